// Joint backward of norm1, ReLU and the 1x1 convolution: one read of x and of G, one write of G.
//
//   db = t0 dv + t1 + t2 b        (the gradient through norm2, [M, K2])
//   dW = db^T z, dz = db W        (z = relu(scale x + shift), remade)
//   dv1 = r [z > 0] dz            G += q gamma rstd dv1, S1 = sum dv1, S2 = sum dv1 xhat
//
// A block has a chunk of channels and a part of the rows: grid (chunks, parts). Chunks are of the
// same size, or all would wait for the fullest. A warp owns 16 channels, alone or with a second
// one, and keeps their dW (all kUnits * 16 rows of it, or half of them), their S1 and S2, and their
// columns of W in registers until the last tile. For each tile: all threads form db in shared
// memory; the warp makes dz of 16 rows (all of the tile's, or half of them) by 16 channels, and
// with it z over x and the new G over the old one, in shared memory; it stores its G, and
// multiplies db^T by z. Meanwhile x and G of the next tiles come by cp.async, dv and b of the next
// one into registers. A barrier a tile; two where warps share their channels.
//
// Where K2 is wider than kUnits * 16, db is formed in parts, one after the other for dz, and blocks
// with another grid.z make the other rows of dW; they leave G alone.
//
// Sums over parts: partial results in scratch memory, added in their order by a second kernel.
// Bytes a row: 3 C + 2 K2 for each chunk of channels (those 2 K2 from L2 but once).
#include "norm_backward.cuh"
#include "pack.cuh"

namespace densenet_ext::cuda {
namespace {

// What the epilogue needs of a channel.
template <class T>
struct alignas(16) Channel {
  T scale, shift, mean, slope;  // slope = gamma rstd
};

template <class Math, int kUnits_, bool kWide_, bool kMasked_>
struct Shape {
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kUnits = kUnits_;     // of 16 bottleneck columns
  static constexpr bool kWide = kWide_;      // more columns than that
  static constexpr bool kMasked = kMasked_;  // there may be masks
  // Warps for 16 channels, and such groups of channels.
  static constexpr int kSplit = sizeof(S) == 2 && !kWide && !kMasked && kUnits % 2 == 0 ? 2 : 1;
  static constexpr int kGroups = sizeof(T) == 8 ? 4 : 8;
  static constexpr int kThreads = kGroups * kSplit * kWarp;
  static constexpr int kBlocks =
      kUnits == 3 && Math::kTensor ? 2 : 1;  // on a multiprocessor, at least
  static constexpr int kChannels = kGroups * 16;
  static constexpr int kWidth = kUnits * 16;
  static constexpr int kOwnUnits = kUnits / kSplit;        // of dW, of a warp
  static constexpr int kRows = sizeof(S) == 2 ? 32 : 16;   // of a tile
  static constexpr int kStages = 3;                        // tiles of x and G in shared memory
  static constexpr int kBuffers = kWide ? 1 : 2;           // of db
  static constexpr int kElements = 16 / sizeof(S);         // of 16 bytes
  static constexpr int kMapPitch = kChannels + kElements;  // of x and G in shared memory
  static constexpr int kMapSize = kRows * kMapPitch;
  static constexpr int kBottleneckPitch = kWidth + kElements;
  static constexpr int kBottleneckSize = kRows * kBottleneckPitch;
  // Of dv and b a thread has pieces of four columns: their tables are read without conflicts.
  static constexpr int kPiece = kElements < 4 ? kElements : 4;
  static constexpr int kPieces = kRows * kWidth / kPiece;
  static constexpr int kPiecesEach = (kPieces + kThreads - 1) / kThreads;
  static constexpr int kSteps = kWidth / Math::kDepth;
  // Of a warp's columns of W, what registers hold; the rest is in shared memory, or stays outside.
  static constexpr int kKept = !Math::kTensor || kWide  ? 0
                               : kSplit > 1             ? kSteps / 2
                               : kMasked && kUnits == 3 ? kSteps / 3
                                                        : kSteps;
  static constexpr bool kHasRest = 0 < kKept && kKept < kSteps;
  static constexpr int kRestPitch = (kSteps - kKept) * Math::kDepth + kElements;
  static constexpr int kRestSize = kHasRest ? kChannels * kRestPitch : 0;
  static constexpr int kSharedBytes =
      (kStages * 2 * kMapSize + kBuffers * kBottleneckSize + kRestSize) *
          static_cast<int>(sizeof(S)) +
      kChannels * static_cast<int>(sizeof(Channel<T>)) +
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
  Table<T> table;
  PerChannel<T> pre_mask, post_mask;
  Norm<T> norm;
  int tiles_each;  // of a part
  int blocks;      // of kWidth bottleneck columns
  T* dweight;      // [parts, width, channels]
  T* sums;         // [parts, kSplit, 2, channels]
};

// A tile of x or G, the chunk's channels; what does not exist becomes 0. A thread has the same
// piece of 16 bytes in each kPerPass-th row.
template <class K, class S>
DEVICE void load_maps(const S* maps, int pitch, int rows, int channels, int row0, int channel0,
                      int self, S* tile) {
  constexpr int kPieces = K::kChannels / K::kElements, kPerPass = K::kThreads / kPieces;
  const int first = self / kPieces, column = self % kPieces * K::kElements;
  const int c = channel0 + column, left = (channels - c) * static_cast<int>(sizeof(S));
  const int bytes = left >= 16 ? 16 : left > 0 ? left : 0;
#pragma unroll
  for (int i = 0; i < K::kRows; i += kPerPass) {
    const int row = row0 + first + i;
    const bool inside = row < rows && bytes > 0;
    cp_async16(tile + (first + i) * K::kMapPitch + column,
               inside ? maps + static_cast<int64_t>(row) * pitch + c : maps, inside ? bytes : 0);
  }
}

// The pieces of dv and b that a thread turns into db.
template <class K>
struct Pieces {
  Word<K::kPiece * sizeof(typename K::S)> dv[K::kPiecesEach], b[K::kPiecesEach];
};

template <class K, class S>
DEVICE void load_pieces(const Arguments<S>& p, int row0, int block, int self, Pieces<K>& pieces) {
  constexpr int kRowPieces = K::kWidth / K::kPiece, kBytes = K::kPiece * sizeof(S);
#pragma unroll
  for (int j = 0; j < K::kPiecesEach; ++j) {
    const int i = self + j * K::kThreads;
    const int row = row0 + i / kRowPieces;
    const int column = block * K::kWidth + i % kRowPieces * K::kPiece;
    if (i < K::kPieces && row < p.rows && column < p.pitch) {
      const int64_t at = static_cast<int64_t>(row) * p.pitch + column;
      pieces.dv[j] = load_word<kBytes>(p.dv + at);
      pieces.b[j] = load_word<kBytes>(p.bottleneck + at);
    }
  }
}

// db = t0 dv + t1 + t2 b, 0 where there is no row or no column. `table` is db_affine in shared
// memory, [3, kWidth]; wide ones stay where they are.
template <class Math, class K, class S, class T>
DEVICE void form_db(const Arguments<S>& p, int row0, int block, int self, const Pieces<K>& pieces,
                    const T* table, S* db) {
  constexpr int kRowPieces = K::kWidth / K::kPiece, V = K::kPiece;
#pragma unroll
  for (int j = 0; j < K::kPiecesEach; ++j) {
    const int i = self + j * K::kThreads;
    if (i >= K::kPieces) continue;
    const int row = i / kRowPieces, first = i % kRowPieces * V;
    const int c = block * K::kWidth + first, left = p.width - c;
    const int valid = row0 + row >= p.rows || left <= 0 ? 0 : left < V ? left : V;
    T t[3][V], v[V], b[V];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if constexpr (K::kWide) {
        load_each<V>(p.db_affine + static_cast<int64_t>(k) * p.width + c, valid, t[k]);
      } else {
        load<V>(table + k * K::kWidth + first, t[k]);
      }
    }
    load<V>(reinterpret_cast<const S*>(&pieces.dv[j]), v);
    load<V>(reinterpret_cast<const S*>(&pieces.b[j]), b);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] = affine(v[e], t[0][e], affine(b[e], t[2][e], t[1][e]));
    if (valid < V) {
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = e < valid ? v[e] : T(0);
    }
    store_operands<Math>(db + row * K::kBottleneckPitch + first, v);
  }
}

template <class Math, int kUnits, bool kWide, bool kMasked>
KERNEL __launch_bounds__(Shape<Math, kUnits, kWide, kMasked>::kThreads,
                         Shape<Math, kUnits, kWide, kMasked>::kBlocks)
    bottleneck_backward_kernel(Arguments<typename Math::Storage> p) {
  wait_for_earlier_kernels();
  using K = Shape<Math, kUnits, kWide, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  S* const maps = reinterpret_cast<S*>(shared);  // x and G of kStages tiles
  S* const buffers = maps + K::kStages * 2 * K::kMapSize;
  S* const rest = buffers + K::kBuffers * K::kBottleneckSize;  // of W
  Channel<T>* const channels = reinterpret_cast<Channel<T>*>(rest + K::kRestSize);
  T* const db_affine = reinterpret_cast<T*>(channels + K::kChannels);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int channel0 = static_cast<int>(blockIdx.x) * p.chunk;
  const int end = channel0 + p.chunk < p.channels ? channel0 + p.chunk : p.channels;
  const int own = warp_id() % K::kGroups * 16;  // first channel of the warp in the chunk
  const int share = warp_id() / K::kGroups;     // which of the warps with these channels it is
  const int tiles = (p.rows + K::kRows - 1) / K::kRows;
  const int first = static_cast<int>(blockIdx.y) * p.tiles_each;
  const int last = first + p.tiles_each < tiles ? first + p.tiles_each : tiles;
  const bool main = !kWide || blockIdx.z == 0;  // makes dz and G; the others only their part of dW

  const S* const weight =
      p.weight + (channel0 + own) * p.weight_pitch;  // rows are the warp's channels
  typename Math::B w[K::kKept > 0 ? K::kKept : 1];
#pragma unroll
  for (int k = 0; k < K::kKept; ++k)
    Math::load_b_direct(w[k], [=](int n) { return weight + n * p.weight_pitch; }, k * Math::kDepth);
  if constexpr (K::kHasRest) {
    constexpr int kPieces = (K::kSteps - K::kKept) * Math::kDepth / K::kElements;
    for (int i = static_cast<int>(threadIdx.x); i < K::kChannels * kPieces; i += K::kThreads) {
      const int row = i / kPieces, column = i % kPieces * K::kElements;
      st16(rest + row * K::kRestPitch + column,
           ld16(p.weight + (channel0 + row) * static_cast<int64_t>(p.weight_pitch) +
                K::kKept * Math::kDepth + column));
    }
  }
  if constexpr (!kWide) {
    for (int i = static_cast<int>(threadIdx.x); i < 3 * K::kWidth; i += K::kThreads) {
      const int64_t c = i % K::kWidth;
      db_affine[i] = c < p.width ? p.db_affine[i / K::kWidth * p.width + c] : T(0);
    }
    __syncthreads();
  }

  for (int i = static_cast<int>(threadIdx.x); i < K::kChannels; i += K::kThreads) {
    const int c = channel0 + i;
    const ScaleShift<T> entry = p.table.data[c];
    Channel<T> channel = {entry.scale, entry.shift, T(0), T(0)};
    if (c < end) {
      channel.mean = p.norm.mean[c];
      channel.slope = p.norm.weight[c] / sqrt(p.norm.var[c] + static_cast<T>(p.norm.eps));
    }
    channels[i] = channel;
  }
  T sum1[2][2] = {}, sum2[2][2] = {};  // of these channels
  T acc[K::kOwnUnits][2][4] = {};      // dW: rows of the unit by the warp's channels

  const auto load_tile = [&](int tile, int stage, int self) {
    if (tile < last) {
      const int row0 = tile * K::kRows;
      S* const to = maps + stage * 2 * K::kMapSize;
      load_maps<K>(p.x, p.x_pitch, p.rows, end, row0, channel0, self, to);
      if (main && p.grad_in != nullptr)
        load_maps<K>(p.grad_in, p.grad_in_pitch, p.rows, end, row0, channel0, self,
                     to + K::kMapSize);
    }
    cp_async_commit();
  };
  Pieces<K> pieces;
  const int start =
      main ? 1 % p.blocks : static_cast<int>(blockIdx.z);  // the part of db to form first
  for (int i = 0; i < K::kStages - 1; ++i) load_tile(first + i, i, static_cast<int>(threadIdx.x));
  if (first < last)
    load_pieces<K>(p, first * K::kRows, start, static_cast<int>(threadIdx.x), pieces);
  int stage = 0;
  for (int tile = first; tile < last; ++tile) {
    const int row0 = tile * K::kRows;
    const int self = fresh(static_cast<int>(threadIdx.x));
    const int g = self % kWarp / 4, t = self % 4;
    const bool idle = channel0 + self / kWarp % K::kGroups * 16 >= end;  // no channel here
    S* const x = maps + stage * 2 * K::kMapSize;
    S* const gradient = x + K::kMapSize;
    S* const db = buffers + (tile - first) % K::kBuffers * K::kBottleneckSize;
    const auto db_row = [=](int i) { return db + i * K::kBottleneckPitch; };
    // dz of 16 rows, from the part of db that is in shared memory.
    const auto multiply = [&](int m, int block, T(&dz)[2][4]) {
#pragma unroll(Math::kTensor ? K::kSteps : 1)
      for (int k = 0; k < K::kSteps; ++k) {
        typename Math::A a;
        Math::load_a(a, [=](int r) { return db_row(m * 16 + r); }, k * Math::kDepth);
        if (k < K::kKept) {
          Math::mma(dz, a, w[k < K::kKept ? k : 0]);
        } else {
          typename Math::B b;
          if constexpr (K::kHasRest) {
            Math::load_b(
                b, [=](int n) { return rest + (own + n) * K::kRestPitch; },
                (k - K::kKept) * Math::kDepth);
          } else {
            Math::load_b_direct(
                b, [=](int n) { return weight + n * p.weight_pitch; },
                block * K::kWidth + k * Math::kDepth);
          }
          Math::mma(dz, a, b);
        }
      }
    };
    T sums_of_parts[kWide ? K::kRows / 16 : 1][2][4] = {};
    const int parts = main ? p.blocks : 1;
    // The part of db that this block's dW needs comes last and stays.
    for (int i = 0; i < (kWide ? parts : 1); ++i) {
      const int block = main ? (i + 1) % p.blocks : static_cast<int>(blockIdx.z);
      const bool is_last = !kWide || i == parts - 1;
      if (i > 0) {
        __syncthreads();  // the part before has been read
        load_pieces<K>(p, row0, block, self, pieces);
      }
      form_db<Math, K>(p, row0, block, self, pieces, db_affine, db);
      if (is_last) cp_async_wait<K::kStages - 2>();
      __syncthreads();  // db and this tile's maps are there; the maps before have been read
      if (is_last) {
        load_tile(tile + K::kStages - 1, stage > 0 ? stage - 1 : K::kStages - 1, self);
        if (tile + 1 < last) load_pieces<K>(p, row0 + K::kRows, start, self, pieces);
      }
      if constexpr (kWide) {
        if (main) {
#pragma unroll
          for (int m = 0; m < K::kRows / 16; ++m) multiply(m, block, sums_of_parts[m]);
        }
      }
    }
    constexpr int kUnrolled =
        kWide ? K::kRows / 16 : 1;  // unrolled twice, it would need more registers

    // z over x, the new gradient over the old one; each element belongs to one thread.
#pragma unroll kUnrolled
    for (int i = 0; i < (idle ? 0 : K::kRows / 16 / K::kSplit); ++i) {
      const int m = share + i * K::kSplit;
      T dz[2][4] = {};
      if constexpr (!kWide) multiply(m, 0, dz);
      S values[2][2][2] = {}, before[2][2][2] = {};  // of x and G, all on their way at once
#pragma unroll
      for (int tile8 = 0; tile8 < 2; ++tile8) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (m * 16 + g + 8 * half) * K::kMapPitch + own + 8 * tile8 + 2 * t;
          load_raw<2>(x + at, 2, values[tile8][half]);
          if (main && p.grad_in != nullptr) load_raw<2>(gradient + at, 2, before[tile8][half]);
        }
      }
#pragma unroll
      for (int tile8 = 0; tile8 < 2; ++tile8) {
        const int column = own + 8 * tile8 + 2 * t;
        const int c = channel0 + column;
        const Channel<T> both[2] = {channels[column], channels[column + 1]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = m * 16 + g + 8 * half;
          const int n = (row0 + r < p.rows ? row0 + r : p.rows - 1) / p.pixels;
          T z[2], updated[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const T value = widen(values[tile8][half][j]), old = widen(before[tile8][half][j]);
            Channel<T> channel = kMasked ? channels[column + j] : both[j];  // fewer registers
            T q = T(1), r2 = T(1);  // masks before and after
            if constexpr (kMasked) {
              const ScaleShift<T> entry =
                  p.table.data[n * static_cast<int>(p.table.sample_stride) + c + j];
              channel.scale = entry.scale, channel.shift = entry.shift;
              if (c + j < end) {
                if (p.pre_mask.data != nullptr)
                  q = p.pre_mask.data[n * static_cast<int>(p.pre_mask.sample_stride) + c + j];
                if (p.post_mask.data != nullptr)
                  r2 = p.post_mask.data[n * static_cast<int>(p.post_mask.sample_stride) + c + j];
              }
            }
            const T v = affine(value, channel.scale, channel.shift);
            z[j] = relu(v);
            const T u = v > T(0) ? (kWide ? sums_of_parts[m] : dz)[tile8][2 * half + j] : T(0);
            const T dv = u * r2;
            updated[j] = affine(dv, q * channel.slope, old);
            sum1[tile8][j] += dv;
            sum2[tile8][j] = affine(dv, affine(value, q, -channel.mean), sum2[tile8][j]);
          }
          store_operands<Math>(x + r * K::kMapPitch + column, z);
          if (main) store<2>(gradient + r * K::kMapPitch + column, updated);
        }
      }
      __syncwarp();

      if (main) {  // these 16 rows of the warp's channels of G, in pieces of 16 bytes
        constexpr int kPieces = 16 / K::kElements;
#pragma unroll
        for (int i = self % kWarp; i < 16 * kPieces; i += kWarp) {
          const int column = own + i % kPieces * K::kElements;
          const int row = row0 + m * 16 + i / kPieces;
          const int c = channel0 + column;
          if (row >= p.rows || c >= end) continue;
          const S* const from = gradient + (m * 16 + i / kPieces) * K::kMapPitch + column;
          S* const to = p.grad + static_cast<int64_t>(row) * p.grad_pitch + c;
          if (c + K::kElements <= end) {
            st16_global(to, ld16(from));
          } else {
            for (int e = 0; c + e < end; ++e) to[e] = from[e];
          }
        }
        __syncwarp();  // lanes leave that loop at different times
      }
    }
    if constexpr (K::kSplit > 1) __syncthreads();  // all of z is there

#pragma unroll(Math::kTensor ? K::kRows / Math::kDepth : 1)
    for (int k = 0; k < (idle ? 0 : K::kRows); k += Math::kDepth) {
      typename Math::B z;
      Math::load_b_t(z, [=](int r) { return x + (k + r) * K::kMapPitch; }, own);
#pragma unroll
      for (int u = 0; u < K::kOwnUnits; ++u) {
        typename Math::A a;
        Math::load_a_t(a, [=](int r) { return db_row(k + r); }, (share * K::kOwnUnits + u) * 16);
        Math::mma(acc[u], a, z);
      }
    }
    if constexpr (K::kBuffers == 1) __syncthreads();  // db has been read
    stage = stage + 1 < K::kStages ? stage + 1 : 0;
  }
  cp_async_wait<0>();

  T* const dweight = p.dweight + static_cast<int64_t>(blockIdx.y) * p.width * p.channels;
#pragma unroll
  for (int u = 0; u < K::kOwnUnits; ++u) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = static_cast<int64_t>(blockIdx.z) * K::kWidth +
                            (share * K::kOwnUnits + u) * 16 + g + i / 2 * 8;
        const int c = channel0 + own + 8 * tile + 2 * t + i % 2;
        if (row < p.width && c < end) dweight[row * p.channels + c] = acc[u][tile][i];
      }
    }
  }
  if (!main) return;
  T* const sums = p.sums + (static_cast<int64_t>(blockIdx.y) * K::kSplit + share) * 2 * p.channels;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        sum1[tile][j] += __shfl_xor_sync(0xffffffffu, sum1[tile][j], lanes);
        sum2[tile][j] += __shfl_xor_sync(0xffffffffu, sum2[tile][j], lanes);
      }
      const int c = channel0 + own + 8 * tile + 2 * t + j;
      if (g == 0 && c < end) {
        sums[c] = sum1[tile][j];
        sums[p.channels + c] = sum2[tile][j];
      }
    }
  }
}

// The sums of the parts: first blocks with kWarp times V elements of dW each, whose warps share out
// the parts, then blocks for S1, S2 and what follows from them.
template <class T>
struct Finish {
  const T* dweight_parts;
  int64_t parts, elements;
  T* dweight;
  int64_t weight_blocks;
  NormBackward<T> norm;
};
template <class T, int V>
KERNEL __launch_bounds__(kMaxThreads) bottleneck_finish_kernel(Finish<T> p) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  if (blockIdx.x >= p.weight_blocks) {
    norm_backward_block(p.norm, blockIdx.x - p.weight_blocks, shared);
    return;
  }
  constexpr int kShares = kMaxThreads / kWarp;
  T* const sums = reinterpret_cast<T*>(shared);
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kWarp + lane_id()) * V;
  T sum[V] = {};
  const auto add = [&](const T* from) {
    T more[V];
    load<V>(from, more);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += more[v];
  };
  if (i < p.elements) {
#pragma unroll 8
    for (int64_t part = warp_id(); part < p.parts; part += kShares)
      add(p.dweight_parts + part * p.elements + i);
  }
  store<V>(sums + threadIdx.x * V, sum);
  __syncthreads();
  if (warp_id() != 0 || i >= p.elements) return;
  for (int share = 1; share < kShares; ++share) add(sums + (share * kWarp + lane_id()) * V);
  store<V>(p.dweight + i, sum);
}

template <class Math, int kUnits, bool kWide, bool kMasked>
void run(const BottleneckBackward<typename Math::Storage>& a, Context& context) {
  using K = Shape<Math, kUnits, kWide, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = a.features.count(), tiles = ceil_div(rows, K::kRows),
                chunks = ceil_div(a.channels, K::kChannels), blocks = ceil_div(a.width, K::kWidth);
  // As many parts as run at once and not one more, which would wait for all others; but no more
  // partial sums than a half of what the kernel reads and writes anyway.
  const int64_t bytes = rows * (3 * a.channels + 2 * a.width) * static_cast<int64_t>(sizeof(S)),
                partial = 2 * a.width * a.channels * static_cast<int64_t>(sizeof(T));
  int64_t parts = K::kBlocks * multiprocessors() / (chunks * blocks);
  if (parts > bytes / 2 / partial) parts = bytes / 2 / partial;
  if (parts > tiles) parts = tiles;
  if (parts < 1) parts = tiles > 0 ? 1 : 0;
  const int64_t tiles_each = parts > 0 ? ceil_div(tiles, parts) : 0;
  parts = tiles_each > 0 ? ceil_div(tiles, tiles_each) : 0;

  const int64_t depth = chunks * K::kChannels,
                chunk = chunks > 0 ? round_up(ceil_div(a.channels, chunks), 16) : 0;
  const auto packed = pack<Math>(a.weight, a.width, a.channels, depth, blocks * K::kWidth, true,
                                 a.scale_shift, a.features.samples, a.channels, depth, context);
  const Arguments<S> p = {a.features.data,
                          a.grad_in.data,
                          a.grad.data,
                          as_int(a.features.pitch),
                          as_int(a.grad_in.pitch),
                          as_int(a.grad.pitch),
                          as_int(rows),
                          as_int(a.features.pixels()),
                          as_int(a.channels),
                          as_int(a.width),
                          as_int(round_up(a.width, kLanes)),
                          as_int(chunk),
                          a.dv,
                          a.bottleneck,
                          a.db_affine,
                          packed.weight,
                          as_int(blocks * K::kWidth),
                          packed.table,
                          a.pre_mask,
                          a.post_mask,
                          a.norm,
                          as_int(tiles_each),
                          as_int(blocks),
                          context.scratch<T>(parts * a.width * a.channels),
                          context.scratch<T>(parts * K::kSplit * 2 * a.channels)};
  as_int(a.features.samples * depth);  // the tables are indexed so
  launch(context, bottleneck_backward_kernel<Math, kUnits, kWide, kMasked>, {chunks, parts, blocks},
         K::kThreads, K::kSharedBytes, p);
  const int64_t elements = a.width * a.channels;
  with_vector<T>(spacing(a.dweight, elements * static_cast<int64_t>(sizeof(T))), [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Finish<T> f = {p.dweight,
                         parts,
                         elements,
                         a.dweight,
                         ceil_div(elements, kWarp * V),
                         {a.norm, p.sums, parts * K::kSplit, a.channels, static_cast<double>(rows),
                          a.coef, a.dnorm_weight, a.dnorm_bias, false, a.pre_mask}};
    launch(context, bottleneck_finish_kernel<T, V>, {f.weight_blocks + narrow_blocks(a.channels)},
           kMaxThreads, kNormBackwardBytes, f);
  });
}

}  // namespace

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& a, Context& context) {
  dispatch_math<S>(context, [&](auto math) {
    using Math = decltype(math);
    const bool masked = a.scale_shift.scale.sample_stride != 0 ||
                        a.scale_shift.shift.sample_stride != 0 || a.pre_mask.data != nullptr ||
                        a.post_mask.data != nullptr;
    if constexpr (!Math::kTensor) {
      run<Math, 3, true, true>(a, context);
    } else if (a.width <= 48) {
      masked ? run<Math, 3, false, true>(a, context) : run<Math, 3, false, false>(a, context);
    } else if (a.width <= 128) {
      masked ? run<Math, 8, false, true>(a, context) : run<Math, 8, false, false>(a, context);
    } else {
      run<Math, 8, true, true>(a, context);
    }
  });
  if (a.previous.weight != nullptr) bottleneck_forward<S>(a.previous, context);
}

template void bottleneck_backward(const BottleneckBackward<float>&, Context&);
template void bottleneck_backward(const BottleneckBackward<double>&, Context&);
template void bottleneck_backward(const BottleneckBackward<BFloat16>&, Context&);
template void bottleneck_backward(const BottleneckBackward<Float16>&, Context&);

}  // namespace densenet_ext::cuda
