// Mean and centered sum of squares of channels that were just written:
//
//   mean[n, c] = (1/P) sum_p x[n, p, c],   m2[n, c] = sum_p (x[n, p, c] - mean[n, c])^2
//
// A thread takes some pixels of V channels at a time: their own mean and squares around it, from
// registers, then Chan's merge into what it has; the threads of a block, and the blocks of a
// sample, are merged by  m2 = sum_i m2_i + count_i (mean_i - mean)^2.  So nothing cancels, and the
// channels are read once. Bytes moved: k*e a pixel. Where a sample is cut, its partial moments go
// to scratch memory, and a second kernel merges them in order.
#include "channel_loops.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
struct Args {
  using T = Arithmetic<S>;
  const S* data;  // at the first channel
  int64_t pitch, channels;
  Items items;
  ThreadMap map;
  T* mean;  // [items, channels], rows `out_pitch` apart
  T* m2;
  int64_t out_pitch;
};

// Joins each thread's moments of `count` pixels into those of all `total` pixels of the block.
template <int V, class T>
DEVICE void merge_rows(T (&mean)[V], T (&m2)[V], T count, T total, T* shared,
                       const ThreadMap& map) {
  T joined[V];
#pragma unroll
  for (int v = 0; v < V; ++v) joined[v] = count * mean[v];
  sum_rows(joined, shared, map);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    joined[v] = total > T(0) ? joined[v] / total : T(0);
    m2[v] += count * (mean[v] - joined[v]) * (mean[v] - joined[v]);
    mean[v] = joined[v];
  }
  sum_rows(m2, shared, map);
}

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 3) moments_kernel(Args<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  constexpr int kAhead = sizeof(T) == 8 ? 4 : 8;  // what the registers have room for
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.channels);
  const S* const from = a.data + run.sample * a.items.pixels * a.pitch + group.first;

  T mean[V] = {}, m2[V] = {};
  int64_t count = 0;
  if (group.valid > 0) {
    for (int64_t p = run.begin + a.map.row(); p < run.end; p += kAhead * a.map.rows) {
      T x[kAhead][V] = {};
      int loaded = 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (p + i * a.map.rows < run.end) {
          load_first<V>(from + (p + i * a.map.rows) * a.pitch, group.valid, x[i]);
          loaded = i + 1;
        }
      }
      const T each = T(1) / T(loaded), share = T(loaded) / T(count + loaded), before = T(count);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) sum += x[i][v];
        const T center = sum * each, off = center - mean[v];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const T d = i < loaded ? x[i][v] - center : T(0);
          squares += d * d;
        }
        mean[v] += off * share;
        m2[v] += squares + off * off * before * share;
      }
      count += loaded;
    }
  }
  merge_rows(mean, m2, T(count), T(run.end - run.begin), reinterpret_cast<T*>(memory), a.map);
  if (a.map.row() != 0) return;
  const int64_t to = static_cast<int64_t>(blockIdx.x) * a.out_pitch + group.first;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v < group.valid) a.mean[to + v] = mean[v], a.m2[to + v] = m2[v];
  }
}

template <class T>
struct MergeArgs {
  const T* mean;  // [items, channels]
  const T* m2;
  int64_t channels;
  Items items;
  T* mean_out;  // [samples, channels], rows `out_pitch` apart
  T* m2_out;
  int64_t out_pitch;
};

template <class T>
KERNEL __launch_bounds__(kMaxThreads) merge_moments_kernel(MergeArgs<T> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(memory);
  const int64_t n = blockIdx.x;
  const ThreadMap map = narrow_map();
  const Group group = group_of<1>(map, blockIdx.y, a.channels);
  T mean[1] = {}, m2[1] = {};
  int64_t count = 0;
  if (group.valid > 0) {
    for (int64_t i = map.row(); i < a.items.splits; i += map.rows) {
      const int64_t at = (n * a.items.splits + i) * a.channels + group.first;
      const int64_t size = a.items.size(i);
      const T share = T(size) / T(count + size), off = a.mean[at] - mean[0];
      mean[0] += off * share;
      m2[0] += a.m2[at] + off * off * T(count) * share;
      count += size;
    }
  }
  merge_rows(mean, m2, T(count), T(a.items.pixels), reinterpret_cast<T*>(memory), map);
  if (map.row() != 0 || group.valid == 0) return;
  a.mean_out[n * a.out_pitch + group.first] = mean[0];
  a.m2_out[n * a.out_pitch + group.first] = m2[0];
}

}  // namespace

template <class S>
void slice_moments(const Maps<const S>& features, int64_t offset, int64_t channels,
                   const Moments<Arithmetic<S>>& moments, Context& context) {
  using T = Arithmetic<S>;
  if (!moments.mean || channels == 0) return;
  with_vector<S, kFew<S>>(spacing(features, offset), [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Plan p = plan(channels, V, features.samples, features.pixels());
    T* const mean = moments.mean + offset;
    T* const m2 = moments.m2 + offset;
    Args<S> a = {features.data + offset, features.pitch, channels, p.items, p.map, mean, m2,
                 moments.channels};
    const bool cut = p.items.splits > 1;
    if (cut) {
      a.mean = context.scratch<T>(p.items.count() * channels);
      a.m2 = context.scratch<T>(p.items.count() * channels);
      a.out_pitch = channels;
    }
    launch(context, moments_kernel<S, V>, p.grid(), p.threads, V * p.threads * sizeof(T), a);
    if (cut) {
      launch(context, merge_moments_kernel<T>, {features.samples, narrow_blocks(channels)},
             kMaxThreads, kMaxThreads * sizeof(T),
             MergeArgs<T>{a.mean, a.m2, channels, p.items, mean, m2, moments.channels});
    }
  });
}

#define INSTANTIATE(S)                                                   \
  template void slice_moments<S>(const Maps<const S>&, int64_t, int64_t, \
                                 const Moments<Arithmetic<S>>&, Context&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace densenet_ext::cuda
