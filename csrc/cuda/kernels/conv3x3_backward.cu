// From the slice's gradient back to before the rectifier, for narrow layers, in one pass:
//
//   dy = dropout(coef0 G + coef1 + coef2 x)               G, x: the slice of gradient and features
//   dh[p, c] = sum_{tap, o} dy[p - tap, o] W[o, c, tap]   dy = 0 outside a map
//   dv = dh mask [v > 0],  v = scale * b + shift,         S1 = sum_p dv,  S2 = sum_p dv (b - mean)
//   dW[o, c, tap] = sum_p dy[p - tap, o] relu(v[p, c])
//
// A tile is some consecutive rows of pixels, whatever the maps' size (see conv3x3_forward.cu): its
// rows of b come by cp.async; dy is formed, for the rows around it too, on the way to shared
// memory.
//   dh: a warp has 16 rows and all columns. In the accumulator's layout it reads b, writes relu(v)
//     over it for what follows, and dv to memory. Its lanes share out S1 and S2.
//   dW: each of nine warps has one tap and keeps its 16 x K2 sums in registers over all tiles of
//   its
//     block, as S1 and S2 stay in shared memory. Then they go to scratch memory, and a second
//     kernel adds the blocks' sums in order.
// Where a tap leaves the map, a row of zeros takes the row's place.
//
// Bytes a row: K2 + 2k read, K2 written; the rows of G and x around a tile come from L2. Partial
// sums are 4 * 9 * k * K2 bytes a block, written once and read once, in L2.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kWarps = kTaps, kThreads = kWarps * kWarp;
constexpr int kMostRows = 2 * kWarps * 16;  // of a tile

template <class S>
struct Args {
  using T = Arithmetic<S>;
  const S* bottleneck;
  int pitch;  // of bottleneck and dv
  Map map;
  PackedTaps<S> taps;
  int growth, width;
  const S* features;  // both at the first channel of the slice
  const S* grad;
  int64_t features_pitch, grad_pitch;
  int run, runs;  // channels of features and grad that are loaded at a time; how many times
  int lines;      // rows that all threads do so for
  Coefficients<T> coef;
  int64_t offset;
  Dropout<T> dropout;
  S* dv;
  T* parts;  // [blocks, step]: dW [kTaps, kOutputs, columns], then S1 [width], S2 [width]
  int64_t step;
  int tile_rows;          // a multiple of 16
  int halo, around_rows;  // rows of dy on each side of a tile, and all of them
  unsigned tiles;
};

template <class Math, int kUnits_>
struct Shape {
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kUnits = kUnits_, kColumns = kUnits * kUnit;
  static constexpr int kPitch = shared_pitch<S>(kColumns);
  static constexpr int kGradientPitch = shared_pitch<S>(kOutputs);
  static constexpr int kWeights = kTaps * kOutputs * kPitch;
  static constexpr int kSums = kTaps * kOutputs * kColumns;  // of dW
  // Of a multiprocessor: what the registers have room for.
  static constexpr int kBlocks = sizeof(S) == 2 && kUnits == 3 ? 2 : 1;

  static int64_t shared_bytes(int64_t rows, int64_t map_width) {
    const int64_t gradient = (1 + rows + 2 * (map_width + 1)) * kGradientPitch;
    return (kWeights + gradient + rows * kPitch) * static_cast<int64_t>(sizeof(S)) +
           kMostRows * static_cast<int64_t>(sizeof(uint16_t)) +
           kUnits * kThreads * static_cast<int64_t>(sizeof(T));
  }
};

// dy of the rows from `from` on into shared memory, V channels from `column` on of every a.lines-th
// row from `line` on by this thread: always the same ones, and their coefficients change with the
// sample only.
template <class Math, int V>
DEVICE void form_gradient(const Args<typename Math::Storage>& a, int64_t from, int line, int count,
                          int column, const Cursor& around, typename Math::Storage* to,
                          int to_pitch) {
  using T = typename Math::T;
  T coef[3][V] = {};
  int64_t coef_sample = -1;
  for (int i = line; i < count; i += a.lines) {
    if (from + i < 0 || from + i >= a.map.rows) continue;
    T g[V], x[V];
    load<V>(a.grad + (from + i) * a.grad_pitch + column, g);
    load<V>(a.features + (from + i) * a.features_pitch + column, x);
    const int64_t n = around.sample(i);
    if (n != coef_sample) {
      coef_sample = n;
#pragma unroll
      for (int j = 0; j < 3; ++j)
#pragma unroll
        for (int e = 0; e < V; ++e) coef[j][e] = a.coef.at(j, n, a.offset + column + e);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
      g[e] = affine(coef[0][e], g[e], affine(coef[2][e], x[e], coef[1][e]));
      g[e] = a.dropout(g[e], n, column + e, around.pixel(i), a.growth, a.map.pixels);
    }
    store_operands<Math>(to + i * to_pitch + column, g);
  }
}

// Four words of each lane of a quad, transposed: lane t gets word t of all four.
DEVICE void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  const uint32_t a = __shfl_xor_sync(0xffffffff, odd ? w[0] : w[1], 1);
  const uint32_t b = __shfl_xor_sync(0xffffffff, odd ? w[2] : w[3], 1);
  w[0] = odd ? a : w[0], w[1] = odd ? w[1] : a, w[2] = odd ? b : w[2], w[3] = odd ? w[3] : b;
  const uint32_t c = __shfl_xor_sync(0xffffffff, high ? w[0] : w[2], 2);
  const uint32_t d = __shfl_xor_sync(0xffffffff, high ? w[1] : w[3], 2);
  w[0] = high ? c : w[0], w[1] = high ? d : w[1], w[2] = high ? w[2] : c, w[3] = high ? w[3] : d;
}
// 16 columns of rows g and g+8 from an accumulator to memory, whole sectors at a time; null for a
// row that is not there.
template <class S>
DEVICE void store_unit(S* low, S* high, const Arithmetic<S> (&v)[2][4]) {
  const int t = lane_id() % 4;
  if constexpr (sizeof(S) == 2) {
    uint32_t words[4] = {narrow2<S>(v[0][0], v[0][1]), narrow2<S>(v[1][0], v[1][1]),
                         narrow2<S>(v[0][2], v[0][3]), narrow2<S>(v[1][2], v[1][3])};
    transpose_quad(words);
    S* const to = t < 2 ? low : high;
    if (to != nullptr) st16(to + t % 2 * 8, {{words[0], words[1], words[2], words[3]}});
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      S* const to = i < 2 ? low : high;
      const Arithmetic<S> pair[2] = {v[i % 2][i / 2 * 2], v[i % 2][i / 2 * 2 + 1]};
      if (to != nullptr) store<2>(to + i % 2 * 8 + 2 * t, pair);
    }
  }
}

// Sums of eight values over the lanes of equal t, the i-th for the lanes with g = i.
template <class T>
DEVICE T share_sums(T (&v)[8]) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane_id() / 4 & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T other = __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + half], 4 * half);
      v[i] = (upper ? v[i + half] : v[i]) + other;
    }
  }
  return v[0];
}

template <class Math, int kUnits>
KERNEL __launch_bounds__(kThreads, Shape<Math, kUnits>::kBlocks)
    conv3x3_backward_kernel(Args<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using S = typename Math::Storage;
  using T = typename Math::T;
  using K = Shape<Math, kUnits>;
  constexpr int kPitch = K::kPitch, kPiece = kGranule<S>, kColumns = K::kColumns;
  const int self = static_cast<int>(threadIdx.x);

  DYNAMIC_SHARED(shared);
  // [kUnits, kWarps, kWarp]: of lanes with g < 4 S1, of the others S2, for the column
  // 8 * (g / 2 % 2) + 2 * t + g % 2 of the unit
  T* const sums = reinterpret_cast<T*>(shared);
  S* const weight = reinterpret_cast<S*>(sums + kUnits * kThreads);
  uint16_t* const inside = reinterpret_cast<uint16_t*>(weight + K::kWeights);
  S* const zeros = reinterpret_cast<S*>(inside + kMostRows);
  S* const tile = zeros + K::kGradientPitch;
  S* const gradient = tile + a.tile_rows * kPitch;

  copy_async(weight, a.taps.weight, K::kWeights);
  cp_async_commit();
  // Channels beyond the growth rate and beyond the rows' pitch stay 0.
  zero_shared(zeros, (1 + a.around_rows) * K::kGradientPitch + a.tile_rows * kPitch);

  // The row of dy that a tap takes to row i of the tile. Where p - tap is outside the map, so is
  // the opposite tap of p.
  const auto gradient_row = [&](int i, int tap) -> const S* {
    return inside[i] >> (kTaps - 1 - tap) & 1
               ? gradient + (i + a.halo - tap_distance(a.map, tap)) * K::kGradientPitch
               : zeros;
  };

  T dw[kUnits][2][4] = {};
  for (int u = 0; u < kUnits; ++u) sums[u * kThreads + self] = T(0);
  for (unsigned index = blockIdx.x; index < a.tiles; index += gridDim.x) {
    const int64_t first = static_cast<int64_t>(index) * a.tile_rows;
    const int rows =
        static_cast<int>(a.map.rows - first < a.tile_rows ? a.map.rows - first : a.tile_rows);
    __syncthreads();  // the zeros are there, and the tile before has been read
    const int self = fresh(static_cast<int>(threadIdx.x)), pieces = a.pitch / kPiece;
    // The run of dy that this thread forms, of every a.lines-th row; a thread too many has no row.
    const int line = self / a.runs < a.lines ? self / a.runs : a.around_rows,
              column = self % a.runs * a.run;
    for (int i = self; i < a.tile_rows * pieces; i += kThreads) {
      const int row = i / pieces, column = i % pieces * kPiece;
      cp_async16(tile + row * kPitch + column,
                 a.bottleneck + (row < rows ? (first + row) * a.pitch + column : 0),
                 row < rows ? 16 : 0);
    }
    cp_async_commit();
    const Cursor around(a.map, first - a.halo);
    for (int i = self; i < a.tile_rows; i += kThreads)
      inside[i] =
          static_cast<uint16_t>(i < rows ? taps_inside(a.map, around.pixel(a.halo + i)) : 0);
    const auto form = [&](auto run) {
      form_gradient<Math, decltype(run)::value>(a, first - a.halo, line, a.around_rows, column,
                                                around, gradient, K::kGradientPitch);
    };
    if (a.run == 4) {
      if constexpr (kPiece >= 4) form(std::integral_constant<int, 4>{});
    } else if (a.run == 2) {
      form(std::integral_constant<int, 2>{});
    } else {
      form(std::integral_constant<int, 1>{});
    }
    cp_async_wait<0>();
    __syncthreads();

    constexpr int kUnroll = sizeof(S) == 2 ? 3 : 1;  // what the registers have room for
    const int lane = fresh(lane_id()), g = lane / 4, t = lane % 4;
    for (int own = warp_id() * 16; own < a.tile_rows; own += kWarps * 16) {
      T dh[kUnits][2][4] = {};
#pragma unroll kUnroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const auto from = lane_rows<Math>(lane, [&](int i) { return gradient_row(own + i, tap); });
        const S* const w = weight + tap * kOutputs * kPitch;
#pragma unroll 1
        for (int o = 0; o < kOutputs; o += Math::kDepth) {
          typename Math::A dy;
          Math::load_a(dy, from, o);
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            typename Math::B b;
            Math::load_b_t(b, [&](int i) { return w + (o + i) * kPitch; }, u * kUnit);
            Math::mma(dh[u], dy, b);
          }
        }
      }

      // Rows that are not there take the table of the tile's first one.
      const auto table = [&](int i) -> const Entry<T>* {
        if (a.taps.sample_stride == 0) return a.taps.table;
        const int64_t n = (first + (i < rows ? i : 0)) / a.map.pixels;
        return a.taps.table + n * a.taps.sample_stride;
      };
      const Entry<T>* const low_table = table(own + g);
      const Entry<T>* const high_table = table(own + g + 8);
      S* const dv = a.dv + (first + own + g) * a.pitch;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        T sum[8] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int c = u * kUnit + 8 * j + 2 * t;
          Entry<T> entry[2] = {load_entry(low_table + c), load_entry(low_table + c + 1)};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (half == 1 && high_table != low_table) {
              entry[0] = load_entry(high_table + c), entry[1] = load_entry(high_table + c + 1);
            }
            S* const at = tile + (own + g + 8 * half) * kPitch + c;
            const bool exists = own + g + 8 * half < rows;
            T b[2], h[2];
            load<2>(at, b);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const T v = exists ? affine(b[e], entry[e].scale, entry[e].shift) : T(0);
              T& d = dh[u][j][2 * half + e];
              // The sums are those of what is stored: in norm2's gradient they have to cancel.
              d = v > T(0) ? rounded<S>(d * entry[e].mask) : T(0);
              sum[2 * j + e] += d;
              sum[4 + 2 * j + e] += d * (b[e] - entry[e].mean);
              h[e] = relu(v);
            }
            store_operands<Math>(at, h);
          }
        }
        sums[u * kThreads + warp_id() * kWarp + lane] += share_sums(sum);
        if (u * kUnit < a.pitch)
          store_unit<S>(own + g < rows ? dv + u * kUnit : nullptr,
                        own + g + 8 < rows ? dv + 8 * a.pitch + u * kUnit : nullptr, dh[u]);
      }
    }
    __syncthreads();

    const int tap = warp_id();
#pragma unroll kUnroll
    for (int p = 0; p < a.tile_rows; p += Math::kDepth) {
      typename Math::A dy;
      Math::load_a_t(dy, [&](int i) { return gradient_row(p + i, tap); }, 0);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        typename Math::B h;
        Math::load_b_t(h, [&](int i) { return tile + (p + i) * kPitch; }, u * kUnit);
        Math::mma(dw[u], dy, h);
      }
    }
  }

  const int g = lane_id() / 4, t = lane_id() % 4;
  T* const parts = a.parts + static_cast<int64_t>(blockIdx.x) * a.step;
#pragma unroll
  for (int u = 0; u < kUnits; ++u)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = g + i / 2 * 8, c = u * kUnit + half * 8 + 2 * t + i % 2;
        if (o < a.growth && c < a.width)
          parts[(warp_id() * kOutputs + o) * kColumns + c] = dw[u][half][i];
      }
  __syncthreads();
  for (int i = self; i < 2 * a.width; i += kThreads) {
    const int c = i % a.width, lane = (i / a.width * 4 + c / 8 % 2 * 2 + c % 2) * 4 + c / 2 % 4;
    const T* const own = sums + c / kUnit * kThreads + lane;
    T sum = own[0];
    for (int w = 1; w < kWarps; ++w) sum += own[w * kWarp];
    parts[K::kSums + i] = sum;
  }
}

template <class T>
struct FinishArgs {
  const T* parts;
  int64_t count, step;
  int growth, width, columns;
  T* dweight;  // [growth, width, 3, 3]
  int64_t weight_blocks;
  NormSums<T> norm;
};
// A block has 32 weights (in the order of the parts), or some channels of norm2 behind those.
template <class T>
KERNEL __launch_bounds__(kFinishThreads) conv3x3_finish_kernel(FinishArgs<T> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  double* const sums = reinterpret_cast<double*>(shared);
  if (blockIdx.x < a.weight_blocks) {
    const int i = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32);
    const int c = i % a.width, o = i / a.width % a.growth, tap = i / a.width / a.growth;
    const bool real = tap < kTaps;
    const T* const part = a.parts + (real ? (tap * kOutputs + o) * a.columns + c : 0);
    const double sum = sum_parts(part, a.step, real ? a.count : 0, sums);
    if (threadIdx.x < 32 && real) a.dweight[(o * a.width + c) * kTaps + tap] = static_cast<T>(sum);
  } else {
    finish_norm(a.norm, blockIdx.x - a.weight_blocks, sums);
  }
}

// Rows of a tile: as many as fill the device and fit in half of a multiprocessor's shared memory;
// 48 or 16 if need be; 0 where not even they fit.
template <class Math, int kUnits>
int tile_rows(const Map& map) {
  const int64_t limit = shared_limit();
  const auto bytes = [&](int rows) { return Shape<Math, kUnits>::shared_bytes(rows, map.width); };
  for (const int rows : {kMostRows, kMostRows / 2, kMostRows / 3}) {
    const int64_t wanted = (rows > kWarps * 16 ? 4 : 1) * static_cast<int64_t>(multiprocessors());
    if (bytes(rows) <= limit / 2 && ceil_div(map.rows, rows) >= wanted) return rows;
  }
  return bytes(48) <= limit ? 48 : bytes(16) <= limit ? 16 : 0;
}

template <class Math, int kUnits, class S>
void run(const Conv3x3Backward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  using K = Shape<Math, kUnits>;
  const Map map = map_of(f.features);
  const int rows = tile_rows<Math, kUnits>(map);
  const int64_t tiles = ceil_div(map.rows, rows), bytes = K::shared_bytes(rows, map.width),
                blocks = std::min<int64_t>(tiles, K::kBlocks * multiprocessors()),
                step = K::kSums + 2 * f.width;
  T* const parts = context.scratch<T>(blocks * step);
  if (blocks > 0) {
    const PackedTaps<S> taps =
        pack_taps<Math, kUnits>(f.weight, f.growth, f.width, f.scale_shift, f.norm.mean,
                                f.post_mask, f.features.samples, context);
    const uint64_t slices = spacing(f.features, f.offset) | spacing(f.grad, f.offset) |
                            static_cast<uint64_t>(f.growth * sizeof(S));
    int run = 1;
    while (run < 4 && 2 * run <= kGranule<S> && slices % (2 * run * sizeof(S)) == 0) run *= 2;
    const Args<S> a = {f.bottleneck,
                       static_cast<int>(round_up(f.width, kLanes)),
                       map,
                       taps,
                       static_cast<int>(f.growth),
                       static_cast<int>(f.width),
                       f.features.data + f.offset,
                       f.grad.data + f.offset,
                       f.features.pitch,
                       f.grad.pitch,
                       run,
                       static_cast<int>(f.growth) / run,
                       kThreads / (static_cast<int>(f.growth) / run),
                       f.coef,
                       f.offset,
                       {f.dropout_mask, static_cast<T>(f.dropout_scale)},
                       f.dv,
                       parts,
                       step,
                       rows,
                       map.width + 1,
                       rows + 2 * (map.width + 1),
                       static_cast<unsigned>(tiles)};
    launch(context, conv3x3_backward_kernel<Math, kUnits>, {blocks}, kThreads, bytes, a);
  }
  const int64_t weight_blocks = ceil_div(kTaps * f.growth * f.width, 32);
  const FinishArgs<T> finish = {parts,
                                blocks,
                                step,
                                static_cast<int>(f.growth),
                                static_cast<int>(f.width),
                                K::kColumns,
                                f.dweight,
                                weight_blocks,
                                {parts + K::kSums, blocks, step, f.width, f.norm, map.rows,
                                 f.dnorm_weight, f.dnorm_bias, f.db_affine}};
  launch(context, conv3x3_finish_kernel<T>, {weight_blocks + narrow_blocks(f.width)},
         kFinishThreads, kFinishShared, finish);
}

}  // namespace

template <class S>
bool conv3x3_backward_fits(const Conv3x3Backward<S>& f, const Context& context) {
  if (!is_narrow<S>(f.width, f.growth, f.features.pixels())) return false;
  bool fits = false;
  dispatch_conv3x3<S>(context, f.width, [&](auto math, auto units) {
    fits = tile_rows<decltype(math), decltype(units)::value>(map_of(f.features)) > 0;
  });
  return fits;
}

template <class S>
void conv3x3_backward(const Conv3x3Backward<S>& f, Context& context) {
  dispatch_conv3x3<S>(context, f.width, [&](auto math, auto units) {
    run<decltype(math), decltype(units)::value>(f, context);
  });
}

template bool conv3x3_backward_fits(const Conv3x3Backward<float>&, const Context&);
template bool conv3x3_backward_fits(const Conv3x3Backward<double>&, const Context&);
template bool conv3x3_backward_fits(const Conv3x3Backward<BFloat16>&, const Context&);
template bool conv3x3_backward_fits(const Conv3x3Backward<Float16>&, const Context&);
template void conv3x3_backward(const Conv3x3Backward<float>&, Context&);
template void conv3x3_backward(const Conv3x3Backward<double>&, Context&);
template void conv3x3_backward(const Conv3x3Backward<BFloat16>&, Context&);
template void conv3x3_backward(const Conv3x3Backward<Float16>&, Context&);

}  // namespace densenet_ext::cuda
