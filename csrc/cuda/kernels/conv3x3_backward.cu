// The slice's gradient goes back to before ReLU, for narrow layers, in one pass:
//
//   dy = dropout(coef0 G + coef1 + coef2 x)               G, x: the slice of gradient and features
//   dh[p, c] = sum_{tap, o} dy[p - tap, o] W[o, c, tap]   dy = 0 outside a map
//   dv = dh mask [v > 0],  v = scale * b + shift,         S1 = sum_p dv,  S2 = sum_p dv (b - mean)
//   dW[o, c, tap] = sum_p dy[p - tap, o] relu(v[p, c])
//
// A tile is some consecutive rows of pixels, whatever the maps' size (see conv3x3_forward.cu): its
// rows of b come by cp.async; dy is formed, for the halo too, on the way to shared memory.
//
// - dh: a warp has 16 rows and all columns. In the accumulator's layout it reads b, writes relu(v)
//   over it for dW, and dv to memory. Its lanes share out S1 and S2.
// - dW: each of nine warps has one tap and keeps its 16 x K2 sums in registers over all tiles of
// its
//   block, as S1 and S2 stay in shared memory. Then they go to scratch memory, and a second kernel
//   adds the blocks' sums in order.
//
// If a tap leaves the map, a row of zeros takes the row's place.
//
// Bytes a row: K2 + 2k read, K2 written; the halo of G and x comes from L2. Partial sums are
// 4 * 9 * k * K2 bytes a block, written once and read once, in L2.
#include "conv3x3_backward_tile.cuh"

namespace densenet_ext::cuda {
namespace {

template <class Math, int kUnits>
KERNEL __launch_bounds__(kThreads, Tiling<Math, kUnits>::kBlocks)
    conv3x3_backward_kernel(Arguments<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using T = typename Math::T;
  using K = Tiling<Math, kUnits>;
  DYNAMIC_SHARED(shared);
  const Block<K> block(a, shared);
  copy_async(block.weight, a.taps.weight, K::kWeights);
  cp_async_commit();
  // Channels beyond the growth rate and beyond the rows' pitch stay 0.
  zero_shared(block.zeros, (1 + a.gradient_rows) * K::kGradientPitch + a.tile_rows * K::kPitch);
  for (int u = 0; u < kUnits; ++u) block.sums[u * kThreads + thread_id()] = T(0);

  T dw[kUnits][2][4] = {};
  for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t row0 = static_cast<int64_t>(tile) * a.tile_rows;
    const int rows =
        static_cast<int>(a.maps.rows - row0 < a.tile_rows ? a.maps.rows - row0 : a.tile_rows);
    __syncthreads();  // the zeros are stored, and the previous tile has been read
    load_tile(a, block, row0, rows);
    __syncthreads();
    const int lane = fresh(lane_id());
    for (int warp_row = warp_id() * 16; warp_row < a.tile_rows; warp_row += kWarps * 16)
      input_gradient<K, typename K::S, T>(a, block, row0, rows, warp_row, lane);
    __syncthreads();
    weight_gradient(a, block, dw);
  }
  store_parts(a, block, dw);
}

constexpr int kSlices = kMaxThreads / kWarp;

// Sums part[r * step] for r < count, in one order, for the threads of slice 0, the first 32.
// `shared` has kSumBytes. Threads without a column pass count 0.
template <class T>
DEVICE double sum_parts(const T* part, int64_t step, int64_t count, double* shared) {
  const int slice = warp_id();
  double sum = 0;
#pragma unroll 8
  for (int64_t r = slice; r < count; r += kSlices) sum += static_cast<double>(part[r * step]);
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (slice == 0) {
    for (int s = 1; s < kSlices; ++s) sum += shared[kWarp * s + threadIdx.x];
  }
  __syncthreads();
  return sum;
}

template <class T>
struct SumArguments {
  const T* parts;
  int64_t count, step;
  int growth, width, columns;
  T* dweight;  // [growth, width, 3, 3]
  int64_t weight_blocks;
  BottleneckNormBackward<T> norm;
};
// A block has 32 weights (in the order of the parts), or some channels of norm2 behind those.
template <class T>
KERNEL __launch_bounds__(kMaxThreads) conv3x3_sum_kernel(SumArguments<T> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  if (blockIdx.x < a.weight_blocks) {
    const int i = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32);
    const int c = i % a.width, o = i / a.width % a.growth, tap = i / a.width / a.growth;
    const bool exists = tap < kTaps;
    const T* const part = a.parts + (exists ? (tap * kOutputs + o) * a.columns + c : 0);
    const double sum = sum_parts(part, a.step, exists ? a.count : 0, sums);
    if (threadIdx.x < 32 && exists)
      a.dweight[(o * a.width + c) * kTaps + tap] = static_cast<T>(sum);
  } else {
    norm_backward_block(a.norm, blockIdx.x - a.weight_blocks, sums);
  }
}

// Returns the rows of a tile: as many as fill the device and fit in half of a multiprocessor's
// shared memory; 48 or 16 if need be; 0 where not even they fit.
template <class K>
int tile_rows(const MapSizes& maps) {
  const int64_t limit = shared_limit();
  const auto bytes = [&](int rows) { return K::shared_bytes(rows, maps.width); };
  for (const int rows : {kMaxRows, kMaxRows / 2, kMaxRows / 3}) {
    const int64_t wanted = (rows > kWarps * 16 ? 4 : 1) * static_cast<int64_t>(multiprocessors());
    if (bytes(rows) <= limit / 2 && ceil_div(maps.rows, rows) >= wanted) return rows;
  }
  return bytes(48) <= limit ? 48 : bytes(16) <= limit ? 16 : 0;
}

template <class Math, int kUnits, class S>
void launch_backward(const Conv3x3Backward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  using K = Tiling<Math, kUnits>;
  Arguments<S> a = {};
  a.maps = sizes_of(f.features), a.tile_rows = tile_rows<K>(a.maps);
  const int64_t tiles = ceil_div(a.maps.rows, a.tile_rows),
                bytes = K::shared_bytes(a.tile_rows, a.maps.width),
                blocks = std::min<int64_t>(tiles, K::kBlocks * multiprocessors());
  a.step = K::kSums + 2 * f.width, a.parts = context.scratch<T>(blocks * a.step);
  if (blocks > 0) {
    a.bottleneck = f.bottleneck, a.pitch = static_cast<int>(round_up(f.width, kLanes));
    a.taps = pack_taps<Math, kUnits, kOutputs>(f, f.norm.mean, f.post_mask, context);
    a.growth = static_cast<int>(f.growth), a.width = static_cast<int>(f.width);
    a.features = f.features.data + f.offset, a.features_pitch = f.features.pitch;
    a.grad = f.grad.data + f.offset, a.grad_pitch = f.grad.pitch;
    const uint64_t distances = spacing(f.features, f.offset) | spacing(f.grad, f.offset) |
                               static_cast<uint64_t>(f.growth * sizeof(S));
    with_vector<S, kSummedVector<S>>(distances, [&](auto vector) { a.vector = vector; });
    a.vectors = a.growth / a.vector, a.lines = kThreads / a.vectors;
    a.coef = f.coef, a.offset = f.offset, a.dropout = dropout_of(f), a.dv = f.dv;
    a.halo = a.maps.width + 1, a.gradient_rows = a.tile_rows + 2 * a.halo;
    a.tiles = static_cast<unsigned>(tiles);
    launch(context, conv3x3_backward_kernel<Math, kUnits>, {blocks}, kThreads, bytes, a);
  }
  SumArguments<T> sum = {};
  sum.parts = a.parts, sum.count = blocks, sum.step = a.step;
  sum.growth = static_cast<int>(f.growth), sum.width = static_cast<int>(f.width);
  sum.columns = K::kColumns, sum.dweight = f.dweight;
  sum.weight_blocks = ceil_div(kTaps * f.growth * f.width, 32);
  sum.norm = norm_backward_of(f);
  sum.norm.parts = a.parts + K::kSums, sum.norm.count = blocks, sum.norm.step = a.step;
  launch(context, conv3x3_sum_kernel<T>, {sum.weight_blocks + narrow_blocks(f.width)}, kMaxThreads,
         kSumBytes, sum);
}

}  // namespace

template <class S>
bool conv3x3_backward_fits(const Conv3x3Backward<S>& f, const Context& context) {
  if (!is_narrow<S>(f.width, f.growth, f.features.pixels())) return false;
  bool fits = false;
  dispatch_conv3x3<S>(context, f.width, [&](auto math, auto units) {
    fits = tile_rows<Tiling<decltype(math), decltype(units)::value>>(sizes_of(f.features)) > 0;
  });
  return fits;
}

template <class S>
void conv3x3_backward(const Conv3x3Backward<S>& f, Context& context) {
  dispatch_conv3x3<S>(context, f.width, [&](auto math, auto units) {
    launch_backward<decltype(math), decltype(units)::value>(f, context);
  });
}

#define INSTANTIATE(S)                                                            \
  template bool conv3x3_backward_fits(const Conv3x3Backward<S>&, const Context&); \
  template void conv3x3_backward(const Conv3x3Backward<S>&, Context&);
DENSENET_EXT_STORAGE_TYPES(INSTANTIATE)

}  // namespace densenet_ext::cuda
