// Computes matrix products with Intel's AMX. One instruction multiplies 16 rows by 32 values of
// bfloat16 with 32 values by 16 columns and adds to 16 x 16 sums of float32, at about 16 times the
// rate of AVX-512. AMX instructions run asynchronously, so vector work is interleaved between them
// in small portions.
//
// bfloat16 is one part. float32 is split into three parts of 8 bits of mantissa each, x = x0 + x1 +
// x2 exactly, and a product is the six larger ones of nine products of parts. The rest is about
// 2^-24 of it, so that the sums are as exact as those of float32 arithmetic. (Henry, Tang,
// Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations, 2019.)
//
// Operands lie in panels of tiles; a tile has 16 rows of 16 pairs. If k counts the 32 values that
// are summed, pair r is (k = r, k = 16 + r), in the rows of a left operand and in the columns of a
// right one alike: a pair of whole vectors splits into a row of either. The tiles of the parts
// follow each other.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

constexpr int64_t kSide = 16;        // rows and columns of a tile of sums
constexpr int64_t kDepth = 32;       // values that one instruction sums
constexpr int64_t kTilePairs = 256;  // of an operand
constexpr int64_t kTileSums = kSide * kSide;

template <class S>
constexpr int kParts = std::is_same_v<S, BFloat16> ? 1 : 3;

typedef uint32_t Pairs __attribute__((vector_size(kVectorBytes)));

// Splits (even, odd) into parts. Three are cut off, not rounded: this is exact, and NaN stays NaN.
template <int PARTS>
DX_INLINE void split(Vec<float> even, Vec<float> odd, __m512i (&parts)[PARTS]) {
  if constexpr (PARTS == 1) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    parts[0] = _mm512_permutexvar_epi16(order, halves);
  } else {
    const Pairs top = Pairs{} + 0xffff0000u;
    DX_UNROLL
    for (int p = 0; p < PARTS; ++p) {
      const Pairs high = (Pairs)odd & top;
      parts[p] = (__m512i)((Pairs)even >> 16 | high);
      if (p + 1 == PARTS) break;
      even -= (Vec<float>)((Pairs)even & top);
      odd -= (Vec<float>)high;
    }
  }
}

// Likewise, and stores the parts to out, out + step, ...
template <int PARTS>
DX_INLINE void split(Vec<float> even, Vec<float> odd, uint32_t* out, int64_t step = kTilePairs) {
  __m512i parts[PARTS];
  split<PARTS>(even, odd, parts);
  DX_UNROLL
  for (int p = 0; p < PARTS; ++p) _mm512_store_si512(out + p * step, parts[p]);
}

// Configures the tile registers of a thread; one surrounds its products.
class TileConfiguration {
 public:
  TileConfiguration() {
    alignas(64) static constexpr struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileConfiguration() { asm volatile("tilerelease"); }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;
};

template <int TILE>
DX_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE, class E>
DX_INLINE void tile_load(const E* p, int64_t row_bytes = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int TILE>
DX_INLINE void tile_store(float* p, int64_t row_bytes = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int SUMS, int LEFT, int RIGHT>
DX_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

template <int... I, class F>
DX_INLINE void unrolled(std::integer_sequence<int, I...>, const F& body) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
DX_INLINE void unrolled(const F& body) {
  unrolled(std::make_integer_sequence<int, N>{}, body);
}

// A panel has tiles of rows or columns of an operand. Part p at chunk k of the i-th is at data +
// i*step + k*chunk_step + p*kTilePairs.
struct Panel {
  const uint32_t* data;
  int64_t step, chunk_step;

  Panel tail(int64_t i) const { return {data + i * step, step, chunk_step}; }
};

// A block has NR x NC tiles of sums; tile (r, c) is register r*NC + c. An instruction takes 52
// cycles and one can begin every 16, so four tiles keep the hardware busy.
template <int PARTS, int NR, int NC>
struct TileBlock {
  static constexpr int kLeft = NR * NC, kRight = kLeft + NR, kSpare = 8 - kRight;  // of 8 registers

  DX_INLINE void zero() const {
    unrolled<NR * NC>([](auto i)
                          __attribute__((always_inline)) { tile_zero<decltype(i)::value>(); });
  }
  // Loads tile (r, c) from r*row_step + c*column_step.
  DX_INLINE void load(const float* in, int64_t row_step, int64_t column_step) const {
    unrolled<NR * NC>([&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::value;
      tile_load<I>(in + I / NC * row_step + I % NC * column_step);
    });
  }
  DX_INLINE void store(float* out, int64_t row_step, int64_t column_step,
                       int64_t row_bytes = 64) const {
    unrolled<NR * NC>([&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::value;
      tile_store<I>(out + I / NC * row_step + I % NC * column_step, row_bytes);
    });
  }

  // Adds left x right over `chunks` chunks and calls work() after each, while the products go on.
  template <class F>
  DX_INLINE void product(int64_t chunks, const Panel& left, const Panel& right,
                         const F& work) const {
    const uint32_t *a = left.data, *b = right.data;
    for (int64_t k = 0; k < chunks; ++k) {
      unrolled<PARTS>([&](auto pa) __attribute__((always_inline)) {
        unrolled<NR>([&](auto r) __attribute__((always_inline)) {
          tile_load<kLeft + decltype(r)::value>(a + r * left.step + pa * kTilePairs);
        });
        right_parts<decltype(pa)::value>({b, right.step, 0});
      });
      a += left.chunk_step;
      b += right.chunk_step;
      work();
    }
  }

  // Adds the products of part PA of the left operands, in registers, with its parts of a chunk.
  template <int PA>
  DX_INLINE void right_parts(const Panel& right) const {
    unrolled<PARTS - PA>([&](auto pb) __attribute__((always_inline)) {
      unrolled<NC>([&](auto c) __attribute__((always_inline)) {
        constexpr int C = decltype(c)::value, R = kRight + (decltype(pb)::value * NC + C) % kSpare;
        tile_load<R>(right.data + C * right.step + pb * kTilePairs);
        unrolled<NR>([&](auto r) __attribute__((always_inline)) {
          tile_multiply<decltype(r)::value * NC + C, kLeft + decltype(r)::value, R>();
        });
      });
    });
  }

  // Adds one chunk of rows; each part of a row is 16 pairs, rows are `step` pairs apart.
  DX_INLINE void rows_product(const uint32_t* left, int64_t step, const Panel& right) const {
    if constexpr (NC == 1) {  // all parts of the right operand stay in registers
      static_assert(kLeft + 1 + PARTS <= 8);
      unrolled<PARTS>([&](auto pb) __attribute__((always_inline)) {
        tile_load<kLeft + 1 + decltype(pb)::value>(right.data + pb * kTilePairs);
      });
      unrolled<NR>([&](auto r) __attribute__((always_inline)) {
        unrolled<PARTS>([&](auto pa) __attribute__((always_inline)) {
          tile_load<kLeft>(left + r * kSide * step + pa * kSide, 4 * step);
          unrolled<PARTS - decltype(pa)::value>([&](auto pb) __attribute__((always_inline)) {
            tile_multiply<decltype(r)::value, kLeft, kLeft + 1 + decltype(pb)::value>();
          });
        });
      });
    } else {
      unrolled<PARTS>([&](auto pa) __attribute__((always_inline)) {
        unrolled<NR>([&](auto r) __attribute__((always_inline)) {
          tile_load<kLeft + decltype(r)::value>(left + r * kSide * step + pa * kSide, 4 * step);
        });
        right_parts<decltype(pa)::value>(right);
      });
    }
  }
};

// Spreads `pieces` pieces of work over `steps` steps.
struct Pace {
  int64_t pieces, steps, balance = 0;

  template <class F>
  DX_INLINE void step(const F& body) {
    for (balance += pieces; balance >= steps; balance -= steps) body();
  }
};

// Multiplies `rows` tiles on the left by four columns on the right into sums [rows, 4, 16, 16];
// calls work() rows*chunks times.
template <int PARTS, class F>
void strip_product(int64_t rows, int64_t chunks, const Panel& left, const Panel& right, float* sums,
                   const F& work) {
  const auto block = [&](auto tiles, int64_t r, int64_t c) __attribute__((always_inline)) {
    tiles.zero();
    tiles.product(chunks, left.tail(r), right.tail(c), work);
    tiles.store(sums + (r * 4 + c) * kTileSums, 4 * kTileSums, kTileSums);
  };
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    block(TileBlock<PARTS, 2, 2>{}, r, 0);
    block(TileBlock<PARTS, 2, 2>{}, r, 2);
  }
  if (r < rows) block(TileBlock<PARTS, 1, 4>{}, r, 0);
}

// Splits a row of an operand: `count` values, and zeros up to `chunks` chunks. The parts of chunk k
// go to out + k*PARTS*kTilePairs.
template <int PARTS>
inline void split_row(const float* values, int64_t count, int64_t chunks, uint32_t* out) {
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t offset = k * kDepth, remaining = count - offset;
    split<PARTS>(
        remaining > 0 ? load_first(values + offset, remaining) : Vec<float>{},
        remaining > kSide ? load_first(values + offset + kSide, remaining - kSide) : Vec<float>{},
        out + k * PARTS * kTilePairs);
  }
}

// Loads the columns of 16 rows of 16 values, which a tile was stored to.
DX_INLINE void load_transposed(const float* tile, Vec<float> (&columns)[kSide]) {
  DX_UNROLL
  for (int i = 0; i < kSide; ++i) columns[i] = load(tile + i * kSide);
  transpose<float>(columns);
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
