// Backward of a dense layer's 3x3 convolution of bfloat16 on the tile unit; formulas:
// ../conv3x3_backward.cpp.
//
// Unit and padded planes as there. dy is rounded at once, into planes of pairs of outputs and into
// linear planes. Both products copy their operand of shifted dy into panels of tiles: a
// tile load that straddles cache lines takes six times as long.
//
//   dh: rows are i, columns 64 consecutive positions of the padded plane (a strip), k runs over
//   pairs of outputs and taps. The sums are transposed in registers to rows of b; then h, dv and
//   both sums of BN2 follow, and h is rounded to be an operand of the second product.
//   dW: rows are outputs and taps, columns i, k runs over all positions of the unit.
//
// Positions of the padding have a row of b of zeros, a table of zeros, so that h is zero there, and
// a row of dv that nobody reads. While the unit multiplies, the vector instructions copy what it
// needs next and finish the strip before.
#include "cpu/kernels/conv_units.h"
#include "cpu/kernels/norm_backward.h"
#include "cpu/parallel.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kStrip = 64;  // positions
constexpr int64_t kTile = kSide * kSide;
constexpr int64_t kCache = 1536 * 1024;  // of the second level, for all that a unit touches
constexpr int64_t kLeastBytes = 256 * 1024;

// Sizes of everything.
struct ProductSizes {
  int64_t growth, pitch;
  int64_t couples, pairs, chunks;  // of outputs; of outputs and taps; in 32s
  int64_t rows, row_tiles, inner;  // of dW: 9*growth, in 16s; pitch in 16s

  ProductSizes(int64_t growth, int64_t width)
      : growth(growth),
        pitch(round_up(width, kLanes)),
        couples(ceil_div(growth, 2)),
        pairs(9 * couples),
        chunks(std::max<int64_t>(1, ceil_div(pairs, kSide))),
        rows(9 * growth),
        row_tiles(ceil_div(rows, kSide)),
        inner(pitch / kSide) {}

  int64_t weight_pairs() const { return inner * chunks * kTilePairs; }
  int64_t panel_pairs() const { return chunks * 4 * kTilePairs; }  // of a strip
  int64_t strip_sums() const { return inner * 4 * kTile; }

  // For Units, which counts values of 4 bytes and has a fixed budget of them.
  int64_t values_per_pixel() const {
    const int64_t bytes = 4 * couples + 2 * growth + 2 * pitch + 2 * 2 * 2 * kSide;
    const int64_t fixed = 4 * (weight_pairs() + 2 * panel_pairs() + 2 * strip_sums());
    return ceil_div(bytes * 64 * 1024, std::max(kCache - fixed, kLeastBytes));
  }
};

// A position of the padded plane: rows of all that is used there.
struct Position {
  const BFloat16* b;
  float* dv;
  const float *scale, *shift, *post_mask;
};

// The next position to come.
struct Cursor {
  int64_t s = 0, y = 0, x = 0;
};

struct Conv3x3BackwardWorker {
  const Conv3x3Backward<BFloat16>& a;
  const Units& units;
  const ProductSizes& sizes;
  const uint32_t* weight;                         // [inner, chunks, 16, 16]
  const float *scale, *shift, *post_mask, *mean;  // padded tables; post_mask null: ones
  int64_t scale_stride, shift_stride;             // 0 or pitch
  const int64_t* pair_source;                     // [pairs], of strip 0 in the planes of pairs
  const int64_t* row_source;                      // [rows], of chunk 0 in the linear planes
  const float* zeros;                             // a row
  // of one thread
  float *planes = nullptr, *dv_unused = nullptr, *unit_sums = nullptr;
  float *strip_sums = nullptr,
        *dweight = nullptr;  // [2, inner, 4, 16, 16] and [row_tiles, inner, 16, 16]
  uint32_t *pairs = nullptr, *panels = nullptr, *h = nullptr, *shifted = nullptr;
  uint16_t* linear = nullptr;  // [growth, plane_size]; pairs [couples, plane_size]
  double* sums = nullptr;
  int64_t h_chunks = 0;
  Position positions[2][kStrip] = {};

  int64_t strips(const Unit& u) const { return ceil_div(units.span(u), kStrip); }

  // dy of output j to a zero-padded plane, with zeros below it up to `end`.
  void load_plane(const Unit& u, int64_t j, int64_t end, float* plane) const {
    const int64_t rows_end = units.position(u, u.samples - 1, u.rows) + units.pitch;
    std::fill(plane + std::min(rows_end, end), plane + end, 0.f);
    load_gradient_plane(a, units, u, j, plane);
  }

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

  // The rows of the next 64 positions.
  void locate(const Unit& u, Cursor& cursor, Position* out) const {
    for (int64_t i = 0; i < kStrip;) {
      if (cursor.s < u.samples && cursor.y < u.rows && cursor.x < units.width) {
        const int64_t n = u.sample + cursor.s, count = std::min(units.width - cursor.x, kStrip - i);
        int64_t row =
            ((n * units.height + u.row + cursor.y) * units.width + cursor.x) * sizes.pitch;
        for (int64_t m = 0; m < count; ++m, ++i, row += sizes.pitch) {
          out[i] = {a.bottleneck + row, a.dv + row, scale + n * scale_stride,
                    shift + n * shift_stride, post_mask ? post_mask + n * sizes.pitch : zeros};
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

  // Rows first .. last of chunk k of a strip's panel [chunks, 4, 16, 16].
  DX_INLINE void form(int64_t strip, int64_t k, int64_t first, int64_t last) const {
    last = std::min(last, sizes.pairs - k * kSide);
    uint32_t* out = panels + strip % 2 * sizes.panel_pairs() + k * 4 * kTilePairs + first * kSide;
    for (int64_t r = first; r < last; ++r, out += kSide) {
      const uint32_t* const in = pairs + pair_source[k * kSide + r] + strip * kStrip;
      DX_UNROLL
      for (int c = 0; c < 4; ++c)
        _mm512_store_si512(out + c * kTilePairs, _mm512_loadu_si512(in + c * kLanes));
    }
  }

  // What follows from 16 x 16 sums of a strip.
  template <bool POST>
  DX_INLINE void finish(int64_t strip, int64_t tile) const {
    const int64_t r = tile / 4, c = tile % 4, i = r * kSide;
    Vec<float> dh[kSide];
    load_transposed(strip_sums + strip % 2 * sizes.strip_sums() + tile * kTile, dh);
    const Position* const rows = positions[strip % 2] + c * kSide;
    const Position* const next_rows = positions[(strip + 1) % 2] + c * kSide;
    uint32_t* const out =
        h + (r * h_chunks + strip * 2 + c / 2) * kTilePairs + c % 2 * (kSide / 2) * kSide;
    const Vec<float> center = load(mean + i);
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

  // One block of dh of a strip; between its chunks a part of the next strip's panel is formed and
  // some tiles of the strip before are finished.
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
    tiles.store(strip_sums + strip % 2 * sizes.strip_sums() + (r * 4 + c) * kTile, 4 * kTile,
                kTile);
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

  // Rows first .. last of two row tiles of shifted dy, chunk k of [chunks, 2, 16, 16].
  DX_INLINE void shift_rows(int64_t tile, int64_t k, int64_t first, int64_t last,
                            uint32_t* panel) const {
    last = std::min(last, sizes.rows - tile * kSide);
    for (int64_t r = first; r < last; ++r) {
      const uint16_t* const in = linear + row_source[tile * kSide + r] + k * kDepth;
      _mm512_store_si512(panel + (k * 2 + r / kSide) * kTilePairs + r % kSide * kSide,
                         _mm512_loadu_si512(in));
    }
  }

  // Adds to NR x NC tiles of dW; meanwhile rows first .. last of the next panel are copied.
  template <int NR, int NC>
  DX_INLINE void weight_block(int64_t tile, int64_t i, int64_t chunks, bool fresh,
                              const uint32_t* panel, uint32_t* next, int64_t first,
                              int64_t last) const {
    const TileBlock<1, NR, NC> tiles;
    const int64_t step = h_chunks * kTilePairs;
    const uint32_t* const right = h + i * step;
    float* const out = dweight + (tile * sizes.inner + i) * kTile;
    if (fresh) {
      tiles.zero();
    } else {
      tiles.load(out, sizes.inner * kTile, kTile);
    }
    int64_t k = 0;
    tiles.product(
        chunks, {panel, kTilePairs, 2 * kTilePairs}, {right, step, kTilePairs},
        [&]() __attribute__((always_inline)) { shift_rows(tile + 2, k++, first, last, next); });
    tiles.store(out, sizes.inner * kTile, kTile);
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

  void run(const Unit& u, bool fresh) {
    load_planes(u);
    std::fill_n(unit_sums, 2 * sizes.pitch, 0.f);
    if (post_mask) {
      data_gradient<true>(u);
    } else {
      data_gradient<false>(u);
    }
    for (int64_t i = 0; i < 2 * sizes.pitch; ++i) sums[i] += static_cast<double>(unit_sums[i]);
    weight_gradient(u, fresh);
  }
};

// Row tile r of the left operand of dh, [chunks, 16, 16]; lines is [2, chunks * 16 + 16].
void pack_weight(const float* weight, const ProductSizes& sizes, int64_t width, int64_t r,
                 float* lines, uint32_t* out) {
  const int64_t size = sizes.chunks * kSide + kSide;
  std::fill_n(lines, 2 * size, 0.f);
  for (int64_t i = 0; i < kSide; ++i) {
    const bool inside = r * kSide + i < width;
    for (int64_t j = 0; j < sizes.growth; ++j) {
      const float* const taps = weight + (j * width + r * kSide + i) * 9;
      store_first(lines + j % 2 * size + j / 2 * 9, inside ? load_first(taps, 9) : Vec<float>{}, 9);
    }
    for (int64_t k = 0; k < sizes.chunks; ++k)
      split<1>(load(lines + k * kSide), load(lines + size + k * kSide),
               out + k * kTilePairs + i * kSide);
  }
}

}  // namespace

void conv3x3_backward(const Conv3x3Backward<BFloat16>& a) {
  const int64_t samples = a.features.samples;
  const ProductSizes sizes(a.growth, a.width);
  const Units units(samples, a.features.height, a.features.width, sizes.values_per_pixel(),
                    thread_count(samples));
  const int64_t threads = thread_count(units.count), pitch = sizes.pitch;

  const Scratch packed(4 * sizes.weight_pairs());
  const int64_t line = 2 * (sizes.chunks + 1) * kSide;
  const Scratch lines(4 * threads * line);
  parallel(sizes.inner, std::min(threads, thread_count(sizes.inner, 9 * kSide * a.growth)),
           [&](int64_t thread, int64_t begin, int64_t end) {
             for (int64_t r = begin; r < end; ++r)
               pack_weight(a.weight, sizes, a.width, r, lines.as<float>() + thread * line,
                           packed.as<uint32_t>() + r * sizes.chunks * kTilePairs);
           });

  // The padding's row follows those of the samples.
  const int64_t scale_rows = a.scale_shift.scale.sample_stride ? samples : 1,
                shift_rows = a.scale_shift.shift.sample_stride ? samples : 1;
  const int64_t mask_rows = a.post_mask.data ? samples : 0;
  const Scratch tables(sizeof(float) * (scale_rows + shift_rows + mask_rows + 2) * pitch);
  float* const scale = tables.as<float>();
  float* const shift = scale + scale_rows * pitch;
  float* const post_mask = shift + shift_rows * pitch;
  float* const mean = post_mask + mask_rows * pitch;
  float* const zeros = mean + pitch;
  pad_rows(a.scale_shift.scale.data, a.scale_shift.scale.sample_stride, scale_rows, a.width, scale);
  pad_rows(a.scale_shift.shift.data, a.scale_shift.shift.sample_stride, shift_rows, a.width, shift);
  if (mask_rows)
    pad_rows(a.post_mask.data, a.post_mask.sample_stride, mask_rows, a.width, post_mask);
  pad_rows(a.norm.mean, int64_t{0}, 1, a.width, mean);
  std::fill_n(zeros, pitch, 0.f);

  const Scratch sources(sizeof(int64_t) * (sizes.pairs + sizes.rows));
  int64_t* const pair_source = sources.as<int64_t>();
  int64_t* const row_source = pair_source + sizes.pairs;
  for (int64_t q = 0; q < sizes.pairs; ++q)
    pair_source[q] = q / 9 * units.plane_size + units.base - units.offset[q % 9];
  for (int64_t r = 0; r < sizes.rows; ++r)
    row_source[r] = r / 9 * units.plane_size + units.base - units.offset[r % 9];

  // of one thread, all in 4 bytes and whole cache lines
  const int64_t longest = (units.maps_per_unit * (units.rows_per_unit + 1) - 1) * units.pitch - 1;
  const int64_t h_chunks = 2 * ceil_div(std::max<int64_t>(longest, 1), kStrip);
  const int64_t plane_values = 2 * units.plane_size;
  const int64_t pair_values = sizes.couples * units.plane_size;
  const int64_t linear_values = round_up(a.growth * units.plane_size, 2 * kSide) / 2;
  const int64_t panel_values = 2 * sizes.panel_pairs(), sum_values = 2 * sizes.strip_sums();
  const int64_t h_values = sizes.inner * h_chunks * kTilePairs,
                shifted_values = 4 * h_chunks * kTilePairs;
  const int64_t dweight_values = sizes.row_tiles * sizes.inner * kTile;
  const int64_t thread_values = plane_values + pair_values + linear_values + panel_values +
                                sum_values + h_values + shifted_values + dweight_values + 3 * pitch;
  const Scratch work(sizeof(float) * threads * thread_values);
  const Scratch sums(sizeof(double) * threads * 2 * pitch);
  std::fill_n(sums.as<double>(), threads * 2 * pitch, 0.0);
  const auto dweight_of = [&](int64_t thread) { return work.as<float>() + thread * thread_values; };
  if (units.count == 0) std::fill_n(dweight_of(0), dweight_values, 0.f);

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileConfiguration unit;
    float* next = dweight_of(thread);
    const auto take = [&](int64_t values) {
      next += values;
      return next - values;
    };
    const auto take_pairs = [&](int64_t values) {
      return reinterpret_cast<uint32_t*>(take(values));
    };
    Conv3x3BackwardWorker job{a,
                              units,
                              sizes,
                              packed.as<uint32_t>(),
                              scale,
                              shift,
                              mask_rows ? post_mask : nullptr,
                              mean,
                              a.scale_shift.scale.sample_stride ? pitch : 0,
                              a.scale_shift.shift.sample_stride ? pitch : 0,
                              pair_source,
                              row_source,
                              zeros};
    job.dweight = take(dweight_values);
    job.planes = take(plane_values);
    job.pairs = take_pairs(pair_values);
    job.linear = reinterpret_cast<uint16_t*>(take(linear_values));
    job.panels = take_pairs(panel_values);
    job.strip_sums = take(sum_values);
    job.h = take_pairs(h_values);
    job.shifted = take_pairs(shifted_values);
    job.unit_sums = take(2 * pitch);
    job.dv_unused = take(pitch);
    job.sums = sums.as<double>() + thread * 2 * pitch;
    job.h_chunks = h_chunks;
    std::fill_n(job.planes, plane_values, 0.f);
    // rows beyond the last pair stay zero
    const int64_t last = (sizes.chunks - 1) * 4 * kTilePairs;
    for (int64_t i = 0; i < 2; ++i)
      std::fill_n(job.panels + i * sizes.panel_pairs() + last, 4 * kTilePairs, 0u);
    for (int64_t i = begin; i < end; ++i) job.run(units[i], i == begin);
  });

  parallel(a.growth, thread_count(a.growth, threads * 9 * pitch),
           [&](int64_t, int64_t begin, int64_t end) {
             for (int64_t j = begin; j < end; ++j) {
               for (int64_t i = 0; i < a.width; i += kSide) {
                 Vec<float> taps[kSide] = {};
                 DX_UNROLL
                 for (int t = 0; t < 9; ++t) {
                   const int64_t r = j * 9 + t;
                   const int64_t offset =
                       (r / kSide * sizes.inner + i / kSide) * kTile + r % kSide * kSide;
                   for (int64_t thread = 0; thread < threads; ++thread)
                     taps[t] += load(dweight_of(thread) + offset);
                 }
                 transpose<float>(taps);
                 float* const out = a.dweight + (j * a.width + i) * 9;
                 DX_UNROLL
                 for (int n = 0; n < kSide; ++n) {
                   if (i + n < a.width) store_first(out + n * 9, taps[n], 9);
                 }
               }
             }
           });
  finish_bottleneck_norm(a, sums.as<double>(), threads, pitch);
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
