// A second kernel merges the moments of the columns of tiles, which a first one took while it made
// the tiles: mean and centered sum of squares, in the order of the tiles, in two steps where there
// are many.
#pragma once

#include "cuda/launch.cuh"

namespace densenet_ext::cuda {

constexpr int kMergeColumns = 8, kMergeLanes = 64;
constexpr int64_t kMergeTiles = 512;  // of a block at most

template <class T>
struct MergeArguments {
  const T* partial;  // [tiles, 2, width]: mean and centered squares
  int64_t tiles, tile_rows, rows, width;
  int64_t tiles_per_block;
  T *mean, *m2;   // of the first block of grid.y
  int64_t pitch;  // from there to those of the next block
};

// Merges the moments of tiles: kMergeLanes threads a column, each every kMergeLanes-th tile, then
// their sums in pairs.
template <class T>
KERNEL __launch_bounds__(kMergeColumns* kMergeLanes) merge_tiles_kernel(MergeArguments<T> p) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  const int column = thread_id() % kMergeColumns, lane = thread_id() / kMergeColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeColumns + column;
  const int64_t first = blockIdx.y * p.tiles_per_block,
                last = first + p.tiles_per_block < p.tiles ? first + p.tiles_per_block : p.tiles;
  const auto total = [&](const auto& term) {
    double sum = 0;
#pragma unroll 4
    for (int64_t tile = first + lane; c < p.width && tile < last; tile += kMergeLanes) {
      const int64_t rows = p.rows - tile * p.tile_rows;
      const T* const moments = p.partial + tile * 2 * p.width + c;
      sum += term(static_cast<double>(rows < p.tile_rows ? rows : p.tile_rows),
                  static_cast<double>(moments[0]), static_cast<double>(moments[p.width]));
    }
    sums[threadIdx.x] = sum;
    for (int half = kMergeLanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) sums[threadIdx.x] = sum += sums[threadIdx.x + half * kMergeColumns];
    }
    __syncthreads();
    sum = sums[column];
    __syncthreads();
    return sum;
  };
  const int64_t remaining = p.rows - first * p.tile_rows, rows = p.tiles_per_block * p.tile_rows;
  const double count = static_cast<double>(remaining <= 0     ? 1
                                           : remaining < rows ? remaining
                                                              : rows);
  const double center = total([](double n, double mu, double) { return n * mu; }) / count;
  const double spread = total([&](double n, double mu, double square) {
    return square + n * (mu - center) * (mu - center);
  });
  if (lane == 0 && c < p.width) {
    p.mean[blockIdx.y * p.pitch + c] = static_cast<T>(center);
    p.m2[blockIdx.y * p.pitch + c] = static_cast<T>(spread);
  }
}

template <class T>
void launch_merge(const MergeArguments<T>& p, Context& context) {
  launch(context, merge_tiles_kernel<T>,
         {ceil_div(p.width, kMergeColumns), p.tiles > 0 ? ceil_div(p.tiles, p.tiles_per_block) : 1},
         kMergeColumns * kMergeLanes, kMergeColumns * kMergeLanes * sizeof(double), p);
}

// Makes mean and m2 [width] of all rows from the moments of tiles of tile_rows rows.
template <class T>
void merge_tiles(const T* partial, int64_t tiles, int64_t tile_rows, int64_t rows, int64_t width,
                 T* mean, T* m2, Context& context) {
  MergeArguments<T> p = {};
  p.partial = partial, p.tiles = tiles, p.tile_rows = tile_rows, p.rows = rows, p.width = width;
  if (tiles > kMergeTiles) {
    const int64_t blocks = ceil_div(tiles, kMergeTiles);
    T* const merged = context.scratch<T>(blocks * 2 * width);
    p.tiles_per_block = kMergeTiles;
    p.mean = merged, p.m2 = merged + width, p.pitch = 2 * width;
    launch_merge(p, context);
    p.partial = merged, p.tiles = blocks, p.tile_rows *= kMergeTiles;
  }
  p.tiles_per_block = p.tiles, p.mean = mean, p.m2 = m2, p.pitch = 0;
  launch_merge(p, context);
}

}  // namespace densenet_ext::cuda
