// Forward of a dense layer's 3x3 convolution, BN2 and ReLU in its load, its output straight into
// the feature buffer with its moments:
//
//   y[j, p] = sum_{i, tap} relu(scale[i]*b[p + tap, i] + shift[i]) W[j, i, tap]
//
// where a tap outside the image is 0, not relu(shift). Unit: about 64K values of b. They are
// normalized, rectified and transposed in registers from [pixel, i] to zero-padded planes; a
// register block of up to 12 outputs by 2 vectors of pixels runs over all i and taps. Threads own
// contiguous units. Bytes moved: b once (and the rows around a block of rows), y once.
#include "../parallel.h"
#include "conv3x3_output.h"
#include "instantiate.h"
#include "microkernel.h"
#include "pack.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class T>
struct Convolution {
  const Units& units;
  int64_t width;
  const T* planes;
  const T* weight;  // [width, 9, R] of this group of outputs
  T* out;           // R planes

  template <int R>
  void run(int64_t span) const {
    constexpr int64_t step = kPixelVectors * kVec<T>;
    for (int64_t p = units.base; p < units.base + span; p += step) {
      Block<T, R, kPixelVectors> block;
      const T* w = weight;
      const T* plane = planes + p;
      for (int64_t i = 0; i < width; ++i) {
        DX_UNROLL
        for (int t = 0; t < 9; ++t) block.rank1(w + t * R, 1, plane + units.offset[t]);
        w += 9 * R;
        plane += units.plane_size;
      }
      DX_UNROLL
      for (int r = 0; r < R; ++r) {
        DX_UNROLL
        for (int v = 0; v < kPixelVectors; ++v)
          store(out + r * units.plane_size + p + v * kVec<T>, block.acc[r][v]);
      }
    }
  }

  template <int R = kChannelRows>
  void dispatch(int64_t rows, int64_t span) const {
    if constexpr (R > 0) {
      if (rows == R) return run<R>(span);
      dispatch<R - 1>(rows, span);
    }
  }
};

template <class S>
struct Job {
  using T = Arithmetic<S>;
  const Conv3x3Forward<S>& a;
  const Units& units;
  int64_t pitch;           // of a row of b
  const T *scale, *shift;  // padded tables
  int64_t scale_stride, shift_stride;
  T *planes, *out;  // of one thread

  void load_planes(const Unit& u) const {
    for (int64_t i = 0; i < a.width; ++i) units.clear_outside(u, planes + i * units.plane_size);
    units.for_rows_with_halo(u, [&](int64_t s, int64_t y) {
      const int64_t n = u.sample + s;
      const S* const row = a.bottleneck + (n * units.height + u.row + y) * units.width * pitch;
      for (int64_t v = 0; v < pitch / kVec<T>; ++v) {
        const Vec<T> sc = load(scale + n * scale_stride + v * kVec<T>),
                     sh = load(shift + n * shift_stride + v * kVec<T>);
        T* const plane = planes + v * kVec<T> * units.plane_size + units.position(u, s, y);
        const int64_t channels = std::min<int64_t>(kVec<T>, a.width - v * kVec<T>);
        for (int64_t x = 0; x < units.width; x += kVec<T>) {
          const int64_t valid = std::min<int64_t>(kVec<T>, units.width - x);
          Vec<T> square[kVec<T>];
          DX_UNROLL
          for (int i = 0; i < kVec<T>; ++i) {
            square[i] =
                i < valid ? relu(sc * load(row + (x + i) * pitch + v * kVec<T>) + sh) : Vec<T>{};
          }
          transpose<T>(square);
          DX_UNROLL
          for (int i = 0; i < kVec<T>; ++i) {
            if (i < channels) store_first(plane + i * units.plane_size + x, square[i], valid);
          }
        }
      }
    });
  }
};

}  // namespace

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, pitch = round_up(a.width, kLanes);
  const Units units(samples, a.features.height, a.features.width, a.width, thread_count(samples));
  const int64_t threads = thread_count(units.count);

  // outputs in even groups of at most kChannelRows; weights [group][i][tap][row]
  const int64_t groups = ceil_div(a.growth, kChannelRows);
  const Scratch packed(sizeof(T) * a.growth * a.width * 9);
  parallel_items(groups, kChannelRows * a.width * 9, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = a.growth * g / groups, rows = a.growth * (g + 1) / groups - first;
      copy_transposed(a.weight + first * a.width * 9, a.width * 9, rows, a.width * 9,
                      packed.as<T>() + first * a.width * 9, rows, rows);
    }
  });
  const int64_t scale_rows = a.norm.scale.sample_stride ? samples : 1,
                shift_rows = a.norm.shift.sample_stride ? samples : 1;
  const Scratch scale(sizeof(T) * scale_rows * pitch), shift(sizeof(T) * shift_rows * pitch);
  pad_rows(a.norm.scale.data, a.norm.scale.sample_stride, scale_rows, a.width, scale.as<T>());
  pad_rows(a.norm.shift.data, a.norm.shift.sample_stride, shift_rows, a.width, shift.as<T>());

  const int64_t thread_values = (a.width + a.growth) * units.plane_size;
  const Scratch planes(sizeof(T) * threads * thread_values);
  const Scratch parts(sizeof(double) * 2 * a.growth * samples * units.blocks_per_map);

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const own = planes.as<T>() + thread * thread_values;
    std::fill_n(own, thread_values, T(0));
    const Job<S> job{a,
                     units,
                     pitch,
                     scale.as<T>(),
                     shift.as<T>(),
                     a.norm.scale.sample_stride ? pitch : 0,
                     a.norm.shift.sample_stride ? pitch : 0,
                     own,
                     own + a.width * units.plane_size};
    for (int64_t i = begin; i < end; ++i) {
      const Unit u = units[i];
      job.load_planes(u);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = a.growth * g / groups, rows = a.growth * (g + 1) / groups - first;
        const Convolution<T> convolution{units, a.width, job.planes,
                                         packed.as<T>() + first * a.width * 9,
                                         job.out + first * units.plane_size};
        convolution.dispatch(rows, units.span(u));
      }
      for (int64_t j = 0; j < a.growth; ++j) {
        write_channel(a, units, u, j, job.out + j * units.plane_size, parts.as<double>());
      }
    }
  });
  merge_block_moments(a, units, parts.as<double>());
}

DENSENET_EXT_INSTANTIATE(conv3x3_forward, Conv3x3Forward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
