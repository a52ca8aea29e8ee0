// Computes a dense layer's 3x3 convolution, with BN2 and ReLU in its load and its output written to
// the feature buffer with its moments:
//
//   y[j, p] = sum_{i, tap} relu(scale[i]*b[p + tap, i] + shift[i]) W[j, i, tap]
//
// where a tap outside the image is 0, not relu(shift). A unit has about 64K values of b. They are
// normalized, rectified and transposed in registers from [pixel, i] to rows of pixels, two rows at
// a time; with the preceding two rows they are transformed as in winograd.h. For each of the four
// points a register block of up to 12 outputs by 2 vectors of pixels runs over all i and the three
// columns. Threads have contiguous units. Bytes moved: b once (and the rows around a block of
// rows), y once.
#include "conv3x3_output.h"
#include "cpu/parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "pack.h"
#include "padded_rows.h"
#include "winograd.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

// Computes the products of one group of outputs.
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

  // Adds product k to the upper and the lower rows.
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

  // It is not inlined, because that would compile it again for each storage type.
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
  ScaleShiftTable<T> scale_shift;             // padded
  T* rows = nullptr;                          // [2, width] rows of h, `row_pitch` apart
  T* transformed = nullptr;                   // [kWinogradPoints, width] planes
  T* out = nullptr;                           // [growth, 2] planes
  int64_t pitch = round_up(a.width, kLanes);  // of a row of b
  int64_t row_pitch = round_up(units.width, kLanes);

  void take_memory(Carver& memory) {
    rows = memory.take<T>(2 * a.width * row_pitch);
    transformed = memory.take<T>(transformed_values());
    out = memory.take<T>(2 * a.growth * planes.plane_size);
  }
  int64_t transformed_values() const { return kWinogradPoints * a.width * planes.plane_size; }

  // Transforms h of a unit.
  void load_transformed(const Unit& u) const {
    for (int64_t s = 0; s < u.samples; ++s) {
      for (int64_t y = -2; y < u.rows; y += 2) {
        for (int64_t first = 0; first < a.width; first += kVec<T>) {
          for (int64_t x = 0; x < units.width; x += kVec<T>) next_rows(u, s, y, first, x);
        }
      }
    }
  }

  // Takes a step down, for kVec channels and columns: the rows y+1 and y+2 replace y-1 and y, and
  // all four are transformed. Values beyond W are zero, and the column at W stays so.
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

  // Loads h of channel first + i, in row y of the unit's s-th map from column x on, into square[i].
  DX_INLINE void load_square(const Unit& u, int64_t s, int64_t y, int64_t first, int64_t x,
                             Vec<T> (&square)[kVec<T>]) const {
    const int64_t n = u.sample + s, row = u.row + y;
    const int64_t valid =
        row < 0 || row >= units.height ? 0 : std::min<int64_t>(kVec<T>, units.width - x);
    const S* const b = a.bottleneck + ((n * units.height + row) * units.width + x) * pitch + first;
    const Vec<T> scale = load(scale_shift.scale.row(n) + first),
                 shift = load(scale_shift.shift.row(n) + first);
    DX_UNROLL
    for (int i = 0; i < kVec<T>; ++i)
      square[i] = i < valid ? relu(scale * load(b + i * pitch) + shift) : Vec<T>{};
    transpose<T>(square);
  }
};

// Divides the outputs into even groups of at most kBlockChannels. Group g begins at begin(g).
struct OutputGroups {
  int64_t growth, count = ceil_div(growth, kBlockChannels);

  int64_t begin(int64_t g) const { return growth * g / count; }
};

// Packs the transformed weight as [group][point][i][column][output]; `memory` has twice its size.
template <class T>
void pack_weight(const T* w, int64_t width, const OutputGroups& groups, T* memory) {
  const int64_t columns = width * 3;
  parallel_items(groups.count, kBlockChannels * kWinogradPoints * columns,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t g = begin; g < end; ++g) {
                     const int64_t first = groups.begin(g), outputs = groups.begin(g + 1) - first;
                     T* const packed = memory + first * kWinogradPoints * columns;
                     T* const transformed = packed + groups.growth * kWinogradPoints * columns;
                     transform_weight(w + first * width * 9, outputs * width, transformed, 3,
                                      outputs * columns);
                     for (int64_t k = 0; k < kWinogradPoints; ++k) {
                       const int64_t offset = k * outputs * columns;
                       copy_transposed(transformed + offset, columns, outputs, columns,
                                       packed + offset, outputs, outputs);
                     }
                   }
                 });
}

}  // namespace

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples;
  const Units units(samples, a.features.height, a.features.width, a.width, thread_count(samples));
  const WinogradPlanes planes(units);
  const int64_t threads = thread_count(units.count);

  const OutputGroups groups{a.growth};
  const int64_t output_values = kWinogradPoints * a.width * 3;
  const Scratch weight(sizeof(T) * 2 * a.growth * output_values);
  pack_weight(a.weight, a.width, groups, weight.as<T>());
  const PaddedRows<T> scale(a.scale_shift.scale, samples, a.width),
      shift(a.scale_shift.shift, samples, a.width);
  const Workers<Conv3x3ForwardWorker<S>> workers({a, units, planes, {scale, shift}}, threads);
  const Scratch parts(sizeof(double) * 2 * a.growth * samples * units.blocks_per_map);

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const Conv3x3ForwardWorker<S> worker = workers[thread];
    std::fill_n(worker.transformed, worker.transformed_values(), T(0));
    for (int64_t i = begin; i < end; ++i) {
      const Unit u = units[i];
      worker.load_transformed(u);
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t first = groups.begin(g);
        const Convolution<T> convolution{planes, a.width, worker.transformed,
                                         weight.as<T>() + first * output_values,
                                         worker.out + 2 * first * planes.plane_size};
        convolution.dispatch(groups.begin(g + 1) - first, planes.span(u));
      }
      for (int64_t j = 0; j < a.growth; ++j) {
        const auto row_of = [&](int64_t s, int64_t y) {
          return worker.out + (2 * j + y % 2) * planes.plane_size + planes.position(u, s, y / 2);
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
