// What the kernels of the 3x3 convolution share: where the nine taps of a pixel lie among rows of
// pixels, packed weights and tables, and sums over partial results.
#pragma once

#include "channel_loops.cuh"
#include "pack.cuh"

namespace densenet_ext::cuda {

constexpr int kTaps = 9;      // tap 3*i + j reads the pixel at (y + i - 1, x + j - 1)
constexpr int kOutputs = 16;  // output channels come in units of so many
constexpr int kUnit = 16;     // channels of the bottleneck come in units of so many

// Elements in 16 bytes.
template <class S>
constexpr int kGranule = 16 / static_cast<int>(sizeof(S));

// Elements from row to row of shared memory for `columns` elements, a multiple of 16: an odd number
// of 16 bytes.
template <class S>
DENSENET_EXT_BOTH constexpr int shared_pitch(int columns) {
  return (columns / kGranule<S> | 1) * kGranule<S>;
}

// What the registers have room for.
template <class S>
constexpr int kMostUnits = sizeof(S) == 8 ? 2 : 4;

// Calls body(Math{}, units) for the arithmetic of S and for kUnit * units >= width channels.
template <class S, class F>
void dispatch_conv3x3(const Context& context, int64_t width, const F& body) {
  dispatch_math<S>(context, [&](auto math) {
    if (width > (kMostUnits<S> - 1) * kUnit) {
      body(math, std::integral_constant<int, kMostUnits<S>>{});
    } else {
      body(math, std::integral_constant<int, kMostUnits<S> - 1>{});
    }
  });
}
// Whether kernels for so many units of channels and of outputs serve a layer, if its maps are not
// too wide for a tile.
inline bool is_within(int units, int outputs, int64_t width, int64_t growth, int64_t pixels) {
  return width <= units * kUnit && growth <= outputs * kOutputs && pixels < (int64_t{1} << 28);
}
// Layers of these sizes have kernels in every type.
template <class S>
bool is_narrow(int64_t width, int64_t growth, int64_t pixels) {
  return is_within(kMostUnits<S>, 1, width, growth, pixels);
}

// ---- pixels ------------------------------------------------------------------------------------

// Maps one after another: row n * pixels + y * width + x.
struct Map {
  int height, width, pixels;
  int64_t rows;
};
template <class E>
Map map_of(const Maps<E>& maps) {
  return {static_cast<int>(maps.height), static_cast<int>(maps.width),
          static_cast<int>(maps.pixels()), maps.count()};
}

// Rows from `first` on, which may be as far as two maps before the first one.
struct Cursor {
  int64_t first_sample;
  unsigned first_pixel, pixels;

  DEVICE Cursor(const Map& map, int64_t first) {
    const uint64_t shifted = first + 2 * static_cast<int64_t>(map.pixels);
    pixels = static_cast<unsigned>(map.pixels);
    const uint64_t maps = shifted >> 32 == 0  // 32-bit division is much cheaper
                              ? static_cast<unsigned>(shifted) / pixels
                              : shifted / pixels;
    first_sample = static_cast<int64_t>(maps) - 2;
    first_pixel = static_cast<unsigned>(shifted - maps * pixels);
  }
  DEVICE int64_t sample(int i) const { return first_sample + (first_pixel + i) / pixels; }
  DEVICE int pixel(int i) const { return static_cast<int>((first_pixel + i) % pixels); }
};

// Bit `tap`: whether that tap of this pixel is inside the map.
DEVICE int taps_inside(const Map& map, int pixel) {
  const int y = pixel / map.width, x = pixel % map.width;
  const int rows = 0x38 | (y > 0 ? 0x7 : 0) | (y < map.height - 1 ? 0x1c0 : 0);
  const int columns = 0x92 | (x > 0 ? 0x49 : 0) | (x < map.width - 1 ? 0x124 : 0);
  return rows & columns;
}
// How many rows further a tap reads.
DEVICE int tap_distance(const Map& map, int tap) { return (tap / 3 - 1) * map.width + tap % 3 - 1; }

// What belongs to the rows that this lane hands to Math::load_a, looked up once for all columns.
template <class V, bool kOne>
struct LaneRows {
  V rows[kOne ? 1 : 2];
  DEVICE V operator()(int i) const { return kOne || i < 8 ? rows[0] : rows[kOne ? 0 : 1]; }
  template <class F>
  DEVICE auto map(const F& f) const -> LaneRows<decltype(f(rows[0])), kOne> {
    if constexpr (kOne) {
      return {{f(rows[0])}};
    } else {
      return {{f(rows[0]), f(rows[1])}};
    }
  }
};
template <class Math, class F>
DEVICE auto lane_rows(int lane, const F& row) -> LaneRows<decltype(row(0)), Math::kTensor> {
  if constexpr (Math::kTensor) {  // one row a lane
    return {{row(lane % 16)}};
  } else {  // rows g and g + 8
    return {{row(lane / 4), row(lane / 4 + 8)}};
  }
}

// Dropout of channel `o` of a pixel; masks are [samples, channels, pixels].
template <class T>
struct Dropout {
  const bool* mask;  // null: nothing is dropped
  T scale;

  DEVICE T operator()(T v, int64_t n, int64_t o, int64_t p, int64_t channels,
                      int64_t pixels) const {
    if (mask == nullptr) return v;
    return mask[(n * channels + o) * pixels + p] ? v * scale : T(0);
  }
};

// ---- packed weights and tables -----------------------------------------------------------------

// What normalizes a channel of the bottleneck, and what its backward needs beside that.
template <class T>
struct alignas(16) Entry {
  T scale, shift, mean, mask;
};
DEVICE Entry<float> load_entry(const Entry<float>* from) {
  const Bytes16 v = ld16(from);
  return {float_of(v.word[0]), float_of(v.word[1]), float_of(v.word[2]), float_of(v.word[3])};
}
DEVICE Entry<double> load_entry(const Entry<double>* from) { return *from; }

template <class S>
struct TapPacking {
  using T = Arithmetic<S>;
  const T* weight;  // [growth, width, 3, 3]
  int growth, width;
  S* packed;  // [kTaps, outputs, pitch], 0 beyond growth and width
  int outputs, pitch;
  ScaleShiftTable<T> norm;
  const T* mean;       // null: not needed
  PerChannel<T> mask;  // data null: all ones
  Entry<T>* table;     // [samples, columns], 0 beyond width
  int64_t samples;
  int columns;
};
// A thread an element: first the weights, then the table.
template <class Math>
KERNEL __launch_bounds__(256) pack_taps_kernel(TapPacking<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using T = typename Math::T;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t weights = static_cast<int64_t>(kTaps) * a.outputs * a.pitch;
  if (i < weights) {
    const int at = static_cast<int>(i), c = at % a.pitch, o = at / a.pitch % a.outputs,
              tap = at / a.pitch / a.outputs;
    const bool real = o < a.growth && c < a.width;
    a.packed[i] = Math::operand(real ? a.weight[(o * a.width + c) * kTaps + tap] : T(0));
  } else if (i - weights < a.samples * a.columns) {
    const int64_t n = (i - weights) / a.columns, c = (i - weights) % a.columns;
    Entry<T> entry = {T(0), T(0), T(0), T(0)};
    if (c < a.width) {
      entry.scale = a.norm.scale.row(n)[c], entry.shift = a.norm.shift.row(n)[c];
      entry.mean = a.mean != nullptr ? a.mean[c] : T(0);
      entry.mask = a.mask.data != nullptr ? a.mask.row(n)[c] : T(1);
    }
    a.table[i - weights] = entry;
  }
}

template <class S>
struct PackedTaps {
  const S* weight;  // [kTaps, outputs, shared_pitch]
  const Entry<Arithmetic<S>>* table;
  int64_t sample_stride;  // 0 where all samples share a row of the table
};
template <class Math, int kUnits, int outputs = kOutputs>
PackedTaps<typename Math::Storage> pack_taps(const typename Math::T* weight, int64_t growth,
                                             int64_t width,
                                             const ScaleShiftTable<typename Math::T>& norm,
                                             const typename Math::T* mean,
                                             const PerChannel<typename Math::T>& mask,
                                             int64_t samples, Context& context) {
  using S = typename Math::Storage;
  using T = typename Math::T;
  constexpr int columns = kUnits * kUnit, pitch = shared_pitch<S>(columns);
  const bool per_sample =
      norm.scale.sample_stride != 0 || norm.shift.sample_stride != 0 || mask.data != nullptr;
  const int64_t table_rows = per_sample ? samples : 1, weights = kTaps * outputs * pitch;
  TapPacking<S> a = {weight,
                     static_cast<int>(growth),
                     static_cast<int>(width),
                     context.scratch<S>(weights),
                     outputs,
                     pitch,
                     norm,
                     mean,
                     mask,
                     context.scratch<Entry<T>>(table_rows * columns),
                     table_rows,
                     columns};
  launch(context, pack_taps_kernel<Math>, cover(weights + table_rows * columns, 256), 256, 0, a);
  return {a.packed, a.table, per_sample ? columns : 0};
}

// Starts the copy of `elements` elements into shared memory; multiples of 16 bytes.
template <class S>
DEVICE void copy_async(S* shared, const S* global, int elements) {
  for (int i = static_cast<int>(threadIdx.x) * kGranule<S>; i < elements;
       i += static_cast<int>(blockDim.x) * kGranule<S>)
    cp_async16(shared + i, global + i);
}
template <class S>
DEVICE void zero_shared(S* shared, int elements) {
  for (int i = static_cast<int>(threadIdx.x) * kGranule<S>; i < elements;
       i += static_cast<int>(blockDim.x) * kGranule<S>)
    st16(shared + i, {{0, 0, 0, 0}});
}

// ---- partial sums ------------------------------------------------------------------------------

// Threads of a block that finishes sums: 32 columns times kSlices slices of the partial sums.
constexpr int kSlices = 8;
constexpr int kFinishThreads = 32 * kSlices;
constexpr int kFinishShared = 2 * kFinishThreads * static_cast<int>(sizeof(double));

// sum_r part[r * step] for r < count, in the same order in every run; for the threads of slice 0,
// the first 32. `shared` has kFinishShared bytes. Threads without a column pass count 0.
template <class T>
DEVICE double sum_parts(const T* part, int64_t step, int64_t count, double* shared) {
  const int slice = static_cast<int>(threadIdx.x) / 32;
  double sum = 0;
#pragma unroll 8
  for (int64_t r = slice; r < count; r += kSlices) sum += static_cast<double>(part[r * step]);
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (slice == 0) {
    for (int s = 1; s < kSlices; ++s) sum += shared[32 * s + threadIdx.x];
  }
  __syncthreads();
  return sum;
}

// What is left of norm2's backward once S1 = sum dv and S2 = sum dv (b - mean) are there in parts.
template <class T>
struct NormSums {
  const T* parts;  // part r of S1 and S2: parts[r * step + c] and parts[r * step + width + c]
  int64_t count, step;
  int64_t width;
  Norm<T> norm;
  int64_t rows;
  T* dnorm_weight;
  T* dnorm_bias;
  T* db_affine;  // [3, width]
};
// For the channels of one of narrow_blocks(width) blocks of kFinishThreads.
template <class T>
DEVICE void finish_norm(const NormSums<T>& a, int64_t block, double* shared) {
  constexpr ThreadMap map = narrow_map();
  static_assert(map.lanes * map.rows == kFinishThreads, "a thread each");
  const int64_t c = block * map.lanes + map.lane();
  double sums[2] = {};
  if (c < a.width) {
#pragma unroll 8
    for (int64_t r = map.row(); r < a.count; r += map.rows) {
      sums[0] += static_cast<double>(a.parts[r * a.step + c]);
      sums[1] += static_cast<double>(a.parts[r * a.step + a.width + c]);
    }
  }
  sum_rows(sums, shared, map);
  if (map.row() == 0 && c < a.width) {
    const double sum1 = sums[0], sum2 = sums[1];
    const double mean = static_cast<double>(a.norm.mean[c]);
    const double rstd = 1 / sqrt(static_cast<double>(a.norm.var[c]) + a.norm.eps);
    const double slope = static_cast<double>(a.norm.weight[c]) * rstd;
    const double each =
        a.norm.training ? slope / static_cast<double>(a.rows > 0 ? a.rows : 1) : 0.0;
    a.dnorm_bias[c] = static_cast<T>(sum1);
    a.dnorm_weight[c] = static_cast<T>(sum2 * rstd);
    a.db_affine[c] = static_cast<T>(slope);
    a.db_affine[a.width + c] =
        a.norm.training ? static_cast<T>(-each * (sum1 - mean * rstd * rstd * sum2)) : T(0);
    a.db_affine[2 * a.width + c] =
        a.norm.training ? static_cast<T>(-each * rstd * rstd * sum2) : T(0);
  }
}

}  // namespace densenet_ext::cuda
