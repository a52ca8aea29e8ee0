// bottleneck_forward computes bottleneck = relu(scale * x + shift) W^T, and its moments.
//
// x [M, C] are rows of the feature buffer, W [K2, C]. A block makes kRows rows of the whole width
// (of kUnits * 16 columns where K2 is wider: then x is read once for each such part), so x is read
// once. A warp has 16 or 32 rows and all columns, so each x is normalized once: in registers,
// between ldmatrix and mma. With 32 rows, shared memory delivers W half as often; they need the
// registers of two warps. x and W come in chunks of 64 bytes of channels through a pipeline of
// cp.async. Bytes a row: (C + K2) of S; W comes from L2.
//
// The rounded values are laid out in shared memory: they leave from there in vectors of 16 bytes,
// and moments are those of them, of a block's rows first (merge_tiles.cuh).
#include "merge_tiles.cuh"
#include "pack.cuh"
#include "packed_access.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kRows = 128;  // of a block
constexpr int kChunkBytes = 64, kPitchBytes = kChunkBytes + 16;
constexpr int kStages = 3;

template <class Math_, int kUnits_, bool kMasked_>
struct Tiling {
  using Math = Math_;
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr bool kMasked = kMasked_;     // scale and shift of samples may differ
  static constexpr int kUnits = kUnits_;        // of 16 columns
  static constexpr int kColumns = kUnits * 16;  // of a block
  static constexpr int kUnitsM = sizeof(S) == 2 && kUnits > 3 && !kMasked ? 2 : 1;  // of 16 rows
  static constexpr int kWarpRows = kUnitsM * 16, kThreads = kRows / kWarpRows * kWarp;
  static constexpr int kBlocks = !Math::kTensor ? 1
                                 : kUnits == 3  ? 3
                                                : 2;      // on a multiprocessor, at least
  static constexpr int kChunk = kChunkBytes / sizeof(S);  // channels
  // Products of a chunk that are unrolled: as many as the registers have room for.
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
  PerChannel<ScaleShift<T>> scale_shift;
  S* out;  // [M, pitch]
  int width, pitch;
  T* partial;  // [blocks, 2, width]: mean and centered squares of a block's rows; or null
};

// Brings chunks of x and of W into shared memory; a thread has one vector of each kRowStep-th row.
// Elements beyond x become 0.
template <class K, class S>
class Loader {
 public:
  DEVICE Loader(const Arguments<S>& p, int row0, int column0)
      : x_(p.x + static_cast<int64_t>(row0 + thread_row()) * p.x_pitch + thread_channel()),
        weight_((column0 + thread_row()) * p.depth + thread_channel()),
        rows_(p.rows - row0 - thread_row()),
        bytes_((p.channels - thread_channel()) * static_cast<int>(sizeof(S))) {}

  // Starts the copy of the next chunk.
  DEVICE void load(const Arguments<S>& p, unsigned char* stage) {
    stage += thread_row() * kPitchBytes + thread_channel() * static_cast<int>(sizeof(S));
    const int bytes = bytes_ >= 16 ? 16 : bytes_ > 0 ? bytes_ : 0;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowStep) {
      const bool exists = i < rows_ && bytes > 0;
      cp_async16(stage + i * kPitchBytes, exists ? x_ + static_cast<int64_t>(i) * p.x_pitch : p.x,
                 exists ? bytes : 0);
    }
#pragma unroll
    for (int i = 0; i < K::kColumns; i += kRowStep) {
      if (K::kColumns % kRowStep == 0 || i + thread_row() < K::kColumns)
        cp_async16(stage + (kRows + i) * kPitchBytes, p.weight + (weight_ + i * p.depth));
    }
    x_ += K::kChunk, weight_ += K::kChunk, bytes_ -= kChunkBytes;
  }

 private:
  static constexpr int kVectors = kChunkBytes / 16, kRowStep = K::kThreads / kVectors;
  DEVICE static int thread_row() { return thread_id() / kVectors; }
  DEVICE static int thread_channel() { return thread_id() % kVectors * kVector<S>; }

  const S* x_;
  int weight_, rows_, bytes_;  // offset of the vector; rows and bytes from the thread's first on
};

// Adds the products of a chunk. `low` and `high` are scale and shift of rows g and g + 8, from the
// chunk's first channel on.
template <class K, class T>
DEVICE void multiply_chunk(const unsigned char* stage, const ScaleShift<T>* low,
                           const ScaleShift<T>* high, T (&acc)[K::kUnitsM][K::kUnits][2][4]) {
  using Math = typename K::Math;
  const auto row_of = [&](int base) {
    return [=](int i) {
      return reinterpret_cast<const typename K::S*>(stage + (base + i) * kPitchBytes);
    };
  };
#pragma unroll(K::kUnroll)
  for (int k = 0; k < K::kChunk; k += Math::kDepth) {
    typename Math::A a[K::kUnitsM];
#pragma unroll
    for (int m = 0; m < K::kUnitsM; ++m) {
      Math::load_a(a[m], row_of(warp_id() * K::kWarpRows + m * 16), k);
      Math::norm_relu(a[m], low + k, high + k, !K::kMasked);
    }
#pragma unroll
    for (int u = 0; u < K::kUnits; ++u) {
      typename Math::B b;
      Math::load_b(b, row_of(kRows + u * 16), k);
#pragma unroll
      for (int m = 0; m < K::kUnitsM; ++m) Math::mma(acc[m][u], a[m], b);
    }
  }
}

// Writes the accumulators to shared memory, [kRows] rows kOutPitch apart; 0 from `width` on, even
// for NaN.
template <class K, class S, class T>
DEVICE void share_tile(T (&acc)[K::kUnitsM][K::kUnits][2][4], int thread, int width, S* out) {
  const int row = thread / kWarp * K::kWarpRows + thread % kWarp / 4;
  const bool is_ragged = K::kColumns > width;
#pragma unroll
  for (int m = 0; m < K::kUnitsM; ++m) {
#pragma unroll
    for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int column = u * 16 + tile * 8 + thread % 4 * 2;
        T(&v)[4] = acc[m][u][tile];
        if (is_ragged) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (column + i % 2 >= width) v[i] = T(0);
          }
        }
        S* const target = out + (row + m * 16) * K::kOutPitch + column;
        store<2>(target, {v[0], v[1]});
        store<2>(target + 8 * K::kOutPitch, {v[2], v[3]});
      }
    }
  }
}

// Stores the first `count` rows of the tile, from column0 on.
template <class K, class S>
DEVICE void store_tile(const Arguments<S>& p, const S* out, int row0, int column0, int count,
                       int thread) {
  constexpr int kVectors = K::kColumns / kVector<S>;
  S* const rows = p.out + static_cast<int64_t>(row0) * p.pitch + column0;
#pragma unroll 4
  for (int i = thread; i < count * kVectors; i += K::kThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector<S>;
    const S* const source = out + row * K::kOutPitch + column;
    S* const target = rows + row * p.pitch + column;
    if (column0 + column < p.pitch) st16_global(target, ld16(source));
  }
}

// Stores the block's part of the moments, of the first `count` rows of the tile.
template <class K, class S, class T>
DEVICE void store_moments(const Arguments<S>& p, const S* out, int column0, int count, T* shared) {
  const int column = thread_id() % (K::kColumns / 2) * 2, group = thread_id() / (K::kColumns / 2);
  const bool idle = group >= K::kGroups;
  struct Pair {
    T v[2];
  };
  // Sums over all rows, for the thread's two columns: term adds a value to the sum so far.
  const auto total = [&](T* sums, const auto& term) {
    T sum[2] = {};
    for (int row = group; !idle && row < count; row += K::kGroups) {
      T v[2];
      load<2>(out + row * K::kOutPitch + column, v);
#pragma unroll
      for (int j = 0; j < 2; ++j) sum[j] = term(v[j], j, sum[j]);
    }
    if (!idle) store<2>(sums + group * K::kColumns + column, sum);
    __syncthreads();
    sum[0] = sum[1] = T(0);
    for (int i = 0; i < K::kGroups; ++i) {
      T v[2];
      load<2>(sums + i * K::kColumns + column, v);
      sum[0] += v[0], sum[1] += v[1];
    }
    return Pair{sum[0], sum[1]};
  };
  const T fraction = T(1) / static_cast<T>(count);
  Pair mean = total(shared, [](T v, int, T sum) { return sum + v; });
  mean.v[0] *= fraction, mean.v[1] *= fraction;  // any center near the mean would do
  const Pair square = total(shared + K::kGroups * K::kColumns, [&](T v, int j, T sum) {
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
KERNEL __launch_bounds__(Tiling<Math, kUnits, kMasked>::kThreads,
                         Tiling<Math, kUnits, kMasked>::kBlocks)
    bottleneck_forward_kernel(Arguments<typename Math::Storage> p) {
  wait_for_earlier_kernels();
  using K = Tiling<Math, kUnits, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  const int row0 = static_cast<int>(blockIdx.x) * kRows;
  const int column0 = static_cast<int>(blockIdx.y) * K::kColumns;

  const ScaleShift<T>* low = p.scale_shift.data;  // of rows g and g + 8
  const ScaleShift<T>* high = p.scale_shift.data;
  if constexpr (kMasked) {
    static_assert(K::kUnitsM == 1, "two rows a lane");
    const int row = row0 + warp_id() * 16 + lane_id() / 4, last = p.rows - 1;
    const int stride = static_cast<int>(p.scale_shift.sample_stride);
    low += (row < last ? row : last) / p.pixels * stride;
    high += (row + 8 < last ? row + 8 : last) / p.pixels * stride;
  }

  T acc[K::kUnitsM][kUnits][2][4] = {};
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
    multiply_chunk<K, T>(shared + reading * K::kStageBytes, low + c, high + c, acc);
    reading = reading + 1 < kStages ? reading + 1 : 0;
  }
  cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory is free from here on

  const int thread = fresh(thread_id());
  S* const out = reinterpret_cast<S*>(shared);
  share_tile<K, S, T>(acc, thread, p.width - column0, out);
  __syncthreads();
  const int count = p.rows - row0 < kRows ? p.rows - row0 : kRows;
  store_tile<K>(p, out, row0, column0, count, thread);
  if (p.partial != nullptr)
    store_moments<K>(p, out, column0, count, reinterpret_cast<T*>(shared + K::kOutBytes));
}

template <class Math, int kUnits, bool kMasked>
void launch_masked(const BottleneckForward<typename Math::Storage>& f, Context& context) {
  using K = Tiling<Math, kUnits, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = f.features.count(), tiles = ceil_div(rows, kRows),
                columns = ceil_div(f.width, K::kColumns), depth = round_up(f.channels, K::kChunk);
  const auto packed = pack<Math>(f, columns * K::kColumns, depth, false, context);
  Arguments<S> a = {};
  a.x = f.features.data, a.x_pitch = as_int(f.features.pitch);
  a.rows = as_int(rows), a.pixels = as_int(f.features.pixels());
  a.channels = as_int(f.channels), a.depth = as_int(depth);
  as_int(f.features.samples * depth);  // scale and shift are indexed with an int
  a.weight = packed.weight, a.scale_shift = packed.scale_shift;
  a.out = f.bottleneck, a.width = as_int(f.width), a.pitch = as_int(round_up(f.width, kLanes));
  if (f.mean) a.partial = context.scratch<T>(tiles * 2 * f.width);
  launch(context, bottleneck_forward_kernel<Math, kUnits, kMasked>, {tiles, columns}, K::kThreads,
         K::kSharedBytes, a);
  if (f.mean) merge_tiles<T>(a.partial, tiles, kRows, rows, f.width, f.mean, f.m2, context);
}

template <class Math, int kUnits>
void launch_forward(const BottleneckForward<typename Math::Storage>& f, Context& context) {
  if (!Math::kTensor || has_sample_stride(f.scale_shift))
    return launch_masked<Math, kUnits, true>(f, context);
  if constexpr (Math::kTensor) launch_masked<Math, kUnits, false>(f, context);
}

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>& f, Context& context) {
  dispatch_math<S>(context, [&](auto math) {
    using Math = decltype(math);
    if constexpr (sizeof(S) == 8) {
      launch_forward<Math, 3>(f, context);
    } else {
      f.width <= 48 ? launch_forward<Math, 3>(f, context) : launch_forward<Math, 8>(f, context);
    }
  });
}

DENSENET_EXT_INSTANTIATE(bottleneck_forward, BottleneckForward)

}  // namespace densenet_ext::cuda
