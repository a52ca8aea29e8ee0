// Computes a 1x1 convolution with few outputs on AMX; bottleneck_narrow.h has the interface.
//
// z of a chunk is formed while the preceding chunk is multiplied, in a place so small that it never
// leaves the first-level cache. b is written, and its moments are taken, one strip later.
#include "bottleneck_narrow.h"

#include "cpu/kernels/instantiate.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kPrefetchColumns =
    16;  // distance of the column that is fetched from the one that is formed

template <class S, int NR>
class NarrowBottleneck {
 public:
  static constexpr int P = kParts<S>;
  static constexpr int64_t kPitch = NR * kSide;
  static constexpr int64_t kTiles = NR * kNarrowColumns;
  static constexpr int64_t kChunk = P * kTilePairs, kZ = kNarrowColumns * kChunk;
  static_assert(2 * kZ + 2 * kTiles * kTileSums <= kNarrowMemory<S>);

  explicit NarrowBottleneck(const NarrowStrips<S>& strips)
      : a(strips.a),
        columns(strips.columns),
        moments(strips.moments),
        chunks(strips.weight.chunks),
        weight(strips.weight.data()),
        z(strips.memory),
        sums(reinterpret_cast<float*>(strips.memory + 2 * kZ)) {}

  DX_NOINLINE void run(int64_t begin, int64_t end) {
    Strip current = strip(begin), previous = current;
    for (int64_t r = 0; r < kSide; ++r) form(current, 0, r, z);
    for (int64_t s = begin; s < end; ++s) {
      const Strip next = strip(s + 1);
      Pace finishing{s > begin ? kTiles : 0, chunks * P * kNarrowColumns};
      int64_t tile = 0;
      unrolled<kTiles>([](auto t)
                           __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
      for (int64_t k = 0; k < chunks; ++k, ++multiplied_chunks) {
        const bool last = k + 1 == chunks;
        const Strip& source = last ? next : current;
        const int64_t chunk = last ? 0 : k + 1;
        Pace forming{last && s + 1 == end ? 0 : kSide, P * kNarrowColumns};
        int64_t row = 0;
        multiply(k, [&]() __attribute__((always_inline)) {
          forming.step([&]() __attribute__((always_inline)) {
            form(source, chunk, row++, z + (multiplied_chunks + 1) % 2 * kZ);
          });
          finishing.step(
              [&]() __attribute__((always_inline)) { finish(previous, current, s - 1, tile++); });
        });
      }
      unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
        tile_store<decltype(t)::value>(sums_of(s) + t * kTileSums);
      });
      if (s > begin) add_strip_moments(s - 1);
      previous = current;
      current = next;
    }
    for (int64_t tile = 0; tile < kTiles; ++tile) finish(previous, previous, end - 1, tile);
    add_strip_moments(end - 1);
  }

 private:
  struct Strip {
    ForwardColumn<S> column[kNarrowColumns];
    bool whole;  // 32 pixels of one sample
  };

  Strip strip(int64_t index) const {
    Strip strip;
    for (int64_t i = 0; i < kNarrowColumns; ++i)
      strip.column[i] = {a, columns, index * kNarrowColumns + i, kPrefetchColumns, kPitch};
    strip.whole = strip.column[1].count == kSide && strip.column[1].x == strip.column[0].x + kSide;
    return strip;
  }

  // Forms row r of chunk k of both columns.
  DX_INLINE void form(const Strip& s, int64_t k, int64_t r, uint32_t* out) const {
    const int64_t c0 = k * kDepth + r, c1 = c0 + kSide, step = a.features.plane_stride;
    out += r * kSide;
    if (s.whole && c1 < a.channels) {
      const ForwardColumn<S>& p = s.column[0];
      const S *const x0 = p.x + c0 * step, *const x1 = p.x + c1 * step;
      const Vec<float> scale0 = broadcast(p.scale[c0]), shift0 = broadcast(p.shift[c0]),
                       scale1 = broadcast(p.scale[c1]), shift1 = broadcast(p.shift[c1]);
      DX_UNROLL
      for (int64_t i = 0; i < kNarrowColumns; ++i) {
        split<P>(relu(scale0 * load(x0 + i * kSide) + shift0),
                 relu(scale1 * load(x1 + i * kSide) + shift1), out + i * kChunk);
        __builtin_prefetch(p.prefetch + c0 * step + i * kSide, 0, 2);
        __builtin_prefetch(p.prefetch + c1 * step + i * kSide, 0, 2);
      }
      return;
    }
    for (int64_t i = 0; i < kNarrowColumns; ++i) {
      const ForwardColumn<S>& p = s.column[i];
      const auto value = [&](int64_t c) __attribute__((always_inline)) {
        if (c >= a.channels) return Vec<float>{};
        __builtin_prefetch(p.prefetch + c * step, 0, 2);
        return relu(broadcast(p.scale[c]) * load_first(p.x + c * step, p.count) +
                    broadcast(p.shift[c]));
      };
      split<P>(value(c0), value(c1), out + i * kChunk);
    }
  }

  // Adds W times chunk k and calls work() after each tile of z.
  template <class F>
  DX_INLINE void multiply(int64_t k, const F& work) const {
    const uint32_t *const left = weight + k * kChunk, *const right = z + multiplied_chunks % 2 * kZ;
    unrolled<P>([&](auto pz) __attribute__((always_inline)) {
      unrolled<kNarrowColumns>([&](auto c) __attribute__((always_inline)) {
        constexpr int C = decltype(c)::value, kRight = 7, kLeft = 6;
        tile_load<kRight>(right + C * kChunk + pz * kTilePairs);
        unrolled<P - decltype(pz)::value>([&](auto pw) __attribute__((always_inline)) {
          unrolled<NR>([&](auto r) __attribute__((always_inline)) {
            tile_load<kLeft>(left + r * chunks * kChunk + pw * kTilePairs);
            tile_multiply<decltype(r)::value * kNarrowColumns + C, kLeft, kRight>();
          });
        });
        work();
      });
    });
  }

  float* sums_of(int64_t strip) const { return sums + strip % 2 * kTiles * kTileSums; }

  // Writes a tile of sums to rows of b and fetches those of `following`.
  DX_INLINE void finish(const Strip& s, const Strip& following, int64_t index, int64_t tile) const {
    const int64_t o = tile / kNarrowColumns * kSide;
    const ForwardColumn<S>&p = s.column[tile % kNarrowColumns],
          &next = following.column[tile % kNarrowColumns];
    Vec<float> rows[kSide];
    load_transposed(sums_of(index) + tile * kTileSums, rows);
    DX_UNROLL
    for (int r = 0; r < kSide; ++r) {
      if (r < p.count) store(p.b + r * kPitch + o, rows[r]);
      __builtin_prefetch(next.b + r * kPitch + o, 1, 2);
    }
  }

  void add_strip_moments(int64_t strip) const {
    add_moments(a, columns, strip * kNarrowColumns, (strip + 1) * kNarrowColumns, moments);
  }

  const BottleneckForward<S>& a;
  const PixelColumns& columns;
  const RunningMoments moments;
  const int64_t chunks;
  const uint32_t* const weight;   // [NR, chunks, P, 16, 16]
  uint32_t* const z;              // [2, kNarrowColumns, P, 16, 16]
  float* const sums;              // [2, NR, kNarrowColumns, 16, 16]
  int64_t multiplied_chunks = 0;  // chunks multiplied
};

}  // namespace

template <class S>
void run_narrow(const NarrowStrips<S>& strips) {
  if (strips.weight.outputs == 1) {
    NarrowBottleneck<S, 1>(strips).run(strips.begin, strips.end);
  } else if (strips.weight.outputs == 2) {
    NarrowBottleneck<S, 2>(strips).run(strips.begin, strips.end);
  } else {
    NarrowBottleneck<S, 3>(strips).run(strips.begin, strips.end);
  }
}

DENSENET_EXT_INSTANTIATE_AMX(run_narrow, NarrowStrips)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
