// Computes the backward of a dense layer's 3x3 convolution of bfloat16 on AMX; formulas:
// ../conv3x3_backward.cpp.
//
// Units and padded planes are those of the other machines. dy is rounded at once, into planes of
// pairs of outputs and into linear planes. Both products copy their operand of shifted dy into
// panels of tiles, because a tile load that straddles cache lines takes six times as long.
//
//   dh: rows are i, columns 64 consecutive positions of the padded plane (a strip), k runs over
//   pairs of outputs and taps. The sums are transposed in registers to rows of b; then h, dv and
//   both sums of BN2 follow, and h is rounded to be an operand of the second product.
//   dW: rows are outputs and taps, columns i, k runs over all positions of the unit.
//
// Positions of the padding have a row of b of zeros, and zeros for scale and shift, so that h is
// zero there, and a row of dv that nobody reads. Between the products, vector instructions copy
// what comes next and finish the preceding strip.
#include "conv3x3_weight.h"
#include "cpu/kernels/norm_backward.h"
#include "cpu/kernels/padded_rows.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kStrip = 64;  // positions

// A position of the padded plane has these rows.
struct Position {
  const BFloat16* b;
  float* dv;
  const float *scale, *shift, *post_mask;
};

// A cursor is at the next position to list.
struct Cursor {
  int64_t s = 0, y = 0, x = 0;
};

struct Conv3x3BackwardWorker {
  const Conv3x3Backward<BFloat16>& a;
  const Units& units;
  const ProductSizes& sizes;
  const uint32_t* weight;              // [inner, chunks, 16, 16]
  ScaleShiftTable<float> scale_shift;  // padded, as are those that follow
  PerChannel<float> post_mask;
  PerChannel<float> mean;
  const float* zeros;
  const int64_t* tap_source;                         // [9 * growth], of position 0 in planes
  float* dweight = nullptr;                          // [row_tiles, inner, 16, 16]
  double* sums = nullptr;                            // [2, pitch]
  float* planes = nullptr;                           // two
  uint32_t* pairs = nullptr;                         // [couples, plane_size]
  uint16_t* linear = nullptr;                        // [growth, plane_size]
  uint32_t* panels = nullptr;                        // [2, chunks, 4, 16, 16]
  float* strip_sums = nullptr;                       // [2, inner, 4, 16, 16]
  uint32_t* h = nullptr;                             // [inner, h_chunks, 16, 16]
  uint32_t* shifted = nullptr;                       // [2, h_chunks, 2, 16, 16]
  float *unit_sums = nullptr, *dv_unused = nullptr;  // [2, pitch], [pitch]
  Position positions[2][kStrip] = {};
  int64_t max_span = (units.maps_per_unit * (units.rows_per_unit + 1) - 1) * units.pitch - 1;
  int64_t h_chunks = 2 * ceil_div(std::max<int64_t>(max_span, 1), kStrip);

  void take_memory(Carver& memory) {
    planes = memory.take<float>(2 * units.plane_size);
    pairs = memory.take<uint32_t>(sizes.couples * units.plane_size);
    linear = memory.take<uint16_t>(a.growth * units.plane_size);
    panels = memory.take<uint32_t>(2 * sizes.panel_pairs());
    strip_sums = memory.take<float>(2 * sizes.strip_sums());
    h = memory.take<uint32_t>(sizes.inner * h_chunks * kTilePairs);
    shifted = memory.take<uint32_t>(4 * h_chunks * kTilePairs);
    unit_sums = memory.take<float>(2 * sizes.pitch);
    dv_unused = memory.take<float>(sizes.pitch);
  }

  // Clears the padding of the planes, and rows beyond the last pair, which stay zero.
  void clear() const {
    std::fill_n(planes, 2 * units.plane_size, 0.f);
    for (int64_t i = 1; i <= 2; ++i)
      std::fill_n(panels + i * sizes.panel_pairs() - 4 * kTilePairs, 4 * kTilePairs, 0u);
  }

  int64_t strips(const Unit& u) const { return ceil_div(units.span(u), kStrip); }

  // Loads dy of output j into a zero-padded plane, with zeros below it up to `end`.
  void load_plane(const Unit& u, int64_t j, int64_t end, float* plane) const {
    const int64_t rows_end = units.position(u, u.samples - 1, u.rows) + units.pitch;
    std::fill(plane + std::min(rows_end, end), plane + end, 0.f);
    load_gradient_plane(a, units, u, j, plane);
  }

  // Rounds dy of a unit, into planes of pairs of outputs and into linear planes.
  void load_planes(const Unit& u) const {
    const int64_t size = units.plane_size;
    const int64_t end =
        std::min(size, round_up(units.base + strips(u) * kStrip + units.pitch + 1, kLanes));
    float *const even = planes, *const odd = planes + size;
    for (int64_t jj = 0; jj < sizes.couples; ++jj) {
      const bool has_odd = 2 * jj + 1 < a.growth;
      load_plane(u, 2 * jj, end, even);
      if (has_odd) {
        load_plane(u, 2 * jj + 1, end, odd);
      } else {
        std::fill_n(odd, size, 0.f);
      }
      uint32_t* const target = pairs + jj * size;
      uint16_t* const line = linear + 2 * jj * size;
      for (int64_t i = 0; i < end; i += kLanes) {
        __m512i part[1];
        split(load(even + i), load(odd + i), part);
        _mm512_store_si512(target + i, part[0]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(line + i), _mm512_cvtepi32_epi16(part[0]));
        if (has_odd)
          _mm256_store_si256(reinterpret_cast<__m256i*>(line + size + i),
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(part[0], 16)));
      }
    }
  }

  // Lists the next 64 positions.
  void locate(const Unit& u, Cursor& cursor, Position* out) const {
    for (int64_t i = 0; i < kStrip;) {
      if (cursor.s < u.samples && cursor.y < u.rows && cursor.x < units.width) {
        const int64_t n = u.sample + cursor.s, count = std::min(units.width - cursor.x, kStrip - i);
        int64_t row =
            ((n * units.height + u.row + cursor.y) * units.width + cursor.x) * sizes.pitch;
        for (int64_t m = 0; m < count; ++m, ++i, row += sizes.pitch) {
          out[i] = {a.bottleneck + row, a.dv + row, scale_shift.scale.row(n),
                    scale_shift.shift.row(n), post_mask.data ? post_mask.row(n) : zeros};
        }
        cursor.x += count;
        continue;
      }
      out[i++] = {reinterpret_cast<const BFloat16*>(zeros), dv_unused, zeros, zeros, zeros};
      if (++cursor.x >= units.pitch) {
        cursor.x = 0;
        if (++cursor.y > u.rows) {
          cursor.y = 0;
          ++cursor.s;
        }
      }
    }
  }

  // Copies rows first .. last of chunk k into a strip's panel [chunks, 4, 16, 16].
  DX_INLINE void form(int64_t strip, int64_t k, int64_t first, int64_t last) const {
    last = std::min(last, sizes.pairs - k * kSide);
    uint32_t* out = panels + strip % 2 * sizes.panel_pairs() + k * 4 * kTilePairs + first * kSide;
    for (int64_t r = first; r < last; ++r, out += kSide) {
      const uint32_t* const in = pairs + tap_source[k * kSide + r] + strip * kStrip;
      DX_UNROLL
      for (int c = 0; c < 4; ++c)
        _mm512_store_si512(out + c * kTilePairs, _mm512_loadu_si512(in + c * kLanes));
    }
  }

  // Finishes 16 x 16 sums of dh of a strip: stores dv and h, adds to both sums.
  template <bool POST>
  DX_INLINE void finish(int64_t strip, int64_t tile) const {
    const int64_t r = tile / 4, c = tile % 4, i = r * kSide;
    Vec<float> dh[kSide];
    load_transposed(strip_sums + strip % 2 * sizes.strip_sums() + tile * kTileSums, dh);
    const Position* const rows = positions[strip % 2] + c * kSide;
    const Position* const next_rows = positions[(strip + 1) % 2] + c * kSide;
    uint32_t* const out =
        h + (r * h_chunks + strip * 2 + c / 2) * kTilePairs + c % 2 * (kSide / 2) * kSide;
    const Vec<float> center = load(mean.data + i);
    Vec<float> s1 = load(unit_sums + i), s2 = load(unit_sums + sizes.pitch + i);
    DX_UNROLL
    for (int p = 0; p < kSide; p += 2) {
      Vec<float> value[2];
      DX_UNROLL
      for (int q = 0; q < 2; ++q) {
        const Position& row = rows[p + q];
        const Vec<float> b = load(row.b + i);
        value[q] = relu(load(row.scale + i) * b + load(row.shift + i));
        Vec<float> d = relu_gradient(value[q], dh[p + q]);
        if constexpr (POST) d *= load(row.post_mask + i);
        store(row.dv + i, d);
        s1 += d;
        s2 += d * (b - center);
        __builtin_prefetch(next_rows[p + q].b + i, 0, 2);
        __builtin_prefetch(next_rows[p + q].dv + i, 1, 2);
      }
      split<1>(value[0], value[1], out + p / 2 * kSide);
    }
    store(unit_sums + i, s1);
    store(unit_sums + sizes.pitch + i, s2);
  }

  // Forms one block of dh of a strip. Between its chunks a part of the next strip's panel is
  // formed, and some tiles of the preceding strip are finished.
  template <bool POST, int NR, int NC>
  DX_INLINE void data_block(int64_t strip, int64_t r, int64_t c, int64_t first, int64_t last,
                            bool has_next, Pace& pace, int64_t& finished) const {
    const TileBlock<1, NR, NC> tiles;
    const Panel w{weight + r * sizes.chunks * kTilePairs, sizes.chunks * kTilePairs, kTilePairs};
    const uint32_t* const panel = panels + strip % 2 * sizes.panel_pairs() + c * kTilePairs;
    tiles.zero();
    int64_t k = 0;
    tiles.product(
        sizes.chunks, w, {panel, kTilePairs, 4 * kTilePairs}, [&]() __attribute__((always_inline)) {
          if (has_next) form(strip + 1, k++, first, last);
          if (strip > 0)
            pace.step([&]()
                          __attribute__((always_inline)) { finish<POST>(strip - 1, finished++); });
        });
    tiles.store(strip_sums + strip % 2 * sizes.strip_sums() + (r * 4 + c) * kTileSums,
                4 * kTileSums, kTileSums);
  }

  template <bool POST>
  void data_gradient(const Unit& u) {
    const int64_t n = strips(u), blocks = round_up(sizes.inner, 2) - sizes.inner % 2;
    Cursor cursor;
    for (int64_t k = 0; k < sizes.chunks; ++k) form(0, k, 0, kSide);
    for (int64_t strip = 0; strip < n; ++strip) {
      const bool has_next = strip + 1 < n;
      locate(u, cursor, positions[strip % 2]);
      Pace pace{4 * sizes.inner, blocks * sizes.chunks};
      int64_t finished = 0, r = 0, block = 0;
      const auto next = [&] { return kSide * block++ / blocks; };
      int64_t first = next();
      for (; r + 2 <= sizes.inner; r += 2) {
        const int64_t middle = next(), last = next();
        data_block<POST, 2, 2>(strip, r, 0, first, middle, has_next, pace, finished);
        data_block<POST, 2, 2>(strip, r, 2, middle, last, has_next, pace, finished);
        first = last;
      }
      if (r < sizes.inner)
        data_block<POST, 1, 4>(strip, r, 0, first, kSide, has_next, pace, finished);
    }
    for (int64_t tile = 0; tile < 4 * sizes.inner; ++tile) finish<POST>(n - 1, tile);
  }

  // Copies rows first .. last of two row tiles of shifted dy, chunk k of [chunks, 2, 16, 16].
  DX_INLINE void shift_rows(int64_t tile, int64_t k, int64_t first, int64_t last,
                            uint32_t* panel) const {
    last = std::min(last, sizes.rows - tile * kSide);
    for (int64_t r = first; r < last; ++r) {
      const uint16_t* const in = linear + tap_source[tile * kSide + r] + k * kDepth;
      _mm512_store_si512(panel + (k * 2 + r / kSide) * kTilePairs + r % kSide * kSide,
                         _mm512_loadu_si512(in));
    }
  }

  // Adds to NR x NC tiles of dW and meanwhile copies rows first .. last of the next panel.
  template <int NR, int NC>
  DX_INLINE void weight_block(int64_t tile, int64_t i, int64_t chunks, bool fresh,
                              const uint32_t* panel, uint32_t* next, int64_t first,
                              int64_t last) const {
    const TileBlock<1, NR, NC> tiles;
    const int64_t step = h_chunks * kTilePairs;
    const uint32_t* const right = h + i * step;
    float* const out = dweight + (tile * sizes.inner + i) * kTileSums;
    if (fresh) {
      tiles.zero();
    } else {
      tiles.load(out, sizes.inner * kTileSums, kTileSums);
    }
    int64_t k = 0;
    tiles.product(
        chunks, {panel, kTilePairs, 2 * kTilePairs}, {right, step, kTilePairs},
        [&]() __attribute__((always_inline)) { shift_rows(tile + 2, k++, first, last, next); });
    tiles.store(out, sizes.inner * kTileSums, kTileSums);
  }

  void weight_gradient(const Unit& u, bool fresh) const {
    const int64_t chunks = 2 * strips(u);
    const auto panel = [&](int64_t tile) {
      return shifted + tile / 2 % 2 * h_chunks * 2 * kTilePairs;
    };
    for (int64_t k = 0; k < chunks; ++k) shift_rows(0, k, 0, 2 * kSide, panel(0));
    for (int64_t tile = 0; tile < sizes.row_tiles; tile += 2) {
      const uint32_t* const current = panel(tile);
      uint32_t* const next = panel(tile + 2);
      const auto share = [&](int64_t i) { return 2 * kSide * i / sizes.inner; };
      int64_t i = 0;
      if (tile + 2 <= sizes.row_tiles) {
        for (; i + 2 <= sizes.inner; i += 2)
          weight_block<2, 2>(tile, i, chunks, fresh, current, next, share(i), share(i + 2));
        if (i < sizes.inner)
          weight_block<2, 1>(tile, i, chunks, fresh, current, next, share(i), share(i + 1));
        continue;
      }
      for (; i + 4 <= sizes.inner; i += 4)
        weight_block<1, 4>(tile, i, chunks, fresh, current, next, 0, 0);
      if (i + 3 == sizes.inner) weight_block<1, 3>(tile, i, chunks, fresh, current, next, 0, 0);
      if (i + 2 == sizes.inner) weight_block<1, 2>(tile, i, chunks, fresh, current, next, 0, 0);
      if (i + 1 == sizes.inner) weight_block<1, 1>(tile, i, chunks, fresh, current, next, 0, 0);
    }
  }

  // Treats a unit; dW starts at zero if it is `fresh`. Inlined into its caller, it spills
  // registers.
  DX_NOINLINE void run(const Unit& u, bool fresh) {
    load_planes(u);
    std::fill_n(unit_sums, 2 * sizes.pitch, 0.f);
    if (post_mask.data) {
      data_gradient<true>(u);
    } else {
      data_gradient<false>(u);
    }
    for (int64_t i = 0; i < 2 * sizes.pitch; ++i) sums[i] += static_cast<double>(unit_sums[i]);
    weight_gradient(u, fresh);
  }
};

}  // namespace

void conv3x3_backward(const Conv3x3Backward<BFloat16>& a) {
  const int64_t samples = a.features.samples;
  const ProductSizes sizes(a.growth, a.width);
  const Units units(samples, a.features.height, a.features.width, sizes.values_per_pixel(),
                    thread_count(samples));
  const int64_t threads = thread_count(units.count), pitch = sizes.pitch;

  const int64_t line = 2 * (sizes.chunks + 1) * kSide;
  const Scratch weight(4 * sizes.weight_pairs()), lines(4 * threads * line);
  parallel(sizes.inner, std::min(threads, thread_count(sizes.inner, 9 * kSide * a.growth)),
           [&](int64_t thread, int64_t begin, int64_t end) {
             for (int64_t r = begin; r < end; ++r)
               pack_weight(a.weight, sizes, a.width, r, lines.as<float>() + thread * line,
                           weight.as<uint32_t>() + r * sizes.chunks * kTilePairs);
           });
  const PaddedRows<float> scale(a.scale_shift.scale, samples, a.width),
      shift(a.scale_shift.shift, samples, a.width);
  const PaddedRows<float> post_mask(a.post_mask, samples, a.width), mean({a.norm.mean}, 1, a.width);
  const Scratch zeros(sizeof(float) * pitch), tap_source(sizeof(int64_t) * sizes.rows);
  std::fill_n(zeros.as<float>(), pitch, 0.f);
  for (int64_t r = 0; r < sizes.rows; ++r)
    tap_source.as<int64_t>()[r] = r / 9 * units.plane_size + units.base - units.offset[r % 9];

  const Workers<Conv3x3BackwardWorker> workers({a,
                                                units,
                                                sizes,
                                                weight.as<uint32_t>(),
                                                {scale, shift},
                                                post_mask,
                                                mean,
                                                zeros.as<float>(),
                                                tap_source.as<int64_t>()},
                                               threads);
  const int64_t dweight_values = sizes.row_tiles * sizes.inner * kTileSums;
  const Scratch dweight(sizeof(float) * threads * dweight_values);
  const Scratch sums(sizeof(double) * threads * 2 * pitch);
  std::fill_n(sums.as<double>(), threads * 2 * pitch, 0.0);
  if (units.count == 0) std::fill_n(dweight.as<float>(), dweight_values, 0.f);

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileConfiguration configuration;
    Conv3x3BackwardWorker worker = workers[thread];
    worker.dweight = dweight.as<float>() + thread * dweight_values;
    worker.sums = sums.as<double>() + thread * 2 * pitch;
    worker.clear();
    for (int64_t i = begin; i < end; ++i) worker.run(units[i], i == begin);
  });

  merge_dweight(dweight.as<float>(), threads, sizes, a.width, a.dweight);
  finish_bottleneck_norm(a, sums.as<double>(), threads, pitch);
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
