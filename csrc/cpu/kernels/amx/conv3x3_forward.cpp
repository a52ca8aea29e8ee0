// Computes a dense layer's 3x3 convolution on AMX; formula: ../conv3x3_forward.cpp.
//
// h = relu(scale*b + shift) is a left operand: a row is a position of the padded plane, as it lies
// in b, and each of its parts is a whole cache line, so that a tap is the same tiles some rows
// further on. If q inputs remain, q up to 16, a line has them for a position and for the next one,
// which is two taps at once.
//
// Between the products, positions that the next step needs are formed in a window that moves along
// the plane, and the sums of the preceding step are transposed into planes.
#include "cpu/kernels/conv3x3_output.h"
#include "cpu/kernels/instantiate.h"
#include "cpu/kernels/padded_rows.h"
#include "cpu/parallel.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kStepTiles = 4, kStep = kStepTiles * kSide;  // positions of a step

// A term is one chunk of the sum: two half chunks of inputs, each at one tap.
struct Term {
  int64_t tap[2], input[2], line;  // tap 9: no tap; line: chunk of a position
};

struct Terms {
  int64_t lines, count;
  Term* term_list;

  // Lists rows of taps one after the other: the lines of a row stay in the first-level cache.
  Terms(int64_t width, Term* out) : lines(ceil_div(width, kDepth)), count(0), term_list(out) {
    const int64_t whole = ceil_div(width, kSide) / 2;
    for (int64_t t = 0; t < 9; t += 3) {
      for (int64_t k = 0; k < whole; ++k) {
        for (int64_t x = 0; x < 3; ++x)
          term_list[count++] = {{t + x, t + x}, {k * kDepth, k * kDepth + kSide}, k};
      }
      if (whole == lines) continue;
      const int64_t i = whole * kDepth;
      term_list[count++] = {{t, t + 1}, {i, i}, whole};
      term_list[count++] = {{t + 2, 9}, {i, i}, whole};
    }
  }
  static int64_t max_count(int64_t width) { return 9 * ceil_div(width, kDepth); }
};

template <class S>
struct Conv3x3ForwardWorker {
  static constexpr int P = kParts<S>;
  static constexpr int64_t kChunk = P * kTilePairs, kLine = P * kSide;
  const Conv3x3Forward<S>& a;
  const Units& units;
  const Terms& terms;
  const uint32_t* weight;                    // [columns, terms, P, 16, 16]
  ScaleShiftTable<float> scale_shift;        // padded
  const S** b_rows = nullptr;                // [positions], null where the plane is padding
  const float** scale_shift_rows = nullptr;  // [positions, 2]
  uint32_t* window = nullptr;                // [window_rows, lines, P, 16]
  float *sums = nullptr, *planes = nullptr;  // [2, columns, 4, 16, 16]; [growth, positions]
  int64_t pitch = round_up(a.width, kLanes), columns = ceil_div(a.growth, kSide);
  int64_t positions = units.plane_size + kStep;
  // The window has four times what a step reads and forms.
  int64_t window_rows = std::min(positions, 4 * (2 * units.pitch + 2 * kStep + 4));

  Vec<float> previous_value = {};  // the value of the last position in a line with the next one
  int64_t start = 0, formed = 0;   // the window has the positions from start to formed

  void take_memory(Carver& memory) {
    window = memory.take<uint32_t>(window_rows * row_pairs());
    sums = memory.take<float>(2 * columns * kStepTiles * kTileSums);
    planes = memory.take<float>(a.growth * units.plane_size);
    b_rows = memory.take<const S*>(positions);
    scale_shift_rows = memory.take<const float*>(2 * positions);
  }

  int64_t row_pairs() const { return terms.lines * kLine; }
  uint32_t* line(int64_t p) const { return window + (p - start) * row_pairs(); }

  // Finds the row of b of each position of the unit's planes.
  void locate(const Unit& u) const {
    std::fill_n(b_rows, positions, nullptr);
    units.for_rows_with_halo(u, [&](int64_t s, int64_t y) {
      const int64_t n = u.sample + s, first = units.position(u, s, y);
      const S* const row = a.bottleneck + (n * units.height + u.row + y) * units.width * pitch;
      for (int64_t x = 0; x < units.width; ++x) {
        b_rows[first + x] = row + x * pitch;
        scale_shift_rows[2 * (first + x)] = scale_shift.scale.row(n);
        scale_shift_rows[2 * (first + x) + 1] = scale_shift.shift.row(n);
      }
    });
  }

  // Forms one more position.
  DX_INLINE void form() {
    const int64_t p = formed++, whole = pitch / kDepth;
    uint32_t* const target = line(p);
    const S* const row = b_rows[p];
    const float *const sc = scale_shift_rows[2 * p], *const sh = scale_shift_rows[2 * p + 1];
    const auto value = [&](int64_t i) __attribute__((always_inline)) {
      return row ? relu(load(sc + i) * load(row + i) + load(sh + i)) : Vec<float>{};
    };
    for (int64_t k = 0; k < whole; ++k)
      split<P>(value(k * kDepth), value(k * kDepth + kSide), target + k * kLine, kSide);
    if (whole == terms.lines) return;
    const Vec<float> current_value = value(whole * kDepth);
    if (p > start)
      split<P>(previous_value, current_value, target - row_pairs() + whole * kLine, kSide);
    previous_value = current_value;
  }

  // Makes room for `count` more positions by giving up those that precede `first`.
  void make_room(int64_t first, int64_t count) {
    if (formed + count - start <= window_rows) return;
    std::memmove(window, line(first), sizeof(uint32_t) * (formed - first) * row_pairs());
    start = first;
  }

  // Multiplies NR tiles of positions from p on by NC of outputs from c on, with work() between
  // terms.
  template <int NR, int NC, class F>
  DX_INLINE void multiply(int64_t p, int64_t c, float* out, const F& work) const {
    const TileBlock<P, NR, NC> tiles;
    const int64_t step = row_pairs();
    const uint32_t* const left = line(p);
    const uint32_t* right = weight + c * terms.count * kChunk;
    tiles.zero();
    for (int64_t t = 0; t < terms.count; ++t, right += kChunk) {
      const Term& term = terms.term_list[t];
      const uint32_t* const shifted = left + units.offset[term.tap[0]] * step + term.line * kLine;
      tiles.rows_product(shifted, step, {right, terms.count * kChunk, 0});
      work();
    }
    tiles.store(out, kTileSums, kStepTiles * kTileSums);
  }

  // Writes a tile of the step that starts at p from its sums to planes.
  DX_INLINE void finish(const float* sums, int64_t p, int64_t tile) const {
    const int64_t j = tile / kStepTiles * kSide, position = p + tile % kStepTiles * kSide;
    Vec<float> y[kSide];
    load_transposed(sums + tile * kTileSums, y);
    DX_UNROLL
    for (int r = 0; r < kSide; ++r) {
      if (j + r < a.growth) store(planes + (j + r) * units.plane_size + position, y[r]);
    }
  }

  void run(const Unit& u) {
    locate(u);
    const int64_t begin = units.position(u, 0, 0), steps = ceil_div(units.span(u), kStep);
    const int64_t reach = units.pitch + 1;  // of the taps
    const int64_t tiles = columns * kStepTiles, blocks = columns / 2 * 2 + columns % 2;
    const auto sums_of = [&](int64_t s) { return sums + s % 2 * tiles * kTileSums; };
    start = formed = begin - reach;
    while (formed <= begin + kStep + reach) form();
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t p = begin + s * kStep, new_positions = s + 1 < steps ? kStep : 0;
      make_room(p - reach, new_positions);
      Pace forming{new_positions, blocks * terms.count},
          finishing{s > 0 ? tiles : 0, blocks * terms.count};
      int64_t finished = 0;
      const auto work = [&]() __attribute__((always_inline)) {
        forming.step([&]() __attribute__((always_inline)) { form(); });
        finishing.step([&]() __attribute__((always_inline)) {
          finish(sums_of(s - 1), p - kStep, finished++);
        });
      };
      float* const out = sums_of(s);
      int64_t c = 0;
      for (; c + 2 <= columns; c += 2) {
        float* const block = out + c * kStepTiles * kTileSums;
        multiply<2, 2>(p, c, block, work);
        multiply<2, 2>(p + 2 * kSide, c, block + 2 * kTileSums, work);
      }
      if (c < columns) multiply<4, 1>(p, c, out + c * kStepTiles * kTileSums, work);
    }
    for (int64_t tile = 0; tile < tiles; ++tile)
      finish(sums_of(steps - 1), begin + (steps - 1) * kStep, tile);
  }
};

// Packs W as right operand, for a tile of outputs.
template <int PARTS>
void pack_weight(const float* w, int64_t growth, int64_t width, const Terms& terms, int64_t c,
                 uint32_t* out) {
  const int64_t count = std::min(growth - c * kSide, kSide);
  int32_t offsets[kSide] = {};
  for (int64_t j = 0; j < count; ++j)
    offsets[j] = static_cast<int32_t>((c * kSide + j) * width * 9);
  const __m512i places = _mm512_loadu_si512(offsets);
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  const auto column = [&](int64_t i, int64_t tap) {
    return i < width && tap < 9 ? (Vec<float>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask,
                                                                       places, w + i * 9 + tap, 4)
                                : Vec<float>{};
  };
  for (int64_t t = 0; t < terms.count; ++t, out += PARTS * kTilePairs) {
    const Term& term = terms.term_list[t];
    for (int64_t r = 0; r < kSide; ++r)
      split<PARTS>(column(term.input[0] + r, term.tap[0]), column(term.input[1] + r, term.tap[1]),
                   out + r * kSide);
  }
}

}  // namespace

template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& a) {
  constexpr int P = kParts<S>;
  const int64_t samples = a.features.samples, columns = ceil_div(a.growth, kSide);
  const Units units(samples, a.features.height, a.features.width, 16, thread_count(samples));
  const int64_t threads = thread_count(units.count);
  const Scratch term_list(sizeof(Term) * Terms::max_count(a.width));
  const Terms terms(a.width, term_list.as<Term>());

  const int64_t column_pairs = terms.count * P * kTilePairs;
  const Scratch weight(4 * columns * column_pairs);
  parallel_items(columns, column_pairs, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      pack_weight<P>(a.weight, a.growth, a.width, terms, c,
                     weight.as<uint32_t>() + c * column_pairs);
  });
  const PaddedRows<float> scale(a.scale_shift.scale, samples, a.width),
      shift(a.scale_shift.shift, samples, a.width);
  const Workers<Conv3x3ForwardWorker<S>> workers(
      {a, units, terms, weight.as<uint32_t>(), {scale, shift}}, threads);
  const Scratch parts(sizeof(double) * 2 * a.growth * samples * units.blocks_per_map);

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileConfiguration configuration;
    Conv3x3ForwardWorker<S> worker = workers[thread];
    for (int64_t i = begin; i < end; ++i) {
      const Unit u = units[i];
      worker.run(u);
      for (int64_t j = 0; j < a.growth; ++j) {
        const auto row_of = [&](int64_t s, int64_t y) {
          return worker.planes + j * units.plane_size + units.position(u, s, y);
        };
        write_channel(a, units, u, j, row_of, parts.as<double>());
      }
    }
  });
  merge_block_moments(a, units, parts.as<double>());
}

DENSENET_EXT_INSTANTIATE_AMX(conv3x3_forward, Conv3x3Forward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
