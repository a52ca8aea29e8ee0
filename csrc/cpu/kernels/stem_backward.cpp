// Computes the backward of batch normalization, ReLU and the 3x3 max pool of stride 2 of the stem.
//
//   dv = dout at the maximum of each window where that is positive
//   S1 = sum dv,  S2 = sum dv*(x-mean)*rstd
//   dx = gamma*rstd*(dv - S1/M - (x-mean)*rstd*S2/M)
//
// A rectifier does not change which value of a window is the largest as long as one is positive,
// and if none is, there is no gradient: so maxima are sought among v = scale*x + shift. The first
// pass finds them, sums dv and notes the place of each maximum in a byte; the second one gathers
// the gradients that come to each pixel. Threads have rows of windows, and the two rows of dx that
// start at their middles. Bytes moved: x and dout twice, dx once, and a sixteenth of x (of float32)
// for the places twice.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "max_pool.h"
#include "norm_backward.h"
#include "pack.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

// The places of a window are counted row by row from 0 to 8; kNoPlace: none is positive.
constexpr int kNoPlace = -1;
template <class T>
using Places = decltype(Vec<T>{} < Vec<T>{});  // integers of the width of T

// Integers<T, I> is a vector of I's, one for each lane of a Vec<T>. Compilers have instructions for
// a conversion to integers that are twice or half as wide; a conversion from bytes to T's width at
// once goes lane by lane.
template <class T, class I>
struct IntegersOf {
  typedef I type __attribute__((vector_size(sizeof(I) * kVec<T>)));
};
template <class T, class I>
using Integers = typename IntegersOf<T, I>::type;

template <class T>
DX_INLINE Places<T> load_places(const int8_t* p) {
  Integers<T, int8_t> bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const auto halves = __builtin_convertvector(bytes, Integers<T, int16_t>);
  return __builtin_convertvector(__builtin_convertvector(halves, Integers<T, int32_t>), Places<T>);
}
template <class T>
DX_INLINE void store_places(int8_t* p, Places<T> places) {
  const auto words = __builtin_convertvector(places, Integers<T, int32_t>);
  const auto halves = __builtin_convertvector(words, Integers<T, int16_t>);
  const auto bytes = __builtin_convertvector(halves, Integers<T, int8_t>);
  std::memcpy(p, &bytes, sizeof bytes);
}

// Holds values of each channel, zero up to the pitch.
template <class T>
struct ChannelValues {
  T *scale, *shift, *mean, *constant, *slope;

  ChannelValues(T* memory, int64_t pitch) {
    std::fill_n(memory, 5 * pitch, T(0));
    for (T** values : {&scale, &shift, &mean, &constant, &slope}) {
      *values = memory;
      memory += pitch;
    }
  }
};

// Holds the running maximum of one window.
template <class T>
struct Maximum {
  Vec<T> value = {}, x = {};  // the rectifier's 0
  Places<T> place = Places<T>{} + kNoPlace;

  DX_INLINE void take(Vec<T> v, Vec<T> x_of_v, int place_of_v) {
    const auto larger = exceeds(v, value);
    value = larger ? v : value;
    x = larger ? x_of_v : x;
    place = larger ? Places<T>{} + place_of_v : place;
  }
};

template <class S>
class StemGradient {
  using T = Arithmetic<S>;

 public:
  StemGradient(const StemBackward<S>& a, const ChannelValues<T>& values, int64_t pitch,
               int8_t* places)
      : a_(a), values_(values), pitch_(pitch), places_(places) {}

  // Counts the elements of a line of gradients: one for each window, and zeros for a next window.
  int64_t line() const { return (a_.grad_out.width + 1) * pitch_; }

  // Reads dout of the windows (i, 0), (i, 1), ... of sample n; zeros if there is no such row.
  void read_line(int64_t n, int64_t i, T* line) const {
    const auto& dout = a_.grad_out;
    if (i < dout.height) {
      copy_transposed(dout.plane(n, 0) + i * dout.width, dout.plane_stride, dout.channels,
                      dout.width, line, pitch_, pitch_);
      line += dout.width * pitch_;
      std::fill_n(line, pitch_, T(0));
    } else {
      std::fill_n(line, this->line(), T(0));
    }
  }

  // Notes the places of a row's maxima, if dx is wanted, and adds dv and dv*(x - mean) to the sums.
  void add_row(int64_t n, int64_t i, const T* dout, T* sums) const {
    const WindowRow<S> row(a_.x, n, i);
    int8_t* place = places_ ? places_of(n, i) : nullptr;
    for (int64_t j = 0; j < a_.grad_out.width; ++j) {
      for (int64_t c = 0; c < pitch_; c += kVec<T>, dout += kVec<T>) {
        const Maximum<T> maximum = find(row, j, c);
        const Vec<T> dv = relu_gradient(maximum.value, load(dout));
        store(sums + c, load(sums + c) + dv);
        store(sums + pitch_ + c,
              load(sums + pitch_ + c) + dv * (maximum.x - load(values_.mean + c)));
        if (place) store_places<T>(place, maximum.place), place += kVec<T>;
      }
    }
  }

  // Writes rows 2i and 2i+1 of dx from the lines of window rows i and i+1.
  void write_rows(int64_t n, int64_t i, const T* upper_line, const T* lower_line) const {
    const bool odd_row = 2 * i + 1 < a_.dx.height;
    const int8_t* const upper_places = places_of(n, i);
    const int8_t* const lower_places = places_of(n, i + 1 < a_.grad_out.height ? i + 1 : i);
    for (int64_t j = 0; j < a_.grad_out.width; ++j) {
      const bool odd_column = 2 * j + 1 < a_.dx.width;
      const int64_t p = 2 * i * a_.dx.width + 2 * j;
      for (int64_t c = 0; c < pitch_; c += kVec<T>) {
        const int64_t o = j * pitch_ + c;
        const Picked upper{upper_places, upper_line, o},
            right{upper_places, upper_line, o + pitch_}, lower{lower_places, lower_line, o},
            corner{lower_places, lower_line, o + pitch_};
        write(n, p, c, upper.grad_at(4));
        if (odd_column) write(n, p + 1, c, upper.grad_at(5) + right.grad_at(3));
        if (!odd_row) continue;
        write(n, p + a_.dx.width, c, upper.grad_at(7) + lower.grad_at(1));
        if (odd_column)
          write(n, p + a_.dx.width + 1, c,
                upper.grad_at(8) + right.grad_at(6) + lower.grad_at(2) + corner.grad_at(0));
      }
    }
  }

 private:
  // Loads the gradients of some channels of a window, and the places that they go to.
  struct Picked {
    Places<T> place;
    Vec<T> grad;

    DX_INLINE Picked(const int8_t* places, const T* grads, int64_t o)
        : place(load_places<T>(places + o)), grad(load(grads + o)) {}
    DX_INLINE Vec<T> grad_at(int wanted) const { return place == wanted ? grad : Vec<T>{}; }
  };

  int8_t* places_of(int64_t n, int64_t i) const {
    return places_ + (n * a_.grad_out.height + i) * a_.grad_out.width * pitch_;
  }

  DX_INLINE Maximum<T> find(const WindowRow<S>& row, int64_t j, int64_t c) const {
    const Vec<T> scale = load(values_.scale + c), shift = load(values_.shift + c);
    Maximum<T> maximum;
    const auto take = [&](int r, int k) {
      const Vec<T> x = row.load(r, j, k, c);
      maximum.take(scale * x + shift, x, 3 * r + k);
    };
    if (row.is_inside(j)) {
      DX_UNROLL
      for (int place = 0; place < 9; ++place) take(place / 3, place % 3);
    } else {
      for (int r = row.first_row(); r <= row.last_row(); ++r) {
        for (int k = row.first_column(j); k <= row.last_column(j); ++k) take(r, k);
      }
    }
    return maximum;
  }

  DX_INLINE void write(int64_t n, int64_t p, int64_t c, Vec<T> dv) const {
    const int64_t remaining = a_.dx.channels - c;
    Vec<T> value = load(values_.scale + c) * dv;
    // Without statistics of the batch, dx depends on the windows around x alone, even if x is NaN.
    if (a_.norm.training)
      value += load(values_.constant + c) +
               load(values_.slope + c) * load_first(a_.x.pixel(n, p) + c, remaining);
    store_first(a_.dx.pixel(n, p) + c, value, remaining);
  }

  const StemBackward<S>& a_;
  const ChannelValues<T>& values_;
  int64_t pitch_;
  int8_t* places_;  // [samples, window rows, windows, pitch]
};

// Writes `sums` [channels, 2] over all windows: sum dv and sum dv*(x - mean).
template <class S>
void sum_gradients(const StemBackward<S>& a, const StemGradient<S>& gradient, int64_t pitch,
                   double* sums) {
  using T = Arithmetic<S>;
  const int64_t height = a.grad_out.height, items = a.grad_out.samples * height,
                threads = thread_count(items), size = gradient.line() + 2 * pitch;
  const Scratch memory(sizeof(T) * threads * size), partial(sizeof(double) * threads * 2 * pitch);
  std::fill_n(partial.as<double>(), threads * 2 * pitch, 0.0);
  parallel(items, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const line = memory.as<T>() + thread * size;
    T* const row_sums = line + gradient.line();
    double* const thread_sums = partial.as<double>() + thread * 2 * pitch;
    for (int64_t i = begin; i < end; ++i) {
      gradient.read_line(i / height, i % height, line);
      std::fill_n(row_sums, 2 * pitch, T(0));
      gradient.add_row(i / height, i % height, line, row_sums);
      for (int64_t j = 0; j < 2 * pitch; ++j) thread_sums[j] += static_cast<double>(row_sums[j]);
    }
  });
  add_partials(partial.as<double>(), threads, 2 * pitch, 2 * pitch);
  for (int64_t c = 0; c < a.x.channels; ++c) {
    sums[2 * c] = partial.as<double>()[c];
    sums[2 * c + 1] = partial.as<double>()[pitch + c];
  }
}

template <class S>
void write_gradients(const StemBackward<S>& a, const StemGradient<S>& gradient) {
  using T = Arithmetic<S>;
  const int64_t height = a.grad_out.height, items = a.grad_out.samples * height,
                threads = thread_count(items), line = gradient.line();
  const Scratch memory(sizeof(T) * threads * 2 * line);
  parallel(items, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* upper_line = memory.as<T>() + thread * 2 * line;
    T* lower_line = upper_line + line;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / height, i = item % height;
      if (item == begin || i == 0) gradient.read_line(n, i, upper_line);
      gradient.read_line(n, i + 1, lower_line);
      gradient.write_rows(n, i, upper_line, lower_line);
      std::swap(upper_line, lower_line);
    }
  });
}

}  // namespace

template <class S>
void stem_backward(const StemBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.x.channels, pitch = round_up(channels, kVec<T>),
                windows = a.grad_out.samples * a.grad_out.pixels();
  const Scratch memory(sizeof(T) * (5 * pitch + 1)), all_sums(sizeof(double) * (2 * channels + 1)),
      coefficients(sizeof(T) * (3 * channels + 1));
  const ChannelValues<T> values(memory.as<T>(), pitch);
  for (int64_t c = 0; c < channels; ++c) {
    const ScaleShift<T> folded(a.norm.weight[c], a.bias[c], a.norm.mean[c], a.norm.var[c],
                               a.norm.eps);
    values.scale[c] = folded.scale, values.shift[c] = folded.shift, values.mean[c] = a.norm.mean[c];
  }
  // The last column of a row reads one window further, for gradients that are 0.
  const Scratch bytes(a.dx.data ? (windows + 1) * pitch : 1);
  int8_t* const places = a.dx.data ? bytes.as<int8_t>() : nullptr;
  if (places) std::fill_n(places + windows * pitch, pitch, int8_t(kNoPlace));

  const StemGradient<S> gradient(a, values, pitch, places);
  double* const sums = all_sums.as<double>();
  sum_gradients(a, gradient, pitch, sums);
  const Coefficients<T> coef = {coefficients.as<T>(), 1, channels};
  finish_norm_backward(a.norm, sums, channels, static_cast<double>(a.x.samples * a.x.pixels()),
                       PerChannel<T>{}, coef, false, a.dnorm_weight, a.dnorm_bias);
  if (!places) return;
  for (int64_t c = 0; c < channels; ++c)
    values.constant[c] = coef.at(1, 0, c), values.slope[c] = coef.at(2, 0, c);
  write_gradients(a, gradient);
}

DENSENET_EXT_INSTANTIATE(stem_backward, StemBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
