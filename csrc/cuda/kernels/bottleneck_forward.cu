// bottleneck = relu(scale * x + shift) W^T, and its moments.
//
// x [M, C] are rows of the feature buffer, W [K2, C]. A block makes kRows rows of the whole width
// (of kUnits * 16 columns where K2 is wider: then x is read once for each such part), so x is read
// once. A warp has 16 rows and all columns, so each x is normalized once: in registers, between
// ldmatrix and mma. x and W come in chunks of 64 bytes of channels through a pipeline of cp.async.
// Bytes a row: (C + K2) of S; W comes from L2.
//
// The rounded values are laid out in shared memory: they leave from there in pieces of 16 bytes,
// and moments are those of them. Mean and centered sum of squares of a block's rows by column are
// merged in the order of the blocks by a second kernel, in two steps where there are many.
#include "pack.cuh"
#include "vector.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kRows = kWarps * 16;  // of a block
constexpr int kChunkBytes = 64, kPitchBytes = kChunkBytes + 16;
constexpr int kStages = 3;

template <class Math, int kUnits_>
struct Shape {
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kUnits = kUnits_;        // of 16 columns
  static constexpr int kColumns = kUnits * 16;  // of a block
  static constexpr int kBlocks = !Math::kTensor ? 1
                                 : kUnits == 3  ? 3
                                                : 2;      // on a multiprocessor, at least
  static constexpr int kChunk = kChunkBytes / sizeof(S);  // channels
  // Of the products of a chunk; all of them would need more registers than TF32 has here.
  static constexpr int kUnroll = sizeof(S) == 4 && kUnits > 3 ? 1 : kChunk / Math::kDepth;
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
  Rows<const S> x;
  int64_t channels, depth;  // depth: channels padded to whole chunks
  const S* weight;          // [>= width, depth]
  Table<T> table;
  S* out;  // [M, pitch]
  int64_t width, pitch;
  T* partial;  // [blocks, 2, width]: mean and centered squares of a block's rows; or null
};

// Brings chunks of x and of W into shared memory; a thread has the same piece of 16 bytes in each
// kPerPass-th row. What does not exist becomes 0.
template <class K, class S>
class Loader {
 public:
  DEVICE Loader(const Arguments<S>& p, int64_t row0, int64_t column0)
      : x_(p.x.row(row0 + own_row()) + own_channel()),
        weight_(static_cast<int>((column0 + own_row()) * p.depth) + own_channel()) {
    const int64_t left = p.x.count() - row0 - own_row();
    rows_ = left > kRows ? kRows : static_cast<int>(left);
  }

  DEVICE void load(const Arguments<S>& p, int channel0, unsigned char* stage) const {
    stage += own_row() * kPitchBytes + own_channel() * static_cast<int>(sizeof(S));
    const int left =
        (static_cast<int>(p.channels) - channel0 - own_channel()) * static_cast<int>(sizeof(S));
    const int bytes = left >= 16 ? 16 : left > 0 ? left : 0;
#pragma unroll
    for (int i = 0; i < kRows; i += kPerPass) {
      const bool inside = i < rows_ && bytes > 0;
      cp_async16(stage + i * kPitchBytes, inside ? x_ + i * p.x.pitch + channel0 : p.x.data,
                 inside ? bytes : 0);
    }
#pragma unroll
    for (int i = 0; i < K::kColumns; i += kPerPass) {
      if (K::kColumns % kPerPass == 0 || i + own_row() < K::kColumns)
        cp_async16(stage + (kRows + i) * kPitchBytes,
                   p.weight + (weight_ + i * static_cast<int>(p.depth) + channel0));
    }
  }

 private:
  static constexpr int kPieces = kChunkBytes / 16, kPerPass = kThreads / kPieces;
  DEVICE static int own_row() { return static_cast<int>(threadIdx.x) / kPieces; }
  DEVICE static int own_channel() {
    return static_cast<int>(threadIdx.x) % kPieces * (16 / static_cast<int>(sizeof(S)));
  }

  const S* x_;
  int weight_, rows_;  // offset of the first piece; rows from the thread's first one on
};

// Mean and centered squares of the columns of `out`, of its first `count` rows.
template <class K, class S, class T>
DEVICE void column_moments(const S* out, int count, T* scratch, const Arguments<S>& p,
                           int64_t column0) {
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

template <class Math, int kUnits>
KERNEL __launch_bounds__(kThreads, Shape<Math, kUnits>::kBlocks)
    bottleneck_forward_kernel(Arguments<typename Math::Storage> p) {
  using K = Shape<Math, kUnits>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * K::kColumns;
  const int64_t rows = p.x.count();
  const int chunks = static_cast<int>(p.depth / K::kChunk);
  const int warp_row = warp_id() * 16;

  const bool same = p.table.sample_stride == 0;
  const ScaleShift<T>* low = p.table.data;
  const ScaleShift<T>* high = p.table.data;
  if (!same) {
    const int64_t row = row0 + warp_row + g, last = rows - 1;
    low = p.table.row((row < last ? row : last) / p.x.pixels());
    high = p.table.row((row + 8 < last ? row + 8 : last) / p.x.pixels());
  }

  T acc[K::kUnits][2][4] = {};
  const Loader<K, S> loader(p, row0, column0);
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < chunks) loader.load(p, chunk * K::kChunk, shared + chunk * K::kStageBytes);
    cp_async_commit();
  }
  int reading = 0, writing = kStages - 1;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const int next = chunk + kStages - 1;
    if (next < chunks) loader.load(p, next * K::kChunk, shared + writing * K::kStageBytes);
    cp_async_commit();

    const unsigned char* const stage = shared + reading * K::kStageBytes;
    const auto row_of = [&](int base) {
      return [=](int i) { return reinterpret_cast<const S*>(stage + (base + i) * kPitchBytes); };
    };
#pragma unroll(K::kUnroll)
    for (int k = 0; k < K::kChunk; k += Math::kDepth) {
      typename Math::A a;
      Math::load_a(a, row_of(warp_row), k);
      Math::norm_relu(a, low + k, high + k, same);
#pragma unroll
      for (int u = 0; u < K::kUnits; ++u) {
        typename Math::B b;
        Math::load_b(b, row_of(kRows + u * 16), k);
        Math::mma(acc[u], a, b);
      }
    }
    low += K::kChunk, high += K::kChunk;
    reading = reading + 1 < kStages ? reading + 1 : 0;
    writing = writing + 1 < kStages ? writing + 1 : 0;
  }
  cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory is used for other things from here on

  S* const out = reinterpret_cast<S*>(shared);
  const bool ragged = column0 + K::kColumns > p.width;  // zeros beyond the width, even for NaN
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int column = u * 16 + tile * 8 + 2 * t;
      T(&v)[4] = acc[u][tile];
      if (ragged) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (column0 + column + i % 2 >= p.width) v[i] = T(0);
        }
      }
      store<2>(out + (warp_row + g) * K::kOutPitch + column, {v[0], v[1]});
      store<2>(out + (warp_row + g + 8) * K::kOutPitch + column, {v[2], v[3]});
    }
  }
  __syncthreads();
  const int count = rows - row0 < kRows ? static_cast<int>(rows - row0) : kRows;
  constexpr int kElements = 16 / sizeof(S), kPieces = K::kColumns / kElements;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * kElements;
    if (row < count && column0 + column < p.pitch)
      st16(p.out + (row0 + row) * p.pitch + column0 + column,
           ld16(out + row * K::kOutPitch + column));
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

template <class Math, int kUnits>
void run(const BottleneckForward<typename Math::Storage>& a, Context& context) {
  using K = Shape<Math, kUnits>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = a.features.count(), tiles = ceil_div(rows, kRows),
                columns = ceil_div(a.width, K::kColumns), depth = round_up(a.channels, K::kChunk);
  const auto packed = pack<Math>(a.weight, a.width, a.channels, columns * K::kColumns, depth, false,
                                 a.norm, a.features.samples, a.channels, depth, context);
  T* const partial = a.mean ? context.scratch<T>(tiles * 2 * a.width) : nullptr;
  const Arguments<S> p = {a.features,   a.channels,   depth,   packed.weight,
                          packed.table, a.bottleneck, a.width, round_up(a.width, kLanes),
                          partial};
  launch(context, bottleneck_forward_kernel<Math, kUnits>, {tiles, columns}, kThreads,
         K::kSharedBytes, p);
  if (a.mean) merge_moments<T>(partial, tiles, rows, a.width, a.mean, a.m2, context);
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
