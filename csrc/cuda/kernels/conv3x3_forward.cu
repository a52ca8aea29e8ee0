// The slice = dropout(conv3x3(relu(scale * b + shift))), in one pass.
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
// A warp has 32 rows and all output columns: per tap and step of depth, two loads of h and one of W
// for each 16 outputs, of which four tensor core products come. A lane stores pairs of neighboring
// channels. Bytes a row: K2 read, k written; what is read around a tile comes from L2, as does W.
// Blocks stay for several tiles, so that W is copied once for each of them. Results do not depend
// on the tiles.
//
// The channels of a tile come in slabs of at most kSlab, each with its own place in shared memory.
// When one has been multiplied, the same slab of the block's next tile takes its place: with two of
// them memory is read while the other one is multiplied. Narrow layers have one, and several blocks
// on a multiprocessor instead.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kMostWarps = 8;
constexpr int kSlab = 64;
// The largest layers of 16-bit types: what shared memory has room for. Others are narrow.
constexpr int kWideUnits = 8, kWideTiles = 2;

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

// For up to kUnits * 16 channels of the bottleneck and kTiles * 16 outputs.
template <class Math, int kUnits, int kTiles>
struct Shape {
  using S = typename Math::Storage;
  static constexpr int kWidth = kUnits * kUnit, kOut = kTiles * kOutputs;
  static constexpr int kColumns = kWidth < kSlab ? kWidth : kSlab;  // of a slab
  static constexpr int kSlabs = kWidth / kColumns;
  static_assert(kSlabs * kColumns == kWidth, "whole slabs");
  static constexpr int kPitch = shared_pitch<S>(kWidth), kSlabPitch = shared_pitch<S>(kColumns);
  static constexpr int kWeights = kTaps * kOut * kPitch;
  // On a multiprocessor, of the most warps: what the registers allow, and shared memory.
  static constexpr int kBlocks = Math::kTensor && kSlabs == 1 ? 3 : 1;

  static int64_t shared_bytes(int64_t rows, int64_t map_width) {
    const int64_t elements =
        kWeights + (1 + kSlabs * (rows + 2 * (map_width + 1))) * int64_t{kSlabPitch};
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

// The place of a thread among the pieces of 16 bytes of a slab's rows: it has the same channels of
// every `lines`-th row from `line` on, so what normalizes them changes with the sample only.
struct Pieces {
  int column, line, lines;
};

template <class Math, int kUnits, int kTiles>
KERNEL __launch_bounds__(kMostWarps* kWarp, Shape<Math, kUnits, kTiles>::kBlocks)
    conv3x3_forward_kernel(Args<typename Math::Storage> a) {
  using S = typename Math::Storage;
  using T = typename Math::T;
  using K = Shape<Math, kUnits, kTiles>;
  constexpr int kPiece = kGranule<S>;
  const int tile_rows = static_cast<int>(blockDim.x);
  const int halo = a.map.width + 1, loaded = tile_rows + 2 * halo;

  DYNAMIC_SHARED(shared);
  S* const weight = reinterpret_cast<S*>(shared);
  S* const zeros = weight + K::kWeights;
  S* const slabs = zeros + K::kSlabPitch;
  uint16_t* const inside = reinterpret_cast<uint16_t*>(slabs + K::kSlabs * loaded * K::kSlabPitch);

  const auto pieces_of = [&](int slab) -> Pieces {
    const int self = fresh(static_cast<int>(threadIdx.x)), left = a.pitch - slab * K::kColumns,
              each = (left < K::kColumns ? left : K::kColumns) / kPiece;
    if (each <= 0) return {0, loaded, 1};
    const int lines = tile_rows / each;
    return {self % each * kPiece, self / each < lines ? self / each : loaded, lines};
  };
  // Starts the copy of a slab of a tile, if there is one.
  const auto load_slab = [&](int64_t index, int slab) {
    if (index < a.tiles) {
      const int64_t from = index * tile_rows - halo;
      const Pieces own = pieces_of(slab);
      S* const to = slabs + slab * loaded * K::kSlabPitch + own.column;
      const S* const source = a.bottleneck + slab * K::kColumns + own.column;
      for (int i = own.line; i < loaded; i += own.lines) {
        if (from + i >= 0 && from + i < a.map.rows)
          cp_async16(to + i * K::kSlabPitch, source + (from + i) * a.pitch);
      }
    }
    cp_async_commit();
  };

  copy_async(weight, a.taps.weight, K::kWeights);
  // Channels beyond the rows' pitch stay 0.
  zero_shared(zeros, (a.pitch < K::kWidth ? K::kSlabs * loaded + 1 : 1) * K::kSlabPitch);
  __syncthreads();
#pragma unroll
  for (int slab = 0; slab < K::kSlabs; ++slab) load_slab(blockIdx.x, slab);

  for (unsigned index = blockIdx.x; index < a.tiles; index += gridDim.x) {
    const int64_t first = static_cast<int64_t>(index) * tile_rows, from = first - halo;
    const Cursor around(a.map, from);
    const int self = fresh(static_cast<int>(threadIdx.x));
    inside[self] = static_cast<uint16_t>(
        first + self < a.map.rows ? taps_inside(a.map, around.pixel(halo + self)) : 0);
    const int own = fresh(warp_id()) * 32, lane = fresh(lane_id());
    T acc[2][kTiles][2][4] = {};
#pragma unroll 1
    for (int slab = 0; slab < K::kSlabs; ++slab) {
      S* const tile = slabs + slab * loaded * K::kSlabPitch;
      const Pieces pieces = pieces_of(slab);
      ScaleShift<T> norm[kPiece] = {};
      int64_t norm_sample = -1;
      cp_async_wait<K::kSlabs - 1>();
      for (int i = pieces.line; i < loaded; i += pieces.lines) {
        if (from + i < 0 || from + i >= a.map.rows) continue;
        const int64_t n = a.taps.sample_stride == 0 ? 0 : around.sample(i);
        if (n != norm_sample) {
          norm_sample = n;
#pragma unroll
          for (int e = 0; e < kPiece; ++e) {
            const Entry<T> entry = load_entry(a.taps.table + n * a.taps.sample_stride +
                                              slab * K::kColumns + pieces.column + e);
            norm[e] = {entry.scale, entry.shift};
          }
        }
        S* const at = tile + i * K::kSlabPitch + pieces.column;
        T h[kPiece];
        load<kPiece>(at, h);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) h[e] = relu(affine(h[e], norm[e].scale, norm[e].shift));
        store_operands<Math>(at, h);
      }
      __syncthreads();

      for (int tap = 0; tap < kTaps; ++tap) {
        const int shift = halo + tap_distance(a.map, tap);
        const auto row = [&](int i) -> const S* {
          return inside[i] >> tap & 1 ? tile + (i + shift) * K::kSlabPitch : zeros;
        };
        const LaneRows<S> rows[2] = {
            lane_rows<Math>(lane, [&](int i) { return row(own + i); }),
            lane_rows<Math>(lane, [&](int i) { return row(own + 16 + i); })};
        const S* const w = weight + tap * K::kOut * K::kPitch + slab * K::kColumns;
        constexpr int kUnroll = Math::kTensor ? K::kColumns / Math::kDepth : 1;
#pragma unroll kUnroll
        for (int c = 0; c < K::kColumns; c += Math::kDepth) {
          typename Math::B b[kTiles];
#pragma unroll
          for (int o = 0; o < kTiles; ++o)
            Math::load_b(b[o], [&](int i) { return w + (o * kOutputs + i) * K::kPitch; }, c);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            typename Math::A h;
            Math::load_a(h, rows[m], c);
#pragma unroll
            for (int o = 0; o < kTiles; ++o) Math::mma(acc[m][o], h, b[o]);
          }
        }
      }
      __syncthreads();  // the slab has been read, and inside
      load_slab(static_cast<int64_t>(index) + gridDim.x, slab);
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
      for (int half = 0; half < 2 * kTiles; ++half) {
        const int o = 8 * half + lane % 4 * 2;
        const T(&sums)[4] = acc[i / 2][half / 2][half % 2];
        T y[2] = {sums[i % 2 * 2], sums[i % 2 * 2 + 1]};
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
// multiprocessor's shared memory (a layer of two slabs has it all) or, if need be, in all of it; 0
// where not even 32 do.
template <class K>
int tile_rows(const Map& map) {
  const int64_t limit = shared_limit(), wanted = multiprocessors();
  int rows = kMostWarps * kWarp;
  const auto bytes = [&] { return K::shared_bytes(rows, map.width); };
  while (rows > 2 * kWarp &&
         (bytes() > limit / (K::kSlabs > 1 ? 1 : 2) || ceil_div(map.rows, rows) < wanted))
    rows /= 2;
  if (bytes() > limit) rows = kWarp;
  return bytes() > limit ? 0 : rows;
}

template <class Math, int kUnits, int kTiles, class S>
void run(const Conv3x3Forward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  using K = Shape<Math, kUnits, kTiles>;
  const Map map = map_of(f.features);
  const int rows = tile_rows<K>(map);
  const PackedTaps<S> taps = pack_taps<Math, kUnits, K::kOut>(
      f.weight, f.growth, f.width, f.norm, nullptr, {}, f.features.samples, context);
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
  const int64_t bytes = K::shared_bytes(rows, map.width);
  // Those that run at the same time: one more would wait for all others.
  const int64_t most = Math::kTensor ? K::kBlocks * kMostWarps * kWarp / rows : 8;
  const int64_t blocks =
      multiprocessors() * std::min<int64_t>(most, std::max<int64_t>(1, shared_limit() / bytes));
  launch(context, conv3x3_forward_kernel<Math, kUnits, kTiles>,
         {std::min<int64_t>(a.tiles, blocks)}, rows, bytes, a);
}

// Calls body(Math{}, units, tiles) for the arithmetic of S and the sizes of the layer; not at all
// where it is too wide.
template <class S, class F>
void dispatch(const Conv3x3Forward<S>& f, const Context& context, const F& body) {
  const int64_t pixels = f.features.pixels();
  if (is_narrow<S>(f.width, f.growth, pixels)) {
    dispatch_conv3x3<S>(context, f.width, [&](auto math, auto units) {
      body(math, units, std::integral_constant<int, 1>{});
    });
  } else if constexpr (sizeof(S) == 2) {
    if (f.width <= kWideUnits * kUnit && f.growth <= kWideTiles * kOutputs && pixels < (1 << 28))
      body(Half<S>{}, std::integral_constant<int, kWideUnits>{},
           std::integral_constant<int, kWideTiles>{});
  }
}

}  // namespace

template <class S>
bool conv3x3_forward_fits(const Conv3x3Forward<S>& f, const Context& context) {
  bool fits = false;
  dispatch(f, context, [&](auto math, auto units, auto tiles) {
    fits = tile_rows<Shape<decltype(math), decltype(units)::value, decltype(tiles)::value>>(
               map_of(f.features)) > 0;
  });
  return fits;
}

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& f, Context& context) {
  dispatch(f, context, [&](auto math, auto units, auto tiles) {
    run<decltype(math), decltype(units)::value, decltype(tiles)::value>(f, context);
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
