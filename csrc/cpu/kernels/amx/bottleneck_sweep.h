// Masks dz of the 1x1 backward, sums it and updates G, in portions between the products.
#pragma once

#include "bottleneck_columns.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Says how far the sweep over dz of a group of channels is, 64 pixels of a channel at a time.
template <class S>
struct SweepProgress {
  const TileColumns<S>*columns, *next;
  int64_t c0, next_c0;
  int64_t remaining, portion;
  int64_t r = 0, s = 0;
};

template <class S>
struct BottleneckSweep {
  const BottleneckBackward<S>& a;
  const float* gains = nullptr;  // gamma*rstd [channels]
  float* dz = nullptr;           // [kGroup, kChannelStride]
  float* moments = nullptr;      // [2, kGroup, 16]
  double* sums = nullptr;        // [channels, 2]

  // Sweeps over a portion. This is one function, because if it is split, the compiler no longer
  // unrolls the columns of strips that are not whole.
  template <bool FIRST>
  DX_INLINE void run(SweepProgress<S>& f) const {
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
        const auto* const columns = f.columns->list + 4 * strip;
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
          const int64_t count = std::min<int64_t>(4, f.columns->count - 4 * strip);
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
            __builtin_prefetch(f.next->list[4 * strip + i].grad_in + prefetch_offset, 0, 2);
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

  // Adds the moments of the `count` channels from c0 on to the sums.
  void add_moments(int64_t c0, int64_t count) const {
    for (int64_t kind = 0; kind < 2; ++kind) {
      for (int64_t r = 0; r < count; r += kSide) {
        Vec<float> lanes[kSide];
        load_transposed(moments + (kind * kGroup + r) * kSide, lanes);
        DX_UNROLL
        for (int step = kSide / 2; step > 0; step /= 2) {
          DX_UNROLL
          for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
        }
        float total[kSide];
        store(total, lanes[0]);
        for (int64_t i = 0; i < std::min(kSide, count - r); ++i)
          sums[2 * (c0 + r + i) + kind] += static_cast<double>(total[i]);
      }
    }
  }
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
