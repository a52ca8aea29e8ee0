// Computes the backward of the transition, which starts the gradient buffer:
//
//   dW[o, c] = sum_p' dout[o, p'] zp[c, p']
//   dzp[c, p'] = sum_o W[o, c] dout[o, p'],   dz = dzp/4 at each of the 4 pixels
//   G = gamma*rstd*dz*[z > 0], 0 where an odd size drops the last row or column
//
// and the sums S1, S2 of the batch normalization on the way.
// Tiles are those of the forward. dout is laid out in both orientations; then follow 12 channels at
// a time. Threads have shares of tiles and channels; the sums of the shares of tiles are merged in
// order. Bytes moved: dout and x once, G once.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "norm_backward.h"
#include "pack.h"
#include "pooled_rows.h"
#include "thread_split.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class S>
struct TransitionBackwardWorker {
  using T = Arithmetic<S>;
  const TransitionBackward<S>& a;
  const PooledTiling& tiling;
  const T* weight = nullptr;             // [groups, outputs, kBlockChannels]
  T *dout = nullptr, *dout_t = nullptr;  // [capacity, pitch], [pitch, capacity]
  T *zp = nullptr, *dzp = nullptr;       // [kBlockChannels, capacity]
  // Sums over the thread's share of the tiles:
  T* dweight = nullptr;    // [channels, pitch]
  double* sums = nullptr;  // [channels, 2]
  int64_t outputs = a.grad_out.channels, pitch = round_up(outputs, kLanes);
  int64_t capacity = padded_stride(tiling.positions() + kLanes);

  void take_memory(Carver& memory) {
    dout = memory.take<T>(pitch * capacity);
    dout_t = memory.take<T>(pitch * capacity);
    zp = memory.take<T>(kBlockChannels * capacity);
    dzp = memory.take<T>(kBlockChannels * capacity);
  }

  DX_NOINLINE void load_dout(const Tile& tile) const {
    for (int64_t o = 0; o < pitch; ++o) {
      T* const channel = dout_t + o * capacity;
      if (o >= outputs) {
        std::fill_n(channel, tile.positions(), T(0));
        continue;
      }
      T* target = channel;
      for (int64_t s = 0; s < tile.samples; ++s, target += tile.pitch) {
        const S* const source = a.grad_out.plane(tile.sample + s, o) + tile.pixel;
        for (int64_t p = 0; p < tile.count; p += kVec<T>)
          store(target + p, load_first(source + p, tile.count - p));
      }
      for (; target < channel + tile.positions(); target += kVec<T>) store(target, Vec<T>{});
    }
    copy_transposed(dout_t, capacity, pitch, tile.positions(), dout, pitch, pitch);
  }

  // Adds to dW of the channels from c on. Meanwhile it fetches x and G of the next channels.
  void weight_gradient(const Tile& tile, int64_t c) const {
    const int64_t vectors = pitch / kVec<T>, channels = a.features.channels;
    for_vector_groups<kPixelVectors>(vectors, [&](int64_t first, auto group) {
      constexpr int NV = decltype(group)::value;
      constexpr int64_t segment = 32;
      const int64_t next = c + kBlockChannels,
                    fetch_begin = next + first * kBlockChannels / vectors,
                    fetch_end = std::min(channels, next + (first + NV) * kBlockChannels / vectors);
      Block<T, kBlockChannels, NV> block;
      for (int64_t s = 0; s < tile.samples; ++s) {
        for (int64_t p = 0; p < tile.count; p += segment) {
          for (int64_t i = fetch_begin; i < fetch_end; ++i) {
            const S* const x = a.features.plane(tile.sample + s, i) + 4 * (tile.pixel + p);
            const T* const g = a.grad.plane(tile.sample + s, i) + 4 * (tile.pixel + p);
            for (int64_t j = 0; j < 4 * segment; j += 64 / sizeof(S))
              __builtin_prefetch(x + j, 0, 2);
            for (int64_t j = 0; j < 4 * segment; j += 64 / sizeof(T))
              __builtin_prefetch(g + j, 1, 2);
          }
          const int64_t position = s * tile.pitch + p;
          block.product(std::min(segment, tile.count - p), zp + position, capacity, 1,
                        dout + position * pitch + first * kVec<T>, pitch);
        }
      }
      block.add_to_rows(dweight + c * pitch + first * kVec<T>, pitch);
    });
  }

  // Forms dzp of a group of channels.
  void pooled_gradient(const Tile& tile, int64_t group_index) const {
    for_vector_groups<kPixelVectors>(tile.positions() / kVec<T>, [&](int64_t first, auto group) {
      constexpr int NV = decltype(group)::value;
      Block<T, kBlockChannels, NV> block;
      block.product(outputs, weight + group_index * outputs * kBlockChannels, 1, kBlockChannels,
                    dout_t + first * kVec<T>, capacity);
      block.store_rows(dzp + first * kVec<T>, capacity);
    });
  }

  // Spreads d, which is dzp of channel c, over the pixels, through ReLU and the direct part of
  // batch normalization, into G.
  DX_NOINLINE void spread(const Tile& tile, int64_t c, const T* d) const {
    const int64_t width = a.features.width, first = tile.pixel / tiling.width,
                  last = (tile.pixel + tile.count) / tiling.width;
    const Vec<T> mean = broadcast(a.norm.mean[c]), step = broadcast(norm_gain(a.norm, c));
    Vec<T> s1 = {}, s2 = {};
    for (int64_t s = 0; s < tile.samples; ++s) {
      const int64_t n = tile.sample + s;
      const Vec<T> scale = broadcast(a.scale_shift.scale.row(n)[c]),
                   shift = broadcast(a.scale_shift.shift.row(n)[c]);
      for (int64_t y = first; y < last; ++y, d += tiling.width) {
        const S* const source = a.features.plane(n, c) + 2 * y * width;
        T* const g = a.grad.plane(n, c) + 2 * y * width;
        const auto update = [&](int64_t x, Vec<T> dz) {
          const int64_t remaining = width - x;
          if (remaining <= 0) return;
          DX_UNROLL
          for (int i = 0; i < 2; ++i) {
            const Vec<T> value = load_first(source + i * width + x, remaining);
            const Vec<T> dv = relu_gradient(scale * value + shift, dz);
            s1 += dv;
            s2 += dv * (value - mean);
            store_first(g + i * width + x, step * dv, remaining);
          }
        };
        for (int64_t x = 0; 2 * x < width; x += kVec<T>) {  // dz is 0 in the last of odd columns
          const Vec<T> dz =
              load_first(d + x, std::max<int64_t>(0, tiling.width - x)) * broadcast(T(0.25));
          update(2 * x, double_lanes<T, 0>(dz));
          update(2 * x + kVec<T>, double_lanes<T, kVec<T> / 2>(dz));
        }
      }
      if (last == tiling.height && a.features.height > 2 * tiling.height)
        std::fill_n(a.grad.plane(n, c) + 2 * tiling.height * width, width, T(0));
    }
    sums[2 * c] += static_cast<double>(sum_lanes<T>(s1));
    sums[2 * c + 1] += static_cast<double>(sum_lanes<T>(s2));
  }

  void run(const Tile& tile, int64_t first_group, int64_t last_group) const {
    load_dout(tile);
    const int64_t channels = a.features.channels;
    for (int64_t g = first_group; g < last_group; ++g) {
      const int64_t c = g * kBlockChannels, valid = std::min<int64_t>(kBlockChannels, channels - c);
      for (int64_t r = 0; r < valid; ++r)
        pool_tile(a.features, a.scale_shift, tiling, tile, c + r, zp + r * capacity);
      for (int64_t r = valid; r < kBlockChannels; ++r)
        std::fill_n(zp + r * capacity, tile.positions(), T(0));
      weight_gradient(tile, c);
      pooled_gradient(tile, g);
      for (int64_t r = 0; r < valid; ++r) spread(tile, c + r, dzp + r * capacity);
    }
  }
};

}  // namespace

template <class S>
void transition_backward(const TransitionBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, channels = a.features.channels,
                outputs = a.grad_out.channels, pitch = round_up(outputs, kLanes);
  const PooledTiling tiling(samples, a.grad_out.height, a.grad_out.width,
                            pooled_capacity<T>(2 * pitch));
  const int64_t groups = ceil_div(channels, kBlockChannels);
  const ThreadSplit split(tiling.count, groups, thread_count(tiling.count * groups));
  if (tiling.count == 0) {  // a map of one row or column pools to nothing
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c)
        std::fill_n(a.grad.plane(n, c), a.features.pixels(), T(0));
    }
  }

  const Scratch weight(sizeof(T) * groups * kBlockChannels * outputs);
  pack_column_groups<kBlockChannels>(a.weight, outputs, channels, weight.as<T>());
  TransitionBackwardWorker<S> shared{a, tiling};
  shared.weight = weight.as<T>();
  const Workers<TransitionBackwardWorker<S>> workers(shared, split.threads());
  const PartialGradients<T> partials(split, groups * kBlockChannels * pitch, 2 * channels);

  parallel_shares(split, [&](const Share& share) {
    TransitionBackwardWorker<S> worker = workers[share.thread];
    const int64_t first = share.first_group * kBlockChannels,
                  last = share.last_group * kBlockChannels;
    worker.dweight = partials.dweight(share, first * pitch, last * pitch);
    worker.sums = partials.sums(share, 2 * first, 2 * std::min(last, channels));
    for (int64_t i = share.first_tile; i < share.last_tile; ++i)
      worker.run(tiling[i], share.first_group, share.last_group);
  });

  partials.merge_dweight(pitch, outputs, channels, a.dweight);
  finish_norm_backward(a.norm, partials.merge_sums(), channels,
                       static_cast<double>(samples * a.features.pixels()), PerChannel<T>{}, a.coef,
                       false, a.dnorm_weight, a.dnorm_bias);
}

DENSENET_EXT_INSTANTIATE(transition_backward, TransitionBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
