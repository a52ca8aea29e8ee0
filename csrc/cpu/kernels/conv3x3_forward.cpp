// Forward of a dense layer's 3x3 convolution, BN2 and ReLU in its load, its output straight into
// the feature buffer with its moments:
//
//   y[j, p] = sum_{i, tap} relu(scale[i]*b[p + tap, i] + shift[i]) W[j, i, tap]
//
// where a tap outside the image is 0, not relu(shift). Unit: about 64K values of b. They are
// normalized, rectified and transposed in registers from [pixel, i] to rows of pixels, two rows at
// a time, and with the two before them become the transformed of winograd.h. For each term a
// register block of up to 12 outputs by 2 vectors of pixels runs over all i and the three columns.
// Threads memory contiguous units. Bytes moved: b once (and the rows around a block of rows), y
// once.
#include "conv3x3_output.h"
#include "cpu/parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "pack.h"
#include "winograd.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class T>
struct Convolution {
  const WinogradPlanes& planes;
  int64_t width;
  const T* transformed;  // [kWinogradPoints, width] planes
  const T* weight;       // [kWinogradPoints, width, 3, R] of this group of outputs
  T* out;                // [R, 2] planes: upper and lower rows

  template <int R>
  void run(int64_t span) const {
    constexpr int64_t step = kPixelVectors * kVec<T>;
    for (int k = 0; k < kWinogradPoints; ++k) {
      for (int64_t p = planes.first(); p < planes.first() + span; p += step)
        add_to_rows(k, product<R>(k, p), out + p);
    }
  }

  template <int R>
  DX_NOINLINE Block<T, R, kPixelVectors> product(int k, int64_t p) const {
    Block<T, R, kPixelVectors> block;
    const T* w = weight + k * width * 3 * R;
    const T* plane = transformed + k * width * planes.plane_size + p;
    for (int64_t i = 0; i < width; ++i) {
      DX_UNROLL
      for (int t = 0; t < 3; ++t) block.rank1(w + t * R, 1, plane + t - 1);
      w += 3 * R;
      plane += planes.plane_size;
    }
    return block;
  }

  // What product k adds to the upper and the lower rows.
  template <int R>
  DX_INLINE void add_to_rows(int k, const Block<T, R, kPixelVectors>& block, T* y) const {
    DX_UNROLL
    for (int r = 0; r < R; ++r) {
      DX_UNROLL
      for (int v = 0; v < kPixelVectors; ++v) {
        T* const upper = y + 2 * r * planes.plane_size + v * kVec<T>;
        T* const lower = upper + planes.plane_size;
        const Vec<T> m = block.acc[r][v];
        if (k == 0) {
          store(upper, m);
        } else if (k == 1) {
          store(upper, load(upper) + m);
          store(lower, m);
        } else if (k == 2) {
          store(upper, load(upper) + m);
          store(lower, load(lower) - m);
        } else {
          store(lower, load(lower) + m);
        }
      }
    }
  }

  // Not inlined: that would compile it for each storage type, which nothing in it depends on.
  template <int R = kBlockChannels>
  DX_NOINLINE void dispatch(int64_t rows, int64_t span) const {
    if constexpr (R > 0) {
      if (rows == R) return run<R>(span);
      dispatch<R - 1>(rows, span);
    }
  }
};

template <class S>
struct Conv3x3ForwardWorker {
  using T = Arithmetic<S>;
  const Conv3x3Forward<S>& a;
  const Units& units;
  const WinogradPlanes& planes;
  int64_t pitch;           // of a row of b
  const T *scale, *shift;  // padded tables
  int64_t scale_stride, shift_stride;
  int64_t row_pitch;  // of a row of h
  // of one thread
  T* rows;         // [2, width] rows of h
  T* transformed;  // [kWinogradPoints, width] planes
  T* out;          // [growth, 2] planes

  void load_transformed(const Unit& u) const {
    for (int64_t s = 0; s < u.samples; ++s) {
      for (int64_t y = -2; y < u.rows; y += 2) {
        for (int64_t first = 0; first < a.width; first += kVec<T>) {
          for (int64_t x = 0; x < units.width; x += kVec<T>) next_rows(u, s, y, first, x);
        }
      }
    }
  }

  // Of kVec channels and columns: the rows y+1 and y+2 take the place of y-1 and y, and all four
  // make the transformed of a pair. What is beyond W is zero, and the column at W stays so.
  DX_INLINE void next_rows(const Unit& u, int64_t s, int64_t y, int64_t first, int64_t x) const {
    const int64_t channels = std::min<int64_t>(kVec<T>, a.width - first);
    const int64_t distance = a.width * planes.plane_size;
    T* const upper = rows + first * row_pitch + x;
    T* const lower = upper + a.width * row_pitch;
    T* const t = transformed + first * planes.plane_size + planes.position(u, s, y / 2) + x;
    Vec<T> square[kVec<T>];
    load_square(u, s, y + 1, first, x, square);
    DX_UNROLL
    for (int i = 0; i < kVec<T>; ++i) {
      if (i >= channels) break;
      T* const row = upper + i * row_pitch;
      if (y >= 0) {
        const Vec<T> d0 = load(row), d1 = load(lower + i * row_pitch), d2 = square[i];
        T* const out = t + i * planes.plane_size;
        store(out, d0 - d2);
        store(out + distance, d1 + d2);
        store(out + 2 * distance, d2 - d1);
      }
      store(row, square[i]);
    }
    load_square(u, s, y + 2, first, x, square);
    DX_UNROLL
    for (int i = 0; i < kVec<T>; ++i) {
      if (i >= channels) break;
      T* const row = lower + i * row_pitch;
      if (y >= 0) store(t + i * planes.plane_size + 3 * distance, square[i] - load(row));
      store(row, square[i]);
    }
  }

  // square[i]: h of channel first + i in row y of the unit's s-th map, from column x on; 0 outside.
  DX_INLINE void load_square(const Unit& u, int64_t s, int64_t y, int64_t first, int64_t x,
                             Vec<T> (&square)[kVec<T>]) const {
    const int64_t n = u.sample + s, row = u.row + y;
    const int64_t valid =
        row < 0 || row >= units.height ? 0 : std::min<int64_t>(kVec<T>, units.width - x);
    const S* const b = a.bottleneck + ((n * units.height + row) * units.width + x) * pitch + first;
    const Vec<T> sc = load(scale + n * scale_stride + first),
                 sh = load(shift + n * shift_stride + first);
    DX_UNROLL
    for (int i = 0; i < kVec<T>; ++i)
      square[i] = i < valid ? relu(sc * load(b + i * pitch) + sh) : Vec<T>{};
    transpose<T>(square);
  }
};

}  // namespace

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, pitch = round_up(a.width, kLanes);
  const Units units(samples, a.features.height, a.features.width, a.width, thread_count(samples));
  const WinogradPlanes planes(units);
  const int64_t threads = thread_count(units.count);

  // outputs in even groups of at most kBlockChannels; weights [group][term][i][column][row]
  const int64_t groups = ceil_div(a.growth, kBlockChannels), columns = a.width * 3;
  const Scratch packed(sizeof(T) * 2 * a.growth * kWinogradPoints * columns);
  T* const weight = packed.as<T>();
  parallel_items(
      groups, kBlockChannels * kWinogradPoints * columns, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
          const int64_t first = a.growth * g / groups, rows = a.growth * (g + 1) / groups - first;
          T* const group = weight + first * kWinogradPoints * columns;
          T* const transformed = group + a.growth * kWinogradPoints * columns;
          transform_weight(a.weight + first * a.width * 9, rows * a.width, transformed, 3,
                           rows * columns);
          for (int64_t k = 0; k < kWinogradPoints; ++k) {
            const int64_t offset = k * rows * columns;
            copy_transposed(transformed + offset, columns, rows, columns, group + offset, rows,
                            rows);
          }
        }
      });
  const int64_t scale_rows = a.scale_shift.scale.sample_stride ? samples : 1,
                shift_rows = a.scale_shift.shift.sample_stride ? samples : 1;
  const Scratch scale(sizeof(T) * scale_rows * pitch), shift(sizeof(T) * shift_rows * pitch);
  pad_rows(a.scale_shift.scale.data, a.scale_shift.scale.sample_stride, scale_rows, a.width,
           scale.as<T>());
  pad_rows(a.scale_shift.shift.data, a.scale_shift.shift.sample_stride, shift_rows, a.width,
           shift.as<T>());

  const int64_t row_pitch = round_up(units.width, kLanes), row_values = 2 * a.width * row_pitch,
                transformed_values = kWinogradPoints * a.width * planes.plane_size,
                thread_values = row_values + transformed_values + 2 * a.growth * planes.plane_size;
  const Scratch work(sizeof(T) * threads * thread_values);
  const Scratch parts(sizeof(double) * 2 * a.growth * samples * units.blocks_per_map);

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const memory = work.as<T>() + thread * thread_values;
    std::fill_n(memory + row_values, transformed_values, T(0));
    const Conv3x3ForwardWorker<S> job{a,
                                      units,
                                      planes,
                                      pitch,
                                      scale.as<T>(),
                                      shift.as<T>(),
                                      a.scale_shift.scale.sample_stride ? pitch : 0,
                                      a.scale_shift.shift.sample_stride ? pitch : 0,
                                      row_pitch,
                                      memory,
                                      memory + row_values,
                                      memory + row_values + transformed_values};
    for (int64_t i = begin; i < end; ++i) {
      const Unit u = units[i];
      job.load_transformed(u);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = a.growth * g / groups, rows = a.growth * (g + 1) / groups - first;
        const Convolution<T> convolution{planes, a.width, job.transformed,
                                         weight + first * kWinogradPoints * columns,
                                         job.out + 2 * first * planes.plane_size};
        convolution.dispatch(rows, planes.span(u));
      }
      for (int64_t j = 0; j < a.growth; ++j) {
        const auto row_of = [&](int64_t s, int64_t y) {
          return job.out + (2 * j + y % 2) * planes.plane_size + planes.position(u, s, y / 2);
        };
        write_channel(a, units, u, j, row_of, parts.as<double>());
      }
    }
  });
  merge_block_moments(a, units, parts.as<double>());
}

DENSENET_EXT_INSTANTIATE(conv3x3_forward, Conv3x3Forward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
