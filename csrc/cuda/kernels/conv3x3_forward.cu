// The slice = dropout(conv3x3(relu(scale * b + shift))), in one pass.
//
//   y[p, o] = sum_{tap, c} h[p + tap, c] W[o, c, tap],   h = relu(scale * b + shift), 0 outside a
//   map
//
// b [M, pitch] are rows of pixels, map after map, and a tile is some consecutive rows, whatever the
// maps' size: they and those one map row and one pixel around them go to shared memory by cp.async,
// each thread normalizes what it has fetched, and then a tap is the same rows shifted. Where a tap leaves the map (the shifted row is a pixel of another
// map row, or of another sample) its row is one of zeros, so padding is 0 behind the rectifier.
//
// A warp has 32 rows and 16 output columns: per tap and step of depth, two loads of h and one of W
// for four tensor core products. A lane stores pairs of neighboring channels. Bytes a row: K2 read,
// k written; what is read around a tile comes from L2, as does W. Blocks stay for several tiles, so
// that W is copied once for each of them. Results do not depend on the tiles.
//
// The channels of a tile come in slabs of at most kSlab, each with its own place in shared memory.
// When one has been multiplied, the same slab of the block's next tile takes its place: with two of
// them memory is read while the other one is multiplied. Narrow layers have one, and several blocks
// on a multiprocessor instead.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kMostRows = 256;  // of a tile
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
  static constexpr int kMostThreads = kMostRows * kTiles;
  // Of so many threads, on a multiprocessor: what the registers allow, and shared memory.
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
KERNEL __launch_bounds__(Shape<Math, kUnits, kTiles>::kMostThreads,
                         Shape<Math, kUnits, kTiles>::kBlocks)
    conv3x3_forward_kernel(Args<typename Math::Storage> a) {
  using S = typename Math::Storage;
  using T = typename Math::T;
  using K = Shape<Math, kUnits, kTiles>;
  constexpr int kPiece = kGranule<S>;
  const int tile_rows = static_cast<int>(blockDim.x) / kTiles;
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
    const int lines = static_cast<int>(blockDim.x) / each;
    return {self % each * kPiece, self / each < lines ? self / each : loaded, lines};
  };
  // Of the rows of a tile and around it those that there are.
  struct Around {
    int64_t from;
    int begin, end;
  };
  const auto around_of = [&](int64_t index) -> Around {
    const int64_t from = index * tile_rows - halo, left = a.map.rows - from;
    return {from, from < 0 ? static_cast<int>(-from) : 0,
            left < loaded ? static_cast<int>(left) : loaded};
  };
  // Starts the copy of a slab of a tile, if there is one.
  const auto load_slab = [&](int64_t index, int slab) {
    if (index < a.tiles) {
      const Pieces own = pieces_of(slab);
      const Around around = around_of(index);
      S* const to = slabs + slab * loaded * K::kSlabPitch + own.column;
      const S* source = a.bottleneck + (around.from + own.line) * a.pitch + slab * K::kColumns + own.column;
      for (int i = own.line; i < around.end; i += own.lines, source += own.lines * a.pitch) {
        if (i >= around.begin) cp_async16(to + i * K::kSlabPitch, source);
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
    const int64_t first = static_cast<int64_t>(index) * tile_rows;
    const Cursor around(a.map, first - halo);
    const int self = fresh(static_cast<int>(threadIdx.x));
    if (self < tile_rows) {
      inside[self] = static_cast<uint16_t>(
          first + self < a.map.rows ? taps_inside(a.map, around.pixel(halo + self)) : 0);
    }
    const int warp = fresh(warp_id()), lane = fresh(lane_id());
    const int own = warp * kWarp % tile_rows, output = warp * kWarp / tile_rows * kOutputs;
    T acc[2][2][4] = {};
#pragma unroll 1
    for (int slab = 0; slab < K::kSlabs; ++slab) {
      S* const tile = slabs + slab * loaded * K::kSlabPitch;
      const Pieces pieces = pieces_of(slab);
      ScaleShift<T> norm[kPiece] = {};
      int64_t norm_sample = -1;
      cp_async_wait<K::kSlabs - 1>();
      const Around real = around_of(index);
      for (int i = pieces.line; i < real.end; i += pieces.lines) {
        if (i < real.begin) continue;
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
        for (int e = 0; e < kPiece; ++e) h[e] = affine(h[e], norm[e].scale, norm[e].shift);
        store_rectified<Math>(at, h);
      }
      __syncthreads();

      // Where a lane's rows lie, and which of their taps are inside.
      struct Row {
        const S* at;
        int taps;
      };
      const auto row = [&](int i) {
        return Row{tile + (halo + own + i) * K::kSlabPitch, inside[own + i]};
      };
      const auto low = lane_rows<Math>(lane, row),
                 high = lane_rows<Math>(lane, [&](int i) { return row(16 + i); });
      const S* w = weight + output * K::kPitch + slab * K::kColumns;
      for (int tap = 0; tap < kTaps; ++tap, w += K::kOut * K::kPitch) {
        const int distance = tap_distance(a.map, tap) * K::kSlabPitch;
        const auto shifted = [&](const Row& r) -> const S* {
          return (r.taps >> tap & 1) != 0 ? r.at + distance : zeros;
        };
        const auto from_low = low.map(shifted), from_high = high.map(shifted);
        constexpr int kUnroll = Math::kTensor ? K::kColumns / Math::kDepth : 1;
#pragma unroll kUnroll
        for (int c = 0; c < K::kColumns; c += Math::kDepth) {
          typename Math::B b;
          Math::load_b(b, [&](int o) { return w + o * K::kPitch; }, c);
          typename Math::A h;
          Math::load_a(h, from_low, c);
          Math::mma(acc[0], h, b);
          Math::load_a(h, from_high, c);
          Math::mma(acc[1], h, b);
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
      for (int half = 0; half < 2; ++half) {
        const int o = output + 8 * half + lane % 4 * 2;
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

// Rows of a tile, so that the multiprocessors read as few rows as can be, those around the tiles
// included; 0 where not even 32 fit. Small tiles where large ones leave no room for a second block
// that could work while one waits for memory; a block of two slabs needs no other.
template <class K>
int tile_rows(const Map& map) {
  const int64_t limit = shared_limit();
  int best = 0;
  int64_t least = 0;
  for (int rows = kMostRows; rows >= (best == 0 ? 1 : 2) * kWarp; rows /= 2) {
    const int64_t bytes = K::shared_bytes(rows, map.width);
    if (bytes > (K::kSlabs == 1 && rows > 2 * kWarp ? limit / 2 : limit)) continue;
    const int64_t tiles = ceil_div(map.rows, rows),
                  read = ceil_div(tiles, multiprocessors()) * (rows + 2 * (map.width + 1));
    if (best == 0 || read < least) best = rows, least = read;
  }
  return best;
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
  const int64_t most = Math::kTensor ? K::kBlocks * kMostRows / rows : 8;
  const int64_t blocks =
      multiprocessors() * std::min<int64_t>(most, std::max<int64_t>(1, shared_limit() / bytes));
  launch(context, conv3x3_forward_kernel<Math, kUnits, kTiles>,
         {std::min<int64_t>(a.tiles, blocks)}, rows * kTiles, bytes, a);
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
