// Computes the backward of the 1x1 convolution of a dense layer and of what is in front of it on
// AMX; formulas: ../bottleneck_backward.cpp.
//
// A tile has up to 512 pixels; its db is formed once, as right operand of both products. Then for
// 32 channels at a time: dz is formed from W, and meanwhile z of the next channels; dW is formed
// from z, while the sweep masks and sums dz and updates G. Rows of either product are channels,
// because planes have them as rows, too. b of the previous layer comes last: previous_bottleneck.h.
#include "bottleneck_operands.h"
#include "bottleneck_sweep.h"
#include "cpu/kernels/instantiate.h"
#include "cpu/kernels/norm_backward.h"
#include "cpu/kernels/pack.h"
#include "previous_bottleneck.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class S>
struct BottleneckBackwardWorker {
  static constexpr int P = kParts<S>;
  static constexpr int64_t kChunk = P * kTilePairs, kRows = kMaxChunks * kChunk;
  const BottleneckBackward<S>& a;
  const Tiling& tiling;
  const PreviousBottleneck<S>& previous;
  int64_t capacity;                        // positions of a tile
  const uint32_t* weight = nullptr;        // [channels / 16, depths, P, 16, 16]
  const float* ones = nullptr;             // [channels]
  float* dweight = nullptr;                // [channels / 16, pitch / 16, 16, 16]
  uint32_t* z = nullptr;                   // [2, 2, kMaxChunks, P, 16, 16]
  TileColumns<S>* tile_columns = nullptr;  // of three tiles
  int64_t begin = 0, end = 0;              // of the thread's tiles
  int64_t groups = ceil_div(a.channels, kGroup);
  BottleneckOperands<S> operands{a};
  BottleneckSweep<S> sweep{a};

  void take_memory(Carver& memory) {
    const int64_t columns = round_up(capacity / kSide, 4);
    operands.db = memory.take<uint32_t>(columns / 2 * operands.outputs * kChunk);
    operands.db_t = memory.take<uint32_t>(columns * operands.depths * kChunk);
    z = memory.take<uint32_t>(2 * 2 * kRows);
    sweep.dz = memory.take<float>(kGroup * kChannelStride);
    sweep.moments = memory.take<float>(2 * kGroup * kSide);
    tile_columns = memory.take<TileColumns<S>>(3);
  }
  // These bytes of memory do not depend on the capacity.
  static constexpr int64_t kFixedBytes =
      4 * (2 * 2 * kRows + kGroup * kChannelStride + 2 * kGroup * kSide);

  int64_t count(int64_t c0) const { return std::min(kGroup, a.channels - c0); }
  void list_columns(int64_t tile) const {
    if (tile < end) tile_columns[tile % 3].assign(a, tiling[tile], ones);
  }

  // A stage is one group of channels of one tile; columns are null beyond the last stage.
  int64_t first_channel(int64_t stage) const { return stage % groups * kGroup; }
  const TileColumns<S>* columns_of(int64_t stage) const {
    const int64_t tile = begin + stage / groups;
    return tile < end ? &tile_columns[tile % 3] : nullptr;
  }

  // Forms dz of the group of channels from c0 on.
  template <int NR, class F>
  void input_gradient(const TileColumns<S>& columns, int64_t c0, const F& work) const {
    constexpr int NC = 4 / NR;
    const Panel left{weight + c0 / kSide * operands.depths * kChunk, operands.depths * kChunk,
                     kChunk};
    const TileBlock<P, NR, NC> block;
    for (int64_t i = 0; i < columns.strips * 4; i += NC) {
      block.zero();
      block.product(
          operands.depths, left,
          {operands.db_t + i * operands.depths * kChunk, operands.depths * kChunk, kChunk}, work);
      unrolled<4>([&](auto t) __attribute__((always_inline)) {
        constexpr int I = decltype(t)::value;
        tile_store<I>(sweep.dz + I / NC * kSide * kChannelStride + (i + I % NC) * kSide,
                      kChannelStride * 4);
      });
    }
  }

  // Adds to dW from z in `rows`: NR tiles of channels by NC of outputs, from the r-th and o-th on.
  template <int NR, int NC, class F>
  void weight_block(const TileColumns<S>& columns, int64_t c0, int64_t r, int64_t o,
                    const uint32_t* rows, bool add, const F& work) const {
    const TileBlock<P, NR, NC> block;
    const int64_t row_step = operands.outputs * kTileSums;
    float* const sums_of_block = dweight + (c0 / kSide + r) * row_step + o * kTileSums;
    if (add) {
      block.load(sums_of_block, row_step, kTileSums);
    } else {
      block.zero();
    }
    block.product(columns.chunks, {rows + r * kRows, kRows, kChunk},
                  {operands.db + o * kChunk, kChunk, operands.outputs * kChunk}, work);
    block.store(sums_of_block, row_step, kTileSums);
  }

  int64_t weight_blocks(int64_t rows) const {
    return std::max<int64_t>(
        1, rows == 1 ? ceil_div(operands.outputs, 4) : ceil_div(operands.outputs, 2));
  }

  template <class F>
  void weight_gradient(const TileColumns<S>& columns, int64_t c0, const uint32_t* rows, bool add,
                       const F& work) const {
    int64_t o = 0, remaining = operands.outputs;
    if (count(c0) > kSide) {
      for (; remaining == 2 || remaining > 3; o += 2, remaining -= 2)
        weight_block<2, 2>(columns, c0, 0, o, rows, add, work);
      if (remaining == 3) {
        weight_block<1, 3>(columns, c0, 0, o, rows, add, work);
        weight_block<1, 3>(columns, c0, 1, o, rows, add, work);
      } else if (remaining == 1) {
        weight_block<2, 1>(columns, c0, 0, o, rows, add, work);
      }
    } else {
      for (; remaining >= 4; o += 4, remaining -= 4)
        weight_block<1, 4>(columns, c0, 0, o, rows, add, work);
      if (remaining == 3) weight_block<1, 3>(columns, c0, 0, o, rows, add, work);
      if (remaining == 2) weight_block<1, 2>(columns, c0, 0, o, rows, add, work);
      if (remaining == 1) weight_block<1, 1>(columns, c0, 0, o, rows, add, work);
    }
  }

  uint32_t* z_of(int64_t stage) const { return z + stage % 2 * 2 * kRows; }

  // Spreads forming z of a stage over `calls` portions.
  FormProgress<S> form_z(int64_t stage, int64_t calls) const {
    const TileColumns<S>* const columns = columns_of(stage);
    const int64_t c0 = first_channel(stage), cells = columns ? count(c0) * columns->chunks : 0;
    return {columns, columns_of(stage + 1), c0, first_channel(stage + 1), z_of(stage),
            cells,   ceil_div(cells, calls)};
  }

  // Spreads the sweep of a stage over `calls` portions.
  SweepProgress<S> sweep_dz(int64_t stage, int64_t calls) const {
    const TileColumns<S>* const columns = columns_of(stage);
    const int64_t c0 = first_channel(stage), strips = count(c0) * columns->strips;
    return {columns, columns_of(stage + 1),  c0, first_channel(stage + 1),
            strips,  ceil_div(strips, calls)};
  }

  // Forms dz of a stage, and between the products z of the next one; in the first group of a tile,
  // also the strip of db that the next strip of dz needs.
  template <class F>
  void run_input_gradient(const TileColumns<S>& columns, int64_t stage, const F& fetch) const {
    const int64_t c0 = first_channel(stage), rows = ceil_div(count(c0), kSide);
    FormProgress<S> next = form_z(stage + 1, columns.strips * rows * operands.depths);
    int64_t k = 2, depth = 0;
    const int64_t chunks = c0 == 0 ? 2 * columns.strips : 0;
    const auto form_portion = [&] {
      operands.form(next);
      fetch();
      for (int64_t i = rows; i <= 2 && k < chunks; ++i) {
        operands.form_db(columns, k, depth);
        if (++depth == operands.depths) {
          depth = 0;
          ++k;
        }
      }
    };
    if (rows == 2) {
      input_gradient<2>(columns, c0, form_portion);
    } else {
      input_gradient<1>(columns, c0, form_portion);
    }
    next.portion = next.remaining;
    operands.form(next);
  }

  // Adds to dW of a stage, and between the products sweeps over its dz.
  template <bool FIRST, class F>
  void run_weight_gradient(const TileColumns<S>& columns, int64_t stage, const F& fetch) const {
    const int64_t c0 = first_channel(stage), rows = ceil_div(count(c0), kSide);
    SweepProgress<S> progress = sweep_dz(stage, columns.chunks * weight_blocks(rows));
    weight_gradient(columns, c0, z_of(stage), stage >= groups, [&] {
      sweep.template run<FIRST>(progress);
      fetch();
    });
    progress.portion = progress.remaining;
    sweep.template run<FIRST>(progress);
    sweep.add_moments(c0, count(c0));
  }

  // Treats the thread's tiles.
  template <bool FIRST>
  void run() const {
    list_columns(begin);
    list_columns(begin + 1);
    FormProgress<S> first = form_z(0, 1);
    operands.form(first);
    for (int64_t tile = begin; tile < end; ++tile) {
      list_columns(tile + 2);
      const int64_t first_stage = (tile - begin) * groups;
      const TileColumns<S>& columns = *columns_of(first_stage);
      const TileColumns<S>* const next = columns_of(first_stage + groups);
      for (int64_t i = 0; i < 2 * operands.depths; ++i)
        operands.form_db(columns, i / operands.depths, i % operands.depths);
      // dv and b of the next tile are fetched during the last groups.
      const int64_t fetching_groups = std::min<int64_t>(groups, 4),
                    calls = fetching_groups * (columns.strips * 2 * operands.depths +
                                               columns.chunks * weight_blocks(2));
      FetchProgress fetching = next ? operands.fetch_rows(*next, calls) : FetchProgress{};
      for (int64_t g = 0; g < groups; ++g) {
        const auto fetch = [&] {
          if (g >= groups - fetching_groups) fetching.fetch_portion();
        };
        run_input_gradient(columns, first_stage + g, fetch);
        run_weight_gradient<FIRST>(columns, first_stage + g, fetch);
      }
      static_assert(kNarrowMemory<S> <= kGroup * kChannelStride);
      if (previous) previous.run(tiling[tile], reinterpret_cast<uint32_t*>(sweep.dz));
    }
  }
};

// Packs W as left operand of dz; rows are channels.
template <int P, class S>
void pack_weight(const BottleneckBackward<S>& a, int64_t c0, int64_t depths, uint32_t* out) {
  for (int64_t depth = 0; depth < depths; ++depth, out += P * kTilePairs) {
    alignas(64) float square[2][kTileSums];
    for (int64_t h = 0; h < 2; ++h) {
      Vec<float> rows[kSide];
      DX_UNROLL
      for (int r = 0; r < kSide; ++r) {
        const int64_t o = depth * kDepth + h * kSide + r;
        rows[r] = o < a.width ? load_first(a.weight + o * a.channels + c0, a.channels - c0)
                              : Vec<float>{};
      }
      transpose<float>(rows);
      DX_UNROLL
      for (int r = 0; r < kSide; ++r) store(square[h] + r * kSide, rows[r]);
    }
    for (int64_t r = 0; r < kSide; ++r)
      split<P>(load(square[0] + r * kSide), load(square[1] + r * kSide), out + r * kSide);
  }
}

// Returns the positions of a tile: its db fits the cache, and threads have equally many tiles.
template <class S>
int64_t tile_positions(const BottleneckBackward<S>& a) {
  const BottleneckOperands<S> operands{a};
  const int64_t pixel_bytes =
      2 * kParts<S> * (operands.pitch + operands.depths * kDepth);  // of db and db_t
  const int64_t limit =
      std::clamp<int64_t>((kAmxTileBytes - BottleneckBackwardWorker<S>::kFixedBytes) /
                              std::max<int64_t>(1, pixel_bytes) / 64 * 64,
                          64, kBackwardPixels);
  const int64_t positions = a.features.samples * round_up(a.features.pixels(), kSide),
                tiles = round_up(ceil_div(positions, limit), thread_count(positions / kSide));
  return positions == 0 ? limit : std::min(limit, round_up(ceil_div(positions, tiles), kSide));
}

// Merges the threads' dweight [channels / 16, pitch / 16, 16, 16] into dW [width, channels].
template <class S>
void merge_dweight(const BottleneckBackward<S>& a, const float* partials, int64_t parts) {
  const int64_t rows = ceil_div(a.channels, kSide), outputs = ceil_div(a.width, kSide);
  parallel_items(rows, parts * kSide * outputs * kSide, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t o = 0; o < a.width; o += kSide) {
        Vec<float> square[kSide] = {};
        for (int64_t t = 0; t < parts; ++t) {
          const float* const source =
              partials + (t * rows * outputs + r * outputs + o / kSide) * kTileSums;
          DX_UNROLL
          for (int i = 0; i < kSide; ++i) square[i] += load(source + i * kSide);
        }
        transpose<float>(square);
        float* const out = a.dweight + o * a.channels + r * kSide;
        DX_UNROLL
        for (int i = 0; i < kSide; ++i) {
          if (o + i < a.width) store_first(out + i * a.channels, square[i], a.channels - r * kSide);
        }
      }
    }
  });
}

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>&);

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& a) {
  using Worker = BottleneckBackwardWorker<S>;
  if (a.channels == 0) return;
  const int64_t capacity = tile_positions(a);
  const Tiling tiling(a.features.samples, a.features.pixels(), capacity);
  const int64_t threads = thread_count(tiling.count);
  const PreviousBottleneck<S> previous(a.previous);

  Worker shared{a, tiling, previous, capacity};
  const int64_t rows = ceil_div(a.channels, kSide), outputs = shared.operands.outputs,
                row_pairs = shared.operands.depths * Worker::kChunk;
  const Scratch weight(4 * rows * row_pairs), gains(2 * sizeof(float) * a.channels);
  parallel_items(rows, kSide * shared.operands.pitch, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      pack_weight<kParts<S>>(a, r * kSide, shared.operands.depths,
                             weight.as<uint32_t>() + r * row_pairs);
  });
  float* const ones = gains.as<float>() + a.channels;
  for (int64_t c = 0; c < a.channels; ++c) gains.as<float>()[c] = norm_gain(a.norm, c), ones[c] = 1;
  shared.weight = weight.as<uint32_t>();
  shared.ones = ones;
  shared.sweep.gains = gains.as<float>();
  const Workers<Worker> workers(shared, threads);
  const int64_t dweight_values = rows * outputs * kTileSums;
  const Scratch dweight(sizeof(float) * threads * dweight_values);
  const Scratch sums(sizeof(double) * threads * 2 * a.channels);
  std::fill_n(sums.as<double>(), threads * 2 * a.channels, 0.0);

  parallel(tiling.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileConfiguration configuration;
    Worker worker = workers[thread];
    worker.begin = begin;
    worker.end = end;
    worker.dweight = dweight.as<float>() + thread * dweight_values;
    worker.sweep.sums = sums.as<double>() + thread * 2 * a.channels;
    if (a.grad_in.data) {
      worker.template run<false>();
    } else {
      worker.template run<true>();
    }
  });

  merge_dweight(a, dweight.as<float>(), tiling.count > 0 ? threads : 0);
  add_partials(sums.as<double>(), threads, 2 * a.channels, 2 * a.channels);
  const double pixels =
      static_cast<double>(a.features.samples) * static_cast<double>(a.features.pixels());
  finish_norm_backward(a.norm, sums.as<double>(), a.channels, pixels, a.pre_mask, a.coef, true,
                       a.dnorm_weight, a.dnorm_bias);
  if (a.previous.weight && !previous) bottleneck_forward(a.previous);
}

DENSENET_EXT_INSTANTIATE_AMX(bottleneck_backward, BottleneckBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
