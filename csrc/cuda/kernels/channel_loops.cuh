// Kernels that walk over channels-last maps share this file: which thread has which channels and
// pixels, loops with several loads in flight, and sums over a block in a fixed order.
//
// `lanes` neighboring threads take groups of V channels side by side, `lines` such lines of threads
// take pixels below each other. A block takes a chunk of lanes * V channels (grid.y) and a range of
// the pixels of one sample (grid.x).
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "packed_access.cuh"

namespace densenet_ext::cuda {

struct ThreadMap {
  int lanes, lines;

  DEVICE int lane() const { return thread_id() % lanes; }
  DEVICE int line() const { return thread_id() / lanes; }  // the thread is idle from `lines` on
};

// The channels of a thread: `valid` of them, from `first` on; valid is 0 for an idle thread.
struct Group {
  int64_t first;
  int valid;
};
template <int V>
DEVICE Group group_of(const ThreadMap& map, int64_t chunk, int64_t channels) {
  const int64_t first = (chunk * map.lanes + map.lane()) * V, remaining = channels - first;
  const bool idle = map.line() >= map.lines || remaining <= 0;
  return {idle ? 0 : first, idle ? 0 : remaining < V ? static_cast<int>(remaining) : V};
}

// Pixels [begin, end) of one sample.
struct PixelRange {
  int64_t sample, begin, end;
};
// The ranges that all samples' pixels are split into, `splits` of each sample.
struct PixelRanges {
  int64_t samples, pixels, splits, length;

  DENSENET_EXT_BOTH int64_t count() const { return samples * splits; }
  // Pixels in a sample's i-th range.
  DENSENET_EXT_BOTH int64_t size(int64_t i) const {
    return i * length + length < pixels ? length : pixels - i * length;
  }
  DENSENET_EXT_BOTH PixelRange operator[](int64_t i) const {
    const int64_t begin = i % splits * length;
    return {i / splits, begin, begin + size(i % splits)};
  }
};

// How channels and pixels are divided among the threads and blocks of a launch.
struct Partition {
  ThreadMap map;
  int threads;
  int64_t chunks;
  PixelRanges ranges;

  Grid grid() const { return {ranges.count(), chunks}; }
  // The ranges of a block whose sums over them another launch has to add.
  int64_t ranges_per_block() const;
};

// Blocks that keep the device busy: whole waves do not matter, the kernels' blocks are short.
inline int64_t wanted_blocks() { return 8 * static_cast<int64_t>(multiprocessors()); }

inline int64_t Partition::ranges_per_block() const {
  const int64_t blocks = ceil_div(wanted_blocks(), std::max<int64_t>(1, chunks));
  return std::max<int64_t>(1, ceil_div(ranges.count(), blocks));
}

// Divides groups of V channels of all pixels. A sample is split where there are too few of them to
// fill the device, into ranges of four pixels a thread at least.
inline Partition partition(int64_t channels, int V, int64_t samples, int64_t pixels) {
  const int64_t groups = ceil_div(channels, V), chunks = ceil_div(groups, kWarp),
                lanes = chunks == 0 ? 1 : ceil_div(groups, chunks),
                lines = std::min(kMaxThreads / lanes, std::max<int64_t>(pixels, 1));
  const int64_t most_splits = std::max<int64_t>(1, pixels / (4 * lines)),
                wanted_splits = ceil_div(wanted_blocks(), std::max<int64_t>(1, samples * chunks)),
                length = ceil_div(pixels, std::min(most_splits, wanted_splits));
  return {{static_cast<int>(lanes), static_cast<int>(lines)},
          static_cast<int>(round_up(lanes * lines, kWarp)),
          chunks,
          {samples, pixels, length == 0 ? 1 : ceil_div(pixels, length), length}};
}

// Calls body(V, partition) with the largest V that these distances allow (packed_access.cuh).
template <class S, int kMaxVector = kVector<S>, class F>
void with_partition(uint64_t distances, int64_t channels, int64_t samples, int64_t pixels,
                    const F& body) {
  with_vector<S, kMaxVector>(distances, [&](auto vector) {
    const Partition p = partition(channels, vector, samples, pixels);
    body(vector, p);
  });
}
// Launches a kernel whose arguments have the map and ranges of a partition.
template <class A>
void launch(const Context& context, void (*kernel)(A), const Partition& p, int64_t shared_bytes,
            A arguments) {
  arguments.map = p.map, arguments.ranges = p.ranges;
  launch(context, kernel, p.grid(), p.threads, shared_bytes, arguments);
}

// Calls body(p, x) for the pixels p of a thread, x[k] its values there of K maps: `source` at the
// sample's first pixel and the thread's first channel. A thread has 128 bytes in flight, in the
// storage type: widened, they would need twice the registers.
template <int V, int K, class S, class F>
DEVICE void for_pixels(const PixelRange& range, const ThreadMap& map, int valid,
                       const S* const (&source)[K], const int64_t (&pitch)[K], const F& body) {
  constexpr int kInFlight = 8 / K;
  if (valid == 0) return;
  for (int64_t p = range.begin + map.line(); p < range.end; p += kInFlight * map.lines) {
    S raw[kInFlight][K][V];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (p + i * map.lines < range.end) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          load_raw<V>(source[k] + (p + i * map.lines) * pitch[k], valid, raw[i][k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (p + i * map.lines >= range.end) break;
      Arithmetic<S> x[K][V];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) x[k][v] = widen(raw[i][k][v]);
      }
      body(p + i * map.lines, x);
    }
  }
}

// Loads scale and shift of the first `valid` of V channels of a sample.
template <int V, class T>
DEVICE void load_scale_shift(const ScaleShiftTable<T>& table, int64_t sample, int64_t channel,
                             int valid, T (&scale)[V], T (&shift)[V]) {
  load_each<V>(table.scale.row(sample) + channel, valid, scale);
  load_each<V>(table.shift.row(sample) + channel, valid, shift);
}

// Sums over the lines of a block; all its threads get the result, which is always added in one
// order. All threads take part. `shared` has room for A values of each thread and may be used again
// afterwards.
template <int A, class T>
DEVICE void sum_lines(T (&sums)[A], T* shared, const ThreadMap& map) {
  const int threads = static_cast<int>(blockDim.x), thread = thread_id(), line = map.line();
#pragma unroll
  for (int a = 0; a < A; ++a) shared[a * threads + thread] = sums[a];
  for (int remaining = map.lines; remaining > 1;) {
    __syncthreads();
    const int half = (remaining + 1) / 2;
    if (line < remaining - half) {
#pragma unroll
      for (int a = 0; a < A; ++a)
        shared[a * threads + thread] = sums[a] += shared[a * threads + thread + half * map.lanes];
    }
    remaining = half;
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

// Kernels of few values, such as [samples, channels], have kMaxThreads threads: 8 neighbors are a
// sector of memory, 32 lines walk down the rows.
DENSENET_EXT_BOTH constexpr ThreadMap narrow_map() { return {8, kMaxThreads / 8}; }
inline int64_t narrow_blocks(int64_t channels) { return ceil_div(channels, narrow_map().lanes); }

}  // namespace densenet_ext::cuda
