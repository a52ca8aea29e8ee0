// Forms the operands of the 1x1 backward, db in both orientations and z. They are formed, and their
// sources are fetched, in portions between the products.
#pragma once

#include "bottleneck_columns.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Says how far z of a group of channels is formed, 32 pixels of a channel at a time.
template <class S>
struct FormProgress {
  const TileColumns<S>*columns, *next;  // next: of the group that follows, which is fetched
  int64_t c0, next_c0;
  uint32_t* out;
  int64_t remaining, portion;  // in all, and at once
  int64_t r = 0, k = 0;
};

// Says how far the rows of dv and b of a tile are fetched, a line of each at a time.
struct FetchProgress {
  const char *dv = nullptr, *b = nullptr;
  int64_t dv_remaining = 0, b_remaining = 0, portion = 0;  // in lines of 64 bytes

  DX_INLINE void fetch_portion() {
    for (int64_t i = std::min(portion, dv_remaining); i > 0; --i, dv += 64)
      __builtin_prefetch(dv, 0, 2);
    dv_remaining -= std::min(portion, dv_remaining);
    for (int64_t i = std::min(portion, b_remaining); i > 0; --i, b += 64)
      __builtin_prefetch(b, 0, 2);
    b_remaining -= std::min(portion, b_remaining);
  }
};

template <class S>
struct BottleneckOperands {
  static constexpr int P = kParts<S>;
  static constexpr int64_t kChunk = P * kTilePairs, kRows = kMaxChunks * kChunk;
  const BottleneckBackward<S>& a;
  uint32_t* db = nullptr;    // [chunks, pitch / 16, P, 16, 16]
  uint32_t* db_t = nullptr;  // [columns, depths, P, 16, 16]
  int64_t pitch = round_up(a.width, kLanes), outputs = pitch / kSide;
  int64_t depths = std::max<int64_t>(1, ceil_div(pitch, kDepth));  // chunks of outputs

  // Forms a chunk of 32 pixels of db at a chunk of 32 outputs.
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
        const auto& column = columns.list[2 * k + i];
        const int64_t count = remaining > 0 ? column.count : 0;
        const float* const dv = a.dv + column.row * pitch + o;
        const S* const b = a.bottleneck + column.row * pitch + o;
        for (int64_t r = 0; r < count; ++r) {
          const Vec<float> value = t0 * load(dv + r * pitch) + (t1 + t2 * load(b + r * pitch));
          store(squares[i][h] + r * kSide, (Vec<float>)_mm512_maskz_mov_ps(valid, (__m512)value));
        }
        for (int64_t r = count; r < kSide; ++r) store(squares[i][h] + r * kSide, Vec<float>{});
      }
      if (k < columns.chunks && o < pitch) {
        uint32_t* const out = db + (k * outputs + o / kSide) * kChunk;
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

  // Forms a portion of z.
  void form(FormProgress<S>& f) const {
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
        const auto& even = f.columns->list[2 * k];
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
          split<P>(value(even), value(f.columns->list[2 * k + 1]), out + k * kChunk);
        }
        if (fetch) {
          __builtin_prefetch(f.next->list[2 * k].x + prefetch_offset, 0, 2);
          __builtin_prefetch(f.next->list[2 * k + 1].x + prefetch_offset, 0, 2);
        }
      }
      f.k = last;
      if (last == f.columns->chunks) {
        f.k = 0;
        ++f.r;
      }
    }
  }

  // Spreads the rows of a tile over `calls` portions.
  FetchProgress fetch_rows(const TileColumns<S>& columns, int64_t calls) const {
    const auto& first = columns.list[0];
    const auto& last = columns.list[columns.count - 1];
    const int64_t values = (last.row + last.count - first.row) * pitch;
    const int64_t lines = values / 16;
    return {reinterpret_cast<const char*>(a.dv + first.row * pitch),
            reinterpret_cast<const char*>(a.bottleneck + first.row * pitch), lines,
            lines * static_cast<int64_t>(sizeof(S)) / 4, ceil_div(lines, calls)};
  }
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
