// bottleneck = relu(scale * x + shift) W^T, and its moments.
//
// x [M, C] are rows of the feature buffer, W [K2, C]. A block makes kRows rows of the whole width
// (of kUnits * 16 columns where K2 is wider: then x is read once for each such part), so x is read
// once. A warp has kTiles * 16 rows and all columns; x and W come in chunks of 64 bytes of channels
// through a pipeline of cp.async, and x is normalized in registers, between ldmatrix and mma. Bytes
// a row: (C + K2) of S; W comes from L2.
//
// Moments are those of the rounded values: mean and centered sum of squares of a block's rows by
// column, merged in the order of the blocks by a second kernel.
#include "pack.cuh"
#include "vector.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kChunkBytes = 64, kPitchBytes = kChunkBytes + 16;

template <class Math, int kUnits_>
struct Shape {
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kUnits = kUnits_;                  // of 16 columns
  static constexpr int kTiles = Math::kTensor ? 2 : 1;    // of 16 rows, of a warp
  static constexpr int kRows = kWarps * kTiles * 16;      // of a block
  static constexpr int kColumns = kUnits * 16;            // of a block
  static constexpr int kChunk = kChunkBytes / sizeof(S);  // channels
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = (kRows + kColumns) * kPitchBytes;
  static constexpr int kOutPitch = kColumns + 16 / sizeof(S);
  static constexpr int kOutBytes = kWarps * 16 * kOutPitch * sizeof(S);
  static constexpr int kSharedBytes = kStages * kStageBytes >
                                              kOutBytes + 2 * kWarps * kColumns *
                                                              static_cast<int>(sizeof(T))
                                          ? kStages * kStageBytes
                                          : kOutBytes +
                                                2 * kWarps * kColumns * static_cast<int>(sizeof(T));
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

// One chunk of x and of W into shared memory; what does not exist becomes 0.
template <class K, class S>
DEVICE void load_chunk(const Arguments<S>& p, int64_t row0, int64_t column0, int64_t channel0,
                       unsigned char* stage) {
  constexpr int kPieces = kChunkBytes / 16, kPerPass = kThreads / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const int first = static_cast<int>(threadIdx.x) / kPieces;
  const int64_t c = channel0 + piece * (16 / static_cast<int>(sizeof(S)));
  const int64_t left = (p.channels - c) * static_cast<int64_t>(sizeof(S));
  const int bytes = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
  const int64_t rows = p.x.count();
#pragma unroll
  for (int i = 0; i < K::kRows; i += kPerPass) {
    const int64_t row = row0 + first + i;
    const bool inside = row < rows && bytes > 0;
    cp_async16(stage + (first + i) * kPitchBytes + piece * 16, inside ? p.x.row(row) + c : p.x.data,
               inside ? bytes : 0);
  }
  unsigned char* const weight = stage + K::kRows * kPitchBytes;
#pragma unroll
  for (int i = 0; i < K::kColumns; i += kPerPass) {
    if (first + i < K::kColumns)
      cp_async16(weight + (first + i) * kPitchBytes + piece * 16,
                 p.weight + (column0 + first + i) * p.depth + c);
  }
}

// Sums of a column over the rows of a warp, from the values of one lane, into sums[column].
template <class K, class T>
DEVICE void add_columns(const T (&values)[K::kUnits][2][2], T* sums) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        T sum = values[u][tile][j];
        for (int lanes = 4; lanes < kWarp; lanes *= 2)
          sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (g == 0) sums[u * 16 + tile * 8 + 2 * t + j] = sum;
      }
    }
  }
}

template <class Math, int kUnits>
KERNEL __launch_bounds__(kThreads) bottleneck_forward_kernel(Arguments<typename Math::Storage> p) {
  using K = Shape<Math, kUnits>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * K::kRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * K::kColumns;
  const int64_t rows = p.x.count();
  const int chunks = static_cast<int>(p.depth / K::kChunk);
  const int warp_row = warp_id() * K::kTiles * 16;

  const ScaleShift<T>* low[K::kTiles];
  const ScaleShift<T>* high[K::kTiles];
#pragma unroll
  for (int m = 0; m < K::kTiles; ++m) {
    low[m] = high[m] = p.table.data;
    if (p.table.sample_stride != 0) {
      const int64_t row = row0 + warp_row + m * 16 + g, last = rows - 1;
      low[m] = p.table.row((row < last ? row : last) / p.x.pixels());
      high[m] = p.table.row((row + 8 < last ? row + 8 : last) / p.x.pixels());
    }
  }

  T acc[K::kTiles][K::kUnits][2][4] = {};
  for (int chunk = 0; chunk < K::kStages - 1; ++chunk) {
    if (chunk < chunks)
      load_chunk<K>(p, row0, column0, chunk * K::kChunk, shared + chunk * K::kStageBytes);
    cp_async_commit();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<K::kStages - 2>();
    __syncthreads();
    const int next = chunk + K::kStages - 1;
    if (next < chunks)
      load_chunk<K>(p, row0, column0, static_cast<int64_t>(next) * K::kChunk,
                    shared + next % K::kStages * K::kStageBytes);
    cp_async_commit();

    const unsigned char* const stage = shared + chunk % K::kStages * K::kStageBytes;
    const auto row_of = [&](int base) {
      return [=](int i) { return reinterpret_cast<const S*>(stage + (base + i) * kPitchBytes); };
    };
#pragma unroll
    for (int k = 0; k < K::kChunk; k += Math::kDepth) {
      typename Math::A a[K::kTiles];
#pragma unroll
      for (int m = 0; m < K::kTiles; ++m) {
        Math::load_a(a[m], row_of(warp_row + m * 16), k);
        const int64_t c = static_cast<int64_t>(chunk) * K::kChunk + k;
        Math::norm_relu(a[m], low[m] + c, high[m] + c);
      }
#pragma unroll
      for (int u = 0; u < K::kUnits; ++u) {
        typename Math::B b;
        Math::load_b(b, row_of(K::kRows + u * 16), k);
#pragma unroll
        for (int m = 0; m < K::kTiles; ++m) Math::mma(acc[m][u], a[m], b);
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory is used for other things from here on

  // Rounded, zero beyond the width, and out through shared memory in pieces of 16 bytes.
  S* const out = reinterpret_cast<S*>(shared) + warp_id() * 16 * K::kOutPitch;
  constexpr int kElements = 16 / sizeof(S), kPieces = K::kColumns / kElements;
#pragma unroll
  for (int m = 0; m < K::kTiles; ++m) {
#pragma unroll
    for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int column = u * 16 + tile * 8 + 2 * t;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T& v = acc[m][u][tile][i];
          v = column0 + column + i % 2 < p.width ? rounded<S>(v) : T(0);
        }
        const T* const v = acc[m][u][tile];
        store<2>(out + g * K::kOutPitch + column, {v[0], v[1]});
        store<2>(out + (g + 8) * K::kOutPitch + column, {v[2], v[3]});
      }
    }
    __syncwarp();
    for (int i = lane_id(); i < 16 * kPieces; i += kWarp) {
      const int64_t row = row0 + warp_row + m * 16 + i / kPieces;
      const int column = i % kPieces * kElements;
      if (row < rows && column0 + column < p.pitch)
        st16(p.out + row * p.pitch + column0 + column,
             ld16(out + i / kPieces * K::kOutPitch + column));
    }
    __syncwarp();
  }
  if (p.partial == nullptr) return;

  T* const sums = reinterpret_cast<T*>(shared + K::kOutBytes);
  T* const squares = sums + kWarps * K::kColumns;
  const int64_t left = rows - row0;
  const T count = static_cast<T>(left < K::kRows ? left : K::kRows);
  const T share = T(1) / count;
  T values[K::kUnits][2][2];
  const auto gather = [&](const auto& term) {
#pragma unroll
    for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          T sum = T(0);
#pragma unroll
          for (int m = 0; m < K::kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const bool inside = row0 + warp_row + m * 16 + g + 8 * half < rows;
              if (inside) sum += term(acc[m][u][tile][2 * half + j], values[u][tile][j]);
            }
          }
          values[u][tile][j] = sum;
        }
      }
    }
  };
  gather([](T v, T) { return v; });
  add_columns<K>(values, sums + warp_id() * K::kColumns);
  __syncthreads();
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        T sum = T(0);
        for (int w = 0; w < kWarps; ++w)
          sum += sums[w * K::kColumns + u * 16 + tile * 8 + 2 * t + j];
        values[u][tile][j] = sum * share;  // any center near the mean will do
      }
    }
  }
  gather([](T v, T mean) { return (v - mean) * (v - mean); });
  add_columns<K>(values, squares + warp_id() * K::kColumns);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < K::kColumns; i += kThreads) {
    if (column0 + i >= p.width) continue;
    T sum = T(0), square = T(0);
    for (int w = 0; w < kWarps; ++w) {
      sum += sums[w * K::kColumns + i];
      square += squares[w * K::kColumns + i];
    }
    T* const partial = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * p.width + column0 + i;
    partial[0] = sum / count;
    partial[p.width] = square;
  }
}

constexpr int kMergeColumns = 8, kMergeLanes = 64;

// Moments of all rows from those of tiles of tile_rows rows: kMergeLanes threads a column, each
// every kMergeLanes-th tile, then their sums in pairs.
template <class T>
KERNEL __launch_bounds__(kMergeColumns* kMergeLanes)
    merge_moments_kernel(const T* partial, int64_t tiles, int64_t tile_rows, int64_t rows,
                         int64_t width, T* mean, T* m2) {
  DYNAMIC_SHARED(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  const int column = static_cast<int>(threadIdx.x) % kMergeColumns;
  const int lane = static_cast<int>(threadIdx.x) / kMergeColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeColumns + column;
  const auto total = [&](const auto& term) {
    double sum = 0;
#pragma unroll 4
    for (int64_t tile = lane; c < width && tile < tiles; tile += kMergeLanes) {
      const int64_t left = rows - tile * tile_rows;
      const T* const own = partial + tile * 2 * width + c;
      sum += term(static_cast<double>(left < tile_rows ? left : tile_rows),
                  static_cast<double>(own[0]), static_cast<double>(own[width]));
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
  const double count = static_cast<double>(rows > 0 ? rows : 1);
  const double center = total([](double n, double mu, double) { return n * mu; }) / count;
  const double spread = total([&](double n, double mu, double square) {
    return square + n * (mu - center) * (mu - center);
  });
  if (lane == 0 && c < width) {
    mean[c] = static_cast<T>(center);
    m2[c] = static_cast<T>(spread);
  }
}

template <class Math, int kUnits>
void run(const BottleneckForward<typename Math::Storage>& a, Context& context) {
  using K = Shape<Math, kUnits>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = a.features.count(), tiles = ceil_div(rows, K::kRows),
                columns = ceil_div(a.width, K::kColumns), depth = round_up(a.channels, K::kChunk);
  const auto packed = pack<Math>(a.weight, a.width, a.channels, columns * K::kColumns, depth, false,
                                 a.norm, a.features.samples, a.channels, depth, context);
  T* const partial = a.mean ? context.scratch<T>(tiles * 2 * a.width) : nullptr;
  const Arguments<S> p = {a.features,   a.channels,   depth,   packed.weight,
                          packed.table, a.bottleneck, a.width, round_up(a.width, kLanes),
                          partial};
  launch(context, bottleneck_forward_kernel<Math, kUnits>, {tiles, columns}, kThreads,
         K::kSharedBytes, p);
  if (a.mean)
    launch(context, merge_moments_kernel<T>, cover(a.width, kMergeColumns),
           kMergeColumns * kMergeLanes, kMergeColumns * kMergeLanes * sizeof(double),
           static_cast<const T*>(partial), tiles, static_cast<int64_t>(K::kRows), rows, a.width,
           a.mean, a.m2);
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
