// Forward of a dense layer's 3x3 convolution on the tile unit; formula: ../conv3x3_forward.cpp.
//
// Shifted operands would straddle cache lines, which the unit loads six times slower. So the taps
// are products first and shifted as sums: with h = relu(scale*b + shift) and q a position in the
// padded plane,
//
//   P[q, (tap, j)] = sum_i h[q, i] W[j, i, tap]          y[j, p] = sum_tap P[p + tap, (tap, j)]
//
// Rows of h are left operands as they lie in b. While the unit works, the next rows are formed, and
// those whose neighbors are all there are summed: P is a window that moves along the plane, a few
// rows of a map long.
#include "../../parallel.h"
#include "../conv3x3_output.h"
#include "tiles.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kRows = 2 * kSide;  // positions of a step

template <class S>
struct Job {
  static constexpr int P = kParts<S>;
  static constexpr int64_t kChunk = P * kTilePairs;
  const Conv3x3Forward<S>& a;
  const Units& units;
  int64_t pitch, chunks, columns;  // of a row of b; of i; of (tap, j) rounded up to whole tiles
  const uint32_t* weight;          // [columns / 16, chunks, P, 16, 16]
  const float *scale, *shift;      // padded tables
  int64_t scale_stride, shift_stride;
  // of one thread
  const S** rows;          // [positions] of b, null where the plane is padding
  const float** table;     // [positions, 2]: scale and shift of that row
  uint32_t* h;             // [2, 2, chunks, P, 16, 16]
  float *window, *planes;  // [window_rows, columns] of P; [growth, positions]
  int64_t window_rows;

  // Where each position of the unit's planes has its row of b.
  void locate(const Unit& u) const {
    std::fill_n(rows, units.plane_size, nullptr);
    units.for_rows_with_halo(u, [&](int64_t s, int64_t y) {
      const int64_t n = u.sample + s, first = units.position(u, s, y);
      const S* const row = a.bottleneck + (n * units.height + u.row + y) * units.width * pitch;
      for (int64_t x = 0; x < units.width; ++x) {
        rows[first + x] = row + x * pitch;
        table[2 * (first + x)] = scale + n * scale_stride;
        table[2 * (first + x) + 1] = shift + n * shift_stride;
      }
    });
  }

  // Positions p + first .. p + last as left operands.
  void form(int64_t p, int64_t first, int64_t last, uint32_t* out) const {
    for (int64_t r = first; r < last; ++r) {
      const S* const row = rows[p + r];
      uint32_t* const to = out + r / kSide * chunks * kChunk + r % kSide * kSide;
      const float *const sc = table[2 * (p + r)], *const sh = table[2 * (p + r) + 1];
      const auto value = [&](int64_t i) __attribute__((always_inline)) {
        return row && i < pitch ? relu(load(sc + i) * load(row + i) + load(sh + i)) : Vec<float>{};
      };
      for (int64_t k = 0; k < chunks; ++k)
        split<P>(value(k * kDepth), value(k * kDepth + kSide), to + k * kChunk);
    }
  }

  // y of the 16 positions from p, from the products around them; `products` is where P of position
  // 0 would be.
  void sum_taps(const float* products, int64_t p) const {
    for (int64_t j = 0; j < a.growth; j += kSide) {
      Vec<float> y[kSide];
      DX_UNROLL
      for (int r = 0; r < kSide; ++r) {
        const float* const at = products + (p + r) * columns + j;
        y[r] = load(at + units.offset[0] * columns);
        DX_UNROLL
        for (int t = 1; t < 9; ++t) y[r] += load(at + units.offset[t] * columns + t * a.growth);
      }
      transpose<float>(y);
      DX_UNROLL
      for (int r = 0; r < kSide; ++r) {
        if (j + r < a.growth) store(planes + (j + r) * units.plane_size + p, y[r]);
      }
    }
  }

  template <int NR, int NC>
  void multiply(const uint32_t* left, float* products, int64_t c) const {
    const TileBlock<P, NR, NC> tiles;
    tiles.zero();
    tiles.product(chunks, {left, chunks * kChunk, kChunk},
                  {weight + c * chunks * kChunk, chunks * kChunk, kChunk});
    tiles.store(products + c * kSide, kSide * columns, kSide, 4 * columns);
  }

  void run(const Unit& u) const {
    locate(u);
    const int64_t above = u.row > 0 ? 1 : 0, below = u.row + u.rows < units.height ? 1 : 0;
    const int64_t first = units.position(u, 0, -above),
                  end = units.position(u, u.samples - 1, u.rows - 1 + below) + units.width;
    const int64_t steps = ceil_div(end - first, kRows), last = first + steps * kRows;
    const int64_t begin = units.position(u, 0, 0), stop = begin + units.span(u),
                  tiles = columns / kSide;
    const int64_t reach = units.pitch + 1;  // of the taps

    int64_t start = first - reach, summed = begin;  // where the window starts; y is there up to it
    float* products = window - start * columns;
    const auto sum = [&](int64_t ready) {  // as far as products up to `ready` allow
      for (; summed < stop && summed + kSide + reach <= ready; summed += kSide)
        sum_taps(products, summed);
    };
    const auto make_room = [&](int64_t p, int64_t rows) {
      if (p + rows - start <= window_rows) return;
      const int64_t kept = std::min(summed, p) - reach;
      std::memmove(window, products + kept * columns, sizeof(float) * (p - kept) * columns);
      start = kept;
      products = window - start * columns;
    };
    const auto panel = [&](int64_t step) { return h + step % 2 * 2 * chunks * kChunk; };

    std::fill_n(window, reach * columns, 0.f);  // outside of the image
    form(first, 0, kRows, panel(0));
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t p = first + s * kRows, more = s + 1 < steps ? kRows : 0;
      make_room(p, kRows);
      float* const to = products + p * columns;
      for (int64_t c = 0; c < tiles;) {
        const int64_t width = tiles - c == 3 ? 3 : std::min<int64_t>(tiles - c, 2);
        if (width == 3) {
          multiply<1, 3>(panel(s), to, c);
          multiply<1, 3>(panel(s) + chunks * kChunk, to + kSide * columns, c);
        } else if (width == 2) {
          multiply<2, 2>(panel(s), to, c);
        } else {
          multiply<2, 1>(panel(s), to, c);
        }
        form(p + kRows, more * c / tiles, more * (c + width) / tiles, panel(s + 1));
        if (2 * c < tiles && 2 * (c + width) >= tiles) sum(p);
        c += width;
      }
    }
    const int64_t behind = reach + kSide;
    make_room(last, behind);
    std::fill_n(products + last * columns, behind * columns, 0.f);
    sum(last + behind);
  }
};

// W as right operand: column (tap, j), rounded up with zeros.
template <int PARTS>
void pack(const float* w, int64_t growth, int64_t width, int64_t chunks, int64_t tiles,
          uint32_t* out) {
  parallel(tiles, thread_count(tiles), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int32_t offsets[kSide] = {};
      int filled = 0;
      for (int64_t q = c * kSide; q < std::min((c + 1) * kSide, 9 * growth); ++q)
        offsets[filled++] = static_cast<int32_t>(q % growth * width * 9 + q / growth);
      const __m512i places = _mm512_loadu_si512(offsets);
      const __mmask16 mask = static_cast<__mmask16>((1u << filled) - 1);
      const auto column = [&](int64_t i) {
        return i < width ? (Vec<float>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, places,
                                                                w + i * 9, 4)
                         : Vec<float>{};
      };
      for (int64_t k = 0; k < chunks; ++k) {
        for (int64_t r = 0; r < kSide; ++r)
          split<PARTS>(column(k * kDepth + r), column(k * kDepth + kSide + r),
                       out + (c * chunks + k) * PARTS * kTilePairs + r * kSide);
      }
    }
  });
}

}  // namespace

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& a) {
  constexpr int P = kParts<S>;
  const int64_t samples = a.features.samples, pitch = round_up(a.width, kLanes);
  const int64_t chunks = ceil_div(a.width, kDepth), columns = round_up(9 * a.growth, kSide);
  const Units units(samples, a.features.height, a.features.width, 16, thread_count(samples));
  const int64_t threads = thread_count(units.count);

  const Scratch packed(4 * columns / kSide * chunks * P * kTilePairs);
  pack<P>(a.weight, a.growth, a.width, chunks, columns / kSide, packed.as<uint32_t>());
  const int64_t scale_rows = a.norm.scale.sample_stride ? samples : 1,
                shift_rows = a.norm.shift.sample_stride ? samples : 1;
  const Scratch scale(4 * scale_rows * pitch), shift(4 * shift_rows * pitch);
  pad_rows(a.norm.scale.data, a.norm.scale.sample_stride, scale_rows, a.width, scale.as<float>());
  pad_rows(a.norm.shift.data, a.norm.shift.sample_stride, shift_rows, a.width, shift.as<float>());
  const Scratch parts(sizeof(double) * 2 * a.growth * samples * units.blocks_per_map);

  // positions before and behind a plane that a step may touch
  const int64_t margin = 2 * kRows, positions = units.plane_size + 2 * margin;
  const int64_t window_rows = 256 + 4 * units.pitch;
  const int64_t h_pairs = 4 * chunks * P * kTilePairs,
                own = h_pairs + window_rows * columns + kSide + a.growth * units.plane_size;
  const Scratch work(4 * threads * round_up(own, kSide));
  const Scratch tables(sizeof(void*) * threads * 3 * positions);

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileUnit unit;
    uint32_t* const h = work.as<uint32_t>() + thread * round_up(own, kSide);
    float* const window = reinterpret_cast<float*>(h + h_pairs);
    const void** const table = tables.as<const void*>() + thread * 3 * positions;
    std::fill_n(table, 3 * positions, nullptr);
    const Job<S> job{a,
                     units,
                     pitch,
                     chunks,
                     columns,
                     packed.as<uint32_t>(),
                     scale.as<float>(),
                     shift.as<float>(),
                     a.norm.scale.sample_stride ? pitch : 0,
                     a.norm.shift.sample_stride ? pitch : 0,
                     reinterpret_cast<const S**>(table + margin),
                     reinterpret_cast<const float**>(table + positions + 2 * margin),
                     h,
                     window,
                     window + window_rows * columns + kSide,
                     window_rows};
    for (int64_t i = begin; i < end; ++i) {
      const Unit u = units[i];
      job.run(u);
      for (int64_t j = 0; j < a.growth; ++j)
        write_channel(a, units, u, j, job.planes + j * units.plane_size, parts.as<double>());
    }
  });
  merge_block_moments(a, units, parts.as<double>());
}

template void conv3x3_forward<float>(const Conv3x3Forward<float>&);
template void conv3x3_forward<BFloat16>(const Conv3x3Forward<BFloat16>&);
template void conv3x3_forward<Float16>(const Conv3x3Forward<Float16>&);

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
