// All matrix work has this one inner loop: a register block acc[R][NV] of R rows by NV vectors sums
// rank-1 updates, which are R broadcasts times NV loaded vectors.
#pragma once

#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Blocks have to fit the registers: R*NV sums, NV loaded vectors, one broadcast.
//   Lanes are channels: kBlockPixels pixels by 1..kMaxVectors vectors.
//   Lanes are pixels: up to kBlockChannels channels by kPixelVectors vectors.
constexpr int kMaxVectors = 3;
constexpr int kBlockPixels = kRegisters == 32 ? 8 : 4;
constexpr int kBlockChannels = kRegisters == 32 ? 12 : 6;
constexpr int kPixelVectors = 2;

template <class T, int R, int NV>
struct Block {
  Vec<T> acc[R][NV];

  DX_INLINE Block() {
    DX_UNROLL
    for (int r = 0; r < R; ++r) {
      DX_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] = Vec<T>{};
    }
  }

  // Loads the first `count` rows.
  template <class S>
  DX_INLINE void load_rows(const S* in, int64_t row_step, int64_t count) {
    DX_UNROLL
    for (int r = 0; r < R; ++r) {
      if (r >= count) break;
      DX_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] = load(in + r * row_step + v * kVec<T>);
    }
  }
  template <class S>
  DX_INLINE void store_rows(S* out, int64_t row_step, int64_t count = R) const {
    DX_UNROLL
    for (int r = 0; r < R; ++r) {
      if (r >= count) break;
      DX_UNROLL
      for (int v = 0; v < NV; ++v) store(out + r * row_step + v * kVec<T>, acc[r][v]);
    }
  }
  DX_INLINE void add_to_rows(T* out, int64_t row_step) const {
    DX_UNROLL
    for (int r = 0; r < R; ++r) {
      DX_UNROLL
      for (int v = 0; v < NV; ++v) {
        T* const target = out + r * row_step + v * kVec<T>;
        store(target, load(target) + acc[r][v]);
      }
    }
  }

  // acc[r][v] += a(r) * b[v], where the vectors of b are `step` apart
  template <class F>
  DX_INLINE void update(const F& a, const T* b, int64_t step = kVec<T>) {
    Vec<T> bv[NV];
    DX_UNROLL
    for (int v = 0; v < NV; ++v) bv[v] = load(b + v * step);
    DX_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> av = broadcast(a(r));
      DX_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
    }
  }

  // acc[r][v] += a[r*row_step] * b[v]
  DX_INLINE void rank1(const T* a, int64_t row_step, const T* b) {
    update([&](int r) { return a[r * row_step]; }, b);
  }

  // Adds `count` rank-1 updates; a and b advance by their steps.
  DX_INLINE void product(int64_t count, const T* a, int64_t row_step, int64_t a_step, const T* b,
                         int64_t b_step) {
    for (int64_t i = 0; i < count; ++i) {
      rank1(a, row_step, b);
      a += a_step;
      b += b_step;
    }
  }

  // Likewise, and fetches from `prefetch`, which advances, too.
  template <class P>
  DX_INLINE void product(int64_t count, const T* a, int64_t row_step, int64_t a_step, const T* b,
                         int64_t b_step, const P* prefetch, int64_t prefetch_step) {
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(prefetch, 0, 2);
      rank1(a, row_step, b);
      a += a_step;
      b += b_step;
      prefetch += prefetch_step;
    }
  }
};

// Calls body(vector, std::integral_constant<int, NV>) over `vectors` vectors in the fewest, most
// even groups of at most MAX: 8 -> 3, 3, 2.
template <int MAX, class F>
DX_INLINE void for_vector_groups(int64_t vectors, const F& body) {
  const int64_t groups = ceil_div(vectors, MAX);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = vectors * g / groups;
    const int64_t count = vectors * (g + 1) / groups - first;
    if constexpr (MAX >= 3) {
      if (count == 3) body(first, std::integral_constant<int, 3>{});
    }
    if constexpr (MAX >= 2) {
      if (count == 2) body(first, std::integral_constant<int, 2>{});
    }
    if (count == 1) body(first, std::integral_constant<int, 1>{});
  }
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
