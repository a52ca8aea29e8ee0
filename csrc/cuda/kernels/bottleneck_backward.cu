// The backward of norm1, ReLU and the 1x1 convolution: one read of x and of G, one write of G.
//
//   db = a0 dv + a1 + a2 b        (the gradient through norm2, [M, K2])
//   dW = db^T z, dz = db W        (z = relu(scale x + shift), made again)
//   dv1 = r [z > 0] dz            G += q gamma rstd dv1, S1 = sum dv1, S2 = sum dv1 xhat
//
// A block has a chunk of channels and a part of the rows: grid (chunks, parts). Chunks are of equal
// size, or all would wait for the fullest. A warp has 16 channels, alone or with a second one, and
// keeps their dW (all kUnits * 16 rows of it, or half of them), their S1 and S2, and their columns
// of W in registers until the last tile. For each tile: all threads form db in shared memory; the
// warp makes dz of 16 rows (all of the tile's, or half of them) by 16 channels, and with it z over
// x and the new G over the old one, in shared memory; it stores its G, and multiplies db^T by z.
// Meanwhile x and G of the next tiles come by cp.async, dv and b of the next one into registers. A
// barrier a tile; two where warps share their channels.
//
// Where K2 is wider than kUnits * 16, db is formed in panels of so many columns, one after the
// other for dz, and blocks with another grid.z make the other rows of dW; they leave G alone.
//
// Sums over parts: partial results in scratch memory, added in their order by a second kernel.
// Bytes a row: 3 C + 2 K2 for each chunk of channels (those 2 K2 from L2 but once).
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

// A tile in shared memory.
template <class S>
struct Tile {
  int row0, thread, g, t;
  S *x, *grad, *db;
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
DEVICE void update_gradient(const Arguments<S>& p, const Block<K>& block, const Tile<S>& tile,
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
DEVICE void store_gradient(const Arguments<S>& p, const Block<K>& block, const Tile<S>& tile,
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
template <class K, class S, class T>
DEVICE void multiply_z(const Block<K>& block, const Tile<S>& tile, bool idle,
                       T (&dweight)[K::kWarpUnits][2][4]) {
  using Math = typename K::Math;
#pragma unroll(Math::kTensor ? K::kRows / Math::kDepth : 1)
  for (int k = 0; k < (idle ? 0 : K::kRows); k += Math::kDepth) {
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

template <class Math, int kUnits, bool kWide, bool kMasked>
KERNEL __launch_bounds__(Tiling<Math, kUnits, kWide, kMasked>::kThreads,
                         Tiling<Math, kUnits, kWide, kMasked>::kBlocks)
    bottleneck_backward_kernel(Arguments<typename Math::Storage> p) {
  wait_for_earlier_kernels();
  using K = Tiling<Math, kUnits, kWide, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  const Block<K> block(p, shared);
  RegisterWeight<K> w;
  load_weight(p, block, w);
  load_channels(p, block);
  Sums<T> sums = {};
  T dweight[K::kWarpUnits][2][4] = {};  // rows of the unit by the warp's channels

  DbOperands<K> operands;
  const int first_panel = block.makes_gradient ? 1 % p.panels : static_cast<int>(blockIdx.z);
  for (int i = 0; i < K::kStages - 1; ++i) load_tile(p, block, block.tile + i, i, thread_id());
  if (block.tile < block.tile_end)
    load_operands<K>(p, block.tile * K::kRows, first_panel, thread_id(), operands);
  int stage = 0;
  for (int i = block.tile; i < block.tile_end; ++i) {
    const int thread = fresh(thread_id());
    const bool idle = block.channel0 + thread / kWarp % K::kGroups * 16 >= block.channel_end;
    S* const x = block.maps + stage * 2 * K::kMapSize;
    S* const db = block.db + (i - block.tile) % K::kBuffers * K::kDbSize;
    const Tile<S> tile = {i * K::kRows,    thread, thread % kWarp / 4, thread % 4, x,
                          x + K::kMapSize, db};
    T wide_dz[kWide ? K::kRowUnits : 1][2][4] = {};
    const int panels = block.makes_gradient ? p.panels : 1;
    // The panel of db that this block's dW needs comes last and stays.
    for (int j = 0; j < (kWide ? panels : 1); ++j) {
      const int panel = block.makes_gradient ? (j + 1) % p.panels : static_cast<int>(blockIdx.z);
      const bool is_last = !kWide || j == panels - 1;
      if (j > 0) {
        __syncthreads();  // the previous panel has been read
        load_operands<K>(p, tile.row0, panel, thread, operands);
      }
      form_db<K>(p, tile.row0, panel, thread, operands, block.db_affine, tile.db);
      if (is_last) cp_async_wait<K::kStages - 2>();
      __syncthreads();  // db and this tile's maps are stored; the previous maps have been read
      if (is_last) {
        load_tile(p, block, i + K::kStages - 1, stage > 0 ? stage - 1 : K::kStages - 1, thread);
        if (i + 1 < block.tile_end)
          load_operands<K>(p, tile.row0 + K::kRows, first_panel, thread, operands);
      }
      if constexpr (kWide) {
        if (block.makes_gradient) {
#pragma unroll
          for (int m = 0; m < K::kRowUnits; ++m)
            multiply_db(p, block, w, tile.db, m, panel, wide_dz[m]);
        }
      }
    }

    constexpr int kUnrolled = kWide ? K::kRowUnits : 1;  // more would need more registers
#pragma unroll kUnrolled
    for (int j = 0; j < (idle ? 0 : K::kRowUnits / K::kSplit); ++j) {
      const int m = block.split + j * K::kSplit;
      if constexpr (kWide) {
        update_gradient(p, block, tile, m, wide_dz[m], sums);
      } else {
        T dz[2][4] = {};
        multiply_db(p, block, w, tile.db, m, 0, dz);
        update_gradient(p, block, tile, m, dz, sums);
      }
      __syncwarp();
      if (block.makes_gradient) {
        store_gradient(p, block, tile, m);
        __syncwarp();  // lanes leave its loop at different times
      }
    }
    if constexpr (K::kSplit > 1) __syncthreads();  // all of z is stored
    multiply_z(block, tile, idle, dweight);
    if constexpr (K::kBuffers == 1) __syncthreads();  // db has been read
    stage = stage + 1 < K::kStages ? stage + 1 : 0;
  }
  cp_async_wait<0>();
  store_weight(p, block, dweight);
  if (block.makes_gradient) store_sums(p, block, sums);
}

// Sums over the parts: first blocks with kWarp times V elements of dW each, whose warps share out
// the parts, then blocks that end the backward of norm1.
template <class T>
struct SumArguments {
  const T* parts;  // [count, elements]
  int64_t count, elements;
  T* dweight;
  int64_t weight_blocks;
  NormBackward<T> norm;
};
template <class T, int V>
KERNEL __launch_bounds__(kMaxThreads) bottleneck_sum_kernel(SumArguments<T> p) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  if (blockIdx.x >= p.weight_blocks) {
    norm_backward_block(p.norm, blockIdx.x - p.weight_blocks, shared);
    return;
  }
  constexpr int kWarps = kMaxThreads / kWarp;
  T* const sums = reinterpret_cast<T*>(shared);
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kWarp + lane_id()) * V;
  T sum[V] = {};
  const auto add = [&](const T* source) {
    T addend[V];
    load<V>(source, addend);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += addend[v];
  };
  if (i < p.elements) {
#pragma unroll 8
    for (int64_t part = warp_id(); part < p.count; part += kWarps)
      add(p.parts + part * p.elements + i);
  }
  store<V>(sums + threadIdx.x * V, sum);
  __syncthreads();
  if (warp_id() != 0 || i >= p.elements) return;
  for (int warp = 1; warp < kWarps; ++warp) add(sums + (warp * kWarp + lane_id()) * V);
  store<V>(p.dweight + i, sum);
}

// Tiles of a part. There are as many parts as run at once and not one more, which would wait for
// all others; but no more partial sums than a half of what the kernel reads and writes anyway.
template <class K, class S>
int64_t tiles_of_part(const BottleneckBackward<S>& f, int64_t tiles, int64_t blocks_of_part) {
  const int64_t bytes = f.features.count() * (3 * f.channels + 2 * f.width) *
                        static_cast<int64_t>(sizeof(S)),
                partial = 2 * f.width * f.channels * static_cast<int64_t>(sizeof(Arithmetic<S>));
  const int64_t parts =
      std::min({K::kBlocks * multiprocessors() / blocks_of_part, bytes / 2 / partial, tiles});
  return ceil_div(tiles, std::max<int64_t>(parts, 1));
}

template <class Math, int kUnits, bool kWide, bool kMasked>
void launch_backward(const BottleneckBackward<typename Math::Storage>& f, Context& context) {
  using K = Tiling<Math, kUnits, kWide, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = f.features.count(), tiles = ceil_div(rows, K::kRows),
                chunks = ceil_div(f.channels, K::kChannels), panels = ceil_div(f.width, K::kWidth),
                depth = chunks * K::kChannels;
  const auto packed = pack<Math>(f, panels * K::kWidth, depth, true, context);
  Arguments<S> a = {};
  a.x = f.features.data, a.x_pitch = as_int(f.features.pitch);
  a.grad_in = f.grad_in.data, a.grad_in_pitch = as_int(f.grad_in.pitch);
  a.grad = f.grad.data, a.grad_pitch = as_int(f.grad.pitch);
  a.rows = as_int(rows), a.pixels = as_int(f.features.pixels());
  a.channels = as_int(f.channels), a.width = as_int(f.width);
  a.chunk = as_int(chunks > 0 ? round_up(ceil_div(f.channels, chunks), 16) : 0);
  a.dv = f.dv, a.bottleneck = f.bottleneck, a.pitch = as_int(round_up(f.width, kLanes));
  a.db_affine = f.db_affine;
  a.weight = packed.weight, a.weight_pitch = as_int(panels * K::kWidth);
  a.scale_shift = packed.scale_shift, a.pre_mask = f.pre_mask, a.post_mask = f.post_mask;
  as_int(f.features.samples * depth);  // an index of scale and shift
  a.norm = f.norm, a.panels = as_int(panels);
  a.tiles_of_part = as_int(tiles_of_part<K>(f, tiles, chunks * panels));
  const int64_t parts = tiles > 0 ? ceil_div(tiles, a.tiles_of_part) : 0;
  a.dweight = context.scratch<T>(parts * f.width * f.channels);
  a.sums = context.scratch<T>(parts * K::kSplit * 2 * f.channels);
  launch(context, bottleneck_backward_kernel<Math, kUnits, kWide, kMasked>, {chunks, parts, panels},
         K::kThreads, K::kSharedBytes, a);

  SumArguments<T> sum = {};
  sum.parts = a.dweight, sum.count = parts, sum.elements = f.width * f.channels;
  sum.dweight = f.dweight;
  sum.norm = norm_backward_of<T>(f, f.coef, a.sums, parts * K::kSplit, f.channels, rows);
  sum.norm.starts_gradient = false, sum.norm.mask = f.pre_mask;
  with_vector<T>(spacing(f.dweight, sum.elements * static_cast<int64_t>(sizeof(T))),
                 [&](auto vector) {
                   constexpr int V = decltype(vector)::value;
                   sum.weight_blocks = ceil_div(sum.elements, kWarp * V);
                   launch(context, bottleneck_sum_kernel<T, V>,
                          {sum.weight_blocks + narrow_blocks(f.channels)}, kMaxThreads,
                          kNormBackwardBytes, sum);
                 });
}

}  // namespace

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& f, Context& context) {
  dispatch_math<S>(context, [&](auto math) {
    using Math = decltype(math);
    const bool masked = has_sample_stride(f.scale_shift) || f.pre_mask.data != nullptr ||
                        f.post_mask.data != nullptr;
    if constexpr (!Math::kTensor) {
      launch_backward<Math, 3, true, true>(f, context);
    } else if (f.width <= 48) {
      masked ? launch_backward<Math, 3, false, true>(f, context)
             : launch_backward<Math, 3, false, false>(f, context);
    } else if (f.width <= 128) {
      masked ? launch_backward<Math, 8, false, true>(f, context)
             : launch_backward<Math, 8, false, false>(f, context);
    } else {
      launch_backward<Math, 8, true, true>(f, context);
    }
  });
  if (f.previous.weight != nullptr) bottleneck_forward<S>(f.previous, context);
}

#define INSTANTIATE(S) template void bottleneck_backward(const BottleneckBackward<S>&, Context&);
DENSENET_EXT_STORAGE_TYPES(INSTANTIATE)

}  // namespace densenet_ext::cuda
