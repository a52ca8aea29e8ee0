// Computes the joint backward of a dense layer's 1x1 convolution and of the batch normalization and
// ReLU in front of it, in one pass over x and G:
//
//   db = t0*dv + t1 + t2*b                   gradient of the bottleneck, through BN2
//   dW[o, c] = sum_m db[m, o] z[m, c]        z = relu(scale*x + shift), computed again
//   dz[m, c] = sum_o db[m, o] W[o, c]
//   G += q*gamma*rstd * dv1,  dv1 = r*dz*[z > 0];   S1, S2 of BN1 on the way
//
// A tile has up to 512 pixels; its db is formed once, in both orientations. Then for 12 channels at
// a time: z is formed; dW is summed (lanes are o) while x of the next 12 channels is fetched; dz is
// formed (lanes are pixels) while G is fetched; and a sweep masks dz, sums it and updates G. z and
// dz never leave the cache. Threads have shares of tiles and channels; the sums of the shares of
// tiles are merged in order. Bytes moved: dv, b, x and G once, G written once.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "norm_backward.h"
#include "pack.h"
#include "pixel_tiles.h"
#include "thread_split.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int kGroup = 12;  // input channels at a time
// The distance between channels of z or dz is constant, so that 12 of them need no 12 registers.
constexpr int64_t kChannelStride = padded_stride(kBackwardPixels);
constexpr int64_t kSegment = 32;  // pixels of a channel after which the next ones are fetched

template <class S>
struct BottleneckBackwardWorker {
  using T = Arithmetic<S>;
  const BottleneckBackward<S>& a;
  int64_t capacity;                  // positions of a tile
  const T* weight = nullptr;         // [groups, width, kGroup]
  const T* gains = nullptr;          // gamma*rstd [channels]
  T *db = nullptr, *db_t = nullptr;  // [capacity, pitch], [pitch, stride]
  T *z = nullptr, *dz = nullptr;     // [kGroup, kChannelStride]
  // Sums over the thread's share of the tiles:
  T* dweight = nullptr;    // [channels, pitch]
  double* sums = nullptr;  // [channels, 2]
  int64_t pitch = round_up(a.width, kLanes), stride = padded_stride(capacity);

  void take_memory(Carver& memory) {
    db = memory.take<T>(pitch * capacity);
    db_t = memory.take<T>(pitch * stride);
    z = memory.take<T>(kGroup * kChannelStride);
    dz = memory.take<T>(kGroup * kChannelStride);
  }

  DX_NOINLINE void form_db(const Tile& tile) const {
    const int64_t first_row = tile.sample * a.features.pixels() + tile.pixel;
    for_vector_groups<kMaxVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
      constexpr int NV = decltype(group)::value;
      Vec<T> t0[NV], t1[NV], t2[NV];
      for (int v = 0; v < NV; ++v) {
        const int64_t column = (first + v) * kVec<T>,
                      remaining = std::max<int64_t>(a.width - column, 0);
        t0[v] = load_first(a.db_affine + column, remaining);
        t1[v] = load_first(a.db_affine + a.width + column, remaining);
        t2[v] = load_first(a.db_affine + 2 * a.width + column, remaining);
      }
      const int64_t start = first_row * pitch + first * kVec<T>;
      const T* dv = a.dv + start;
      const S* b = a.bottleneck + start;
      T* out = db + first * kVec<T>;
      for (int64_t i = 0; i < tile.pixels(); ++i) {
        DX_UNROLL
        for (int v = 0; v < NV; ++v) {
          const int64_t lane = v * kVec<T>;
          store(out + lane, t0[v] * load(dv + lane) + (t1[v] + t2[v] * load(b + lane)));
        }
        dv += pitch;
        b += pitch;
        out += pitch;
      }
    });
    std::fill_n(db + tile.pixels() * pitch, (tile.positions() - tile.pixels()) * pitch, T(0));
    copy_transposed(db, pitch, tile.positions(), pitch, db_t, stride, tile.positions());
  }

  // Adds to dW of the group of channels from c0 on. `prefetch` is x of the next group of channels
  // at the first pixel of its tile.
  void weight_gradient(const Tile& tile, int64_t c0, const S* prefetch) const {
    for (int r0 = 0; r0 < kGroup; r0 += kBlockChannels) {
      for_vector_groups<kPixelVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
        constexpr int NV = decltype(group)::value;
        Block<T, kBlockChannels, NV> block;
        for (int64_t s = 0; s < tile.samples; ++s) {
          const S* const next = prefetch + s * a.features.sample_stride;
          for (int64_t p = 0; p < tile.count; p += kSegment) {
            if (first == 0) {
              for (int r = r0; r < r0 + kBlockChannels; ++r) {
                for (int64_t i = 0; i < kSegment; i += 64 / sizeof(S))
                  __builtin_prefetch(next + r * a.features.plane_stride + p + i, 0, 2);
              }
            }
            const int64_t position = s * tile.pitch + p;
            block.product(std::min(kSegment, tile.count - p), z + r0 * kChannelStride + position,
                          kChannelStride, 1, db + position * pitch + first * kVec<T>, pitch);
          }
        }
        block.add_to_rows(dweight + (c0 + r0) * pitch + first * kVec<T>, pitch);
      });
    }
  }

  // Fetches G of the channels from c0 on at those positions.
  DX_INLINE void fetch_gradient(const Tile& tile, int64_t c0, int64_t position,
                                int64_t count) const {
    const int64_t s = position / tile.pitch,
                  rows = std::min<int64_t>(kBlockChannels, a.channels - c0);
    if (s >= tile.samples) return;
    const T* g = a.grad.plane(tile.sample + s, c0) + tile.pixel + position % tile.pitch;
    for (int64_t r = 0; r < rows; ++r, g += a.grad.plane_stride) {
      for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(g + i, 1, 2);
    }
  }

  // Forms dz of the group of channels from c0 on.
  void input_gradient(const Tile& tile, int64_t c0) const {
    for (int r0 = 0; r0 < kGroup; r0 += kBlockChannels) {
      for_vector_groups<kPixelVectors>(tile.positions() / kVec<T>, [&](int64_t first, auto group) {
        constexpr int NV = decltype(group)::value;
        fetch_gradient(tile, c0 + r0, first * kVec<T>, NV * kVec<T>);
        Block<T, kBlockChannels, NV> block;
        block.product(a.width, weight + c0 * a.width + r0, 1, kGroup, db_t + first * kVec<T>,
                      stride);
        block.store_rows(dz + r0 * kChannelStride + first * kVec<T>, kChannelStride);
      });
    }
  }

  // Masks dz of channel c, the r-th of its group, adds to the sums of BN1 and updates G.
  template <bool FIRST>
  void update_channel(const Tile& tile, int64_t c, int64_t r) const {
    const Vec<T> mean = broadcast(a.norm.mean[c]);
    Vec<T> s1 = {}, s2 = {};
    for (int64_t s = 0; s < tile.samples; ++s) {
      const int64_t n = tile.sample + s;
      const Vec<T> q = broadcast(a.pre_mask.data ? a.pre_mask.row(n)[c] : T(1)),
                   post_mask = broadcast(a.post_mask.data ? a.post_mask.row(n)[c] : T(1)),
                   step = q * broadcast(gains[c]);
      const T* const z_channel = z + r * kChannelStride + s * tile.pitch;
      const T* const dz_channel = dz + r * kChannelStride + s * tile.pitch;
      const S* const x = a.features.plane(n, c) + tile.pixel;
      const T* const grad_in = FIRST ? nullptr : a.grad_in.plane(n, c) + tile.pixel;
      T* const g = a.grad.plane(n, c) + tile.pixel;
      const int64_t count = tile.count;
      const auto update = [&](int64_t p, int64_t remaining) {
        const Vec<T> d =
            relu_gradient(load(z_channel + p), load_first(dz_channel + p, remaining)) * post_mask;
        s1 += d;
        s2 += d * (q * load_first(x + p, remaining) - mean);
        if constexpr (FIRST) {
          store_first(g + p, step * d, remaining);
        } else {
          store_first(g + p, step * d + load_first(grad_in + p, remaining), remaining);
        }
      };
      int64_t p = 0;
      for (; p + kVec<T> <= count; p += kVec<T>) update(p, kVec<T>);
      if (p < count) update(p, count - p);
    }
    sums[2 * c] += static_cast<double>(sum_lanes<T>(s1));
    sums[2 * c + 1] += static_cast<double>(sum_lanes<T>(s2));
  }

  // Treats the groups of channels first .. last of a tile; `next` is the tile that follows it.
  void run(const Tile& tile, const Tile& next, int64_t first, int64_t last) const {
    form_db(tile);
    for (int64_t g = first; g < last; ++g) {
      const int64_t c0 = g * kGroup, count = std::min<int64_t>(kGroup, a.channels - c0);
      for (int64_t r = 0; r < count; ++r)
        norm_relu_tile(a.features, a.scale_shift, tile, c0 + r, z + r * kChannelStride);
      for (int64_t r = count; r < kGroup; ++r)
        std::fill_n(z + r * kChannelStride, tile.positions(), T(0));
      weight_gradient(tile, c0,
                      g + 1 == last ? a.features.plane(next.sample, first * kGroup) + next.pixel
                                    : a.features.plane(tile.sample, c0 + kGroup) + tile.pixel);
      input_gradient(tile, c0);
      for (int64_t r = 0; r < count; ++r) {
        if (a.grad_in.data) {
          update_channel<false>(tile, c0 + r, r);
        } else {
          update_channel<true>(tile, c0 + r, r);
        }
      }
    }
  }
};

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>&);

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t pitch = round_up(a.width, kLanes), channels = round_up(a.channels, kGroup);
  const int64_t capacity = tile_capacity<T>(2 * pitch, kBackwardPixels);
  const Tiling tiling(a.features.samples, a.features.pixels(), capacity, 1);
  const ThreadSplit split(tiling.count, channels / kGroup,
                          thread_count(tiling.count * channels / kGroup));

  const Scratch weight(sizeof(T) * channels * a.width), gains(sizeof(T) * a.channels);
  pack_column_groups<kGroup>(a.weight, a.width, a.channels, weight.as<T>());
  for (int64_t c = 0; c < a.channels; ++c) gains.as<T>()[c] = norm_gain(a.norm, c);
  BottleneckBackwardWorker<S> shared{a, capacity};
  shared.weight = weight.as<T>();
  shared.gains = gains.as<T>();
  const Workers<BottleneckBackwardWorker<S>> workers(shared, split.threads());
  const PartialGradients<T> partials(split, channels * pitch, 2 * a.channels);

  parallel_shares(split, [&](const Share& share) {
    BottleneckBackwardWorker<S> worker = workers[share.thread];
    const int64_t first = share.first_group * kGroup, last = share.last_group * kGroup;
    worker.dweight = partials.dweight(share, first * pitch, last * pitch);
    worker.sums = partials.sums(share, 2 * first, 2 * std::min(last, a.channels));
    for (int64_t i = share.first_tile; i < share.last_tile; ++i)
      worker.run(tiling[i], tiling[std::min(i + 1, share.last_tile - 1)], share.first_group,
                 share.last_group);
  });

  partials.merge_dweight(pitch, a.width, a.channels, a.dweight);
  const double count =
      static_cast<double>(a.features.samples) * static_cast<double>(a.features.pixels());
  finish_norm_backward(a.norm, partials.merge_sums(), a.channels, count, a.pre_mask, a.coef, true,
                       a.dnorm_weight, a.dnorm_bias);
  if (a.previous.weight) bottleneck_forward(a.previous);
}

DENSENET_EXT_INSTANTIATE(bottleneck_backward, BottleneckBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
