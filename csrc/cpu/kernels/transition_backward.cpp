// Backward of the transition, which starts the gradient buffer:
//
//   dW[o, c] = sum_p' dout[o, p'] zp[c, p']
//   dzp[c, p'] = sum_o W[o, c] dout[o, p'],   dz = dzp/4 at each of the 4 pixels
//   G = gamma*rstd*dz*[z > 0], 0 where an odd size drops the last row or column
//
// and the sums S1, S2 of the batch normalization on the way.
// Tiles as in the forward; dout is laid out in both orientations, then 12 channels at a time.
// Threads own contiguous tiles and private sums, merged in thread order. Bytes moved: dout and x
// once, G once.
#include "../parallel.h"
#include "instantiate.h"
#include "norm_backward.h"
#include "pack.h"
#include "pooling.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class S>
struct BackwardJob {
  using T = Arithmetic<S>;
  const TransitionBackward<S>& a;
  const Rows& rows;
  int64_t outputs, pitch, capacity;  // output channels, and rounded up to kLanes
  const T* weight;                   // [groups, outputs, kChannelRows]
  // of one thread
  T *dout, *dout_t, *zp, *dzp, *line, *dweight;
  double* sums;

  // dout in both orientations: dout_t [outputs, position] as it comes, dout [position, outputs]
  // transposed.
  void load_dout(const Tile& tile) const {
    for (int64_t o = 0; o < pitch; ++o) {
      T* const run = dout_t + o * capacity;
      if (o >= outputs) {
        std::fill_n(run, tile.positions(), T(0));
        continue;
      }
      for (int64_t s = 0; s < tile.samples; ++s) {
        const S* const source = a.grad_out.plane(tile.sample + s, o) + tile.pixel;
        for (int64_t p = 0; p < tile.pitch; p += kVec<T>) {
          store(run + s * tile.pitch + p,
                p < tile.count ? load_first(source + p, tile.count - p) : Vec<T>{});
        }
      }
    }
    for (int64_t p = 0; p < tile.positions(); p += kVec<T>) {
      for (int64_t o = 0; o < pitch; o += kVec<T>) {
        Vec<T> square[kVec<T>];
        DX_UNROLL
        for (int i = 0; i < kVec<T>; ++i) square[i] = load(dout_t + (o + i) * capacity + p);
        transpose<T>(square);
        DX_UNROLL
        for (int i = 0; i < kVec<T>; ++i) store(dout + (p + i) * pitch + o, square[i]);
      }
    }
  }

  void weight_gradient(const Tile& tile, int64_t c, int64_t valid) const {
    for (int64_t r0 = 0; r0 < valid; r0 += kPixelRows / 2) {
      for_vector_groups<kMaxVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
        constexpr int NV = decltype(group)::value, R = kPixelRows / 2;
        Block<T, R, NV> block;
        block.product(tile.positions(), zp + r0 * capacity, capacity, 1, dout + first * kVec<T>,
                      pitch);
        T* const out = dweight + (c + r0) * pitch + first * kVec<T>;
        DX_UNROLL
        for (int r = 0; r < R; ++r) {
          DX_UNROLL
          for (int v = 0; v < NV; ++v)
            store(out + r * pitch + v * kVec<T>,
                  load(out + r * pitch + v * kVec<T>) + block.acc[r][v]);
        }
      });
    }
  }

  void pooled_gradient(const Tile& tile, int64_t group_index) const {
    for_vector_groups<kPixelVectors>(tile.positions() / kVec<T>, [&](int64_t first, auto group) {
      constexpr int NV = decltype(group)::value;
      Block<T, kChannelRows, NV> block;
      block.product(outputs, weight + group_index * outputs * kChannelRows, 1, kChannelRows,
                    dout_t + first * kVec<T>, capacity);
      DX_UNROLL
      for (int r = 0; r < kChannelRows; ++r) {
        DX_UNROLL
        for (int v = 0; v < NV; ++v)
          store(dzp + r * capacity + (first + v) * kVec<T>, block.acc[r][v]);
      }
    });
  }

  // Spreads dzp over the pixels of channel c, through ReLU and the direct part of BN, into G.
  void spread(const Tile& tile, int64_t c, const T* dzp_channel) const {
    const int64_t width = a.features.width, used = 2 * rows.width;
    const Vec<T> mean = broadcast(a.norm.mean[c]),
                 step = broadcast(static_cast<T>(static_cast<double>(a.norm.weight[c]) *
                                                 reciprocal_std(a.norm, c)));
    Vec<T> s1 = {}, s2 = {};
    for (int64_t s = 0; s < tile.samples; ++s) {
      const int64_t n = tile.sample + s, first = tile.pixel / rows.width,
                    last = (tile.pixel + tile.count) / rows.width;
      const Vec<T> scale = broadcast(a.table.scale.row(n)[c]),
                   shift = broadcast(a.table.shift.row(n)[c]);
      const T* d = dzp_channel + s * tile.pitch;
      for (int64_t y = first; y < last; ++y) {
        for (int64_t x = 0; x < rows.width; ++x) line[2 * x] = line[2 * x + 1] = d[x] * T(0.25);
        d += rows.width;
        for (int64_t i = 2 * y; i < 2 * y + 2; ++i) {
          const S* const source = a.features.plane(n, c) + i * width;
          T* const g = a.grad.plane(n, c) + i * width;
          for (int64_t x = 0; x < width; x += kVec<T>) {  // `line` is 0 from `used` on
            const int64_t left = width - x;
            const Vec<T> value = load_first(source + x, left);
            const Vec<T> dv = where_positive(scale * value + shift,
                                             load_first(line + x, used - x > 0 ? used - x : 0));
            s1 += dv;
            s2 += dv * (value - mean);
            store_first(g + x, step * dv, left);
          }
        }
      }
      if (last == rows.height && a.features.height > 2 * rows.height)
        std::fill_n(a.grad.plane(n, c) + 2 * rows.height * width, width, T(0));
    }
    sums[2 * c] += static_cast<double>(sum_lanes<T>(s1));
    sums[2 * c + 1] += static_cast<double>(sum_lanes<T>(s2));
  }

  void run(const Tile& tile) const {
    load_dout(tile);
    const int64_t channels = a.features.channels;
    for (int64_t c0 = 0; c0 < channels; c0 += kChannelRows) {
      const int64_t valid = std::min<int64_t>(kChannelRows, channels - c0);
      for (int64_t r = 0; r < valid; ++r)
        pool_tile(a.features, a.table, rows, tile, c0 + r, line, zp + r * capacity);
      for (int64_t r = valid; r < kChannelRows; ++r)
        std::fill_n(zp + r * capacity, tile.positions(), T(0));
      weight_gradient(tile, c0, valid);
      pooled_gradient(tile, c0 / kChannelRows);
      for (int64_t r = 0; r < valid; ++r) spread(tile, c0 + r, dzp + r * capacity);
    }
  }
};

}  // namespace

template <class S>
void transition_backward(const TransitionBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, channels = a.features.channels,
                outputs = a.grad_out.channels, pitch = round_up(outputs, kLanes);
  const Rows rows(samples, a.grad_out.height, a.grad_out.width, tile_capacity<T>(2 * pitch, 256));
  const int64_t threads = thread_count(rows.count), capacity = padded_stride(rows.positions());
  const int64_t groups = ceil_div(channels, kChannelRows), padded = groups * kChannelRows,
                line = round_up(a.features.width, kLanes) + kLanes;
  const Scratch packed(sizeof(T) * (padded * outputs + 1));
  pack_column_groups<kChannelRows>(a.weight, outputs, channels, packed.as<T>());

  const int64_t thread_values = round_up((2 * pitch + 2 * kChannelRows) * capacity + line, kLanes);
  const Scratch tiles(sizeof(T) * threads * thread_values);
  const Scratch partials(sizeof(T) * (threads * padded * pitch + 1));
  const Scratch sums(sizeof(double) * (threads * 2 * channels + 1));
  if (rows.count == 0) {  // a map of one row or column pools to nothing
    std::fill_n(partials.as<T>(), threads * padded * pitch, T(0));
    std::fill_n(sums.as<double>(), threads * 2 * channels, 0.0);
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c)
        std::fill_n(a.grad.plane(n, c), a.features.pixels(), T(0));
    }
  }

  parallel(rows.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const own = tiles.as<T>() + thread * thread_values;
    T* const dweight = partials.as<T>() + thread * padded * pitch;
    double* const own_sums = sums.as<double>() + thread * 2 * channels;
    std::fill_n(dweight, padded * pitch, T(0));
    std::fill_n(own_sums, 2 * channels, 0.0);
    const BackwardJob<S> job{a,
                             rows,
                             outputs,
                             pitch,
                             capacity,
                             packed.as<T>(),
                             own,
                             own + pitch * capacity,
                             own + 2 * pitch * capacity,
                             own + (2 * pitch + kChannelRows) * capacity,
                             own + (2 * pitch + 2 * kChannelRows) * capacity,
                             dweight,
                             own_sums};
    for (int64_t i = begin; i < end; ++i) job.run(rows[i]);
  });

  merge_transposed(partials.as<T>(), threads, padded * pitch, pitch, outputs, channels, a.dweight);
  double* const total = sums.as<double>();
  add_partials(total, threads, 2 * channels, 2 * channels);
  finish_norm_backward(a.norm, total, channels, static_cast<double>(samples * a.features.pixels()),
                       PerChannel<T>{}, a.coef, false, a.dnorm_weight, a.dnorm_bias);
}

DENSENET_EXT_INSTANTIATE(transition_backward, TransitionBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
