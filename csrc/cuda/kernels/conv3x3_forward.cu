// The slice = dropout(conv3x3(relu(scale * b + shift))), for narrow layers, in one pass.
//
//   y[p, o] = sum_{tap, c} h[p + tap, c] W[o, c, tap],   h = relu(scale * b + shift), 0 outside a
//   map
//
// b [M, pitch] are rows of pixels, map after map, and a tile is as many consecutive rows as a block
// has threads, whatever the maps' size: the rows of a tile and those one map row and one pixel
// around it go to shared memory by cp.async, each thread normalizes what it has fetched, and then a
// tap is the same rows shifted. Where a tap leaves the map (the shifted row is a pixel of another
// map row, or of another sample) its row is one of zeros, so padding is 0 behind the rectifier.
//
// A warp has 32 rows and all 16 output columns: per tap and step of depth, two loads of h and one
// of W for four tensor core products. A lane stores pairs of neighboring channels. Bytes a row: K2
// read, k written; what is read around a tile comes from L2, as does W. Blocks stay for several
// tiles, so that W is copied once for each of them. Results do not depend on the tiles.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kMostWarps = 8;
constexpr int kBlocks = 3;  // of the most warps, on a multiprocessor: what the registers allow

template <class S>
struct Args {
  using T = Arithmetic<S>;
  const S* bottleneck;
  int pitch;
  Map map;
  PackedTaps<S> taps;
  int growth;
  Dropout<T> dropout;
  S* out;  // at the first channel of the slice
  int64_t out_pitch;
  bool pairs;  // whether pairs of channels are aligned to their size
  unsigned tiles;
};

template <class S, int kUnits>
struct Shape {
  static constexpr int kPitch = shared_pitch<S>(kUnits * kUnit);
  static constexpr int kWeights = kTaps * kOutputs * kPitch;

  static int64_t shared_bytes(int64_t rows, int64_t map_width) {
    const int64_t elements = kWeights + (1 + rows + 2 * (map_width + 1)) * kPitch;
    return elements * static_cast<int64_t>(sizeof(S)) +
           rows * static_cast<int64_t>(sizeof(uint16_t));
  }
};

template <class S>
DEVICE void store_pair(S* to, Arithmetic<S> first, Arithmetic<S> second, bool together, int valid) {
  if (together && valid >= 2) {
    const Arithmetic<S> v[2] = {first, second};
    store<2>(to, v);
  } else {
    if (valid > 0) to[0] = store_as<S>(first);
    if (valid > 1) to[1] = store_as<S>(second);
  }
}

template <class Math, int kUnits>
KERNEL __launch_bounds__(kMostWarps* kWarp, Math::kTensor ? kBlocks : 1)
    conv3x3_forward_kernel(Args<typename Math::Storage> a) {
  using S = typename Math::Storage;
  using T = typename Math::T;
  using K = Shape<S, kUnits>;
  constexpr int kPitch = K::kPitch, kPiece = kGranule<S>;
  const int tile_rows = static_cast<int>(blockDim.x);
  const int halo = a.map.width + 1, loaded = tile_rows + 2 * halo;

  DYNAMIC_SHARED(shared);
  S* const weight = reinterpret_cast<S*>(shared);
  S* const zeros = weight + K::kWeights;
  S* const tile = zeros + kPitch;
  uint16_t* const inside = reinterpret_cast<uint16_t*>(tile + loaded * kPitch);

  copy_async(weight, a.taps.weight, K::kWeights);
  cp_async_commit();
  // Channels beyond the rows' pitch stay 0.
  zero_shared(zeros, (a.pitch < kUnits * kUnit ? loaded + 1 : 1) * kPitch);

  for (unsigned index = blockIdx.x; index < a.tiles; index += gridDim.x) {
    const int64_t first = static_cast<int64_t>(index) * tile_rows, from = first - halo;
    // A thread has the same channels of all its rows: the table changes with the sample only.
    const int self = fresh(static_cast<int>(threadIdx.x)), pieces = a.pitch / kPiece,
              lines = tile_rows / pieces, column = self % pieces * kPiece,
              line = self / pieces < lines ? self / pieces : loaded;
    __syncthreads();  // the zeros are there, and the tile before has been read
    for (int i = line; i < loaded; i += lines) {
      if (from + i >= 0 && from + i < a.map.rows)
        cp_async16(tile + i * kPitch + column, a.bottleneck + (from + i) * a.pitch + column);
    }
    cp_async_commit();
    const Cursor around(a.map, from);
    inside[self] = static_cast<uint16_t>(
        first + self < a.map.rows ? taps_inside(a.map, around.pixel(halo + self)) : 0);
    ScaleShift<T> norm[kPiece] = {};
    int64_t norm_sample = -1;
    cp_async_wait<0>();
    for (int i = line; i < loaded; i += lines) {
      if (from + i < 0 || from + i >= a.map.rows) continue;
      const int64_t n = a.taps.sample_stride == 0 ? 0 : around.sample(i);
      if (n != norm_sample) {
        norm_sample = n;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          const Entry<T> entry = load_entry(a.taps.table + n * a.taps.sample_stride + column + e);
          norm[e] = {entry.scale, entry.shift};
        }
      }
      S* const at = tile + i * kPitch + column;
      T h[kPiece];
      load<kPiece>(at, h);
#pragma unroll
      for (int e = 0; e < kPiece; ++e) h[e] = relu(affine(h[e], norm[e].scale, norm[e].shift));
      store_operands<Math>(at, h);
    }
    __syncthreads();

    T acc[2][2][4] = {};
    const int own = fresh(warp_id()) * 32, lane = fresh(lane_id());
    for (int tap = 0; tap < kTaps; ++tap) {
      const int shift = halo + tap_distance(a.map, tap);
      const auto row = [&](int i) -> const S* {
        return inside[i] >> tap & 1 ? tile + (i + shift) * kPitch : zeros;
      };
      const LaneRows<S> rows[2] = {lane_rows<Math>(lane, [&](int i) { return row(own + i); }),
                                   lane_rows<Math>(lane, [&](int i) { return row(own + 16 + i); })};
      const S* const w = weight + tap * kOutputs * kPitch;
      constexpr int kUnroll = Math::kTensor ? kUnits * kUnit / Math::kDepth : 1;
#pragma unroll kUnroll
      for (int c = 0; c < kUnits * kUnit; c += Math::kDepth) {
        typename Math::B b;
        Math::load_b(b, [&](int o) { return w + o * kPitch; }, c);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          typename Math::A h;
          Math::load_a(h, rows[m], c);
          Math::mma(acc[m], h, b);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows g, g+8, g+16, g+24 of the warp
      const int in_tile = own + 8 * i + lane / 4;
      const int64_t r = first + in_tile;
      if (r >= a.map.rows) continue;
      int64_t n = 0, p = 0;
      if (a.dropout.mask != nullptr) {
        n = around.sample(halo + in_tile), p = around.pixel(halo + in_tile);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int o = 8 * half + lane % 4 * 2;
        T y[2] = {acc[i / 2][half][i % 2 * 2], acc[i / 2][half][i % 2 * 2 + 1]};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (o + e < a.growth) y[e] = a.dropout(y[e], n, o + e, p, a.growth, a.map.pixels);
        }
        store_pair<S>(a.out + r * a.out_pitch + o, y[0], y[1], a.pairs, a.growth - o);
      }
    }
  }
}

// Rows of a tile, 32 for each warp: as many as fill the device, and fit in half of a
// multiprocessor's shared memory or, if need be, in all of it; 0 where not even 32 do.
template <class S, int kUnits>
int tile_rows(const Map& map) {
  const int64_t limit = shared_limit(), wanted = multiprocessors();
  int rows = kMostWarps * kWarp;
  const auto bytes = [&] { return Shape<S, kUnits>::shared_bytes(rows, map.width); };
  while (rows > 2 * kWarp && (bytes() > limit / 2 || ceil_div(map.rows, rows) < wanted)) rows /= 2;
  if (bytes() > limit) rows = kWarp;
  return bytes() > limit ? 0 : rows;
}

template <class Math, int kUnits, class S>
void run(const Conv3x3Forward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  const Map map = map_of(f.features);
  const int rows = tile_rows<S, kUnits>(map);
  const PackedTaps<S> taps = pack_taps<Math, kUnits>(f.weight, f.growth, f.width, f.norm, nullptr,
                                                     {}, f.features.samples, context);
  S* const out = f.features.data + f.offset;
  const Args<S> a = {f.bottleneck,
                     static_cast<int>(round_up(f.width, kLanes)),
                     map,
                     taps,
                     static_cast<int>(f.growth),
                     {f.dropout_mask, static_cast<T>(f.dropout_scale)},
                     out,
                     f.features.pitch,
                     spacing(f.features, f.offset) % (2 * sizeof(S)) == 0,
                     static_cast<unsigned>(ceil_div(map.rows, rows))};
  const int64_t bytes = Shape<S, kUnits>::shared_bytes(rows, map.width);
  // Those that run at the same time: one more would wait for all others.
  const int64_t most = Math::kTensor ? kBlocks * kMostWarps * kWarp / rows : 8;
  const int64_t blocks =
      multiprocessors() * std::min<int64_t>(most, std::max<int64_t>(1, shared_limit() / bytes));
  launch(context, conv3x3_forward_kernel<Math, kUnits>, {std::min<int64_t>(a.tiles, blocks)}, rows,
         bytes, a);
}

}  // namespace

template <class S>
bool conv3x3_forward_fits(const Conv3x3Forward<S>& f, const Context& context) {
  bool fits = false;
  if (!is_narrow<S>(f.width, f.growth, f.features.pixels())) return false;
  dispatch_conv3x3<S>(context, f.width, [&](auto, auto units) {
    fits = tile_rows<S, decltype(units)::value>(map_of(f.features)) > 0;
  });
  return fits;
}

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& f, Context& context) {
  dispatch_conv3x3<S>(context, f.width, [&](auto math, auto units) {
    run<decltype(math), decltype(units)::value>(f, context);
  });
}

template bool conv3x3_forward_fits(const Conv3x3Forward<float>&, const Context&);
template bool conv3x3_forward_fits(const Conv3x3Forward<double>&, const Context&);
template bool conv3x3_forward_fits(const Conv3x3Forward<BFloat16>&, const Context&);
template bool conv3x3_forward_fits(const Conv3x3Forward<Float16>&, const Context&);
template void conv3x3_forward(const Conv3x3Forward<float>&, Context&);
template void conv3x3_forward(const Conv3x3Forward<double>&, Context&);
template void conv3x3_forward(const Conv3x3Forward<BFloat16>&, Context&);
template void conv3x3_forward(const Conv3x3Forward<Float16>&, Context&);

}  // namespace densenet_ext::cuda
