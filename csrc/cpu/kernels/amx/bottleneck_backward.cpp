// Backward of the 1x1 convolution of a dense layer and of what is in front of it on the tile unit;
// formulas: ../bottleneck_backward.cpp.
//
// A tile of up to 512 pixels: db is formed once, as right operand of both products. Then for 32
// channels at a time: dz from W, while z of the next channels is formed; dW from z, while the sweep
// masks and sums dz and updates G. The unit works while the vector instructions that follow its
// memory_values in the program go on, so this work comes in small portions between its
// instructions. Rows of either product are channels, which lie in the planes as a left operand and
// its sums do. Last, b of the previous layer: bottleneck_earlier.h.
#include "cpu/kernels/norm_backward.h"
#include "cpu/kernels/pixel_tiles.h"
#include "cpu/parallel.h"
#include "previous_bottleneck.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kMaxTilePixels = 512, kMaxColumns = kMaxTilePixels / kSide,
                  kMaxChunks = kMaxTilePixels / kDepth;
constexpr int64_t kGroup = 32;  // channels at a time
constexpr int64_t kBudget = 1200 * 1024;
constexpr int64_t kChannelStride = kMaxTilePixels + kSide;  // from one run of dz to the next
constexpr int64_t kTileSums = kSide * kSide;

// A tile's columns of 16 pixels of one sample.
template <class S>
struct TileColumns {
  struct Column {
    const S* x;  // at channel 0, as are the others
    const float* grad_in;
    float* grad;
    const float *scale, *shift, *pre_mask, *post_mask;
    int64_t row, count;  // its first row of db; pixels in it, 0 beyond the last column
  };
  Column column[kMaxColumns + 4];
  int64_t columns, chunks, strips;
  bool whole[kMaxColumns / 4];  // strips of 64 pixels of one sample
};

template <class S>
struct BottleneckBackwardWorker {
  static constexpr int P = kParts<S>;
  static constexpr int64_t kChunk = P * kTilePairs, kRows = kMaxChunks * kChunk;
  static constexpr int64_t kMemory = 2 * 2 * kRows + kGroup * kChannelStride + 2 * kGroup * kSide;
  const BottleneckBackward<S>& a;
  const Tiling& tiling;
  int64_t pitch, depths, groups;  // depths: chunks of outputs
  const uint32_t* weight;         // [channels / 16, depths, P, 16, 16]
  const float *gains, *ones;      // gamma*rstd; [channels]
  // of one thread
  int64_t end;                   // of its tiles
  uint32_t* db;                  // [chunks, pitch / 16, P, 16, 16]
  uint32_t* db_t;                // [columns, depths, P, 16, 16]
  uint32_t* z;                   // [2, 2, kMaxChunks, P, 16, 16]
  float* dz;                     // [kGroup, kChannelStride]
  float* moments;                // [2, kGroup, 16]
  float* dweight;                // [channels / 16, pitch / 16, 16, 16]
  double* sums;                  // [channels, 2]
  TileColumns<S>* tile_columns;  // of three tiles
  const PreviousBottleneck<S>& previous;

  int64_t outputs() const { return pitch / kSide; }
  int64_t count(int64_t c0) const { return std::min(kGroup, a.channels - c0); }
  const TileColumns<S>& columns(int64_t tile) const { return tile_columns[tile % 3]; }

  void list_columns(int64_t index) const {
    if (index >= end) return;
    TileColumns<S>& out = tile_columns[index % 3];
    const Tile tile = tiling[index];
    out.columns = tile.positions() / kSide;
    out.chunks = ceil_div(out.columns, 2);
    out.strips = ceil_div(out.columns, 4);
    int64_t i = 0;
    for (int64_t n = tile.sample; n < tile.sample + tile.samples; ++n) {
      for (int64_t p = 0; p < tile.count; p += kSide) {
        const int64_t pixel = tile.pixel + p;
        out.column[i++] = {a.features.plane(n, 0) + pixel,
                           a.grad_in.data ? a.grad_in.plane(n, 0) + pixel : nullptr,
                           a.grad.plane(n, 0) + pixel,
                           a.scale_shift.scale.row(n),
                           a.scale_shift.shift.row(n),
                           a.pre_mask.data ? a.pre_mask.row(n) : ones,
                           a.post_mask.data ? a.post_mask.row(n) : ones,
                           n * a.features.pixels() + pixel,
                           std::min(kSide, tile.count - p)};
      }
    }
    for (; i < out.strips * 4; ++i) {
      out.column[i] = out.column[0];
      out.column[i].count = 0;
    }
    for (i = 0; i < out.strips; ++i) {
      const auto& last = out.column[4 * i + 3];
      out.whole[i] = last.count == kSide && last.row == out.column[4 * i].row + 3 * kSide &&
                     last.x == out.column[4 * i].x + 3 * kSide;
    }
  }

  // A chunk of 32 pixels of db at a chunk of 32 outputs.
  void form_db(const TileColumns<S>& columns, int64_t k, int64_t depth) const {
    alignas(64) float squares[2][2][kTileSums];  // of two columns, at two tiles of outputs
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t o = depth * kDepth + h * kSide, remaining = std::max<int64_t>(a.width - o, 0);
      const Vec<float> t0 = load_first(a.db_affine + o, remaining),
                       t1 = load_first(a.db_affine + a.width + o, remaining),
                       t2 = load_first(a.db_affine + 2 * a.width + o, remaining);
      const __mmask16 valid =
          remaining >= kSide ? 0xffff : static_cast<__mmask16>((1u << remaining) - 1);
      for (int64_t i = 0; i < 2; ++i) {
        const auto& column = columns.column[2 * k + i];
        const int64_t count = remaining > 0 ? column.count : 0;
        const auto* const dv = a.dv + column.row * pitch + o;
        const S* const b = a.bottleneck + column.row * pitch + o;
        for (int64_t r = 0; r < count; ++r) {
          const Vec<float> value = t0 * load(dv + r * pitch) + (t1 + t2 * load(b + r * pitch));
          store(squares[i][h] + r * kSide, (Vec<float>)_mm512_maskz_mov_ps(valid, (__m512)value));
        }
        for (int64_t r = count; r < kSide; ++r) store(squares[i][h] + r * kSide, Vec<float>{});
      }
      if (k < columns.chunks && o < pitch) {
        uint32_t* const out = db + (k * outputs() + o / kSide) * kChunk;
        for (int64_t r = 0; r < kSide; ++r)
          split<P>(load(squares[0][h] + r * kSide), load(squares[1][h] + r * kSide),
                   out + r * kSide);
      }
    }
    for (int64_t i = 0; i < 2; ++i) {
      Vec<float> even[kSide], odd[kSide];
      load_transposed(squares[i][0], even);
      DX_UNROLL
      for (int r = 0; r < kSide; ++r) store(squares[i][0] + r * kSide, even[r]);
      load_transposed(squares[i][1], odd);
      uint32_t* const out = db_t + ((2 * k + i) * depths + depth) * kChunk;
      DX_UNROLL
      for (int r = 0; r < kSide; ++r)
        split<P>(load(squares[i][0] + r * kSide), odd[r], out + r * kSide);
    }
  }

  // z of a group of channels, 32 pixels of a channel at a time.
  struct FormProgress {
    const TileColumns<S>*columns, *next;  // next: of the group that follows, which is fetched
    int64_t c0, next_c0;
    uint32_t* out;
    int64_t remaining, portion;  // to be formed in all, at once
    int64_t r = 0, k = 0;
  };

  void form(FormProgress& f) const {
    int64_t n = std::min(f.portion, f.remaining);
    f.remaining -= n;
    while (n > 0) {
      const int64_t c = f.c0 + f.r, last = std::min(f.columns->chunks, f.k + n),
                    offset = c * a.features.plane_stride,
                    prefetch_offset = (f.next_c0 + f.r) * a.features.plane_stride;
      const bool fetch = f.next && f.next_c0 + f.r < a.channels;
      uint32_t* const out = f.out + f.r / kSide * kRows + f.r % kSide * kSide;
      n -= last - f.k;
      for (int64_t k = f.k; k < last; ++k) {
        const auto& even = f.columns->column[2 * k];
        if (f.columns->whole[k / 2]) {
          const Vec<float> scale = broadcast(even.scale[c]), shift = broadcast(even.shift[c]);
          const S* const x = even.x + offset;
          split<P>(relu(scale * load(x) + shift), relu(scale * load(x + kSide) + shift),
                   out + k * kChunk);
        } else {
          const auto value = [&](const auto& column) __attribute__((always_inline)) {
            const __mmask16 valid = static_cast<__mmask16>((1u << column.count) - 1);
            const Vec<float> v =
                broadcast(column.scale[c]) * load_first(column.x + offset, column.count) +
                broadcast(column.shift[c]);
            return (Vec<float>)_mm512_maskz_max_ps(valid, _mm512_setzero_ps(), (__m512)v);  // relu
          };
          split<P>(value(even), value(f.columns->column[2 * k + 1]), out + k * kChunk);
        }
        if (fetch) {
          __builtin_prefetch(f.next->column[2 * k].x + prefetch_offset, 0, 2);
          __builtin_prefetch(f.next->column[2 * k + 1].x + prefetch_offset, 0, 2);
        }
      }
      f.k = last;
      if (last == f.columns->chunks) {
        f.k = 0;
        ++f.r;
      }
    }
  }

  // The rows of dv and b of a tile, a line of each at a time.
  struct FetchProgress {
    const char *dv = nullptr, *b = nullptr;
    int64_t dv_remaining = 0, b_remaining = 0, portion = 0;  // in lines of 64 bytes
  };

  FetchProgress fetching_of(const TileColumns<S>& columns, int64_t calls) const {
    const auto& first = columns.column[0];
    const auto& last = columns.column[columns.columns - 1];
    const int64_t values = (last.row + last.count - first.row) * pitch;
    const int64_t lines = values / 16;
    return {reinterpret_cast<const char*>(a.dv + first.row * pitch),
            reinterpret_cast<const char*>(a.bottleneck + first.row * pitch), lines,
            lines * static_cast<int64_t>(sizeof(S)) / 4, ceil_div(lines, calls)};
  }

  static DX_INLINE void fetch_some(FetchProgress& f) {
    for (int64_t i = std::min(f.portion, f.dv_remaining); i > 0; --i, f.dv += 64)
      __builtin_prefetch(f.dv, 0, 2);
    f.dv_remaining -= std::min(f.portion, f.dv_remaining);
    for (int64_t i = std::min(f.portion, f.b_remaining); i > 0; --i, f.b += 64)
      __builtin_prefetch(f.b, 0, 2);
    f.b_remaining -= std::min(f.portion, f.b_remaining);
  }

  // Everything that follows from dz of a group, 64 pixels of a channel at a time.
  struct SweepProgress {
    const TileColumns<S>*columns, *next;
    int64_t c0, next_c0;
    int64_t remaining, portion;
    int64_t r = 0, s = 0;
  };

  template <bool FIRST>
  DX_INLINE void sweep(SweepProgress& f) const {
    int64_t n = std::min(f.portion, f.remaining);
    f.remaining -= n;
    while (n > 0) {
      const int64_t c = f.c0 + f.r, last = std::min(f.columns->strips, f.s + n),
                    offset = c * a.features.plane_stride, grad_offset = c * a.grad.plane_stride,
                    grad_in_offset = c * a.grad_in.plane_stride,
                    prefetch_offset = (f.next_c0 + f.r) * a.grad_in.plane_stride;
      const bool fetch = !FIRST && f.next && f.next_c0 + f.r < a.channels;
      const Vec<float> mean = broadcast(a.norm.mean[c]), gain = broadcast(gains[c]);
      float* const m = moments + f.r * kSide;
      const float* const gradient = dz + f.r * kChannelStride;
      n -= last - f.s;
      Vec<float> s1 = {}, s2 = {};
      if (f.s > 0) {
        s1 = load(m);
        s2 = load(m + kGroup * kSide);
      }
      for (int64_t strip = f.s; strip < last; ++strip) {
        const auto* const columns = f.columns->column + 4 * strip;
        if (f.columns->whole[strip]) {
          const Vec<float> scale = broadcast(columns->scale[c]),
                           shift = broadcast(columns->shift[c]),
                           q = broadcast(columns->pre_mask[c]),
                           post_mask = broadcast(columns->post_mask[c]), step = q * gain;
          const S* const x = columns->x + offset;
          const float* const grad_in = FIRST ? nullptr : columns->grad_in + grad_in_offset;
          float* const g = columns->grad + grad_offset;
          DX_UNROLL
          for (int i = 0; i < 4; ++i) {
            const Vec<float> value = load(x + i * kSide),
                             d = relu_gradient(scale * value + shift,
                                               load(gradient + (4 * strip + i) * kSide)) *
                                 post_mask;
            s1 += d;
            s2 += d * (q * value - mean);
            if constexpr (FIRST) {
              store(g + i * kSide, step * d);
            } else {
              store(g + i * kSide, step * d + load(grad_in + i * kSide));
            }
          }
        } else {
          const int64_t count = std::min<int64_t>(4, f.columns->columns - 4 * strip);
          for (int64_t i = 0; i < count; ++i) {
            const auto& column = columns[i];
            const Vec<float> x = load_first(column.x + offset, column.count),
                             v = broadcast(column.scale[c]) * x + broadcast(column.shift[c]),
                             q = broadcast(column.pre_mask[c]),
                             d = relu_gradient(v, load(gradient + (4 * strip + i) * kSide)) *
                                 broadcast(column.post_mask[c]);
            s1 += d;
            s2 += d * (q * x - mean);
            Vec<float> g = q * gain * d;
            if constexpr (!FIRST) g += load_first(column.grad_in + grad_in_offset, column.count);
            store_first(column.grad + grad_offset, g, column.count);
          }
        }
        if (fetch) {
          DX_UNROLL
          for (int i = 0; i < 4; ++i)
            __builtin_prefetch(f.next->column[4 * strip + i].grad_in + prefetch_offset, 0, 2);
        }
      }
      store(m, s1);
      store(m + kGroup * kSide, s2);
      f.s = last;
      if (last == f.columns->strips) {
        f.s = 0;
        ++f.r;
      }
    }
  }

  void add_moments(int64_t c0) const {
    for (int64_t kind = 0; kind < 2; ++kind) {
      for (int64_t r = 0; r < count(c0); r += kSide) {
        Vec<float> lanes[kSide];
        load_transposed(moments + (kind * kGroup + r) * kSide, lanes);
        DX_UNROLL
        for (int step = kSide / 2; step > 0; step /= 2) {
          DX_UNROLL
          for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
        }
        float total[kSide];
        store(total, lanes[0]);
        for (int64_t i = 0; i < std::min(kSide, count(c0) - r); ++i)
          sums[2 * (c0 + r + i) + kind] += static_cast<double>(total[i]);
      }
    }
  }

  // dz of channels c0 ...
  template <int NR, class F>
  void input_gradient(const TileColumns<S>& columns, int64_t c0, const F& work) const {
    constexpr int NC = 4 / NR;
    const Panel left{weight + c0 / kSide * depths * kChunk, depths * kChunk, kChunk};
    const TileBlock<P, NR, NC> block;
    for (int64_t i = 0; i < columns.strips * 4; i += NC) {
      block.zero();
      block.product(depths, left, {db_t + i * depths * kChunk, depths * kChunk, kChunk}, work);
      unrolled<4>([&](auto t) __attribute__((always_inline)) {
        constexpr int I = decltype(t)::value;
        tile_store<I>(dz + I / NC * kSide * kChannelStride + (i + I % NC) * kSide,
                      kChannelStride * 4);
      });
    }
  }

  // dW of channels c0 ..., from z in `rows`; NR tiles of them by NC of outputs, from the first on.
  template <int NR, int NC, class F>
  void weight_block(const TileColumns<S>& columns, int64_t c0, int64_t r, int64_t o,
                    const uint32_t* rows, bool add, const F& work) const {
    const TileBlock<P, NR, NC> block;
    const int64_t row_step = outputs() * kTileSums;
    float* const sums_of_block = dweight + (c0 / kSide + r) * row_step + o * kTileSums;
    if (add) {
      block.load(sums_of_block, row_step, kTileSums);
    } else {
      block.zero();
    }
    block.product(columns.chunks, {rows + r * kRows, kRows, kChunk},
                  {db + o * kChunk, kChunk, outputs() * kChunk}, work);
    block.store(sums_of_block, row_step, kTileSums);
  }

  int64_t weight_blocks(int64_t rows) const {
    return std::max<int64_t>(1, rows == 1 ? ceil_div(outputs(), 4) : ceil_div(outputs(), 2));
  }

  template <class F>
  void weight_gradient(const TileColumns<S>& columns, int64_t c0, const uint32_t* rows, bool add,
                       const F& work) const {
    int64_t o = 0, remaining = outputs();
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

  FormProgress forming(int64_t begin, int64_t stage, int64_t calls) const {
    const int64_t tile = begin + stage / groups, next = begin + (stage + 1) / groups;
    FormProgress f{&columns(tile),
                   next < end ? &columns(next) : nullptr,
                   stage % groups * kGroup,
                   (stage + 1) % groups * kGroup,
                   z_of(stage),
                   0,
                   0};
    if (tile >= end) return f;
    f.remaining = count(f.c0) * f.columns->chunks;
    f.portion = ceil_div(f.remaining, calls);
    return f;
  }

  template <bool FIRST>
  void run(int64_t begin) const {
    list_columns(begin);
    list_columns(begin + 1);
    FormProgress first = forming(begin, 0, 1);
    form(first);
    const int64_t db_strip = 2 * depths;  // portions of db in a strip
    for (int64_t tile = begin; tile < end; ++tile) {
      list_columns(tile + 2);
      const TileColumns<S>& current = columns(tile);
      for (int64_t i = 0; i < db_strip; ++i) form_db(current, i / depths, i % depths);
      // dv and b of the tile that follows, over the last groups.
      const int64_t fetched = std::min<int64_t>(groups, 4),
                    calls =
                        fetched * (current.strips * 2 * depths + current.chunks * weight_blocks(2));
      FetchProgress fetching =
          tile + 1 < end ? fetching_of(columns(tile + 1), calls) : FetchProgress{};
      for (int64_t g = 0; g < groups; ++g) {
        const auto fetch = [&] {
          if (g >= groups - fetched) fetch_some(fetching);
        };
        const int64_t stage = (tile - begin) * groups + g, c0 = g * kGroup,
                      rows = ceil_div(count(c0), kSide);
        FormProgress next = forming(begin, stage + 1, current.strips * rows * depths);
        // Of the first group also the strip of db that the next strip of dz needs.
        int64_t k = 2, depth = 0;
        const int64_t chunks = g == 0 ? 2 * current.strips : 0;
        const auto form_some = [&] {
          form(next);
          fetch();
          for (int64_t i = rows; i <= 2 && k < chunks; ++i) {
            form_db(current, k, depth);
            if (++depth == depths) {
              depth = 0;
              ++k;
            }
          }
        };
        if (rows == 2) {
          input_gradient<2>(current, c0, form_some);
        } else {
          input_gradient<1>(current, c0, form_some);
        }
        next.portion = next.remaining;
        form(next);

        const int64_t next_tile = begin + (stage + 1) / groups;
        SweepProgress sweeping{
            &current,
            next_tile < end ? &columns(next_tile) : nullptr,
            c0,
            (stage + 1) % groups * kGroup,
            count(c0) * current.strips,
            ceil_div(count(c0) * current.strips, current.chunks * weight_blocks(rows))};
        weight_gradient(current, c0, z_of(stage), tile > begin, [&] {
          sweep<FIRST>(sweeping);
          fetch();
        });
        sweeping.portion = sweeping.remaining;
        sweep<FIRST>(sweeping);
        add_moments(c0);
      }
      static_assert(kNarrowMemory<S> <= kGroup * kChannelStride);
      if (previous) previous.run(tiling[tile], reinterpret_cast<uint32_t*>(dz));
    }
  }
};

// W as left operand of dz: rows are channels.
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

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>&);

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& a) {
  using Worker = BottleneckBackwardWorker<S>;
  if (a.channels == 0) return;
  const int64_t pitch = round_up(a.width, kLanes),
                depths = std::max<int64_t>(1, ceil_div(pitch, kDepth)),
                rows = ceil_div(a.channels, kSide), outputs = pitch / kSide;
  // What a pixel takes in db and db_t; whole tiles for each thread.
  const int64_t pixel_bytes = 2 * Worker::P * (pitch + depths * kDepth),
                fixed = 4 * Worker::kMemory;
  const int64_t max_pixels = std::clamp<int64_t>(
      (kBudget - fixed) / std::max<int64_t>(1, pixel_bytes) / 64 * 64, 64, kMaxTilePixels);
  const int64_t positions = a.features.samples * round_up(a.features.pixels(), kSide),
                share = round_up(ceil_div(positions, max_pixels), thread_count(positions / kSide));
  const int64_t capacity = positions == 0
                               ? max_pixels
                               : std::min(max_pixels, round_up(ceil_div(positions, share), kSide));
  const Tiling tiling(a.features.samples, a.features.pixels(), capacity);
  const int64_t threads = thread_count(tiling.count);

  const PreviousBottleneck<S> previous(a.previous);
  const Scratch packed(4 * rows * depths * Worker::kChunk);
  parallel(rows, thread_count(rows, kSide * pitch), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      pack_weight<Worker::P>(a, r * kSide, depths,
                             packed.as<uint32_t>() + r * depths * Worker::kChunk);
  });
  const Scratch gains(2 * sizeof(float) * a.channels);
  float* const ones = gains.as<float>() + a.channels;
  for (int64_t c = 0; c < a.channels; ++c) {
    gains.as<float>()[c] =
        static_cast<float>(static_cast<double>(a.norm.weight[c]) * reciprocal_std(a.norm, c));
    ones[c] = 1;
  }

  const int64_t max_columns = round_up(capacity / kSide, 4),
                db_size = max_columns / 2 * outputs * Worker::kChunk,
                db_t_size = max_columns * depths * Worker::kChunk,
                memory_values = db_size + db_t_size + Worker::kMemory,
                partial = rows * outputs * kTileSums;
  const Scratch tiles(4 * threads * memory_values);
  const Scratch partials(sizeof(float) * threads * partial);
  const Scratch sums(sizeof(double) * threads * 2 * a.channels);
  std::fill_n(sums.as<double>(), threads * 2 * a.channels, 0.0);

  parallel(tiling.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileConfiguration unit;
    TileColumns<S> tile_columns[3];
    uint32_t* const db = tiles.as<uint32_t>() + thread * memory_values;
    uint32_t* const z = db + db_size + db_t_size;
    float* const dz = reinterpret_cast<float*>(z + 4 * Worker::kRows);
    const Worker job{a,
                     tiling,
                     pitch,
                     depths,
                     ceil_div(a.channels, kGroup),
                     packed.as<uint32_t>(),
                     gains.as<float>(),
                     ones,
                     end,
                     db,
                     db + db_size,
                     z,
                     dz,
                     dz + kGroup * kChannelStride,
                     partials.as<float>() + thread * partial,
                     sums.as<double>() + thread * 2 * a.channels,
                     tile_columns,
                     previous};
    if (a.grad_in.data) {
      job.template run<false>(begin);
    } else {
      job.template run<true>(begin);
    }
  });

  const int64_t parts = tiling.count > 0 ? threads : 0;
  parallel(rows, thread_count(rows, parts * kSide * pitch),
           [&](int64_t, int64_t begin, int64_t end) {
             for (int64_t r = begin; r < end; ++r) {
               for (int64_t o = 0; o < a.width; o += kSide) {
                 Vec<float> square[kSide] = {};
                 for (int64_t t = 0; t < parts; ++t) {
                   const float* const source =
                       partials.as<float>() + t * partial + (r * outputs + o / kSide) * kTileSums;
                   DX_UNROLL
                   for (int i = 0; i < kSide; ++i) square[i] += load(source + i * kSide);
                 }
                 transpose<float>(square);
                 float* const out = a.dweight + o * a.channels + r * kSide;
                 DX_UNROLL
                 for (int i = 0; i < kSide; ++i) {
                   if (o + i < a.width)
                     store_first(out + i * a.channels, square[i], a.channels - r * kSide);
                 }
               }
             }
           });
  double* const total = sums.as<double>();
  for (int64_t t = 1; t < threads; ++t) {
    for (int64_t i = 0; i < 2 * a.channels; ++i) total[i] += total[t * 2 * a.channels + i];
  }
  const double all =
      static_cast<double>(a.features.samples) * static_cast<double>(a.features.pixels());
  finish_norm_backward(a.norm, total, a.channels, all, a.pre_mask, a.coef, true, a.dnorm_weight,
                       a.dnorm_bias);
  if (a.previous.weight && !previous) bottleneck_forward(a.previous);
}

template void bottleneck_backward<float>(const BottleneckBackward<float>&);
template void bottleneck_backward<BFloat16>(const BottleneckBackward<BFloat16>&);
template void bottleneck_backward<Float16>(const BottleneckBackward<Float16>&);

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
