// bottleneck_backward.cu divides its work as this file says: sizes, arguments, a block's shared
// memory; and the functions that load.
#pragma once

#include "norm_backward.cuh"
#include "pack.cuh"

namespace densenet_ext::cuda {
namespace {

template <class T>
struct alignas(16) FeatureChannel {
  T scale, shift, mean, gain;  // gain = gamma rstd
};

template <class Math_, int kUnits_, bool kWide_, bool kMasked_>
struct Tiling {
  using Math = Math_;
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kUnits = kUnits_;     // of 16 bottleneck columns
  static constexpr bool kWide = kWide_;      // there are more columns than that
  static constexpr bool kMasked = kMasked_;  // there may be masks
  // Warps for 16 channels, and such groups of channels.
  static constexpr int kSplit = sizeof(S) == 2 && !kWide && !kMasked && kUnits % 2 == 0 ? 2 : 1;
  static constexpr int kGroups = sizeof(T) == 8 ? 4 : 8;
  static constexpr int kThreads = kGroups * kSplit * kWarp;
  static constexpr int kBlocks =
      kUnits == 3 && Math::kTensor ? 2 : 1;  // on a multiprocessor, at least
  static constexpr int kChannels = kGroups * 16;
  static constexpr int kWidth = kUnits * 16;
  static constexpr int kWarpUnits = kUnits / kSplit;        // of dW, of a warp
  static constexpr int kRows = sizeof(S) == 2 ? 32 : 16;    // of a tile
  static constexpr int kRowUnits = kRows / 16;              // of a tile
  static constexpr int kStages = 3;                         // tiles of x and G in shared memory
  static constexpr int kBuffers = kWide ? 1 : 2;            // of db
  static constexpr int kMapPitch = kChannels + kVector<S>;  // of x and G in shared memory
  static constexpr int kMapSize = kRows * kMapPitch;
  static constexpr int kDbPitch = kWidth + kVector<S>;
  static constexpr int kDbSize = kRows * kDbPitch;
  // A thread loads dv and b in vectors of four columns: it reads db_affine without bank conflicts.
  static constexpr int kDbVector = kVector<S> < 4 ? kVector<S> : 4;
  static constexpr int kDbVectors = kRows * kWidth / kDbVector;
  static constexpr int kThreadVectors = (kDbVectors + kThreads - 1) / kThreads;
  static constexpr int kSteps = kWidth / Math::kDepth;
  // Steps of a warp's columns of W in registers; the others are in shared memory, or stay in L2.
  static constexpr int kRegisterSteps = !Math::kTensor || kWide  ? 0
                                        : kSplit > 1             ? kSteps / 2
                                        : kMasked && kUnits == 3 ? kSteps / 3
                                                                 : kSteps;
  static constexpr bool kSharesWeight = 0 < kRegisterSteps && kRegisterSteps < kSteps;
  static constexpr int kSharedColumns = (kSteps - kRegisterSteps) * Math::kDepth;  // of W
  static constexpr int kWeightPitch = kSharedColumns + kVector<S>;
  static constexpr int kWeightSize = kSharesWeight ? kChannels * kWeightPitch : 0;
  static constexpr int kSharedBytes =
      (kStages * 2 * kMapSize + kBuffers * kDbSize + kWeightSize) * static_cast<int>(sizeof(S)) +
      kChannels * static_cast<int>(sizeof(FeatureChannel<T>)) +
      (kWide ? 0 : 3 * kWidth * static_cast<int>(sizeof(T)));
};

template <class S>
struct Arguments {
  using T = Arithmetic<S>;
  const S* x;        // [M, channels], x_pitch apart
  const S* grad_in;  // null: 0
  S* grad;
  int x_pitch, grad_in_pitch, grad_pitch;
  int rows, pixels;  // of all samples, of one
  int channels, width, pitch;
  int chunk;            // channels of a chunk, a multiple of 16
  const S* dv;          // [M, pitch]
  const S* bottleneck;  // [M, pitch]
  const T* db_affine;   // [3, width]
  const S* weight;      // transposed, [padded channels, padded width]
  int weight_pitch;
  PerChannel<ScaleShift<T>> scale_shift;
  PerChannel<T> pre_mask, post_mask;
  Norm<T> norm;
  int tiles_of_part;
  int panels;  // of kWidth bottleneck columns
  T* dweight;  // [parts, width, channels]
  T* sums;     // [parts, kSplit, 2, channels]
};

// A block's shared memory, its channels and tiles, and those of the thread's warp.
template <class K>
struct Block {
  using S = typename K::S;
  using T = typename K::T;
  S* maps;    // x and G of kStages tiles
  S* db;      // kBuffers
  S* weight;  // kSharedColumns of W
  FeatureChannel<T>* channels;
  T* db_affine;                                    // [3, kWidth]
  int g, t;                                        // of the lane, see mma.cuh
  int channel0, channel_end, warp_channel, split;  // split: which warp of those with its channels
  int tiles, tile, tile_end;
  bool makes_gradient;     // and dz; otherwise only a part of dW
  const S* global_weight;  // rows are the warp's channels

  DEVICE Block(const Arguments<S>& p, unsigned char* shared)
      : maps(reinterpret_cast<S*>(shared)),
        db(maps + K::kStages * 2 * K::kMapSize),
        weight(db + K::kBuffers * K::kDbSize),
        channels(reinterpret_cast<FeatureChannel<T>*>(weight + K::kWeightSize)),
        db_affine(reinterpret_cast<T*>(channels + K::kChannels)),
        g(lane_id() / 4),
        t(lane_id() % 4),
        channel0(static_cast<int>(blockIdx.x) * p.chunk),
        channel_end(channel0 + p.chunk < p.channels ? channel0 + p.chunk : p.channels),
        warp_channel(warp_id() % K::kGroups * 16),
        split(warp_id() / K::kGroups),
        tiles((p.rows + K::kRows - 1) / K::kRows),
        tile(static_cast<int>(blockIdx.y) * p.tiles_of_part),
        tile_end(tile + p.tiles_of_part < tiles ? tile + p.tiles_of_part : tiles),
        makes_gradient(!K::kWide || blockIdx.z == 0),
        global_weight(p.weight + (channel0 + warp_channel) * p.weight_pitch) {}
};

// The steps of W that a warp has in registers.
template <class K>
using RegisterWeight = typename K::Math::B[K::kRegisterSteps > 0 ? K::kRegisterSteps : 1];

// A tile in shared memory, and the thread's place in it.
template <class K>
struct Tile {
  using S = typename K::S;
  int row0, thread, g, t;
  bool idle;  // the warp has no channel
  S *x, *grad, *db;

  DEVICE Tile(const Block<K>& block, int index, int stage)
      : row0(index * K::kRows),
        thread(fresh(thread_id())),
        g(thread % kWarp / 4),
        t(thread % 4),
        idle(block.channel0 + thread / kWarp % K::kGroups * 16 >= block.channel_end),
        x(block.maps + stage * 2 * K::kMapSize),
        grad(x + K::kMapSize),
        db(block.db + (index - block.tile) % K::kBuffers * K::kDbSize) {}
};

template <class K, class S>
DEVICE void load_weight(const Arguments<S>& p, const Block<K>& block, RegisterWeight<K>& w) {
  using Math = typename K::Math;
  const S* const rows = block.global_weight;
#pragma unroll
  for (int k = 0; k < K::kRegisterSteps; ++k)
    Math::load_b_direct(w[k], [=](int n) { return rows + n * p.weight_pitch; }, k * Math::kDepth);
  if constexpr (K::kSharesWeight) {
    constexpr int kVectors = K::kSharedColumns / kVector<S>;
    for (int i = thread_id(); i < K::kChannels * kVectors; i += K::kThreads) {
      const int row = i / kVectors, column = i % kVectors * kVector<S>;
      st16(block.weight + row * K::kWeightPitch + column,
           ld16(p.weight + (block.channel0 + row) * static_cast<int64_t>(p.weight_pitch) +
                K::kRegisterSteps * Math::kDepth + column));
    }
  }
}

// Loads db_affine, which wide layers leave in L2, and the channels.
template <class K, class S>
DEVICE void load_channels(const Arguments<S>& p, const Block<K>& block) {
  using T = typename K::T;
  if constexpr (!K::kWide) {
    for (int i = thread_id(); i < 3 * K::kWidth; i += K::kThreads) {
      const int64_t c = i % K::kWidth;
      block.db_affine[i] = c < p.width ? p.db_affine[i / K::kWidth * p.width + c] : T(0);
    }
    __syncthreads();
  }
  for (int i = thread_id(); i < K::kChannels; i += K::kThreads) {
    const int c = block.channel0 + i;
    const ScaleShift<T> s = p.scale_shift.data[c];
    FeatureChannel<T> channel = {s.scale, s.shift, T(0), T(0)};
    if (c < block.channel_end) {
      channel.mean = p.norm.mean[c];
      channel.gain = p.norm.weight[c] / sqrt(p.norm.var[c] + static_cast<T>(p.norm.eps));
    }
    block.channels[i] = channel;
  }
}

// Starts the copy of a tile of x or G, the chunk's channels; elements that do not exist become 0. A
// thread has one vector of each kRowStep-th row.
template <class K, class S>
DEVICE void load_maps(const S* maps, int pitch, int rows, int channels, int row0, int channel0,
                      int thread, S* tile) {
  constexpr int kVectors = K::kChannels / kVector<S>, kRowStep = K::kThreads / kVectors;
  const int first = thread / kVectors, column = thread % kVectors * kVector<S>;
  const int c = channel0 + column, remaining = (channels - c) * static_cast<int>(sizeof(S));
  const int bytes = remaining >= 16 ? 16 : remaining > 0 ? remaining : 0;
#pragma unroll
  for (int i = 0; i < K::kRows; i += kRowStep) {
    const int row = row0 + first + i;
    const bool exists = row < rows && bytes > 0;
    cp_async16(tile + (first + i) * K::kMapPitch + column,
               exists ? maps + static_cast<int64_t>(row) * pitch + c : maps, exists ? bytes : 0);
  }
}
template <class K, class S>
DEVICE void load_tile(const Arguments<S>& p, const Block<K>& block, int tile, int stage,
                      int thread) {
  if (tile < block.tile_end) {
    const int row0 = tile * K::kRows;
    S* const target = block.maps + stage * 2 * K::kMapSize;
    load_maps<K>(p.x, p.x_pitch, p.rows, block.channel_end, row0, block.channel0, thread, target);
    if (block.makes_gradient && p.grad_in != nullptr)
      load_maps<K>(p.grad_in, p.grad_in_pitch, p.rows, block.channel_end, row0, block.channel0,
                   thread, target + K::kMapSize);
  }
  cp_async_commit();
}

// The vectors of dv and b that a thread turns into db.
template <class K>
struct DbOperands {
  Word<K::kDbVector * sizeof(typename K::S)> dv[K::kThreadVectors], b[K::kThreadVectors];
};

template <class K, class S>
DEVICE void load_operands(const Arguments<S>& p, int row0, int panel, int thread,
                          DbOperands<K>& operands) {
  constexpr int kRowVectors = K::kWidth / K::kDbVector, kBytes = K::kDbVector * sizeof(S);
#pragma unroll
  for (int j = 0; j < K::kThreadVectors; ++j) {
    const int i = thread + j * K::kThreads;
    const int row = row0 + i / kRowVectors;
    const int column = panel * K::kWidth + i % kRowVectors * K::kDbVector;
    if (i < K::kDbVectors && row < p.rows && column < p.pitch) {
      const int64_t index = static_cast<int64_t>(row) * p.pitch + column;
      operands.dv[j] = load_word<kBytes>(p.dv + index);
      operands.b[j] = load_word<kBytes>(p.bottleneck + index);
    }
  }
}

}  // namespace
}  // namespace densenet_ext::cuda
