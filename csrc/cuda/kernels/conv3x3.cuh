// The kernels of the 3x3 convolution share this file: where the nine taps of a pixel lie among rows
// of pixels, packed weights and channels, and sums over partial results.
#pragma once

#include "channel_loops.cuh"
#include "pack.cuh"

namespace densenet_ext::cuda {

constexpr int kTaps = 9;      // tap 3*i + j reads the pixel at (y + i - 1, x + j - 1)
constexpr int kOutputs = 16;  // output channels of a unit
constexpr int kUnit = 16;     // channels of the bottleneck in a unit

// Elements from row to row of shared memory for `columns` elements, a multiple of 16: an odd number
// of 16 bytes.
template <class S>
DENSENET_EXT_BOTH constexpr int shared_pitch(int columns) {
  return (columns / kVector<S> | 1) * kVector<S>;
}

// Units of a narrow layer's bottleneck: as many as the registers have room for.
template <class S>
constexpr int kMaxUnits = sizeof(S) == 8 ? 2 : 4;

// Calls body(Math{}, units) for the arithmetic of S and for kUnit * units >= width channels.
template <class S, class F>
void dispatch_conv3x3(const Context& context, int64_t width, const F& body) {
  dispatch_math<S>(context, [&](auto math) {
    if (width > (kMaxUnits<S> - 1) * kUnit) {
      body(math, std::integral_constant<int, kMaxUnits<S>>{});
    } else {
      body(math, std::integral_constant<int, kMaxUnits<S> - 1>{});
    }
  });
}
// True if kernels for so many units of channels and of outputs serve a layer, if its maps are not
// too wide for a tile.
inline bool is_within(int units, int outputs, int64_t width, int64_t growth, int64_t pixels) {
  return width <= units * kUnit && growth <= outputs * kOutputs && pixels < (int64_t{1} << 28);
}
// Layers of these sizes have kernels in every type.
template <class S>
bool is_narrow(int64_t width, int64_t growth, int64_t pixels) {
  return is_within(kMaxUnits<S>, 1, width, growth, pixels);
}

// ---- pixels ------------------------------------------------------------------------------------

// The maps lie one after another: row n * pixels + y * width + x.
struct MapSizes {
  int height, width, pixels;  // of a map
  int64_t rows;               // of all maps
};
template <class E>
MapSizes sizes_of(const Maps<E>& maps) {
  return {static_cast<int>(maps.height), static_cast<int>(maps.width),
          static_cast<int>(maps.pixels()), maps.count()};
}

// Finds sample and pixel of the rows from `first` on, which may lie up to two maps before the
// first.
struct Cursor {
  int64_t first_sample;
  unsigned first_pixel, pixels;

  DEVICE Cursor(const MapSizes& maps, int64_t first) {
    const uint64_t shifted = first + 2 * static_cast<int64_t>(maps.pixels);
    pixels = static_cast<unsigned>(maps.pixels);
    const uint64_t sample = shifted >> 32 == 0  // 32-bit division is much cheaper
                                ? static_cast<unsigned>(shifted) / pixels
                                : shifted / pixels;
    first_sample = static_cast<int64_t>(sample) - 2;
    first_pixel = static_cast<unsigned>(shifted - sample * pixels);
  }
  DEVICE int64_t sample(int i) const { return first_sample + (first_pixel + i) / pixels; }
  DEVICE int pixel(int i) const { return static_cast<int>((first_pixel + i) % pixels); }
};

// Bit `tap` is set if that tap of the pixel lies in the map.
DEVICE int existing_taps(const MapSizes& maps, int pixel) {
  const int y = pixel / maps.width, x = pixel % maps.width;
  const int rows = 0x38 | (y > 0 ? 0x7 : 0) | (y < maps.height - 1 ? 0x1c0 : 0);
  const int columns = 0x92 | (x > 0 ? 0x49 : 0) | (x < maps.width - 1 ? 0x124 : 0);
  return rows & columns;
}
// The distance in rows from a pixel to its tap.
DEVICE int tap_distance(const MapSizes& maps, int tap) {
  return (tap / 3 - 1) * maps.width + tap % 3 - 1;
}

// Values of the rows whose addresses this lane gives to Math::load_a, looked up once for all
// columns.
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

template <class T>
struct Dropout {
  const bool* mask;  // [samples, channels, pixels]; null: nothing is dropped
  T scale;

  // Drops or scales the value v of channel `o` of a pixel.
  DEVICE T operator()(T v, int64_t n, int64_t o, int64_t p, int64_t channels,
                      int64_t pixels) const {
    if (mask == nullptr) return v;
    return mask[(n * channels + o) * pixels + p] ? v * scale : T(0);
  }
};

template <class Layer, class T = typename Layer::T>
Dropout<T> dropout_of(const Layer& layer) {
  return {layer.dropout_mask, static_cast<T>(layer.dropout_scale)};
}

// ---- packed weights and channels ---------------------------------------------------------------

// The normalization of a channel of the bottleneck, and what its backward needs.
template <class T>
struct alignas(16) BottleneckChannel {
  T scale, shift, mean, mask;
};
DEVICE BottleneckChannel<float> load_channel(const BottleneckChannel<float>* source) {
  const Bytes16 v = ld16(source);
  return {float_of(v.word[0]), float_of(v.word[1]), float_of(v.word[2]), float_of(v.word[3])};
}
DEVICE BottleneckChannel<double> load_channel(const BottleneckChannel<double>* source) {
  return *source;
}

template <class S>
struct TapPacking {
  using T = Arithmetic<S>;
  const T* weight;  // [growth, width, 3, 3]
  int growth, width;
  S* packed;  // [kTaps, outputs, pitch], 0 beyond growth and width
  int outputs, pitch;
  ScaleShiftTable<T> scale_shift;
  const T* mean;                   // null: not needed
  PerChannel<T> mask;              // data null: all ones
  BottleneckChannel<T>* channels;  // [samples, columns], 0 beyond width
  int64_t samples;
  int columns;
};
// Each thread has an element: first those of the weight, then the channels.
template <class Math>
KERNEL __launch_bounds__(kMaxThreads) pack_taps_kernel(TapPacking<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using T = typename Math::T;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  const int64_t weights = static_cast<int64_t>(kTaps) * a.outputs * a.pitch;
  if (i < weights) {
    const int index = static_cast<int>(i), c = index % a.pitch, o = index / a.pitch % a.outputs,
              tap = index / a.pitch / a.outputs;
    const bool exists = o < a.growth && c < a.width;
    a.packed[i] = Math::operand(exists ? a.weight[(o * a.width + c) * kTaps + tap] : T(0));
  } else if (i - weights < a.samples * a.columns) {
    const int64_t n = (i - weights) / a.columns, c = (i - weights) % a.columns;
    BottleneckChannel<T> channel = {T(0), T(0), T(0), T(0)};
    if (c < a.width) {
      channel.scale = a.scale_shift.scale.row(n)[c];
      channel.shift = a.scale_shift.shift.row(n)[c];
      channel.mean = a.mean != nullptr ? a.mean[c] : T(0);
      channel.mask = a.mask.data != nullptr ? a.mask.row(n)[c] : T(1);
    }
    a.channels[i - weights] = channel;
  }
}

template <class S>
struct PackedTaps {
  const S* weight;  // [kTaps, outputs, shared_pitch]
  PerChannel<BottleneckChannel<Arithmetic<S>>> channels;
};
// Packs weight, scale and shift of a layer's 3x3 convolution, for its backward with mean and mask.
template <class Math, int kUnits, int outputs, class Layer>
PackedTaps<typename Math::Storage> pack_taps(const Layer& layer, const typename Math::T* mean,
                                             const PerChannel<typename Math::T>& mask,
                                             Context& context) {
  using S = typename Math::Storage;
  using T = typename Math::T;
  TapPacking<S> a = {};
  a.columns = kUnits * kUnit, a.pitch = shared_pitch<S>(a.columns), a.outputs = outputs;
  const bool per_sample = has_sample_stride(layer.scale_shift) || mask.data != nullptr;
  const int64_t weights = kTaps * a.outputs * a.pitch;
  a.weight = layer.weight, a.packed = context.scratch<S>(weights);
  a.growth = static_cast<int>(layer.growth), a.width = static_cast<int>(layer.width);
  a.scale_shift = layer.scale_shift, a.mean = mean, a.mask = mask;
  a.samples = per_sample ? layer.features.samples : 1;
  a.channels = context.scratch<BottleneckChannel<T>>(a.samples * a.columns);
  launch(context, pack_taps_kernel<Math>, cover(weights + a.samples * a.columns), kMaxThreads, 0,
         a);
  return {a.packed, {a.channels, per_sample ? a.columns : 0}};
}

// Starts the copy of `elements` elements into shared memory; multiples of 16 bytes.
template <class S>
DEVICE void copy_async(S* shared, const S* global, int elements) {
  for (int i = thread_id() * kVector<S>; i < elements;
       i += static_cast<int>(blockDim.x) * kVector<S>)
    cp_async16(shared + i, global + i);
}
template <class S>
DEVICE void zero_shared(S* shared, int elements) {
  for (int i = thread_id() * kVector<S>; i < elements;
       i += static_cast<int>(blockDim.x) * kVector<S>)
    st16(shared + i, {{0, 0, 0, 0}});
}

// ---- partial sums ------------------------------------------------------------------------------

// The last launch of a backward has blocks for the gradient of the weight, then blocks for norm2.
// Their kMaxThreads threads have kSumBytes of shared memory.
constexpr int kSumBytes = 2 * kMaxThreads * static_cast<int>(sizeof(double));

// The backward of norm2, once there are parts of S1 = sum dv and S2 = sum dv (b - mean).
template <class T>
struct BottleneckNormBackward {
  const T* parts;  // part r of S1 and S2: parts[r * step + c] and parts[r * step + width + c]
  int64_t count, step;
  int64_t width;
  Norm<T> norm;
  int64_t rows;
  T* dnorm_weight;
  T* dnorm_bias;
  T* db_affine;  // [3, width]
};
// Sets everything but the parts, for the layer f.
template <class S>
BottleneckNormBackward<Arithmetic<S>> norm_backward_of(const Conv3x3Backward<S>& f) {
  BottleneckNormBackward<Arithmetic<S>> a = {};
  a.width = f.width, a.norm = f.norm, a.rows = f.features.count();
  a.dnorm_weight = f.dnorm_weight, a.dnorm_bias = f.dnorm_bias, a.db_affine = f.db_affine;
  return a;
}
// Ends the backward of the channels of one of narrow_blocks(width) blocks.
template <class T>
DEVICE void norm_backward_block(const BottleneckNormBackward<T>& a, int64_t block, double* shared) {
  constexpr ThreadMap map = narrow_map();
  static_assert(map.lanes * map.lines == kMaxThreads, "a thread each");
  const int64_t c = block * map.lanes + map.lane();
  double sums[2] = {};
  if (c < a.width) {
#pragma unroll 8
    for (int64_t r = map.line(); r < a.count; r += map.lines) {
      sums[0] += static_cast<double>(a.parts[r * a.step + c]);
      sums[1] += static_cast<double>(a.parts[r * a.step + a.width + c]);
    }
  }
  sum_lines(sums, shared, map);
  if (map.line() == 0 && c < a.width) {
    const double sum1 = sums[0], sum2 = sums[1];
    const double mean = static_cast<double>(a.norm.mean[c]);
    const double rstd = 1 / sqrt(static_cast<double>(a.norm.var[c]) + a.norm.eps);
    const double gain = static_cast<double>(a.norm.weight[c]) * rstd;
    const double gain_of_row =
        a.norm.training ? gain / static_cast<double>(a.rows > 0 ? a.rows : 1) : 0.0;
    a.dnorm_bias[c] = static_cast<T>(sum1);
    a.dnorm_weight[c] = static_cast<T>(sum2 * rstd);
    a.db_affine[c] = static_cast<T>(gain);
    a.db_affine[a.width + c] =
        a.norm.training ? static_cast<T>(-gain_of_row * (sum1 - mean * rstd * rstd * sum2)) : T(0);
    a.db_affine[2 * a.width + c] =
        a.norm.training ? static_cast<T>(-gain_of_row * rstd * rstd * sum2) : T(0);
  }
}

}  // namespace densenet_ext::cuda
