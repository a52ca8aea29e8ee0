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
// statistics add). Maxima are found twice in backward, which
// costs less than a map of dv. Bytes moved: forward x and out once; backward x, dout and dx once.
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

// Adds a plane's sums of dv and of dv*(x - mean).
template <class S, class T = Arithmetic<S>>
void add_plane_sums(const StemBackward<S>& a, int64_t n, int64_t c, const ScaleShift<T>& norm,
                    const WindowRows<T>& values, const WindowRows<T>& inputs, double* sums) {
  const S* const x = a.x.plane(n, c);
  const int64_t windows = a.grad_out.width;
  const Vec<T> mean = broadcast(a.norm.mean[c]);
  Vec<T> s1 = {}, s2 = {};
  for (int64_t i = 0; i < a.grad_out.height; ++i) {
    const auto value = values.read(x, a.x.height, a.x.width, i, norm.scale, norm.shift);
    const auto input = inputs.read(x, a.x.height, a.x.width, i, T(1), T(0));
    const S* const dout = a.grad_out.plane(n, c) + i * windows;
    for (int64_t j = 0; j < windows; j += kVec<T>) {
      Vec<T> maximum = {}, from = {};
      for_window(value, j, [&](Vec<T> v, int place) {
        const auto larger = exceeds(v, maximum);
        maximum = larger ? v : maximum;
        from = larger ? load_place(input, j, place) : from;
      });
      const Vec<T> dv = where_positive(maximum, load_first(dout + j, windows - j));
      s1 += dv;
      s2 += dv * (from - mean);
    }
  }
  sums[0] += static_cast<double>(sum_lanes<T>(s1));
  sums[1] += static_cast<double>(sum_lanes<T>(s2));
}

// Where the maximum of each window of a row is, and the gradient that goes there.
template <class T>
struct PickedRow {
  T* place;  // 0 to 8, row by row; kNowhere where none is positive, and beyond the last window
  T* grad;   // 0 beyond the last window
};
constexpr int kNowhere = -1;

template <class T>
DX_INLINE Vec<T> gradient_at(const PickedRow<T>& row, int64_t j, int place) {
  const Vec<T> here = load(row.place + j);
  return here == broadcast(static_cast<T>(place)) ? load(row.grad + j) : Vec<T>{};
}

// Writes dx, plane by plane.
template <class S>
class GradientWriter {
  using T = Arithmetic<S>;

 public:
  static int64_t elements(int64_t windows) { return 6 * row_elements(windows); }

  GradientWriter(const StemBackward<S>& a, const WindowRows<T>& values, T* memory)
      : a_(a), values_(values) {
    const int64_t size = row_elements(a.grad_out.width);
    for (PickedRow<T>& row : picked_) {
      row = {memory, memory + size};
      std::fill_n(row.place, size, T(kNowhere));
      std::fill_n(row.grad, size, T(0));
      memory += 2 * size;
    }
  }

  // dx = gain*dv + constant + slope*x
  void write_plane(int64_t n, int64_t c, const ScaleShift<T>& norm, T gain, T constant, T slope) {
    const Affine affine = {broadcast(gain), broadcast(constant), broadcast(slope)};
    const int64_t rows = a_.grad_out.height;
    for (int64_t i = 0; i < rows; ++i) {
      pick(n, c, i, norm);
      if (i > 0) write_odd_row(n, c, i - 1, picked_[(i - 1) & 1], picked_[i & 1], affine);
      write_even_row(n, c, i, affine);
    }
    if (2 * rows - 1 < a_.dx.height)
      write_odd_row(n, c, rows - 1, picked_[(rows - 1) & 1], picked_[2], affine);
  }

 private:
  static int64_t row_elements(int64_t windows) { return round_up(windows, kVec<T>) + kVec<T>; }

  void pick(int64_t n, int64_t c, int64_t i, const ScaleShift<T>& norm) {
    const int64_t windows = a_.grad_out.width;
    const auto value =
        values_.read(a_.x.plane(n, c), a_.x.height, a_.x.width, i, norm.scale, norm.shift);
    const S* const dout = a_.grad_out.plane(n, c) + i * windows;
    const PickedRow<T>& row = picked_[i & 1];
    for (int64_t j = 0; j < windows; j += kVec<T>) {
      Vec<T> maximum = {}, place = broadcast(T(kNowhere));
      for_window(value, j, [&](Vec<T> v, int k) {
        const auto larger = exceeds(v, maximum);
        maximum = larger ? v : maximum;
        place = larger ? broadcast(static_cast<T>(k)) : place;
      });
      store(row.place + j, place);
      store(row.grad + j, load_first(dout + j, windows - j));
    }
  }

  struct Affine {
    Vec<T> gain, constant, slope;
  };

  void write(int64_t n, int64_t c, int64_t y, int64_t j, Vec<T> even, Vec<T> odd,
             const Affine& affine) {
    const S* const x = a_.x.plane(n, c) + y * a_.x.width + 2 * j;
    S* const to = a_.dx.plane(n, c) + y * a_.dx.width + 2 * j;
    Vec<T> dv[2];
    interleave<T>(even, odd, dv[0], dv[1]);
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t left = a_.dx.width - 2 * j - i * kVec<T>;
      if (left <= 0) return;
      // without statistics of the batch, dx has to do with x's neighbourhood alone, even if x is
      // NaN
      const Vec<T> rest = a_.norm.training
                              ? affine.constant + affine.slope * load_first(x + i * kVec<T>, left)
                              : Vec<T>{};
      store_first(to + i * kVec<T>, affine.gain * dv[i] + rest, left);
    }
  }

  // Pixels of row 2i are in the middle row of window row i alone.
  void write_even_row(int64_t n, int64_t c, int64_t i, const Affine& affine) {
    const PickedRow<T>& row = picked_[i & 1];
    for (int64_t j = 0; j < a_.grad_out.width; j += kVec<T>)
      write(n, c, 2 * i, j, gradient_at(row, j, 4),
            gradient_at(row, j, 5) + gradient_at(row, j + 1, 3), affine);
  }

  // Those of row 2i+1 in the last row of window row i and in the first of the next.
  void write_odd_row(int64_t n, int64_t c, int64_t i, const PickedRow<T>& above,
                     const PickedRow<T>& below, const Affine& affine) {
    for (int64_t j = 0; j < a_.grad_out.width; j += kVec<T>) {
      write(n, c, 2 * i + 1, j, gradient_at(above, j, 7) + gradient_at(below, j, 1),
            gradient_at(above, j, 8) + gradient_at(above, j + 1, 6) + gradient_at(below, j, 2) +
                gradient_at(below, j + 1, 0),
            affine);
    }
  }

  const StemBackward<S>& a_;
  const WindowRows<T>& values_;
  PickedRow<T> picked_[3];  // of even and odd window rows, and of none
};

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
                threads = thread_count(channels), lines = WindowRows<T>::elements(a.grad_out.width),
                size = 2 * lines + GradientWriter<S>::elements(a.grad_out.width);
  const Scratch scratch(sizeof(T) * threads * size), sums(sizeof(double) * (2 * channels + 1)),
      coef(sizeof(T) * (3 * channels + 1));
  parallel(channels, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const memory = scratch.as<T>() + thread * size;
    const WindowRows<T> values(memory, a.grad_out.width), inputs(memory + lines, a.grad_out.width);
    GradientWriter<S> writer(a, values, memory + 2 * lines);
    for (int64_t c = begin; c < end; ++c) {
      const ScaleShift<T> norm(a.norm.weight[c], a.bias[c], a.norm.mean[c], a.norm.var[c],
                               a.norm.eps);
      double* const sum = sums.as<double>() + 2 * c;
      sum[0] = sum[1] = 0;
      for (int64_t n = 0; n < samples; ++n) add_plane_sums(a, n, c, norm, values, inputs, sum);
      T* const own = coef.as<T>() + 3 * c;
      const Norm<T> one = {a.norm.weight + c, a.norm.mean + c, a.norm.var + c, a.norm.eps,
                           a.norm.training};
      finish_norm_backward(one, sum, 1, static_cast<double>(samples * pixels), PerChannel<T>{},
                           Coefficients<T>{own, 1, 1}, false, a.dnorm_weight + c, a.dnorm_bias + c);
      if (!a.dx.data) continue;
      for (int64_t n = 0; n < samples; ++n)
        writer.write_plane(n, c, norm, norm.scale, own[1], own[2]);
    }
  });
}

DENSENET_EXT_INSTANTIATE(stem_forward, StemForward)
DENSENET_EXT_INSTANTIATE(stem_backward, StemBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
