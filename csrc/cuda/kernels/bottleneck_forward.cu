// bottleneck = relu(scale * x + shift) W^T, and its moments.
//
// x [M, C] are rows of the feature buffer, W [K2, C]. A block makes kRows rows of the whole width
// (of kUnits * 16 columns where K2 is wider: then x is read once for each such part), so x is read
// once. A warp has 16 or 32 rows and all columns, so each x is normalized once: in registers,
// between ldmatrix and mma. With 32 rows, shared memory delivers W half as often; they need the
// registers of two warps. x and W come in chunks of 64 bytes of channels through a pipeline of
// cp.async. Bytes a row: (C + K2) of S; W comes from L2.
//
// The rounded values are laid out in shared memory: they leave from there in pieces of 16 bytes,
// and moments are those of them. Mean and centered sum of squares of a block's rows by column are
// merged in the order of the blocks by a second kernel, in two steps where there are many.
#include "pack.cuh"
#include "packed_access.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kRows = 128;  // of a block
constexpr int kChunkBytes = 64, kPitchBytes = kChunkBytes + 16;
constexpr int kStages = 3;

template <class Math, int kUnits_, bool kMasked_>
struct Shape {
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr bool kMasked = kMasked_;     // tables of samples may differ
  static constexpr int kUnits = kUnits_;        // of 16 columns
  static constexpr int kColumns = kUnits * 16;  // of a block
  static constexpr int kUnitsM = sizeof(S) == 2 && kUnits > 3 && !kMasked ? 2 : 1;  // of 16 rows
  static constexpr int kWarpRows = kUnitsM * 16, kThreads = kRows / kWarpRows * kWarp;
  static constexpr int kBlocks = !Math::kTensor ? 1
                                 : kUnits == 3  ? 3
                                                : 2;      // on a multiprocessor, at least
  static constexpr int kChunk = kChunkBytes / sizeof(S);  // channels
  // Of the products of a chunk: what the registers have room for.
  static constexpr int kUnroll =
      kUnits > 3 && (kMasked || sizeof(S) == 4) ? 1 : kChunk / Math::kDepth;
  static constexpr int kStageBytes = (kRows + kColumns) * kPitchBytes;
  static constexpr int kOutPitch = kColumns + 8;
  static constexpr int kOutBytes = kRows * kOutPitch * static_cast<int>(sizeof(S));
  static constexpr int kGroups = kThreads / (kColumns / 2);  // of threads, two columns each
  static constexpr int kEndBytes = kOutBytes + 2 * kGroups * kColumns * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kEndBytes ? kStages * kStageBytes : kEndBytes;
};

template <class S>
struct Arguments {
  using T = Arithmetic<S>;
  const S* x;  // [M, channels], x_pitch apart
  int x_pitch;
  int rows, pixels;     // of all samples, of one
  int channels, depth;  // depth: channels padded to whole chunks
  const S* weight;      // [>= width, depth]
  Table<T> table;
  S* out;  // [M, pitch]
  int width, pitch;
  T* partial;  // [blocks, 2, width]: mean and centered squares of a block's rows; or null
};

// Brings chunks of x and of W into shared memory; a thread has the same piece of 16 bytes in each
// kPerPass-th row. What does not exist becomes 0.
template <class K, class S>
class Loader {
 public:
  DEVICE Loader(const Arguments<S>& p, int row0, int column0)
      : x_(p.x + static_cast<int64_t>(row0 + own_row()) * p.x_pitch + own_channel()),
        weight_((column0 + own_row()) * p.depth + own_channel()),
        rows_(p.rows - row0 - own_row()),
        bytes_((p.channels - own_channel()) * static_cast<int>(sizeof(S))) {}

  // The next chunk.
  DEVICE void load(const Arguments<S>& p, unsigned char* stage) {
    stage += own_row() * kPitchBytes + own_channel() * static_cast<int>(sizeof(S));
    const int bytes = bytes_ >= 16 ? 16 : bytes_ > 0 ? bytes_ : 0;
#pragma unroll
    for (int i = 0; i < kRows; i += kPerPass) {
      const bool inside = i < rows_ && bytes > 0;
      cp_async16(stage + i * kPitchBytes, inside ? x_ + static_cast<int64_t>(i) * p.x_pitch : p.x,
                 inside ? bytes : 0);
    }
#pragma unroll
    for (int i = 0; i < K::kColumns; i += kPerPass) {
      if (K::kColumns % kPerPass == 0 || i + own_row() < K::kColumns)
        cp_async16(stage + (kRows + i) * kPitchBytes, p.weight + (weight_ + i * p.depth));
    }
    x_ += K::kChunk, weight_ += K::kChunk, bytes_ -= kChunkBytes;
  }

 private:
  static constexpr int kPieces = kChunkBytes / 16, kPerPass = K::kThreads / kPieces;
  DEVICE static int own_row() { return static_cast<int>(threadIdx.x) / kPieces; }
  DEVICE static int own_channel() {
    return static_cast<int>(threadIdx.x) % kPieces * (16 / static_cast<int>(sizeof(S)));
  }

  const S* x_;
  int weight_, rows_, bytes_;  // offset of the piece; rows and bytes from the thread's first on
};

// Mean and centered squares of the columns of `out`, of its first `count` rows.
template <class K, class S, class T>
DEVICE void column_moments(const S* out, int count, T* scratch, const Arguments<S>& p,
                           int column0) {
  const int column = static_cast<int>(threadIdx.x) % (K::kColumns / 2) * 2;
  const int group = static_cast<int>(threadIdx.x) / (K::kColumns / 2);
  const bool idle = group >= K::kGroups;
  struct Pair {
    T v[2];
  };
  // Sums over all rows, for the thread's two columns: term adds a value to the sum so far.
  const auto total = [&](T* sums, const auto& term) {
    T own[2] = {};
    for (int row = group; !idle && row < count; row += K::kGroups) {
      T v[2];
      load<2>(out + row * K::kOutPitch + column, v);
#pragma unroll
      for (int j = 0; j < 2; ++j) own[j] = term(v[j], j, own[j]);
    }
    if (!idle) store<2>(sums + group * K::kColumns + column, own);
    __syncthreads();
    own[0] = own[1] = T(0);
    for (int i = 0; i < K::kGroups; ++i) {
      T v[2];
      load<2>(sums + i * K::kColumns + column, v);
      own[0] += v[0], own[1] += v[1];
    }
    return Pair{own[0], own[1]};
  };
  const T share = T(1) / static_cast<T>(count);
  Pair mean = total(scratch, [](T v, int, T sum) { return sum + v; });
  mean.v[0] *= share, mean.v[1] *= share;  // any center near the mean would do
  const Pair square = total(scratch + K::kGroups * K::kColumns, [&](T v, int j, T sum) {
    return affine(v - mean.v[j], v - mean.v[j], sum);
  });
  if (group != 0) return;
  T* const partial = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * p.width + column0 + column;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (column0 + column + j < p.width) partial[j] = mean.v[j], partial[p.width + j] = square.v[j];
  }
}

template <class Math, int kUnits, bool kMasked>
KERNEL __launch_bounds__(Shape<Math, kUnits, kMasked>::kThreads,
                         Shape<Math, kUnits, kMasked>::kBlocks)
    bottleneck_forward_kernel(Arguments<typename Math::Storage> p) {
  wait_for_earlier_kernels();
  using K = Shape<Math, kUnits, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  const int row0 = static_cast<int>(blockIdx.x) * kRows;
  const int column0 = static_cast<int>(blockIdx.y) * K::kColumns;

  const ScaleShift<T>* low = p.table.data;  // of rows g and g + 8
  const ScaleShift<T>* high = p.table.data;
  if constexpr (kMasked) {
    static_assert(K::kUnitsM == 1, "a pair of tables");
    const int row = row0 + warp_id() * 16 + lane_id() / 4, last = p.rows - 1;
    const int stride = static_cast<int>(p.table.sample_stride);
    low += (row < last ? row : last) / p.pixels * stride;
    high += (row + 8 < last ? row + 8 : last) / p.pixels * stride;
  }

  T acc[K::kUnitsM][K::kUnits][2][4] = {};
  Loader<K, S> loader(p, row0, column0);
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk * K::kChunk < p.depth) loader.load(p, shared + chunk * K::kStageBytes);
    cp_async_commit();
  }
  int reading = 0;
  for (int c = 0; c < p.depth; c += K::kChunk) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const int writing = reading > 0 ? reading - 1 : kStages - 1;
    if (c + (kStages - 1) * K::kChunk < p.depth) loader.load(p, shared + writing * K::kStageBytes);
    cp_async_commit();

    const unsigned char* const stage = shared + reading * K::kStageBytes;
    const auto row_of = [&](int base) {
      return [=](int i) { return reinterpret_cast<const S*>(stage + (base + i) * kPitchBytes); };
    };
#pragma unroll(K::kUnroll)
    for (int k = 0; k < K::kChunk; k += Math::kDepth) {
      typename Math::A a[K::kUnitsM];
#pragma unroll
      for (int m = 0; m < K::kUnitsM; ++m) {
        Math::load_a(a[m], row_of(warp_id() * K::kWarpRows + m * 16), k);
        Math::norm_relu(a[m], low + c + k, high + c + k, !kMasked);
      }
#pragma unroll
      for (int u = 0; u < K::kUnits; ++u) {
        typename Math::B b;
        Math::load_b(b, row_of(kRows + u * 16), k);
#pragma unroll
        for (int m = 0; m < K::kUnitsM; ++m) Math::mma(acc[m][u], a[m], b);
      }
    }
    reading = reading + 1 < kStages ? reading + 1 : 0;
  }
  cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory is used for other things from here on

  const int self = fresh(static_cast<int>(threadIdx.x)),
            own_row = self / kWarp * K::kWarpRows + self % kWarp / 4;
  S* const out = reinterpret_cast<S*>(shared);
  const bool ragged = column0 + K::kColumns > p.width;  // zeros beyond the width, even for NaN
#pragma unroll
  for (int m = 0; m < K::kUnitsM; ++m) {
#pragma unroll
    for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int column = u * 16 + tile * 8 + self % 4 * 2;
        T(&v)[4] = acc[m][u][tile];
        if (ragged) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (column0 + column + i % 2 >= p.width) v[i] = T(0);
          }
        }
        S* const to = out + (own_row + m * 16) * K::kOutPitch + column;
        store<2>(to, {v[0], v[1]});
        store<2>(to + 8 * K::kOutPitch, {v[2], v[3]});
      }
    }
  }
  __syncthreads();
  const int count = p.rows - row0 < kRows ? p.rows - row0 : kRows;
  constexpr int kElements = 16 / sizeof(S), kPieces = K::kColumns / kElements;
  S* const rows_out = p.out + static_cast<int64_t>(row0) * p.pitch + column0;
#pragma unroll 4
  for (int i = self; i < count * kPieces; i += K::kThreads) {
    const int row = i / kPieces, column = i % kPieces * kElements;
    const S* const from = out + row * K::kOutPitch + column;
    S* const to = rows_out + row * p.pitch + column;
    if (column0 + column < p.pitch) st16_global(to, ld16(from));
  }
  if (p.partial != nullptr)
    column_moments<K>(out, count, reinterpret_cast<T*>(shared + K::kOutBytes), p, column0);
}

constexpr int kMergeColumns = 8, kMergeLanes = 64;
constexpr int64_t kMergeTiles = 512;  // of a block at most

template <class T>
struct Merge {
  const T* partial;  // [tiles, 2, width]: mean and centered squares
  int64_t tiles, tile_rows, rows, width;
  int64_t each;   // tiles of a block of grid.y
  T *mean, *m2;   // where the first such block puts its result
  int64_t pitch;  // from there to where the next one does
};

// Moments of the rows of many tiles: kMergeLanes threads a column, each every kMergeLanes-th tile,
// then their sums in pairs.
template <class T>
KERNEL __launch_bounds__(kMergeColumns* kMergeLanes) merge_moments_kernel(Merge<T> p) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  const int column = static_cast<int>(threadIdx.x) % kMergeColumns;
  const int lane = static_cast<int>(threadIdx.x) / kMergeColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeColumns + column;
  const int64_t first = blockIdx.y * p.each,
                last = first + p.each < p.tiles ? first + p.each : p.tiles;
  const auto total = [&](const auto& term) {
    double sum = 0;
#pragma unroll 4
    for (int64_t tile = first + lane; c < p.width && tile < last; tile += kMergeLanes) {
      const int64_t left = p.rows - tile * p.tile_rows;
      const T* const own = p.partial + tile * 2 * p.width + c;
      sum += term(static_cast<double>(left < p.tile_rows ? left : p.tile_rows),
                  static_cast<double>(own[0]), static_cast<double>(own[p.width]));
    }
    sums[threadIdx.x] = sum;
    for (int half = kMergeLanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) sums[threadIdx.x] = sum += sums[threadIdx.x + half * kMergeColumns];
    }
    __syncthreads();
    sum = sums[column];
    __syncthreads();
    return sum;
  };
  const int64_t left = p.rows - first * p.tile_rows, own = p.each * p.tile_rows;
  const double count = static_cast<double>(left <= 0 ? 1 : left < own ? left : own);
  const double center = total([](double n, double mu, double) { return n * mu; }) / count;
  const double spread = total([&](double n, double mu, double square) {
    return square + n * (mu - center) * (mu - center);
  });
  if (lane == 0 && c < p.width) {
    p.mean[blockIdx.y * p.pitch + c] = static_cast<T>(center);
    p.m2[blockIdx.y * p.pitch + c] = static_cast<T>(spread);
  }
}

template <class T>
void launch_merge(const Merge<T>& p, int64_t blocks, Context& context) {
  launch(context, merge_moments_kernel<T>, {ceil_div(p.width, kMergeColumns), blocks},
         kMergeColumns * kMergeLanes, kMergeColumns * kMergeLanes * sizeof(double), p);
}

template <class T>
void merge_moments(const T* partial, int64_t tiles, int64_t rows, int64_t width, T* mean, T* m2,
                   Context& context) {
  int64_t tile_rows = kRows;
  if (tiles > kMergeTiles) {
    const int64_t blocks = ceil_div(tiles, kMergeTiles);
    T* const merged = context.scratch<T>(blocks * 2 * width);
    launch_merge<T>(
        {partial, tiles, tile_rows, rows, width, kMergeTiles, merged, merged + width, 2 * width},
        blocks, context);
    partial = merged, tiles = blocks, tile_rows *= kMergeTiles;
  }
  launch_merge<T>({partial, tiles, tile_rows, rows, width, tiles, mean, m2, 0}, 1, context);
}

template <class Math, int kUnits, bool kMasked>
void run_as(const BottleneckForward<typename Math::Storage>& a, Context& context) {
  using K = Shape<Math, kUnits, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = a.features.count(), tiles = ceil_div(rows, kRows),
                columns = ceil_div(a.width, K::kColumns), depth = round_up(a.channels, K::kChunk);
  const auto packed = pack<Math>(a.weight, a.width, a.channels, columns * K::kColumns, depth, false,
                                 a.scale_shift, a.features.samples, a.channels, depth, context);
  T* const partial = a.mean ? context.scratch<T>(tiles * 2 * a.width) : nullptr;
  const Arguments<S> p = {a.features.data,
                          as_int(a.features.pitch),
                          as_int(rows),
                          as_int(a.features.pixels()),
                          as_int(a.channels),
                          as_int(depth),
                          packed.weight,
                          packed.table,
                          a.bottleneck,
                          as_int(a.width),
                          as_int(round_up(a.width, kLanes)),
                          partial};
  as_int(a.features.samples * depth);  // the tables are indexed so
  launch(context, bottleneck_forward_kernel<Math, kUnits, kMasked>, {tiles, columns}, K::kThreads,
         K::kSharedBytes, p);
  if (a.mean) merge_moments<T>(partial, tiles, rows, a.width, a.mean, a.m2, context);
}

template <class Math, int kUnits>
void run(const BottleneckForward<typename Math::Storage>& a, Context& context) {
  if (!Math::kTensor || a.scale_shift.scale.sample_stride != 0 ||
      a.scale_shift.shift.sample_stride != 0)
    return run_as<Math, kUnits, true>(a, context);
  if constexpr (Math::kTensor) run_as<Math, kUnits, false>(a, context);
}

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>& a, Context& context) {
  dispatch_math<S>(context, [&](auto math) {
    using Math = decltype(math);
    if constexpr (sizeof(S) == 8) {
      run<Math, 3>(a, context);
    } else {
      a.width <= 48 ? run<Math, 3>(a, context) : run<Math, 8>(a, context);
    }
  });
}

template void bottleneck_forward(const BottleneckForward<float>&, Context&);
template void bottleneck_forward(const BottleneckForward<double>&, Context&);
template void bottleneck_forward(const BottleneckForward<BFloat16>&, Context&);
template void bottleneck_forward(const BottleneckForward<Float16>&, Context&);

}  // namespace densenet_ext::cuda
