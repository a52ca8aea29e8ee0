// Computes batch normalization, ReLU and the 3x3 max pool of stride 2 of the stem.
//
//   v = scale*x + shift,  out = max over a window of relu(v)
//
// v grows with sign*x, where sign is that of gamma. So the maximum of v is that at the maximum of
// sign*x, which needs no statistics: one pass over x pools sign*x into out and sums the moments,
// and a second one over the pooled map normalizes it. A sign of 0 stands for gamma = 0, where out
// is relu(shift) whatever x, unless that is infinite or NaN. Threads have rows of windows, then
// planes of out. Bytes moved: x once; out three times, a quarter of x each.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "max_pool.h"
#include "pack.h"
#include "row_moments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class T>
T sign_of(T weight) {
  return weight > 0 ? T(1) : weight < 0 ? T(-1) : T(0) * weight;  // NaN stays NaN
}

template <class V>
DX_INLINE V larger(V a, V b) {
  return exceeds(b, a) ? b : a;
}

// Writes the largest sign*x of each window of a row, [windows, pitch]. `column` [pitch] holds the
// maximum of the column that two neighboring windows share.
template <class S, class T = Arithmetic<S>>
void pool_row(const WindowRow<S>& row, int64_t windows, int64_t pitch, const T* sign, T* column,
              T* out) {
  for (int64_t j = 0; j < windows; ++j) {
    const bool has_left = row.first_column(j) == 0, has_right = row.last_column(j) == 2;
    for (int64_t c = 0; c < pitch; c += kVec<T>, out += kVec<T>) {
      const Vec<T> s = load(sign + c);
      const auto maximum = [&](int k) {
        Vec<T> m = s * row.load(1, j, k, c);
        if (row.first_row() == 0) m = larger(m, s * row.load(0, j, k, c));
        if (row.last_row() == 2) m = larger(m, s * row.load(2, j, k, c));
        return m;
      };
      Vec<T> m = maximum(1);
      if (has_left) m = larger(m, load(column + c));
      if (has_right) {
        const Vec<T> shared = maximum(2);
        store(column + c, shared);
        m = larger(m, shared);
      }
      store(out, m);
    }
  }
}

// Pools all of x without the normalization, and computes the moments if they are needed.
template <class S>
void pool(const StemForward<S>& a, const Arithmetic<S>* sign, int64_t pitch) {
  using T = Arithmetic<S>;
  const int64_t height = a.out.height, width = a.out.width, items = a.out.samples * height,
                threads = thread_count(items), size = (width + 1) * pitch;
  const Scratch memory(sizeof(T) * threads * size);
  const RowMoments moments(threads, pitch);
  parallel(items, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const column = memory.as<T>() + thread * size;
    T* const pooled = column + pitch;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / height, i = item % height;
      pool_row(WindowRow<S>(a.x, n, i), width, pitch, sign, column, pooled);
      copy_transposed(pooled, pitch, width, a.x.channels, a.out.plane(n, 0) + i * width,
                      a.out.plane_stride, width);
      if (a.has_statistics) continue;
      const int64_t pixels = std::min<int64_t>(2, a.x.height - 2 * i) * a.x.width;
      moments[thread].add_rows(a.x.pixel(n, 2 * i * a.x.width), pixels, a.x.channels, a.x.channels);
    }
  });
  if (a.has_statistics) return;
  moments.finish(a.x.channels, a.batch_mean, a.batch_var);
  const auto values = static_cast<T>(a.x.samples * a.x.pixels());
  for (int64_t c = 0; c < a.x.channels; ++c)
    a.batch_var[c] = values > 0 ? a.batch_var[c] / values : T(0);
}

// Computes out from the pooled map.
template <class S>
void normalize(const StemForward<S>& a, const Arithmetic<S>* sign) {
  using T = Arithmetic<S>;
  const int64_t channels = a.out.channels, pixels = a.out.pixels();
  parallel_items(a.out.samples * channels, a.out.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels;
      const ScaleShift<T> norm(a.weight[c], a.bias[c], a.batch_mean[c], a.batch_var[c], a.eps);
      const Vec<T> scale = broadcast(sign[c] * norm.scale), shift = broadcast(norm.shift);
      S* const plane = a.out.plane(n, c);
      for (int64_t p = 0; p < pixels; p += kVec<T>) {
        const int64_t remaining = pixels - p;
        store_first(plane + p, relu(scale * load_first(plane + p, remaining) + shift), remaining);
      }
    }
  });
}

}  // namespace

template <class S>
void stem_forward(const StemForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.x.channels, pitch = round_up(channels, kVec<T>);
  const Scratch signs(sizeof(T) * (pitch + 1));
  T* const sign = signs.as<T>();
  for (int64_t c = 0; c < pitch; ++c) sign[c] = c < channels ? sign_of(a.weight[c]) : T(0);
  pool(a, sign, pitch);
  normalize(a, sign);
}

DENSENET_EXT_INSTANTIATE(stem_forward, StemForward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
