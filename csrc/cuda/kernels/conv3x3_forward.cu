// conv3x3_forward makes the slice = dropout(conv3x3(relu(scale * b + shift))) in one pass:
//
//   y[p, o] = sum_{tap, c} h[p + tap, c] W[o, c, tap]
//   h = relu(scale * b + shift), 0 outside a map
//
// b [M, pitch] are rows of pixels, map after map, and a tile is some consecutive rows, whatever the
// maps' size: they and a halo of one map row and one pixel on each side go to shared memory by
// cp.async, each thread normalizes what it has fetched, and then a tap is the tile's rows, shifted.
// If a tap leaves the map (the shifted row is a pixel of another map row, or of another sample)
// its row is one of zeros, so padding is 0 behind ReLU.
//
// A warp has 32 rows and all output columns: per tap and step of depth, two loads of h and one of W
// for each 16 outputs, of which four tensor core products come. (With 16 outputs a warp, shared
// memory would bound wide layers; with 64 rows a warp, small maps would have too few warps.) A lane
// stores pairs of neighboring channels. Bytes a row: K2 read, k written; the halo comes from L2, as
// does W. Blocks stay for several tiles, so that W is copied once for each of them. Results do not
// depend on the tiles.
//
// Wide layers' channels come in chunks, through two stages of shared memory: when a chunk has been
// multiplied, the one after the next takes its place, be it of the block's next tile, so that
// memory is read while the other one is multiplied. Narrow layers have one chunk, and several
// blocks on a multiprocessor instead.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

// The largest layers, of 16-bit types, that shared memory has room for. Others are narrow.
constexpr int kWideUnits = 8, kWideTiles = 2;

template <class S>
struct Arguments {
  using T = Arithmetic<S>;
  const S* bottleneck;
  int pitch;
  MapSizes maps;
  PackedTaps<S> taps;
  int growth;
  Dropout<T> dropout;
  S* out;  // at the first channel of the slice
  int64_t out_pitch;
  bool pairs_are_aligned;  // pairs of channels of `out`, to their size
  unsigned tiles;
};

// Sizes for up to kUnits * 16 channels of the bottleneck and kTiles * 16 outputs.
template <class Math_, int kUnits, int kTiles_>
struct Tiling {
  using Math = Math_;
  using S = typename Math::Storage;
  static constexpr int kTiles = kTiles_;
  static constexpr bool kWide = kUnits > kMaxUnits<S>;
  static constexpr int kWidth = kUnits * kUnit, kOut = kTiles * kOutputs;
  static constexpr int kColumns = kWide ? 32 : kWidth;  // of a chunk
  static constexpr int kChunks = kWidth / kColumns, kStages = kWide ? 2 : 1;
  static constexpr int kVectors = kColumns / kVector<S>;  // of a row
  static constexpr int kMaxRows = kWide ? 512 : 256;      // of a tile
  // Blocks of kMaxRows threads on a multiprocessor, as registers and shared memory allow.
  static constexpr int kBlocks = Math::kTensor && !kWide ? 3 : 1;
  static constexpr int kPitch = shared_pitch<S>(kWidth), kChunkPitch = shared_pitch<S>(kColumns);
  static constexpr int kWeights = kTaps * kOut * kPitch;

  static int64_t shared_bytes(int64_t rows, int64_t map_width) {
    const int64_t elements =
        kWeights + (1 + kStages * (rows + 2 * (map_width + 1))) * int64_t{kChunkPitch};
    return elements * static_cast<int64_t>(sizeof(S)) +
           rows * static_cast<int64_t>(sizeof(uint16_t));
  }
};

// A block's shared memory, and how its threads share out the rows that it loads for a tile.
template <class K>
struct Block {
  using S = typename K::S;
  int tile_rows, halo, loaded_rows, lines;
  S* weight;
  S* zeros;
  S* stages;
  uint16_t* taps;  // [tile_rows]: existing_taps

  DEVICE Block(const Arguments<S>& a, unsigned char* shared)
      : tile_rows(static_cast<int>(blockDim.x)),
        halo(a.maps.width + 1),
        loaded_rows(tile_rows + 2 * halo),
        lines(tile_rows / K::kVectors),
        weight(reinterpret_cast<S*>(shared)),
        zeros(weight + K::kWeights),
        stages(zeros + K::kChunkPitch),
        taps(reinterpret_cast<uint16_t*>(stages + K::kStages * loaded_rows * K::kChunkPitch)) {}

  DEVICE S* stage(int chunk) const {
    return stages + chunk % K::kStages * loaded_rows * K::kChunkPitch;
  }
  // A thread has one vector of every `lines`-th row from its line on: the channels' normalization
  // changes with the sample only.
  DEVICE static int column(int thread) { return thread % K::kVectors * kVector<S>; }
  DEVICE int line(int thread) const {
    return thread / K::kVectors < lines ? thread / K::kVectors : loaded_rows;
  }
};

// The rows of a tile, with its halo, that exist: [begin, end) from row `first` of all maps on.
struct LoadedRows {
  int64_t first;
  int begin, end;
};
template <class K, class S>
DEVICE LoadedRows loaded_rows(const Arguments<S>& a, const Block<K>& block, int64_t tile) {
  const int64_t first = tile * block.tile_rows - block.halo, remaining = a.maps.rows - first;
  return {first, first < 0 ? static_cast<int>(-first) : 0,
          remaining < block.loaded_rows ? static_cast<int>(remaining) : block.loaded_rows};
}

// Starts the copy of a chunk of a tile, if there is one; channels beyond the pitch become 0.
template <class K, class S>
DEVICE void load_chunk(const Arguments<S>& a, const Block<K>& block, int64_t tile, int chunk) {
  if (tile < a.tiles) {
    const int thread = fresh(thread_id()), line = block.line(thread),
              channel = chunk * K::kColumns + block.column(thread);
    const LoadedRows rows = loaded_rows(a, block, tile);
    S* const target = block.stage(chunk) + block.column(thread);
    const bool exists = channel < a.pitch;
    const S* source = a.bottleneck + (rows.first + line) * a.pitch + channel;
    for (int i = line; i < rows.end; i += block.lines, source += block.lines * a.pitch) {
      if (i >= rows.begin)
        cp_async16(target + i * K::kChunkPitch, exists ? source : a.bottleneck, exists ? 16 : 0);
    }
  }
  cp_async_commit();
}

// Turns b into h in shared memory; each thread, what it has fetched.
template <class K, class S>
DEVICE void normalize_chunk(const Arguments<S>& a, const Block<K>& block, int64_t tile, int chunk,
                            const Cursor& cursor, int thread) {
  using T = Arithmetic<S>;
  constexpr int V = kVector<S>;
  const int column = block.column(thread);
  S* const stage = block.stage(chunk);
  ScaleShift<T> norm[V] = {};
  int64_t norm_sample = -1;
  const LoadedRows rows = loaded_rows(a, block, tile);
  for (int i = block.line(thread); i < rows.end; i += block.lines) {
    if (i < rows.begin) continue;
    const int64_t n = a.taps.channels.sample_stride == 0 ? 0 : cursor.sample(i);
    if (n != norm_sample) {
      norm_sample = n;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const auto channel =
            load_channel(a.taps.channels.row(n) + chunk * K::kColumns + column + e);
        norm[e] = {channel.scale, channel.shift};
      }
    }
    S* const vector = stage + i * K::kChunkPitch + column;
    T h[V];
    load<V>(vector, h);
#pragma unroll
    for (int e = 0; e < V; ++e) h[e] = affine(h[e], norm[e].scale, norm[e].shift);
    store_operands<typename K::Math, true>(vector, h);
  }
}

// Adds the products of a chunk with all nine taps, for the 32 rows of a warp.
template <class K, class S, class T>
DEVICE void multiply_chunk(const Arguments<S>& a, const Block<K>& block, int chunk, int warp_row,
                           int lane, T (&acc)[2][K::kTiles][2][4]) {
  using Math = typename K::Math;
  struct Row {
    const S* data;
    int taps;
  };
  const S* const stage = block.stage(chunk);
  LaneRows<Row, Math::kTensor> rows[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    rows[m] = lane_rows<Math>(lane, [&](int i) {
      const int row = warp_row + 16 * m + i;
      return Row{stage + (block.halo + row) * K::kChunkPitch, block.taps[row]};
    });
  }
  const S* w = block.weight + chunk * K::kColumns;
  for (int tap = 0; tap < kTaps; ++tap, w += K::kOut * K::kPitch) {
    const int distance = tap_distance(a.maps, tap) * K::kChunkPitch;
    LaneRows<const S*, Math::kTensor> shifted[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      shifted[m] = rows[m].map([&](const Row& row) -> const S* {
        return (row.taps >> tap & 1) != 0 ? row.data + distance : block.zeros;
      });
    }
    constexpr int kUnroll = Math::kTensor ? K::kColumns / Math::kDepth : 1;
#pragma unroll kUnroll
    for (int c = 0; c < K::kColumns; c += Math::kDepth) {
      typename Math::B b[K::kTiles];
#pragma unroll
      for (int o = 0; o < K::kTiles; ++o)
        Math::load_b(b[o], [&](int i) { return w + (o * kOutputs + i) * K::kPitch; }, c);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        typename Math::A h;
        Math::load_a(h, shifted[m], c);
#pragma unroll
        for (int o = 0; o < K::kTiles; ++o) Math::mma(acc[m][o], h, b[o]);
      }
    }
  }
}

template <class S>
DEVICE void store_pair(S* target, const Arithmetic<S> (&v)[2], bool is_aligned, int valid) {
  if (is_aligned && valid >= 2) {
    store<2>(target, v);
  } else {
    if (valid > 0) target[0] = store_as<S>(v[0]);
    if (valid > 1) target[1] = store_as<S>(v[1]);
  }
}

// Stores dropout(y) of the 32 rows of a warp. The tile starts at row `tile_row` of all maps.
template <class K, class S, class T>
DEVICE void store_outputs(const Arguments<S>& a, const Block<K>& block, const Cursor& cursor,
                          int64_t tile_row, int warp_row, int lane,
                          const T (&acc)[2][K::kTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // rows g, g+8, g+16, g+24 of the warp
    const int row = warp_row + 8 * i + lane / 4;
    const int64_t r = tile_row + row;
    if (r >= a.maps.rows) continue;
    int64_t n = 0, p = 0;
    if (a.dropout.mask != nullptr) {
      n = cursor.sample(block.halo + row), p = cursor.pixel(block.halo + row);
    }
#pragma unroll
    for (int half = 0; half < 2 * K::kTiles; ++half) {
      const int o = 8 * half + lane % 4 * 2;
      const T(&sums)[4] = acc[i / 2][half / 2][half % 2];
      T y[2] = {sums[i % 2 * 2], sums[i % 2 * 2 + 1]};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (o + e < a.growth) y[e] = a.dropout(y[e], n, o + e, p, a.growth, a.maps.pixels);
      }
      store_pair(a.out + r * a.out_pitch + o, y, a.pairs_are_aligned, a.growth - o);
    }
  }
}

template <class Math, int kUnits, int kTiles>
KERNEL __launch_bounds__(Tiling<Math, kUnits, kTiles>::kMaxRows,
                         Tiling<Math, kUnits, kTiles>::kBlocks)
    conv3x3_forward_kernel(Arguments<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using K = Tiling<Math, kUnits, kTiles>;
  DYNAMIC_SHARED(shared);
  const Block<K> block(a, shared);
  copy_async(block.weight, a.taps.weight, K::kWeights);
  zero_shared(block.zeros, K::kChunkPitch);
#pragma unroll
  for (int chunk = 0; chunk < K::kStages; ++chunk) load_chunk(a, block, blockIdx.x, chunk);

  for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t tile_row = static_cast<int64_t>(tile) * block.tile_rows;
    const Cursor cursor(a.maps, tile_row - block.halo);
    const int thread = fresh(thread_id());
    block.taps[thread] = static_cast<uint16_t>(
        tile_row + thread < a.maps.rows ? existing_taps(a.maps, cursor.pixel(block.halo + thread))
                                        : 0);
    const int warp_row = fresh(warp_id()) * 32, lane = fresh(lane_id());
    typename Math::T acc[2][kTiles][2][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < K::kChunks; ++chunk) {
      cp_async_wait<K::kStages - 1>();
      normalize_chunk(a, block, tile, chunk, cursor, thread);
      __syncthreads();
      multiply_chunk(a, block, chunk, warp_row, lane, acc);
      __syncthreads();  // the chunk has been read, and the taps
      const int next = chunk + K::kStages;
      load_chunk(a, block, static_cast<int64_t>(tile) + (next < K::kChunks ? 0 : gridDim.x),
                 next < K::kChunks ? next : next - K::kChunks);
    }
    store_outputs(a, block, cursor, tile_row, warp_row, lane, acc);
  }
}

// Returns the rows of a tile, 32 for each warp: the number that takes the multiprocessors the least
// time, which is that of the rows they read, halos included, and of waiting; 0 where not even 32
// fit. Narrow layers get small tiles where large ones leave no room for a second block that could
// work while one waits for memory. Wide ones get 0 where 256 do not fit: so few warps would wait
// for memory and for each other most of the time.
template <class K>
int tile_rows(const MapSizes& maps) {
  constexpr int kWaiting = 128;  // in rows, for each tile: an estimate
  const int64_t limit = shared_limit();
  if (K::kWide && K::shared_bytes(256, maps.width) > limit) return 0;
  int best = 0;
  int64_t least_time = 0;
  for (int rows = K::kMaxRows; rows >= (best == 0 ? 1 : 2) * kWarp; rows /= 2) {
    const int64_t bytes = K::shared_bytes(rows, maps.width);
    if (bytes > (K::kWide || rows <= 2 * kWarp ? limit : limit / 2)) continue;
    const int64_t time = ceil_div(ceil_div(maps.rows, rows), multiprocessors()) *
                         (rows + 2 * (maps.width + 1) + kWaiting);
    if (best == 0 || time < least_time) best = rows, least_time = time;
  }
  return best;
}

template <class Math, int kUnits, int kTiles, class S>
void launch_forward(const Conv3x3Forward<S>& f, Context& context) {
  using K = Tiling<Math, kUnits, kTiles>;
  Arguments<S> a = {};
  a.maps = sizes_of(f.features);
  const int rows = tile_rows<K>(a.maps);
  a.bottleneck = f.bottleneck, a.pitch = static_cast<int>(round_up(f.width, kLanes));
  a.taps = pack_taps<Math, kUnits, K::kOut>(f, nullptr, {}, context);
  a.growth = static_cast<int>(f.growth), a.dropout = dropout_of(f);
  a.out = f.features.data + f.offset, a.out_pitch = f.features.pitch;
  a.pairs_are_aligned = spacing(f.features, f.offset) % (2 * sizeof(S)) == 0;
  a.tiles = static_cast<unsigned>(ceil_div(a.maps.rows, rows));
  const int64_t bytes = K::shared_bytes(rows, a.maps.width);
  // All blocks run at the same time: one more would wait for all others.
  const int64_t limit = Math::kTensor ? K::kBlocks * K::kMaxRows / rows : 8;
  const int64_t blocks =
      multiprocessors() * std::min<int64_t>(limit, std::max<int64_t>(1, shared_limit() / bytes));
  launch(context, conv3x3_forward_kernel<Math, kUnits, kTiles>,
         {std::min<int64_t>(a.tiles, blocks)}, rows, bytes, a);
}

// Calls body(Math{}, units, tiles) for the arithmetic of S and the sizes of the layer, unless it is
// too wide.
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
    fits = tile_rows<Tiling<decltype(math), decltype(units)::value, decltype(tiles)::value>>(
               sizes_of(f.features)) > 0;
  });
  return fits;
}

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& f, Context& context) {
  dispatch(f, context, [&](auto math, auto units, auto tiles) {
    launch_forward<decltype(math), decltype(units)::value, decltype(tiles)::value>(f, context);
  });
}

#define INSTANTIATE(S)                                                          \
  template bool conv3x3_forward_fits(const Conv3x3Forward<S>&, const Context&); \
  template void conv3x3_forward(const Conv3x3Forward<S>&, Context&);
DENSENET_EXT_STORAGE_TYPES(INSTANTIATE)

}  // namespace densenet_ext::cuda
