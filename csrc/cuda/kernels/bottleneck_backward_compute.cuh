// bottleneck_backward.cu computes with these functions on a tile in shared memory, and stores the
// results.
#pragma once

#include "bottleneck_backward_load.cuh"

namespace densenet_ext::cuda {
namespace {

// Forms a panel of db of a tile, 0 where there is no row or no column.
template <class K, class S>
DEVICE void form_db(const Arguments<S>& p, int row0, int panel, int thread,
                    const DbOperands<K>& operands, const typename K::T* db_affine, S* db) {
  using T = typename K::T;
  constexpr int kRowVectors = K::kWidth / K::kDbVector, V = K::kDbVector;
#pragma unroll
  for (int j = 0; j < K::kThreadVectors; ++j) {
    const int i = thread + j * K::kThreads;
    if (i >= K::kDbVectors) continue;
    const int row = i / kRowVectors, first = i % kRowVectors * V;
    const int c = panel * K::kWidth + first, remaining = p.width - c;
    const int valid = row0 + row >= p.rows || remaining <= 0 ? 0 : remaining < V ? remaining : V;
    T a[3][V], v[V], b[V];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if constexpr (K::kWide) {
        load_each<V>(p.db_affine + static_cast<int64_t>(k) * p.width + c, valid, a[k]);
      } else {
        load<V>(db_affine + k * K::kWidth + first, a[k]);
      }
    }
    load<V>(reinterpret_cast<const S*>(&operands.dv[j]), v);
    load<V>(reinterpret_cast<const S*>(&operands.b[j]), b);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] = affine(v[e], a[0][e], affine(b[e], a[2][e], a[1][e]));
    if (valid < V) {
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = e < valid ? v[e] : T(0);
    }
    store_operands<typename K::Math>(db + row * K::kDbPitch + first, v);
  }
}

// Adds to dz of the m-th 16 rows the product of the panel of db in shared memory.
template <class K, class S, class T>
DEVICE void multiply_db(const Arguments<S>& p, const Block<K>& block, const RegisterWeight<K>& w,
                        const S* db, int m, int panel, T (&dz)[2][4]) {
  using Math = typename K::Math;
#pragma unroll(Math::kTensor ? K::kSteps : 1)
  for (int k = 0; k < K::kSteps; ++k) {
    typename Math::A a;
    Math::load_a(a, [=](int r) { return db + (m * 16 + r) * K::kDbPitch; }, k * Math::kDepth);
    if (k < K::kRegisterSteps) {
      Math::mma(dz, a, w[k < K::kRegisterSteps ? k : 0]);
    } else {
      typename Math::B b;
      if constexpr (K::kSharesWeight) {
        Math::load_b(
            b, [=](int n) { return block.weight + (block.warp_channel + n) * K::kWeightPitch; },
            (k - K::kRegisterSteps) * Math::kDepth);
      } else {
        const S* const rows = block.global_weight;
        Math::load_b_direct(
            b, [=](int n) { return rows + n * p.weight_pitch; },
            panel * K::kWidth + k * Math::kDepth);
      }
      Math::mma(dz, a, b);
    }
  }
}

template <class T>
struct Masks {
  T pre = T(1), post = T(1);
};

// Loads scale, shift and masks of channel c + e of sample n.
template <class K, class S, class T>
DEVICE void load_sample(const Arguments<S>& p, int channel_end, int n, int c, int e,
                        FeatureChannel<T>& channel, Masks<T>& masks) {
  const ScaleShift<T> s =
      p.scale_shift.data[n * static_cast<int>(p.scale_shift.sample_stride) + c + e];
  channel.scale = s.scale, channel.shift = s.shift;
  if (c + e < channel_end) {
    if (p.pre_mask.data != nullptr)
      masks.pre = p.pre_mask.data[n * static_cast<int>(p.pre_mask.sample_stride) + c + e];
    if (p.post_mask.data != nullptr)
      masks.post = p.post_mask.data[n * static_cast<int>(p.post_mask.sample_stride) + c + e];
  }
}

// S1 and S2 of the thread's channels.
template <class T>
struct Sums {
  T s1[2][2], s2[2][2];
};

// Writes z over x and the new gradient over the old one, for 16 rows of the warp's channels; each
// element belongs to one thread.
template <class K, class S, class T>
DEVICE void update_gradient(const Arguments<S>& p, const Block<K>& block, const Tile<K>& tile,
                            int m, const T (&dz)[2][4], Sums<T>& sums) {
  const int g = tile.g, t = tile.t;
  S values[2][2][2] = {}, old_grad[2][2][2] = {};  // all are loaded at once
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = (m * 16 + g + 8 * half) * K::kMapPitch + block.warp_channel + 8 * j + 2 * t;
      load_raw<2>(tile.x + index, 2, values[j][half]);
      if (block.makes_gradient && p.grad_in != nullptr)
        load_raw<2>(tile.grad + index, 2, old_grad[j][half]);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int column = block.warp_channel + 8 * j + 2 * t;
    const int c = block.channel0 + column;
    const FeatureChannel<T> pair[2] = {block.channels[column], block.channels[column + 1]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = m * 16 + g + 8 * half;
      const int n = (tile.row0 + r < p.rows ? tile.row0 + r : p.rows - 1) / p.pixels;
      T z[2], grad[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const T x = widen(values[j][half][e]), old = widen(old_grad[j][half][e]);
        FeatureChannel<T> channel =
            K::kMasked ? block.channels[column + e] : pair[e];  // fewer registers
        Masks<T> masks;
        if constexpr (K::kMasked) load_sample<K>(p, block.channel_end, n, c, e, channel, masks);
        const T v = affine(x, channel.scale, channel.shift);
        z[e] = relu(v);
        const T dv = (v > T(0) ? dz[j][2 * half + e] : T(0)) * masks.post;
        grad[e] = affine(dv, masks.pre * channel.gain, old);
        sums.s1[j][e] += dv;
        sums.s2[j][e] = affine(dv, affine(x, masks.pre, -channel.mean), sums.s2[j][e]);
      }
      store_operands<typename K::Math>(tile.x + r * K::kMapPitch + column, z);
      if (block.makes_gradient) store<2>(tile.grad + r * K::kMapPitch + column, grad);
    }
  }
}

// Stores 16 rows of the warp's channels of G, in vectors of 16 bytes.
template <class K, class S>
DEVICE void store_gradient(const Arguments<S>& p, const Block<K>& block, const Tile<K>& tile,
                           int m) {
  constexpr int kVectors = 16 / kVector<S>;
#pragma unroll
  for (int i = tile.thread % kWarp; i < 16 * kVectors; i += kWarp) {
    const int column = block.warp_channel + i % kVectors * kVector<S>;
    const int row = tile.row0 + m * 16 + i / kVectors;
    const int c = block.channel0 + column;
    if (row >= p.rows || c >= block.channel_end) continue;
    const S* const source = tile.grad + (m * 16 + i / kVectors) * K::kMapPitch + column;
    S* const target = p.grad + static_cast<int64_t>(row) * p.grad_pitch + c;
    if (c + kVector<S> <= block.channel_end) {
      st16_global(target, ld16(source));
    } else {
      for (int e = 0; c + e < block.channel_end; ++e) target[e] = source[e];
    }
  }
}

// Adds db^T z of a tile to the warp's dW.
template <class K, class T>
DEVICE void multiply_z(const Block<K>& block, const Tile<K>& tile,
                       T (&dweight)[K::kWarpUnits][2][4]) {
  using Math = typename K::Math;
#pragma unroll(Math::kTensor ? K::kRows / Math::kDepth : 1)
  for (int k = 0; k < (tile.idle ? 0 : K::kRows); k += Math::kDepth) {
    typename Math::B z;
    Math::load_b_t(z, [=](int r) { return tile.x + (k + r) * K::kMapPitch; }, block.warp_channel);
#pragma unroll
    for (int u = 0; u < K::kWarpUnits; ++u) {
      typename Math::A a;
      Math::load_a_t(
          a, [=](int r) { return tile.db + (k + r) * K::kDbPitch; },
          (block.split * K::kWarpUnits + u) * 16);
      Math::mma(dweight[u], a, z);
    }
  }
}

// Stores the part's dW of the warp.
template <class K, class S, class T>
DEVICE void store_weight(const Arguments<S>& p, const Block<K>& block,
                         const T (&dweight)[K::kWarpUnits][2][4]) {
  T* const part = p.dweight + static_cast<int64_t>(blockIdx.y) * p.width * p.channels;
#pragma unroll
  for (int u = 0; u < K::kWarpUnits; ++u) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = static_cast<int64_t>(blockIdx.z) * K::kWidth +
                            (block.split * K::kWarpUnits + u) * 16 + block.g + i / 2 * 8;
        const int c = block.channel0 + block.warp_channel + 8 * j + 2 * block.t + i % 2;
        if (row < p.width && c < block.channel_end) part[row * p.channels + c] = dweight[u][j][i];
      }
    }
  }
}

// Adds S1 and S2 over the lanes of equal channels, and stores the part's.
template <class K, class S, class T>
DEVICE void store_sums(const Arguments<S>& p, const Block<K>& block, Sums<T>& sums) {
  T* const part =
      p.sums + (static_cast<int64_t>(blockIdx.y) * K::kSplit + block.split) * 2 * p.channels;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        sums.s1[j][e] += __shfl_xor_sync(0xffffffffu, sums.s1[j][e], lanes);
        sums.s2[j][e] += __shfl_xor_sync(0xffffffffu, sums.s2[j][e], lanes);
      }
      const int c = block.channel0 + block.warp_channel + 8 * j + 2 * block.t + e;
      if (block.g == 0 && c < block.channel_end) {
        part[c] = sums.s1[j][e];
        part[p.channels + c] = sums.s2[j][e];
      }
    }
  }
}

}  // namespace
}  // namespace densenet_ext::cuda
