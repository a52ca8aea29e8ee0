// Joint backward of a dense layer's 1x1 convolution and of the batch normalization and ReLU in
// front of it, one pass over x and G:
//
//   db = t0*dv + t1 + t2*b                   gradient of the bottleneck, through BN2
//   dW[o, c] = sum_m db[m, o] z[m, c]        z = relu(scale*x + shift), remade
//   dz[m, c] = sum_o db[m, o] W[o, c]
//   G += q*gamma*rstd * dv1,  dv1 = r*dz*[z > 0];   S1, S2 of BN1 on the way
//
// A tile of up to 512 pixels: db is formed once, in both orientations. Then for 12 channels at a
// time: z (12 runs of pixels), dW (lanes are o), dz (lanes are pixels), whose epilogue masks, sums
// and updates G from registers: dz never reaches memory. Threads own contiguous tiles and private
// sums, merged in thread order. Bytes moved: dv, b, x and G once, G written once.
#include "../parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "norm_backward.h"
#include "tile.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int kGroup = 12;  // input channels at a time

template <class S>
struct Job {
  using T = Arithmetic<S>;
  const BottleneckBackward<S>& a;
  int64_t pitch, stride;  // of db and dweight; of db_t and z
  const T* weight;        // [groups, width, kGroup]
  const T* scaled;        // gamma*rstd [channels]
  // of one thread
  T *db, *db_t, *z, *dweight;
  double* sums;

  void form_db(const Tile& tile) const {
    const int64_t first_row = tile.sample * a.features.pixels() + tile.pixel;
    const int64_t vectors = pitch / kVec<T>;
    for (int64_t v = 0; v < vectors; ++v) {
      T t[3][kVec<T>] = {};
      for (int j = 0; j < 3; ++j) {
        for (int64_t i = 0; i < kVec<T> && v * kVec<T> + i < a.width; ++i)
          t[j][i] = a.db_table[j * a.width + v * kVec<T> + i];
      }
      const Vec<T> t0 = load(t[0]), t1 = load(t[1]), t2 = load(t[2]);
      for (int64_t s = 0; s < tile.samples; ++s) {
        const int64_t row = (first_row + s * tile.count) * pitch + v * kVec<T>;
        T* const out = db + s * tile.pitch * pitch + v * kVec<T>;
        for (int64_t i = 0; i < tile.count; ++i)
          store(out + i * pitch, t0 * load(a.dv + row + i * pitch) +
                                     (t1 + t2 * load(a.bottleneck + row + i * pitch)));
        for (int64_t i = tile.count; i < tile.pitch; ++i) store(out + i * pitch, Vec<T>{});
      }
    }
    for (int64_t p = 0; p < tile.positions(); p += kVec<T>) {
      for (int64_t v = 0; v < vectors; ++v) {
        Vec<T> square[kVec<T>];
        DX_UNROLL
        for (int i = 0; i < kVec<T>; ++i) square[i] = load(db + (p + i) * pitch + v * kVec<T>);
        transpose<T>(square);
        DX_UNROLL
        for (int i = 0; i < kVec<T>; ++i) store(db_t + (v * kVec<T> + i) * stride + p, square[i]);
      }
    }
  }

  void weight_gradient(const Tile& tile, int64_t c0) const {
    for (int r0 = 0; r0 < kGroup; r0 += kChannelRows) {
      for_vector_groups<kPixelVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
        constexpr int NV = decltype(group)::value;
        Block<T, kChannelRows, NV> block;
        block.product(tile.positions(), z + r0 * stride, stride, 1, db + first * kVec<T>, pitch);
        T* const out = dweight + (c0 + r0) * pitch + first * kVec<T>;
        DX_UNROLL
        for (int r = 0; r < kChannelRows; ++r) {
          DX_UNROLL
          for (int v = 0; v < NV; ++v) {
            T* const sum = out + r * pitch + v * kVec<T>;
            store(sum, load(sum) + block.acc[r][v]);
          }
        }
      });
    }
  }

  // dz of channels [c0 + r0, + kChannelRows) and its epilogue.
  template <bool FIRST>
  void input_gradient(const Tile& tile, int64_t c0, int r0) const {
    const int64_t valid = std::min<int64_t>(kChannelRows, a.channels - c0 - r0);
    if (valid <= 0) return;
    Vec<T> s1[kChannelRows] = {}, s2[kChannelRows] = {};
    for (int64_t s = 0; s < tile.samples; ++s) {
      const int64_t n = tile.sample + s, c = c0 + r0;
      const T* const pre = a.pre_mask.data ? a.pre_mask.row(n) + c : nullptr;
      const T* const post = a.post_mask.data ? a.post_mask.row(n) + c : nullptr;
      const T* const means = a.norm.mean + c;
      const T* const steps = scaled + c;
      const T* const z_first = z + r0 * stride + s * tile.pitch;
      const S* const x_first = a.features.plane(n, c) + tile.pixel;
      const T* const before_first = FIRST ? nullptr : a.grad_in.plane(n, c) + tile.pixel;
      T* const g_first = a.grad.plane(n, c) + tile.pixel;
      const int64_t x_stride = a.features.plane_stride, g_stride = a.grad.plane_stride;
      const int64_t before_stride = a.grad_in.plane_stride;
      for_vector_groups<kPixelVectors>(
          ceil_div(tile.count, kVec<T>), [&](int64_t first, auto group) {
            constexpr int NV = decltype(group)::value;
            const int64_t position = s * tile.pitch + first * kVec<T>;
            Block<T, kChannelRows, NV> block;
            block.product(a.width, weight + c0 * a.width + r0, 1, kGroup, db_t + position, stride);
            DX_UNROLL
            for (int r = 0; r < kChannelRows; ++r) {
              if (r >= valid) continue;
              const Vec<T> q = broadcast(pre ? pre[r] : T(1)), mean = broadcast(means[r]);
              const Vec<T> step = q * broadcast(steps[r]);
              DX_UNROLL
              for (int v = 0; v < NV; ++v) {
                const int64_t p = (first + v) * kVec<T>, left = tile.count - p;
                const S* const x = x_first + r * x_stride + p;
                T* const g = g_first + r * g_stride + p;
                const Vec<T> value = load_first(x, left);
                Vec<T> d = where_positive(load(z_first + r * stride + p), block.acc[r][v]);
                if (post) d = d * broadcast(post[r]);
                s1[r] += d;
                s2[r] += d * (q * value - mean);
                if constexpr (FIRST) {
                  store_first(g, step * d, left);
                } else {
                  const T* const before = before_first + r * before_stride + p;
                  store_first(g, step * d + load_first(before, left), left);
                  __builtin_prefetch(before + kGroup * before_stride, 0, 2);
                }
                __builtin_prefetch(x + kGroup * x_stride, 0, 2);
              }
            }
          });
    }
    for (int64_t r = 0; r < valid; ++r) {
      sums[2 * (c0 + r0 + r)] += static_cast<double>(sum_lanes<T>(s1[r]));
      sums[2 * (c0 + r0 + r) + 1] += static_cast<double>(sum_lanes<T>(s2[r]));
    }
  }

  void run(const Tile& tile) const {
    form_db(tile);
    for (int64_t c0 = 0; c0 < a.channels; c0 += kGroup) {
      for (int64_t r = 0; r < kGroup; ++r) {
        if (c0 + r < a.channels) {
          norm_relu_tile(a.features, a.table, tile, c0 + r, z + r * stride);
        } else {
          std::fill_n(z + r * stride, tile.positions(), T(0));
        }
      }
      weight_gradient(tile, c0);
      for (int r0 = 0; r0 < kGroup; r0 += kChannelRows) {
        if (a.grad_in.data) {
          input_gradient<false>(tile, c0, r0);
        } else {
          input_gradient<true>(tile, c0, r0);
        }
      }
    }
  }
};

}  // namespace

template <class S>
void bottleneck_backward(const BottleneckBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t pitch = round_up(a.width, kLanes), channels = round_up(a.channels, kGroup);
  const int64_t capacity = tile_capacity<T>(2 * pitch, 512);
  const Tiling tiling(a.features.samples, a.features.pixels(), capacity);
  const int64_t threads = thread_count(tiling.count);

  const Scratch packed(sizeof(T) * channels * a.width);
  const Scratch scaled(sizeof(T) * a.channels);
  for (int64_t c = 0; c < channels; ++c) {
    T* const column = packed.as<T>() + (c / kGroup) * kGroup * a.width + c % kGroup;
    for (int64_t o = 0; o < a.width; ++o)
      column[o * kGroup] = c < a.channels ? a.weight[o * a.channels + c] : T(0);
  }
  for (int64_t c = 0; c < a.channels; ++c)
    scaled.as<T>()[c] =
        static_cast<T>(static_cast<double>(a.norm.weight[c]) * reciprocal_std(a.norm, c));

  const int64_t stride = padded_stride(capacity),
                tile_values = pitch * capacity + (pitch + kGroup) * stride;
  const Scratch tiles(sizeof(T) * threads * tile_values);
  const Scratch partials(sizeof(T) * threads * channels * pitch);
  const Scratch sums(sizeof(double) * threads * 2 * a.channels);
  std::fill_n(partials.as<T>(), threads * channels * pitch, T(0));
  std::fill_n(sums.as<double>(), threads * 2 * a.channels, 0.0);

  parallel(tiling.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const tile = tiles.as<T>() + thread * tile_values;
    const Job<S> job{a,
                     pitch,
                     stride,
                     packed.as<T>(),
                     scaled.as<T>(),
                     tile,
                     tile + pitch * capacity,
                     tile + pitch * (capacity + stride),
                     partials.as<T>() + thread * channels * pitch,
                     sums.as<double>() + thread * 2 * a.channels};
    for (int64_t i = begin; i < end; ++i) job.run(tiling[i]);
  });

  for (int64_t o = 0; o < a.width; ++o) {
    for (int64_t c = 0; c < a.channels; ++c) {
      T sum = 0;
      for (int64_t t = 0; t < threads; ++t) sum += partials.as<T>()[(t * channels + c) * pitch + o];
      a.dweight[o * a.channels + c] = sum;
    }
  }
  double* const total = sums.as<double>();
  for (int64_t t = 1; t < threads; ++t) {
    for (int64_t i = 0; i < 2 * a.channels; ++i) total[i] += total[t * 2 * a.channels + i];
  }
  const double rows =
      static_cast<double>(a.features.samples) * static_cast<double>(a.features.pixels());
  finish_norm_backward(a.norm, total, a.channels, rows, a.pre_mask, a.coef, true, a.dnorm_weight,
                       a.dnorm_bias);
}

DENSENET_EXT_INSTANTIATE(bottleneck_backward, BottleneckBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
