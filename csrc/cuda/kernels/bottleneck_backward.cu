// Joint backward of norm1, ReLU and the 1x1 convolution: one read of x and of G, one write of G.
//
//   db = t0 dv + t1 + t2 b        (the gradient through norm2, [M, K2])
//   dW = db^T z, dz = db W        (z = relu(scale x + shift), remade)
//   dv1 = r [z > 0] dz            G += q gamma rstd dv1, S1 = sum dv1, S2 = sum dv1 xhat
//
// A block has a chunk of channels and a part of the rows: grid (chunks, parts). A warp owns 16
// channels, all rows of a tile, and keeps their dW (kUnits * 16 rows of it), their S1 and S2, and
// their columns of W in registers until the last tile. For each tile: all threads form db in shared
// memory; the warp makes dz of 16 rows by 16 channels, and with it z over x and the new G over the
// old one, in shared memory; it stores its G, and multiplies db^T by its z. x and G of the next
// tile come by cp.async meanwhile, dv and b into registers. Two barriers a tile.
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

template <class Math, int kUnits_>
struct Shape {
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kUnits = kUnits_;                 // of 16 bottleneck columns
  static constexpr int kWarps = sizeof(T) == 8 ? 4 : 8;  // of 16 channels each
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks =
      kUnits == 3 && Math::kTensor ? 2 : 1;  // on a multiprocessor, at least
  static constexpr int kChannels = kWarps * 16;
  static constexpr int kWidth = kUnits * 16;
  static constexpr int kRows = sizeof(S) == 2 ? 32 : 16;   // of a tile
  static constexpr int kElements = 16 / sizeof(S);         // of 16 bytes
  static constexpr int kMapPitch = kChannels + kElements;  // of x and G in shared memory
  static constexpr int kBottleneckPitch = kWidth + kElements;
  static constexpr int kMapBytes = kRows * kMapPitch * sizeof(S);
  static constexpr int kSharedBytes = 4 * kMapBytes +
                                      kRows * kBottleneckPitch * static_cast<int>(sizeof(S)) +
                                      kChannels * static_cast<int>(sizeof(Channel<T>));
  static constexpr int kPieces = kRows * kWidth / kElements;  // of dv and b, 16 bytes each
  static constexpr int kPiecesEach = (kPieces + kThreads - 1) / kThreads;
  static constexpr int kSteps = kWidth / Math::kDepth;
};

template <class S>
struct Arguments {
  using T = Arithmetic<S>;
  Rows<const S> x;
  Rows<const S> grad_in;  // data null: 0
  Rows<S> grad;
  int64_t channels, width, pitch;
  const S* dv;          // [M, pitch]
  const S* bottleneck;  // [M, pitch]
  const T* db_table;    // [3, width]
  const S* weight;      // transposed, [padded channels, padded width]
  int64_t weight_pitch;
  Table<T> table;
  PerChannel<T> pre_mask, post_mask;
  Norm<T> norm;
  int tiles_each;  // of a part
  int blocks;      // of kWidth bottleneck columns
  T* dweight;      // [parts, width, channels]
  T* sums;         // [parts, 2, channels]
};

// A tile of x or G, the chunk's channels; what does not exist becomes 0.
template <class K, class S>
DEVICE void load_maps(const Rows<const S>& maps, int64_t channels, int64_t row0, int64_t channel0,
                      S* tile) {
  constexpr int kPieces = K::kChannels / K::kElements;
  const int64_t rows = maps.count();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < K::kRows * kPieces; i += K::kThreads) {
    const int64_t row = row0 + i / kPieces, c = channel0 + i % kPieces * K::kElements;
    const int64_t left = (channels - c) * static_cast<int64_t>(sizeof(S));
    const int bytes = row >= rows || left <= 0 ? 0 : left >= 16 ? 16 : static_cast<int>(left);
    cp_async16(tile + i / kPieces * K::kMapPitch + i % kPieces * K::kElements,
               bytes > 0 ? maps.row(row) + c : maps.data, bytes);
  }
}

// The pieces of dv and b that a thread turns into db.
template <class K>
struct Pieces {
  Bytes16 dv[K::kPiecesEach], b[K::kPiecesEach];
};

template <class K, class S>
DEVICE void load_pieces(const Arguments<S>& p, int64_t row0, int block, Pieces<K>& pieces) {
  constexpr int kRowPieces = K::kWidth / K::kElements;
#pragma unroll
  for (int j = 0; j < K::kPiecesEach; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * K::kThreads;
    const int64_t row = row0 + i / kRowPieces;
    const int64_t column = static_cast<int64_t>(block) * K::kWidth + i % kRowPieces * K::kElements;
    if (i < K::kPieces && row < p.x.count() && column < p.pitch) {
      pieces.dv[j] = ld16(p.dv + row * p.pitch + column);
      pieces.b[j] = ld16(p.bottleneck + row * p.pitch + column);
    }
  }
}

// db = t0 dv + t1 + t2 b, 0 where there is no row or no column.
template <class Math, class K, class S>
DEVICE void form_db(const Arguments<S>& p, int64_t row0, int block, const Pieces<K>& pieces,
                    S* db) {
  using T = typename Math::T;
  constexpr int kRowPieces = K::kWidth / K::kElements;
#pragma unroll
  for (int j = 0; j < K::kPiecesEach; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * K::kThreads;
    if (i >= K::kPieces) continue;
    const int row = i / kRowPieces, first = i % kRowPieces * K::kElements;
    const bool exists = row0 + row < p.x.count();
    Bytes16 out;
    S* const values = reinterpret_cast<S*>(&out);
    const S* const dv = reinterpret_cast<const S*>(&pieces.dv[j]);
    const S* const b = reinterpret_cast<const S*>(&pieces.b[j]);
#pragma unroll
    for (int e = 0; e < K::kElements; ++e) {
      const int64_t c = static_cast<int64_t>(block) * K::kWidth + first + e;
      T v = T(0);
      if (exists && c < p.width)
        v = affine(widen(dv[e]), p.db_table[c],
                   affine(widen(b[e]), p.db_table[2 * p.width + c], p.db_table[p.width + c]));
      values[e] = Math::operand(v);
    }
    st16(db + row * K::kBottleneckPitch + first, out);
  }
}

template <class Math, int kUnits, bool kWide>
KERNEL __launch_bounds__(Shape<Math, kUnits>::kThreads, Shape<Math, kUnits>::kBlocks)
    bottleneck_backward_kernel(Arguments<typename Math::Storage> p) {
  using K = Shape<Math, kUnits>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  S* const maps = reinterpret_cast<S*>(shared);  // x, G of this tile and of the next
  S* const db = maps + 4 * K::kRows * K::kMapPitch;
  Channel<T>* const table = reinterpret_cast<Channel<T>*>(db + K::kRows * K::kBottleneckPitch);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t channel0 = static_cast<int64_t>(blockIdx.x) * K::kChannels;
  const int own = warp_id() * 16;  // first channel of the warp in the chunk
  const int64_t rows = p.x.count();
  const int pixels = static_cast<int>(p.x.pixels());
  const int tiles = static_cast<int>(ceil_div(rows, static_cast<int64_t>(K::kRows)));
  const int first = static_cast<int>(blockIdx.y) * p.tiles_each;
  const int last = first + p.tiles_each < tiles ? first + p.tiles_each : tiles;
  const bool main = !kWide || blockIdx.z == 0;  // makes dz and G; the others only their part of dW
  const bool per_sample =
      p.table.sample_stride != 0 || p.pre_mask.data != nullptr || p.post_mask.data != nullptr;

  const S* const weight =
      p.weight + (channel0 + own) * p.weight_pitch;  // rows are the warp's channels
  constexpr bool kKeepWeight = Math::kTensor && !kWide;
  typename Math::B w[kKeepWeight ? K::kSteps : 1];
  if constexpr (kKeepWeight) {
#pragma unroll
    for (int k = 0; k < K::kSteps; ++k)
      Math::load_b_direct(
          w[k], [=](int n) { return weight + n * p.weight_pitch; }, k * Math::kDepth);
  }

  for (int i = static_cast<int>(threadIdx.x); i < K::kChannels; i += K::kThreads) {
    const int64_t c = channel0 + i;
    const ScaleShift<T> entry = p.table.data[c];
    Channel<T> channel = {entry.scale, entry.shift, T(0), T(0)};
    if (c < p.channels) {
      channel.mean = p.norm.mean[c];
      channel.slope = p.norm.weight[c] / sqrt(p.norm.var[c] + static_cast<T>(p.norm.eps));
    }
    table[i] = channel;
  }
  T sum1[2][2] = {}, sum2[2][2] = {};  // of the thread's channels, 2t and 2t+1 of each 8
  T acc[K::kUnits][2][4] = {};         // dW: rows of the unit by the warp's channels

  const auto load_tile = [&](int tile) {
    const int64_t row0 = static_cast<int64_t>(tile) * K::kRows;
    S* const to = maps + tile % 2 * 2 * K::kRows * K::kMapPitch;
    load_maps<K>(p.x, p.channels, row0, channel0, to);
    if (main && p.grad_in.data != nullptr)
      load_maps<K>(p.grad_in, p.channels, row0, channel0, to + K::kRows * K::kMapPitch);
    cp_async_commit();
  };
  Pieces<K> pieces;
  const int start =
      main ? 1 % p.blocks : static_cast<int>(blockIdx.z);  // the part of db to form first
  if (first < last) {
    load_tile(first);
    load_pieces<K>(p, static_cast<int64_t>(first) * K::kRows, start, pieces);
  }
  for (int tile = first; tile < last; ++tile) {
    const int64_t row0 = static_cast<int64_t>(tile) * K::kRows;
    S* const x = maps + tile % 2 * 2 * K::kRows * K::kMapPitch;
    S* const gradient = x + K::kRows * K::kMapPitch;
    const auto db_row = [=](int i) { return db + i * K::kBottleneckPitch; };
    // dz of 16 rows, from the part of db that is in shared memory.
    const auto multiply = [&](int m, int block, T(&dz)[2][4]) {
#pragma unroll(Math::kTensor ? K::kSteps : 1)
      for (int k = 0; k < K::kSteps; ++k) {
        typename Math::A a;
        Math::load_a(a, [=](int r) { return db_row(m * 16 + r); }, k * Math::kDepth);
        if constexpr (kKeepWeight) {
          Math::mma(dz, a, w[k]);
        } else {
          typename Math::B b;
          Math::load_b_direct(
              b, [=](int n) { return weight + n * p.weight_pitch; },
              block * K::kWidth + k * Math::kDepth);
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
        load_pieces<K>(p, row0, block, pieces);
      }
      form_db<Math, K>(p, row0, block, pieces, db);
      if (is_last) cp_async_wait<0>();
      __syncthreads();
      if (is_last && tile + 1 < last) {
        load_tile(tile + 1);
        load_pieces<K>(p, row0 + K::kRows, start, pieces);
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
    const int64_t sample0 = row0 / pixels;
    const int pixel0 = static_cast<int>(row0 - sample0 * pixels);

    // z over x, the new gradient over the old one; each element belongs to one thread.
#pragma unroll kUnrolled
    for (int m = 0; m < K::kRows / 16; ++m) {
      T dz[2][4] = {};
      if constexpr (!kWide) multiply(m, 0, dz);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = m * 16 + g + 8 * half;
        const int64_t row = row0 + r;
        const int64_t n = per_sample ? sample0 + (pixel0 + (row < rows ? r : 0)) / pixels : 0;
#pragma unroll
        for (int tile8 = 0; tile8 < 2; ++tile8) {
          const int column = own + 8 * tile8 + 2 * t;
          const int64_t c = channel0 + column;
          T value[2], old[2] = {T(0), T(0)}, z[2], updated[2];
          load<2>(x + r * K::kMapPitch + column, value);
          if (main && p.grad_in.data != nullptr) load<2>(gradient + r * K::kMapPitch + column, old);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            Channel<T> channel = table[column + j];
            T q = T(1), r2 = T(1);  // masks before and after
            if (per_sample) {
              const ScaleShift<T> own = p.table.row(n)[c + j];
              channel.scale = own.scale, channel.shift = own.shift;
              if (c + j < p.channels) {
                if (p.pre_mask.data != nullptr) q = p.pre_mask.row(n)[c + j];
                if (p.post_mask.data != nullptr) r2 = p.post_mask.row(n)[c + j];
              }
            }
            const T v = affine(value[j], channel.scale, channel.shift);
            z[j] = relu(v);
            const T u = v > T(0) ? (kWide ? sums_of_parts[m] : dz)[tile8][2 * half + j] : T(0);
            const T dv = u * r2;
            updated[j] = affine(dv, q * channel.slope, old[j]);
            sum1[tile8][j] += dv;
            sum2[tile8][j] = affine(dv, affine(value[j], q, -channel.mean), sum2[tile8][j]);
          }
          store_operands<Math>(x + r * K::kMapPitch + column, z);
          if (main) store<2>(gradient + r * K::kMapPitch + column, updated);
        }
      }
    }
    __syncwarp();

    if (main) {  // the warp's channels of G, in pieces of 16 bytes
      constexpr int kPieces = 16 / K::kElements;
#pragma unroll 1
      for (int i = lane_id(); i < K::kRows * kPieces; i += kWarp) {
        const int column = own + i % kPieces * K::kElements;
        const int64_t row = row0 + i / kPieces, c = channel0 + column;
        if (row >= rows || c >= p.channels) continue;
        const S* const from = gradient + i / kPieces * K::kMapPitch + column;
        S* const to = p.grad.row(row) + c;
        if (c + K::kElements <= p.channels) {
          st16(to, ld16(from));
        } else {
          for (int e = 0; c + e < p.channels; ++e) to[e] = from[e];
        }
      }
      __syncwarp();  // lanes leave that loop at different times
    }
#pragma unroll(Math::kTensor ? K::kRows / Math::kDepth : 1)
    for (int k = 0; k < K::kRows; k += Math::kDepth) {
      typename Math::B z;
      Math::load_b_t(z, [=](int r) { return x + (k + r) * K::kMapPitch; }, own);
#pragma unroll
      for (int u = 0; u < K::kUnits; ++u) {
        typename Math::A a;
        Math::load_a_t(a, [=](int r) { return db_row(k + r); }, u * 16);
        Math::mma(acc[u], a, z);
      }
    }
    __syncthreads();  // db and this tile's maps have been read
  }

  T* const dweight = p.dweight + static_cast<int64_t>(blockIdx.y) * p.width * p.channels;
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = static_cast<int64_t>(blockIdx.z) * K::kWidth + u * 16 + g + i / 2 * 8;
        const int64_t c = channel0 + own + 8 * tile + 2 * t + i % 2;
        if (row < p.width && c < p.channels) dweight[row * p.channels + c] = acc[u][tile][i];
      }
    }
  }
  if (!main) return;
  T* const sums = p.sums + static_cast<int64_t>(blockIdx.y) * 2 * p.channels;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        sum1[tile][j] += __shfl_xor_sync(0xffffffffu, sum1[tile][j], lanes);
        sum2[tile][j] += __shfl_xor_sync(0xffffffffu, sum2[tile][j], lanes);
      }
      const int64_t c = channel0 + own + 8 * tile + 2 * t + j;
      if (g == 0 && c < p.channels) {
        sums[c] = sum1[tile][j];
        sums[p.channels + c] = sum2[tile][j];
      }
    }
  }
}

// The sums of the parts: first blocks with kWarp elements of dW each, whose warps share out the
// parts, then blocks for S1, S2 and what follows from them.
template <class T>
struct Finish {
  const T* dweight_parts;
  int64_t parts, elements;
  T* dweight;
  int64_t weight_blocks;
  NormBackward<T> norm;
};
template <class T>
KERNEL __launch_bounds__(kMaxThreads) bottleneck_finish_kernel(Finish<T> p) {
  DYNAMIC_SHARED(shared);
  if (blockIdx.x >= p.weight_blocks) {
    norm_backward_block(p.norm, blockIdx.x - p.weight_blocks, shared);
    return;
  }
  constexpr int kShares = kMaxThreads / kWarp;
  T* const sums = reinterpret_cast<T*>(shared);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane_id();
  T sum = T(0);
  if (i < p.elements) {
#pragma unroll 8
    for (int64_t part = warp_id(); part < p.parts; part += kShares)
      sum += p.dweight_parts[part * p.elements + i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp_id() != 0 || i >= p.elements) return;
  for (int share = 1; share < kShares; ++share) sum += sums[share * kWarp + lane_id()];
  p.dweight[i] = sum;
}

template <class Math, int kUnits, bool kWide>
void run(const BottleneckBackward<typename Math::Storage>& a, Context& context) {
  using K = Shape<Math, kUnits>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = a.features.count(), tiles = ceil_div(rows, K::kRows),
                chunks = ceil_div(a.channels, K::kChannels), blocks = ceil_div(a.width, K::kWidth);
  // As many parts as make two blocks for each multiprocessor and not one more, which would wait for
  // all others; but no more partial sums than a half of what the kernel reads and writes anyway.
  const int64_t bytes = rows * (3 * a.channels + 2 * a.width) * static_cast<int64_t>(sizeof(S)),
                partial = 2 * a.width * a.channels * static_cast<int64_t>(sizeof(T));
  int64_t parts = 2 * multiprocessors() / (chunks * blocks);
  if (parts > bytes / 2 / partial) parts = bytes / 2 / partial;
  if (parts > tiles) parts = tiles;
  if (parts < 1) parts = tiles > 0 ? 1 : 0;
  const int64_t tiles_each = parts > 0 ? ceil_div(tiles, parts) : 0;
  parts = tiles_each > 0 ? ceil_div(tiles, tiles_each) : 0;

  const int64_t depth = chunks * K::kChannels;
  const auto packed = pack<Math>(a.weight, a.width, a.channels, depth, blocks * K::kWidth, true,
                                 a.table, a.features.samples, a.channels, depth, context);
  const Arguments<S> p = {a.features,
                          a.grad_in,
                          a.grad,
                          a.channels,
                          a.width,
                          round_up(a.width, kLanes),
                          a.dv,
                          a.bottleneck,
                          a.db_table,
                          packed.weight,
                          blocks * K::kWidth,
                          packed.table,
                          a.pre_mask,
                          a.post_mask,
                          a.norm,
                          static_cast<int>(tiles_each),
                          static_cast<int>(blocks),
                          context.scratch<T>(parts * a.width * a.channels),
                          context.scratch<T>(parts * 2 * a.channels)};
  launch(context, bottleneck_backward_kernel<Math, kUnits, kWide>, {chunks, parts, blocks},
         K::kThreads, K::kSharedBytes, p);
  const int64_t elements = a.width * a.channels;
  const Finish<T> f = {p.dweight,
                       parts,
                       elements,
                       a.dweight,
                       ceil_div(elements, kWarp),
                       {a.norm, p.sums, parts, a.channels, static_cast<double>(rows), a.coef,
                        a.dnorm_weight, a.dnorm_bias, false, a.pre_mask}};
  launch(context, bottleneck_finish_kernel<T>, {f.weight_blocks + narrow_blocks(a.channels)},
         kMaxThreads, kNormBackwardBytes, f);
}

}  // namespace

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& a, Context& context) {
  dispatch_math<S>(context, [&](auto math) {
    using Math = decltype(math);
    if constexpr (!Math::kTensor) {
      run<Math, 3, true>(a, context);
    } else if (a.width <= 48) {
      run<Math, 3, false>(a, context);
    } else if (a.width <= 128) {
      run<Math, 8, false>(a, context);
    } else {
      run<Math, 8, true>(a, context);
    }
  });
}

template void bottleneck_backward(const BottleneckBackward<float>&, Context&);
template void bottleneck_backward(const BottleneckBackward<double>&, Context&);
template void bottleneck_backward(const BottleneckBackward<BFloat16>&, Context&);
template void bottleneck_backward(const BottleneckBackward<Float16>&, Context&);

}  // namespace densenet_ext::cuda
