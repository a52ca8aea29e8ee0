// The slice = dropout(conv3x3(relu(scale * b + shift))), in one pass.
//
//   y[p, o] = sum_{tap, c} h[p + tap, c] W[o, c, tap],   h = relu(scale * b + shift), 0 outside a
//   map
//
// b [M, pitch] are rows of pixels, map after map, and a tile is some consecutive rows, whatever the
// maps' size: they and those one map row and one pixel around them go to shared memory by cp.async,
// each thread normalizes what it has fetched, and then a tap is the same rows shifted. Where a tap
// leaves the map (the shifted row is a pixel of another map row, or of another sample) its row is
// one of zeros, so padding is 0 behind the rectifier.
//
// A warp has 32 rows and all output columns: per tap and step of depth, two loads of h and one of W
// for each 16 outputs, of which four tensor core products come. (With 16 outputs a warp, shared
// memory would bound wide layers; with 64 rows a warp, small maps would have too few warps.) A lane
// stores pairs of neighboring channels. Bytes a row: K2 read, k written; what is read around a tile
// comes from L2, as does W. Blocks stay for several tiles, so that W is copied once for each of
// them. Results do not depend on the tiles.
//
// Wide layers' channels come in slabs, through two places in shared memory: when a slab has been
// multiplied, the one after the next takes its place, be it of the block's next tile, so that
// memory is read while the other one is multiplied. Narrow layers have one slab, and several blocks
// on a multiprocessor instead.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

// The largest layers, of 16-bit types: what shared memory has room for. Others are narrow.
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
  static constexpr bool kWide = kUnits > kMostUnits<S>;
  static constexpr int kWidth = kUnits * kUnit, kOut = kTiles * kOutputs;
  static constexpr int kColumns = kWide ? 32 : kWidth;  // of a slab
  static constexpr int kSlabs = kWidth / kColumns, kPlaces = kWide ? 2 : 1;
  static constexpr int kMostRows = kWide ? 512 : 256;  // of a tile
  // Of so many threads, on a multiprocessor: what the registers allow, and shared memory.
  static constexpr int kBlocks = Math::kTensor && !kWide ? 3 : 1;
  static constexpr int kPitch = shared_pitch<S>(kWidth), kSlabPitch = shared_pitch<S>(kColumns);
  static constexpr int kWeights = kTaps * kOut * kPitch;

  static int64_t shared_bytes(int64_t rows, int64_t map_width) {
    const int64_t elements =
        kWeights + (1 + kPlaces * (rows + 2 * (map_width + 1))) * int64_t{kSlabPitch};
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

template <class Math, int kUnits, int kTiles>
KERNEL __launch_bounds__(Shape<Math, kUnits, kTiles>::kMostRows,
                         Shape<Math, kUnits, kTiles>::kBlocks)
    conv3x3_forward_kernel(Args<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using S = typename Math::Storage;
  using T = typename Math::T;
  using K = Shape<Math, kUnits, kTiles>;
  constexpr int kPiece = kGranule<S>;
  const int tile_rows = static_cast<int>(blockDim.x);
  const int halo = a.map.width + 1, loaded = tile_rows + 2 * halo;

  DYNAMIC_SHARED(shared);
  S* const weight = reinterpret_cast<S*>(shared);
  S* const zeros = weight + K::kWeights;
  S* const places = zeros + K::kSlabPitch;
  uint16_t* const inside =
      reinterpret_cast<uint16_t*>(places + K::kPlaces * loaded * K::kSlabPitch);

  // A thread has the same channels of every `lines`-th row from `line` on: what normalizes them
  // changes with the sample only.
  constexpr int kPieces = K::kColumns / kPiece;
  const auto column_of = [](int self) { return self % kPieces * kPiece; };
  const int lines = static_cast<int>(blockDim.x) / kPieces;
  const auto line_of = [&](int self) { return self / kPieces < lines ? self / kPieces : loaded; };
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
  // Starts the copy of a slab of a tile, if there is one; channels beyond the pitch become 0.
  const auto load_slab = [&](int64_t index, int slab) {
    if (index < a.tiles) {
      const int self = fresh(static_cast<int>(threadIdx.x)), line = line_of(self),
                channel = slab * K::kColumns + column_of(self);
      const Around around = around_of(index);
      S* const to = places + slab % K::kPlaces * loaded * K::kSlabPitch + column_of(self);
      const bool real = channel < a.pitch;
      const S* from = a.bottleneck + (around.from + line) * a.pitch + channel;
      for (int i = line; i < around.end; i += lines, from += lines * a.pitch) {
        if (i >= around.begin)
          cp_async16(to + i * K::kSlabPitch, real ? from : a.bottleneck, real ? 16 : 0);
      }
    }
    cp_async_commit();
  };

  copy_async(weight, a.taps.weight, K::kWeights);
  zero_shared(zeros, K::kSlabPitch);
#pragma unroll
  for (int slab = 0; slab < K::kPlaces; ++slab) load_slab(blockIdx.x, slab);

  for (unsigned index = blockIdx.x; index < a.tiles; index += gridDim.x) {
    const int64_t first = static_cast<int64_t>(index) * tile_rows;
    const Cursor around(a.map, first - halo);
    const int self = fresh(static_cast<int>(threadIdx.x));
    inside[self] = static_cast<uint16_t>(
        first + self < a.map.rows ? taps_inside(a.map, around.pixel(halo + self)) : 0);
    const int own = fresh(warp_id()) * 32, lane = fresh(lane_id());
    T acc[2][kTiles][2][4] = {};
#pragma unroll 1
    for (int slab = 0; slab < K::kSlabs; ++slab) {
      S* const tile = places + slab % K::kPlaces * loaded * K::kSlabPitch;
      const int column = column_of(self);
      ScaleShift<T> norm[kPiece] = {};
      int64_t norm_sample = -1;
      cp_async_wait<K::kPlaces - 1>();
      const Around real = around_of(index);
      for (int i = line_of(self); i < real.end; i += lines) {
        if (i < real.begin) continue;
        const int64_t n = a.taps.sample_stride == 0 ? 0 : around.sample(i);
        if (n != norm_sample) {
          norm_sample = n;
#pragma unroll
          for (int e = 0; e < kPiece; ++e) {
            const Entry<T> entry = load_entry(a.taps.table + n * a.taps.sample_stride +
                                              slab * K::kColumns + column + e);
            norm[e] = {entry.scale, entry.shift};
          }
        }
        S* const at = tile + i * K::kSlabPitch + column;
        T h[kPiece];
        load<kPiece>(at, h);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) h[e] = affine(h[e], norm[e].scale, norm[e].shift);
        store_operands<Math, true>(at, h);
      }
      __syncthreads();

      // Where a lane's rows lie, and which of their taps are inside.
      struct Row {
        const S* at;
        int taps;
      };
      LaneRows<Row, Math::kTensor> rows[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        rows[m] = lane_rows<Math>(lane, [&](int i) {
          const int row = own + 16 * m + i;
          return Row{tile + (halo + row) * K::kSlabPitch, inside[row]};
        });
      }
      const S* w = weight + slab * K::kColumns;
      for (int tap = 0; tap < kTaps; ++tap, w += K::kOut * K::kPitch) {
        const int distance = tap_distance(a.map, tap) * K::kSlabPitch;
        LaneRows<const S*, Math::kTensor> shifted[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          shifted[m] = rows[m].map([&](const Row& row) -> const S* {
            return (row.taps >> tap & 1) != 0 ? row.at + distance : zeros;
          });
        }
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
            Math::load_a(h, shifted[m], c);
#pragma unroll
            for (int o = 0; o < kTiles; ++o) Math::mma(acc[m][o], h, b[o]);
          }
        }
      }
      __syncthreads();  // the slab has been read, and inside
      const int next = slab + K::kPlaces;
      load_slab(static_cast<int64_t>(index) + (next < K::kSlabs ? 0 : gridDim.x),
                next < K::kSlabs ? next : next - K::kSlabs);
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

// Rows of a tile, 32 for each warp: those that take the multiprocessors the least time, which is
// that of the rows they read, the ones around the tiles included, and of waiting; 0 where not even
// 32 fit. Of narrow layers small ones, where large ones leave no room for a second block that could
// work while one waits for memory. Of wide ones 0 where 256 do not fit: so few warps would wait for
// memory and for each other most of the time.
template <class K>
int tile_rows(const Map& map) {
  constexpr int kWaiting = 128;  // in rows, for each tile: an estimate
  const int64_t limit = shared_limit();
  if (K::kWide && K::shared_bytes(256, map.width) > limit) return 0;
  int best = 0;
  int64_t least = 0;
  for (int rows = K::kMostRows; rows >= (best == 0 ? 1 : 2) * kWarp; rows /= 2) {
    const int64_t bytes = K::shared_bytes(rows, map.width);
    if (bytes > (K::kWide || rows <= 2 * kWarp ? limit : limit / 2)) continue;
    const int64_t tiles = ceil_div(map.rows, rows), time = ceil_div(tiles, multiprocessors()) *
                                                           (rows + 2 * (map.width + 1) + kWaiting);
    if (best == 0 || time < least) best = rows, least = time;
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
      f.weight, f.growth, f.width, f.scale_shift, nullptr, {}, f.features.samples, context);
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
  const int64_t most = Math::kTensor ? K::kBlocks * K::kMostRows / rows : 8;
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
    if (is_within(kWideUnits, kWideTiles, f.width, f.growth, pixels))
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
