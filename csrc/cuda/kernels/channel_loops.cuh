// What the kernels that walk over channels-last maps share: which thread has which channels and
// pixels, loops with several loads on their way, and sums over a block in a fixed order.
//
// `lanes` neighboring threads take groups of V channels side by side, `rows` such lines of threads
// take pixels below each other. Blocks take chunks of lanes*V channels (grid.y) and items, runs of
// pixels of one sample (grid.x).
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "packed_access.cuh"

namespace densenet_ext::cuda {

constexpr int kMaxThreads = 256;  // of a block at most

struct ThreadMap {
  int lanes, rows;

  DEVICE int lane() const { return static_cast<int>(threadIdx.x) % lanes; }
  DEVICE int row() const { return static_cast<int>(threadIdx.x) / lanes; }  // idle from `rows` on
};

// The channels of a thread, `valid` of them, from `first` on; valid is 0 for an idle thread.
struct Group {
  int64_t first;
  int valid;
};
template <int V>
DEVICE Group group_of(const ThreadMap& map, int64_t chunk, int64_t channels) {
  const int64_t first = (chunk * map.lanes + map.lane()) * V, left = channels - first;
  const bool idle = map.row() >= map.rows || left <= 0;
  return {idle ? 0 : first, idle ? 0 : left < V ? static_cast<int>(left) : V};
}

// Pixels [begin, end) of one sample.
struct Run {
  int64_t sample, begin, end;
};
struct Items {
  int64_t samples, pixels, splits, length;

  DENSENET_EXT_BOTH int64_t count() const { return samples * splits; }
  // Pixels of a sample's i-th run.
  DENSENET_EXT_BOTH int64_t size(int64_t i) const {
    return i * length + length < pixels ? length : pixels - i * length;
  }
  DENSENET_EXT_BOTH Run operator[](int64_t i) const {
    const int64_t begin = i % splits * length;
    return {i / splits, begin, begin + size(i % splits)};
  }
};

struct Plan {
  ThreadMap map;
  int threads;
  int64_t chunks;
  Items items;

  Grid grid() const { return {items.count(), chunks}; }
  // Items of a block, where a block leaves sums that have to be added.
  int64_t each() const;
};

// Blocks that keep the device busy: whole waves do not matter, the kernels' blocks are short.
inline int64_t wanted_blocks() { return 8 * static_cast<int64_t>(multiprocessors()); }

inline int64_t Plan::each() const {
  const int64_t most = ceil_div(wanted_blocks(), std::max<int64_t>(1, chunks));
  return std::max<int64_t>(1, ceil_div(items.count(), most));
}

// The threads and blocks for groups of V channels of all pixels. A sample is cut where there are
// too few of them to fill the device, into runs of four pixels a thread at least.
inline Plan plan(int64_t channels, int V, int64_t samples, int64_t pixels) {
  const int64_t groups = ceil_div(channels, V), chunks = ceil_div(groups, kWarp),
                lanes = chunks == 0 ? 1 : ceil_div(groups, chunks),
                rows = std::min(kMaxThreads / lanes, std::max<int64_t>(pixels, 1));
  const int64_t most = std::max<int64_t>(1, pixels / (4 * rows)),
                few = ceil_div(wanted_blocks(), std::max<int64_t>(1, samples * chunks)),
                length = ceil_div(pixels, std::min(most, few));
  return {{static_cast<int>(lanes), static_cast<int>(rows)},
          static_cast<int>(round_up(lanes * rows, kWarp)),
          chunks,
          {samples, pixels, length == 0 ? 1 : ceil_div(pixels, length), length}};
}

// Calls body(p, x) for the pixels p of a thread, x[k] its values there of K maps: `from` at the
// sample's first pixel and the thread's first channel. 128 bytes are on their way to a thread at a
// time, as they come from memory: widened, they would need twice the registers.
template <int V, int K, class S, class F>
DEVICE void for_pixels(const Run& run, const ThreadMap& map, int valid, const S* const (&from)[K],
                       const int64_t (&pitch)[K], const F& body) {
  constexpr int kAhead = 8 / K;
  if (valid == 0) return;
  for (int64_t p = run.begin + map.row(); p < run.end; p += kAhead * map.rows) {
    S raw[kAhead][K][V];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (p + i * map.rows < run.end) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          load_raw<V>(from[k] + (p + i * map.rows) * pitch[k], valid, raw[i][k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (p + i * map.rows >= run.end) break;
      Arithmetic<S> x[K][V];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) x[k][v] = widen(raw[i][k][v]);
      }
      body(p + i * map.rows, x);
    }
  }
}

// Sums over the rows of a block, for all its threads to have; always in the same order. All threads
// take part. `shared` has room for A values of each thread and may be used again afterwards.
template <int A, class T>
DEVICE void sum_rows(T (&sums)[A], T* shared, const ThreadMap& map) {
  const int threads = static_cast<int>(blockDim.x), self = static_cast<int>(threadIdx.x),
            row = map.row();
#pragma unroll
  for (int a = 0; a < A; ++a) shared[a * threads + self] = sums[a];
  for (int left = map.rows; left > 1;) {
    __syncthreads();
    const int half = (left + 1) / 2;
    if (row < left - half) {
#pragma unroll
      for (int a = 0; a < A; ++a)
        shared[a * threads + self] = sums[a] += shared[a * threads + self + half * map.lanes];
    }
    left = half;
  }
  __syncthreads();
#pragma unroll
  for (int a = 0; a < A; ++a) sums[a] = shared[a * threads + map.lane()];
  __syncthreads();
}

// Offset of pixel p in maps of any strides.
template <class E>
DEVICE int64_t pixel_offset(const StridedMaps<E>& m, int64_t n, int64_t p) {
  if (m.stride_h == m.width * m.stride_w) return n * m.stride_n + p * m.stride_w;
  return n * m.stride_n + p / m.width * m.stride_h + p % m.width * m.stride_w;
}

// Kernels of few values, such as [samples, channels]: 8 neighbors are a sector of memory, 32 lines
// walk down the rows.
DENSENET_EXT_BOTH constexpr ThreadMap narrow_map() { return {8, 32}; }
inline int64_t narrow_blocks(int64_t channels) { return ceil_div(channels, narrow_map().lanes); }

}  // namespace densenet_ext::cuda
