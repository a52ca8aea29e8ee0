// The backward of norm1, ReLU and the 1x1 convolution reads x and G once, and writes G once.
//
//   db = a0 dv + a1 + a2 b        (the gradient through norm2, [M, K2])
//   dW = db^T z, dz = db W        (z = relu(scale x + shift), made again)
//   dv1 = r [z > 0] dz            G += q gamma rstd dv1, S1 = sum dv1, S2 = sum dv1 xhat
//
// A block has a chunk of channels and a part of the rows: grid (chunks, parts). Chunks are of equal
// size, or all would wait for the fullest. A warp has 16 channels, alone or with a second one, and
// keeps their dW (all kUnits * 16 rows of it, or half of them), their S1 and S2, and their columns
// of W in registers until the last tile. For each tile: all threads form db in shared memory; the
// warp makes dz of 16 rows (all of the tile's, or half of them) by 16 channels, and with it z over
// x and the new G over the old one, in shared memory; it stores its G, and multiplies db^T by z.
// Meanwhile x and G of the next tiles come by cp.async, dv and b of the next one into registers. A
// barrier a tile; two where warps share their channels.
//
// If K2 is wider than kUnits * 16, db is formed in panels of so many columns, one after the
// other for dz, and blocks with another grid.z make the other rows of dW; they leave G alone.
//
// Sums over parts: partial results in scratch memory, added in their order by a second kernel.
// Bytes a row: 3 C + 2 K2 for each chunk of channels (those 2 K2 from L2 but once).
#include "bottleneck_backward_compute.cuh"

namespace densenet_ext::cuda {
namespace {

template <class Math, int kUnits, bool kWide, bool kMasked>
KERNEL __launch_bounds__(Tiling<Math, kUnits, kWide, kMasked>::kThreads,
                         Tiling<Math, kUnits, kWide, kMasked>::kBlocks)
    bottleneck_backward_kernel(Arguments<typename Math::Storage> p) {
  wait_for_earlier_kernels();
  using K = Tiling<Math, kUnits, kWide, kMasked>;
  using T = typename Math::T;
  DYNAMIC_SHARED(shared);
  const Block<K> block(p, shared);
  RegisterWeight<K> w;
  load_weight(p, block, w);
  load_channels(p, block);
  Sums<T> sums = {};
  T dweight[K::kWarpUnits][2][4] = {};  // rows of the unit by the warp's channels

  DbOperands<K> operands;
  const int first_panel = block.makes_gradient ? 1 % p.panels : static_cast<int>(blockIdx.z);
  for (int i = 0; i < K::kStages - 1; ++i) load_tile(p, block, block.tile + i, i, thread_id());
  if (block.tile < block.tile_end)
    load_operands<K>(p, block.tile * K::kRows, first_panel, thread_id(), operands);
  int stage = 0;
  for (int i = block.tile; i < block.tile_end; ++i) {
    const Tile<K> tile(block, i, stage);
    T wide_dz[kWide ? K::kRowUnits : 1][2][4] = {};
    const int panels = block.makes_gradient ? p.panels : 1;
    // The panel of db that this block's dW needs comes last and stays.
    for (int j = 0; j < (kWide ? panels : 1); ++j) {
      const int panel = block.makes_gradient ? (j + 1) % p.panels : static_cast<int>(blockIdx.z);
      const bool is_last = !kWide || j == panels - 1;
      if (j > 0) {
        __syncthreads();  // the previous panel has been read
        load_operands<K>(p, tile.row0, panel, tile.thread, operands);
      }
      form_db<K>(p, tile.row0, panel, tile.thread, operands, block.db_affine, tile.db);
      if (is_last) cp_async_wait<K::kStages - 2>();
      __syncthreads();  // db and this tile's maps are stored; the previous maps have been read
      if (is_last) {
        load_tile(p, block, i + K::kStages - 1, stage > 0 ? stage - 1 : K::kStages - 1,
                  tile.thread);
        if (i + 1 < block.tile_end)
          load_operands<K>(p, tile.row0 + K::kRows, first_panel, tile.thread, operands);
      }
      if constexpr (kWide) {
        if (block.makes_gradient) {
#pragma unroll
          for (int m = 0; m < K::kRowUnits; ++m)
            multiply_db(p, block, w, tile.db, m, panel, wide_dz[m]);
        }
      }
    }

    constexpr int kUnrolled = kWide ? K::kRowUnits : 1;  // more would need more registers
#pragma unroll kUnrolled
    for (int j = 0; j < (tile.idle ? 0 : K::kRowUnits / K::kSplit); ++j) {
      const int m = block.split + j * K::kSplit;
      if constexpr (kWide) {
        update_gradient(p, block, tile, m, wide_dz[m], sums);
      } else {
        T dz[2][4] = {};
        multiply_db(p, block, w, tile.db, m, 0, dz);
        update_gradient(p, block, tile, m, dz, sums);
      }
      __syncwarp();
      if (block.makes_gradient) {
        store_gradient(p, block, tile, m);
        __syncwarp();  // lanes leave its loop at different times
      }
    }
    if constexpr (K::kSplit > 1) __syncthreads();  // all of z is stored
    multiply_z(block, tile, dweight);
    if constexpr (K::kBuffers == 1) __syncthreads();  // db has been read
    stage = stage + 1 < K::kStages ? stage + 1 : 0;
  }
  cp_async_wait<0>();
  store_weight(p, block, dweight);
  if (block.makes_gradient) store_sums(p, block, sums);
}

// Adds the parts: first blocks with kWarp times V elements of dW each, whose warps share out the
// parts, then blocks that end the backward of norm1.
template <class T>
struct SumArguments {
  const T* parts;  // [count, elements]
  int64_t count, elements;
  T* dweight;
  int64_t weight_blocks;
  NormBackward<T> norm;
};
template <class T, int V>
KERNEL __launch_bounds__(kMaxThreads) bottleneck_sum_kernel(SumArguments<T> p) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  if (blockIdx.x >= p.weight_blocks) {
    norm_backward_block(p.norm, blockIdx.x - p.weight_blocks, shared);
    return;
  }
  constexpr int kWarps = kMaxThreads / kWarp;
  T* const sums = reinterpret_cast<T*>(shared);
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kWarp + lane_id()) * V;
  T sum[V] = {};
  const auto add = [&](const T* source) {
    T addend[V];
    load<V>(source, addend);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += addend[v];
  };
  if (i < p.elements) {
#pragma unroll 8
    for (int64_t part = warp_id(); part < p.count; part += kWarps)
      add(p.parts + part * p.elements + i);
  }
  store<V>(sums + threadIdx.x * V, sum);
  __syncthreads();
  if (warp_id() != 0 || i >= p.elements) return;
  for (int warp = 1; warp < kWarps; ++warp) add(sums + (warp * kWarp + lane_id()) * V);
  store<V>(p.dweight + i, sum);
}

// Returns the tiles of a part. There are as many parts as run at once and not one more, which would
// wait for all others; but no more partial sums than a half of what the kernel reads and writes
// anyway.
template <class K, class S>
int64_t tiles_of_part(const BottleneckBackward<S>& f, int64_t tiles, int64_t blocks_of_part) {
  const int64_t bytes = f.features.count() * (3 * f.channels + 2 * f.width) *
                        static_cast<int64_t>(sizeof(S)),
                partial = 2 * f.width * f.channels * static_cast<int64_t>(sizeof(Arithmetic<S>));
  const int64_t parts =
      std::min({K::kBlocks * multiprocessors() / blocks_of_part, bytes / 2 / partial, tiles});
  return ceil_div(tiles, std::max<int64_t>(parts, 1));
}

template <class Math, int kUnits, bool kWide, bool kMasked>
void launch_backward(const BottleneckBackward<typename Math::Storage>& f, Context& context) {
  using K = Tiling<Math, kUnits, kWide, kMasked>;
  using S = typename Math::Storage;
  using T = typename Math::T;
  const int64_t rows = f.features.count(), tiles = ceil_div(rows, K::kRows),
                chunks = ceil_div(f.channels, K::kChannels), panels = ceil_div(f.width, K::kWidth),
                depth = chunks * K::kChannels;
  const auto packed = pack<Math>(f, panels * K::kWidth, depth, true, context);
  Arguments<S> a = {};
  a.x = f.features.data, a.x_pitch = as_int(f.features.pitch);
  a.grad_in = f.grad_in.data, a.grad_in_pitch = as_int(f.grad_in.pitch);
  a.grad = f.grad.data, a.grad_pitch = as_int(f.grad.pitch);
  a.rows = as_int(rows), a.pixels = as_int(f.features.pixels());
  a.channels = as_int(f.channels), a.width = as_int(f.width);
  a.chunk = as_int(chunks > 0 ? round_up(ceil_div(f.channels, chunks), 16) : 0);
  a.dv = f.dv, a.bottleneck = f.bottleneck, a.pitch = as_int(round_up(f.width, kLanes));
  a.db_affine = f.db_affine;
  a.weight = packed.weight, a.weight_pitch = as_int(panels * K::kWidth);
  a.scale_shift = packed.scale_shift, a.pre_mask = f.pre_mask, a.post_mask = f.post_mask;
  as_int(f.features.samples * depth);  // scale and shift are indexed with an int
  a.norm = f.norm, a.panels = as_int(panels);
  a.tiles_of_part = as_int(tiles_of_part<K>(f, tiles, chunks * panels));
  const int64_t parts = tiles > 0 ? ceil_div(tiles, a.tiles_of_part) : 0;
  a.dweight = context.scratch<T>(parts * f.width * f.channels);
  a.sums = context.scratch<T>(parts * K::kSplit * 2 * f.channels);
  launch(context, bottleneck_backward_kernel<Math, kUnits, kWide, kMasked>, {chunks, parts, panels},
         K::kThreads, K::kSharedBytes, a);

  SumArguments<T> sum = {};
  sum.parts = a.dweight, sum.count = parts, sum.elements = f.width * f.channels;
  sum.dweight = f.dweight;
  sum.norm = norm_backward_of<T>(f, f.coef, a.sums, parts * K::kSplit, f.channels, rows);
  sum.norm.starts_gradient = false, sum.norm.mask = f.pre_mask;
  with_vector<T>(spacing(f.dweight, sum.elements * static_cast<int64_t>(sizeof(T))),
                 [&](auto vector) {
                   constexpr int V = decltype(vector)::value;
                   sum.weight_blocks = ceil_div(sum.elements, kWarp * V);
                   launch(context, bottleneck_sum_kernel<T, V>,
                          {sum.weight_blocks + narrow_blocks(f.channels)}, kMaxThreads,
                          kNormBackwardBytes, sum);
                 });
}

}  // namespace

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& f, Context& context) {
  dispatch_math<S>(context, [&](auto math) {
    using Math = decltype(math);
    const bool masked = has_sample_stride(f.scale_shift) || f.pre_mask.data != nullptr ||
                        f.post_mask.data != nullptr;
    if constexpr (!Math::kTensor) {
      launch_backward<Math, 3, true, true>(f, context);
    } else if (f.width <= 48) {
      masked ? launch_backward<Math, 3, false, true>(f, context)
             : launch_backward<Math, 3, false, false>(f, context);
    } else if (f.width <= 128) {
      masked ? launch_backward<Math, 8, false, true>(f, context)
             : launch_backward<Math, 8, false, false>(f, context);
    } else {
      launch_backward<Math, 8, true, true>(f, context);
    }
  });
  if (f.previous.weight != nullptr) bottleneck_forward<S>(f.previous, context);
}

DENSENET_EXT_INSTANTIATE(bottleneck_backward, BottleneckBackward)

}  // namespace densenet_ext::cuda
