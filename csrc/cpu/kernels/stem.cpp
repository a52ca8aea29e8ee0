// The stem after its convolution: batch normalization, ReLU and the 3x3 max pool of stride 2,
// forward and backward.
//
//   v = scale*x + shift,  out = max over a window of relu(v)
//   dv = dout at the maximum of each window where that is positive,  S1 = sum dv, S2 = sum
//   dv*(x-mean)*rstd dx = gamma*rstd*(dv - S1/M - (x-mean)*rstd*S2/M)
//
// A rectifier cannot change which value of a window is the largest as long as one is positive, and
// where none is there is no gradient: so maxima are sought among v, and backward finds them again
// in x. Threads own whole channels, all samples of one after the other: a channel's maps are still
// in cache when the second pass over them comes (moments, then values; sums and dv, then what
// statistics add). Bytes moved: forward x and out once; backward x, dout and dx once.
#include <array>
#include <cmath>

#include "../parallel.h"
#include "instantiate.h"
#include "moments.h"
#include "norm_backward.h"
#include "windows.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class S, class T>
void channel_statistics(const Maps<const S>& x, int64_t c, T& mean, T& var) {
  double count = 0, all_mean = 0, all_m2 = 0;
  const auto pixels = static_cast<double>(x.pixels());
  for (int64_t n = 0; n < x.samples; ++n) {
    double plane_mean, plane_m2;
    run_moments(x.plane(n, c), x.pixels(), plane_mean, plane_m2);
    merge_moments(count, all_mean, all_m2, pixels, plane_mean, plane_m2);
    count += pixels;
  }
  mean = static_cast<T>(all_mean);
  var = count > 0 ? static_cast<T>(all_m2 / count) : T(0);
}

template <class T>
struct ScaleShift {
  T scale, shift;

  ScaleShift(T weight, T bias, T mean, T var, double eps) {
    const double gain = static_cast<double>(weight) / std::sqrt(static_cast<double>(var) + eps);
    scale = static_cast<T>(gain);
    shift = static_cast<T>(static_cast<double>(bias) - gain * static_cast<double>(mean));
  }
};

template <class S, class T = Arithmetic<S>>
void pool_plane(const Maps<const S>& x, int64_t n, int64_t c, const ScaleShift<T>& norm,
                const WindowRows<T>& rows, const Maps<S>& out) {
  for (int64_t i = 0; i < out.height; ++i) {
    const auto window = rows.read(x.plane(n, c), x.height, x.width, i, norm.scale, norm.shift);
    S* const to = out.plane(n, c) + i * out.width;
    for (int64_t j = 0; j < out.width; j += kVec<T>) {
      Vec<T> maximum = {};  // the rectifier's
      for_window(window, j, [&](Vec<T> v, int) { maximum = exceeds(v, maximum) ? v : maximum; });
      store_first(to + j, maximum, out.width - j);
    }
  }
}

// Where the maximum of each window of a row is, and the gradient that goes there.
template <class T>
struct PickedRow {
  T* place;  // 0 to 8, row by row; kNowhere where no gradient goes on, and beyond the last window
  T* grad;   // 0 beyond the last window
};
constexpr int kNowhere = -1;

template <class T>
DX_INLINE Vec<T> at(const PickedRow<T>& row, int64_t j, int place) {
  const Vec<T> here = load(row.place + j);
  return here == broadcast(static_cast<T>(place)) ? load(row.grad + j) : Vec<T>{};
}

// What backward of one channel needs on one thread.
template <class S>
class StemGradient {
  using T = Arithmetic<S>;

 public:
  static int64_t bytes(int64_t windows) {
    return sizeof(T) * (2 * WindowRows<T>::elements(windows) + 6 * picked_elements(windows));
  }

  StemGradient(const StemBackward<S>& a, T* memory)
      : a_(a),
        values_(memory, a.grad_out.width),
        raw_(memory + WindowRows<T>::elements(a.grad_out.width), a.grad_out.width) {
    memory += 2 * WindowRows<T>::elements(a.grad_out.width);
    const int64_t size = picked_elements(a.grad_out.width);
    for (PickedRow<T>& row : picked_) {
      row = {memory, memory + size};
      std::fill_n(row.place, size, T(kNowhere));
      std::fill_n(row.grad, size, T(0));
      memory += 2 * size;
    }
  }

  // Adds a plane's sums of dv and of dv*(x - mean), and writes gain*dv.
  void plane(int64_t n, int64_t c, const ScaleShift<T>& norm, T gain, double* sums) {
    Vec<T> s1 = {}, s2 = {};
    const int64_t rows = a_.grad_out.height;
    for (int64_t i = 0; i < rows; ++i) {
      pick(n, c, i, norm, s1, s2);
      if (!a_.dx.data) continue;
      if (i > 0) write_odd_row(n, c, i - 1, picked_[(i - 1) & 1], picked_[i & 1], gain);
      write_even_row(n, c, i, gain);
    }
    if (a_.dx.data && 2 * rows - 1 < a_.dx.height)
      write_odd_row(n, c, rows - 1, picked_[(rows - 1) & 1], picked_[2], gain);
    sums[0] += static_cast<double>(sum_lanes<T>(s1));
    sums[1] += static_cast<double>(sum_lanes<T>(s2));
  }

 private:
  static int64_t picked_elements(int64_t windows) { return round_up(windows, kVec<T>) + kVec<T>; }

  void pick(int64_t n, int64_t c, int64_t i, const ScaleShift<T>& norm, Vec<T>& s1, Vec<T>& s2) {
    const S* const x = a_.x.plane(n, c);
    const int64_t windows = a_.grad_out.width;
    const auto values = values_.read(x, a_.x.height, a_.x.width, i, norm.scale, norm.shift);
    const auto raw = raw_.read(x, a_.x.height, a_.x.width, i, T(1), T(0));
    const S* const dout = a_.grad_out.plane(n, c) + i * windows;
    const Vec<T> mean = broadcast(a_.norm.mean[c]);
    for (int64_t j = 0; j < windows; j += kVec<T>) {
      Vec<T> maximum = broadcast(-std::numeric_limits<T>::infinity()), place = maximum, from = {};
      for_window(values, j, [&](Vec<T> v, int k) {
        const SplitRow<T>& row = raw[k / 3];
        const Vec<T> here = load(k % 3 == 1 ? row.even + j : row.odd + j - (k % 3 == 0));
        const auto larger = exceeds(v, maximum);
        maximum = larger ? v : maximum;
        place = larger ? broadcast(static_cast<T>(k)) : place;
        from = larger ? here : from;
      });
      const Vec<T> grad = load_first(dout + j, windows - j), dv = where_positive(maximum, grad);
      s1 += dv;
      s2 += where_positive(maximum, grad * (from - mean));
      const PickedRow<T>& row = picked_[i & 1];
      store(row.place + j, (maximum <= Vec<T>{}) ? broadcast(T(kNowhere)) : place);
      store(row.grad + j, grad);
    }
  }

  void write(int64_t n, int64_t c, int64_t y, int64_t j, Vec<T> even, Vec<T> odd, T gain) {
    S* const to = a_.dx.plane(n, c) + y * a_.dx.width + 2 * j;
    const int64_t left = a_.dx.width - 2 * j;
    Vec<T> first, second;
    interleave<T>(even * broadcast(gain), odd * broadcast(gain), first, second);
    store_first(to, first, left);
    if (left > kVec<T>) store_first(to + kVec<T>, second, left - kVec<T>);
  }

  // Pixels of row 2i are in the middle row of window row i alone.
  void write_even_row(int64_t n, int64_t c, int64_t i, T gain) {
    const PickedRow<T>& row = picked_[i & 1];
    for (int64_t j = 0; j < a_.grad_out.width; j += kVec<T>)
      write(n, c, 2 * i, j, at(row, j, 4), at(row, j, 5) + at(row, j + 1, 3), gain);
  }

  // Those of row 2i+1 in the last row of window row i and in the first of the next.
  void write_odd_row(int64_t n, int64_t c, int64_t i, const PickedRow<T>& above,
                     const PickedRow<T>& below, T gain) {
    for (int64_t j = 0; j < a_.grad_out.width; j += kVec<T>) {
      write(n, c, 2 * i + 1, j, at(above, j, 7) + at(below, j, 1),
            at(above, j, 8) + at(above, j + 1, 6) + at(below, j, 2) + at(below, j + 1, 0), gain);
    }
  }

  const StemBackward<S>& a_;
  WindowRows<T> values_, raw_;
  PickedRow<T> picked_[3];  // of even and odd window rows, and of none
};

// dx += constant + slope*x
template <class S, class T>
void add_affine(const S* x, int64_t count, T constant, T slope, S* dx) {
  const Vec<T> c1 = broadcast(constant), c2 = broadcast(slope);
  for (int64_t p = 0; p < count; p += kVec<T>) {
    const int64_t left = count - p;
    store_first(dx + p, load_first(dx + p, left) + (c1 + c2 * load_first(x + p, left)), left);
  }
}

}  // namespace

template <class S>
void stem_forward(const StemForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.x.channels, threads = thread_count(channels),
                size = WindowRows<T>::elements(a.out.width);
  const Scratch scratch(sizeof(T) * threads * size);
  parallel(channels, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const WindowRows<T> rows(scratch.as<T>() + thread * size, a.out.width);
    for (int64_t c = begin; c < end; ++c) {
      if (!a.use_given) channel_statistics(a.x, c, a.mean[c], a.var[c]);
      const ScaleShift<T> norm(a.weight[c], a.bias[c], a.mean[c], a.var[c], a.eps);
      for (int64_t n = 0; n < a.x.samples; ++n) pool_plane(a.x, n, c, norm, rows, a.out);
    }
  });
}

template <class S>
void stem_backward(const StemBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.x.channels, samples = a.x.samples, pixels = a.x.pixels(),
                threads = thread_count(channels),
                size = StemGradient<S>::bytes(a.grad_out.width) / sizeof(T);
  const Scratch scratch(sizeof(T) * threads * size), sums(sizeof(double) * (2 * channels + 1)),
      coef(sizeof(T) * (3 * channels + 1));
  parallel(channels, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    StemGradient<S> gradient(a, scratch.as<T>() + thread * size);
    for (int64_t c = begin; c < end; ++c) {
      const ScaleShift<T> norm(a.norm.weight[c], a.bias[c], a.norm.mean[c], a.norm.var[c],
                               a.norm.eps);
      double* const sum = sums.as<double>() + 2 * c;
      sum[0] = sum[1] = 0;
      for (int64_t n = 0; n < samples; ++n) gradient.plane(n, c, norm, norm.scale, sum);
      T* const own = coef.as<T>() + 3 * c;
      const Norm<T> one = {a.norm.weight + c, a.norm.mean + c, a.norm.var + c, a.norm.eps,
                           a.norm.training};
      finish_norm_backward(one, sum, 1, static_cast<double>(samples * pixels), PerChannel<T>{},
                           Coefficients<T>{own, 1, 1}, false, a.dnorm_weight + c, a.dnorm_bias + c);
      if (!a.norm.training || !a.dx.data) continue;
      for (int64_t n = 0; n < samples; ++n)
        add_affine(a.x.plane(n, c), pixels, own[1], own[2], a.dx.plane(n, c));
    }
  });
}

DENSENET_EXT_INSTANTIATE(stem_forward, StemForward)
DENSENET_EXT_INSTANTIATE(stem_backward, StemBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
