// conv3x3_backward.cu loads, computes and stores a tile with these functions.
#pragma once

#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kWarps = kTaps, kThreads = kWarps * kWarp;
constexpr int kMaxRows = 2 * kWarps * 16;  // of a tile

template <class S>
struct Arguments {
  using T = Arithmetic<S>;
  const S* bottleneck;
  int pitch;  // of bottleneck and dv
  MapSizes maps;
  PackedTaps<S> taps;
  int growth, width;
  const S* features;  // both at the first channel of the slice
  const S* grad;
  int64_t features_pitch, grad_pitch;
  int vector, vectors;  // channels of the slice in one access; accesses of a row
  int lines;            // rows of the slice that all threads load at a time
  Coefficients<T> coef;
  int64_t offset;
  Dropout<T> dropout;
  S* dv;
  T* parts;  // [blocks, step]: dW [kTaps, kOutputs, columns], then S1 [width], S2 [width]
  int64_t step;
  int tile_rows;            // a multiple of 16
  int halo, gradient_rows;  // rows of dy on each side of a tile, and all of them
  unsigned tiles;
};

template <class Math_, int kUnits_>
struct Tiling {
  using Math = Math_;
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kUnits = kUnits_, kColumns = kUnits * kUnit;
  static constexpr int kPitch = shared_pitch<S>(kColumns);
  static constexpr int kGradientPitch = shared_pitch<S>(kOutputs);
  static constexpr int kWeights = kTaps * kOutputs * kPitch;
  static constexpr int kSums = kTaps * kOutputs * kColumns;  // of dW
  // Blocks on a multiprocessor and taps at a time: as many as the registers have room for.
  static constexpr int kBlocks = sizeof(S) == 2 && kUnits == 3 ? 2 : 1;
  static constexpr int kUnroll = sizeof(S) == 2 ? 3 : 1;

  static int64_t shared_bytes(int64_t rows, int64_t map_width) {
    const int64_t gradient = (1 + rows + 2 * (map_width + 1)) * kGradientPitch;
    return (kWeights + gradient + rows * kPitch) * static_cast<int64_t>(sizeof(S)) +
           kMaxRows * static_cast<int64_t>(sizeof(uint16_t)) +
           kUnits * kThreads * static_cast<int64_t>(sizeof(T));
  }
};

// The shared memory of a block.
template <class K>
struct Block {
  using S = typename K::S;
  using T = typename K::T;
  // [kUnits, kWarps, kWarp]: S1 of lanes with g < 4, S2 of the others, for the column
  // 8 * (g / 2 % 2) + 2 * t + g % 2 of the unit
  T* sums;
  S* weight;
  uint16_t* taps;  // [tile_rows]: existing_taps
  S* zeros;
  S* tile;      // b, then h
  S* gradient;  // dy

  DEVICE Block(const Arguments<S>& a, unsigned char* shared)
      : sums(reinterpret_cast<T*>(shared)),
        weight(reinterpret_cast<S*>(sums + K::kUnits * kThreads)),
        taps(reinterpret_cast<uint16_t*>(weight + K::kWeights)),
        zeros(reinterpret_cast<S*>(taps + kMaxRows)),
        tile(zeros + K::kGradientPitch),
        gradient(tile + a.tile_rows * K::kPitch) {}

  // The row of dy that a tap takes to row i of the tile. If p - tap is outside the map, so is the
  // opposite tap of p.
  DEVICE const S* gradient_row(const Arguments<S>& a, int i, int tap) const {
    return taps[i] >> (kTaps - 1 - tap) & 1
               ? gradient + (i + a.halo - tap_distance(a.maps, tap)) * K::kGradientPitch
               : zeros;
  }
};

// Forms dy of the rows from `row0` on in shared memory: V channels from `column` on of every
// a.lines-th row from `line` on by this thread, whose coefficients change with the sample only.
template <class K, int V, class S>
DEVICE void form_gradient(const Arguments<S>& a, const Block<K>& block, int64_t row0, int line,
                          int column, const Cursor& cursor) {
  using T = Arithmetic<S>;
  T coef[3][V] = {};
  int64_t coef_sample = -1;
  for (int i = line; i < a.gradient_rows; i += a.lines) {
    if (row0 + i < 0 || row0 + i >= a.maps.rows) continue;
    T g[V], x[V];
    load<V>(a.grad + (row0 + i) * a.grad_pitch + column, g);
    load<V>(a.features + (row0 + i) * a.features_pitch + column, x);
    const int64_t n = cursor.sample(i);
    if (n != coef_sample) {
      coef_sample = n;
#pragma unroll
      for (int j = 0; j < 3; ++j)
#pragma unroll
        for (int e = 0; e < V; ++e) coef[j][e] = a.coef.at(j, n, a.offset + column + e);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
      g[e] = affine(coef[0][e], g[e], affine(coef[2][e], x[e], coef[1][e]));
      g[e] = a.dropout(g[e], n, column + e, cursor.pixel(i), a.growth, a.maps.pixels);
    }
    store_operands<typename K::Math>(block.gradient + i * K::kGradientPitch + column, g);
  }
}

// Brings b, dy and the taps of a tile, `rows` rows from row0 on, into shared memory.
template <class K, class S>
DEVICE void load_tile(const Arguments<S>& a, const Block<K>& block, int64_t row0, int rows) {
  constexpr int V = kVector<S>;
  const int thread = fresh(thread_id()), row_vectors = a.pitch / V;
  // A thread too many has no row of dy.
  const int line = thread / a.vectors < a.lines ? thread / a.vectors : a.gradient_rows,
            column = thread % a.vectors * a.vector;
  for (int i = thread; i < a.tile_rows * row_vectors; i += kThreads) {
    const int row = i / row_vectors, first = i % row_vectors * V;
    cp_async16(block.tile + row * K::kPitch + first,
               a.bottleneck + (row < rows ? (row0 + row) * a.pitch + first : 0),
               row < rows ? 16 : 0);
  }
  cp_async_commit();
  const Cursor cursor(a.maps, row0 - a.halo);
  for (int i = thread; i < a.tile_rows; i += kThreads)
    block.taps[i] =
        static_cast<uint16_t>(i < rows ? existing_taps(a.maps, cursor.pixel(a.halo + i)) : 0);
  if (a.vector == 4) {
    if constexpr (V >= 4) form_gradient<K, 4>(a, block, row0 - a.halo, line, column, cursor);
  } else if (a.vector == 2) {
    form_gradient<K, 2>(a, block, row0 - a.halo, line, column, cursor);
  } else {
    form_gradient<K, 1>(a, block, row0 - a.halo, line, column, cursor);
  }
  cp_async_wait<0>();
}

// Transposes four words of each lane of a quad: lane t gets word t of all four.
DEVICE void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  const uint32_t a = __shfl_xor_sync(0xffffffff, odd ? w[0] : w[1], 1);
  const uint32_t b = __shfl_xor_sync(0xffffffff, odd ? w[2] : w[3], 1);
  w[0] = odd ? a : w[0], w[1] = odd ? w[1] : a, w[2] = odd ? b : w[2], w[3] = odd ? w[3] : b;
  const uint32_t c = __shfl_xor_sync(0xffffffff, high ? w[0] : w[2], 2);
  const uint32_t d = __shfl_xor_sync(0xffffffff, high ? w[1] : w[3], 2);
  w[0] = high ? c : w[0], w[1] = high ? d : w[1], w[2] = high ? w[2] : c, w[3] = high ? w[3] : d;
}
// Stores 16 columns of rows g and g+8 of an accumulator, whole sectors at a time; null stands for a
// row that does not exist.
template <class S>
DEVICE void store_unit(S* low, S* high, const Arithmetic<S> (&v)[2][4]) {
  const int t = lane_id() % 4;
  if constexpr (sizeof(S) == 2) {
    uint32_t words[4] = {narrow2<S>(v[0][0], v[0][1]), narrow2<S>(v[1][0], v[1][1]),
                         narrow2<S>(v[0][2], v[0][3]), narrow2<S>(v[1][2], v[1][3])};
    transpose_quad(words);
    S* const target = t < 2 ? low : high;
    if (target != nullptr) st16(target + t % 2 * 8, {{words[0], words[1], words[2], words[3]}});
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      S* const target = i < 2 ? low : high;
      const Arithmetic<S> pair[2] = {v[i % 2][i / 2 * 2], v[i % 2][i / 2 * 2 + 1]};
      if (target != nullptr) store<2>(target + i % 2 * 8 + 2 * t, pair);
    }
  }
}

// Sums eight values over the lanes of equal t; lanes with g = i get the i-th sum.
template <class T>
DEVICE T sum_over_rows(T (&v)[8]) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane_id() / 4 & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T other = __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + half], 4 * half);
      v[i] = (upper ? v[i + half] : v[i]) + other;
    }
  }
  return v[0];
}

// Computes dh of 16 rows of the tile.
template <class K, class S, class T>
DEVICE void multiply_taps(const Arguments<S>& a, const Block<K>& block, int warp_row, int lane,
                          T (&dh)[K::kUnits][2][4]) {
  using Math = typename K::Math;
#pragma unroll(K::kUnroll)
  for (int tap = 0; tap < kTaps; ++tap) {
    const auto rows =
        lane_rows<Math>(lane, [&](int i) { return block.gradient_row(a, warp_row + i, tap); });
    const S* const w = block.weight + tap * kOutputs * K::kPitch;
#pragma unroll 1
    for (int o = 0; o < kOutputs; o += Math::kDepth) {
      typename Math::A dy;
      Math::load_a(dy, rows, o);
#pragma unroll
      for (int u = 0; u < K::kUnits; ++u) {
        typename Math::B b;
        Math::load_b_t(b, [&](int i) { return w + (o + i) * K::kPitch; }, u * kUnit);
        Math::mma(dh[u], dy, b);
      }
    }
  }
}

// Turns dh into dv of one unit of columns, and b into h in shared memory; adds to S1 and S2. `low`
// and `high` are the channels of rows g and g + 8.
template <class K, class S, class T>
DEVICE void normalize_unit(const Block<K>& block, int rows, int warp_row, int lane, int u,
                           const BottleneckChannel<T>* low, const BottleneckChannel<T>* high,
                           T (&dh)[2][4]) {
  const int g = lane / 4, t = lane % 4;
  T sum[8] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int c = u * kUnit + 8 * j + 2 * t;
    BottleneckChannel<T> channel[2] = {load_channel(low + c), load_channel(low + c + 1)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && high != low)
        channel[0] = load_channel(high + c), channel[1] = load_channel(high + c + 1);
      S* const pair = block.tile + (warp_row + g + 8 * half) * K::kPitch + c;
      const bool exists = warp_row + g + 8 * half < rows;
      T b[2], h[2];
      load<2>(pair, b);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const T v = exists ? affine(b[e], channel[e].scale, channel[e].shift) : T(0);
        T& d = dh[j][2 * half + e];
        // The sums are those of the stored values: in norm2's gradient they have to cancel.
        d = v > T(0) ? rounded<S>(d * channel[e].mask) : T(0);
        sum[2 * j + e] += d;
        sum[4 + 2 * j + e] += d * (b[e] - channel[e].mean);
        h[e] = relu(v);
      }
      store_operands<typename K::Math>(pair, h);
    }
  }
  block.sums[u * kThreads + warp_id() * kWarp + lane] += sum_over_rows(sum);
}

// Makes dv, S1, S2 and h of 16 rows of a tile, which has `rows` rows from row0 on.
template <class K, class S, class T>
DEVICE void input_gradient(const Arguments<S>& a, const Block<K>& block, int64_t row0, int rows,
                           int warp_row, int lane) {
  T dh[K::kUnits][2][4] = {};
  multiply_taps(a, block, warp_row, lane, dh);
  // Rows that do not exist take the channels of the tile's first one.
  const auto channels = [&](int i) -> const BottleneckChannel<T>* {
    if (a.taps.channels.sample_stride == 0) return a.taps.channels.data;
    return a.taps.channels.row((row0 + (i < rows ? i : 0)) / a.maps.pixels);
  };
  const int g = lane / 4;
  const BottleneckChannel<T>* const low = channels(warp_row + g);
  const BottleneckChannel<T>* const high = channels(warp_row + g + 8);
  S* const dv = a.dv + (row0 + warp_row + g) * a.pitch;
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
    normalize_unit<K, S>(block, rows, warp_row, lane, u, low, high, dh[u]);
    if (u * kUnit < a.pitch)
      store_unit<S>(warp_row + g < rows ? dv + u * kUnit : nullptr,
                    warp_row + g + 8 < rows ? dv + 8 * a.pitch + u * kUnit : nullptr, dh[u]);
  }
}

// Adds the tile's dW of the warp's tap.
template <class K, class S, class T>
DEVICE void weight_gradient(const Arguments<S>& a, const Block<K>& block,
                            T (&dw)[K::kUnits][2][4]) {
  using Math = typename K::Math;
  const int tap = warp_id();
#pragma unroll(K::kUnroll)
  for (int p = 0; p < a.tile_rows; p += Math::kDepth) {
    typename Math::A dy;
    Math::load_a_t(dy, [&](int i) { return block.gradient_row(a, p + i, tap); }, 0);
#pragma unroll
    for (int u = 0; u < K::kUnits; ++u) {
      typename Math::B h;
      Math::load_b_t(h, [&](int i) { return block.tile + (p + i) * K::kPitch; }, u * kUnit);
      Math::mma(dw[u], dy, h);
    }
  }
}

// Stores the block's part of dW, S1 and S2.
template <class K, class S, class T>
DEVICE void store_parts(const Arguments<S>& a, const Block<K>& block,
                        const T (&dw)[K::kUnits][2][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  T* const parts = a.parts + static_cast<int64_t>(blockIdx.x) * a.step;
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = g + i / 2 * 8, c = u * kUnit + half * 8 + 2 * t + i % 2;
        if (o < a.growth && c < a.width)
          parts[(warp_id() * kOutputs + o) * K::kColumns + c] = dw[u][half][i];
      }
  __syncthreads();
  for (int i = thread_id(); i < 2 * a.width; i += kThreads) {
    const int c = i % a.width, lane = (i / a.width * 4 + c / 8 % 2 * 2 + c % 2) * 4 + c / 2 % 4;
    const T* const sums = block.sums + c / kUnit * kThreads + lane;
    T sum = sums[0];
    for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp];
    parts[K::kSums + i] = sum;
  }
}

}  // namespace
}  // namespace densenet_ext::cuda
