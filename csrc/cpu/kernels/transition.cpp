// The transition: batch normalization, ReLU, 1x1 convolution and 2x2 average pooling. Pooling and the convolution commute, so pool first: a quarter of the products.
//
//   forward    zp[c, p'] = mean of the 4 pixels of relu(scale*x + shift),  out[o, p'] = sum_c W[o, c] zp[c, p']
//   backward   dW[o, c] = sum_p' dout[o, p'] zp[c, p'],  dzp[c, p'] = sum_o W[o, c] dout[o, p'],  dz = dzp/4 at each of the 4 pixels,
//              G = gamma*rstd*dz*[z > 0] (this starts the gradient buffer; 0 where an odd size drops the last row or column),  S1, S2 on the way
//
// Tiles are whole rows of the pooled map, or several whole pooled maps; lanes are pooled pixels in the products. Threads own contiguous tiles. Bytes moved: x once (and G
// once), out or dout once.
#include "../parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "norm_backward.h"
#include "tile.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

// Rows of the pooled map as `Tiling` over pixels would not keep them whole.
struct Rows {
  int64_t samples, height, width;  // of the pooled map
  int64_t maps_per_tile = 1, rows_per_tile, tiles_per_map = 1, count;

  Rows(int64_t samples, int64_t height, int64_t width, int64_t capacity) : samples(samples), height(height), width(width), rows_per_tile(height) {
    const int64_t pitch = round_up(std::max<int64_t>(1, height * width), kLanes);
    if (pitch <= capacity) {
      maps_per_tile = capacity / pitch;
      count = ceil_div(samples, maps_per_tile);
    } else {
      rows_per_tile = std::max<int64_t>(1, capacity / round_up(width, kLanes));
      tiles_per_map = ceil_div(height, rows_per_tile);
      count = samples * tiles_per_map;
    }
    if (height * width == 0) count = 0;
  }
  int64_t positions() const { return maps_per_tile * round_up(std::max<int64_t>(1, rows_per_tile * width), kLanes); }

  Tile operator[](int64_t i) const {
    Tile t;
    t.sample = tiles_per_map > 1 ? i / tiles_per_map : i * maps_per_tile;
    t.samples = tiles_per_map > 1 ? 1 : std::min(maps_per_tile, samples - t.sample);
    const int64_t row = tiles_per_map > 1 ? (i % tiles_per_map) * rows_per_tile : 0;
    t.pixel = row * width;
    t.count = std::min(rows_per_tile, height - row) * width;
    t.pitch = round_up(t.count, kLanes);
    return t;
  }
};

// zp of one channel of a tile; `line` holds a row of the map, rounded up to whole vectors.
template <class S, class T = Arithmetic<S>>
void pool_tile(const Maps<const S>& features, const NormTable<T>& norm, const Rows& rows, const Tile& tile, int64_t c, T* line, T* zp) {
  for (int64_t s = 0; s < tile.samples; ++s) {
    const int64_t n = tile.sample + s, used = 2 * rows.width;
    const Vec<T> scale = broadcast(norm.scale.row(n)[c]), shift = broadcast(norm.shift.row(n)[c]);
    T* out = zp + s * tile.pitch;
    for (int64_t y = tile.pixel / rows.width; y < (tile.pixel + tile.count) / rows.width; ++y) {
      const S* const upper = features.plane(n, c) + 2 * y * features.width;
      const S* const lower = upper + features.width;
      for (int64_t x = 0; x < used; x += kVec<T>) {
        store(line + x, relu(scale * load_first(upper + x, used - x) + shift) + relu(scale * load_first(lower + x, used - x) + shift));
      }
      for (int64_t x = 0; x < rows.width; ++x) *out++ = (line[2 * x] + line[2 * x + 1]) * T(0.25);
    }
    std::fill_n(out, tile.pitch - tile.count, T(0));
  }
}

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

  // dout in both orientations: dout_t [outputs, position] as it comes, dout [position, outputs] transposed.
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
          store(run + s * tile.pitch + p, p < tile.count ? load_first(source + p, tile.count - p) : Vec<T>{});
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
        block.product(tile.positions(), zp + r0 * capacity, capacity, 1, dout + first * kVec<T>, pitch);
        T* const out = dweight + (c + r0) * pitch + first * kVec<T>;
        DX_UNROLL
        for (int r = 0; r < R; ++r) {
          DX_UNROLL
          for (int v = 0; v < NV; ++v) store(out + r * pitch + v * kVec<T>, load(out + r * pitch + v * kVec<T>) + block.acc[r][v]);
        }
      });
    }
  }

  void pooled_gradient(const Tile& tile, int64_t group_index) const {
    for_vector_groups<kPixelVectors>(tile.positions() / kVec<T>, [&](int64_t first, auto group) {
      constexpr int NV = decltype(group)::value;
      Block<T, kChannelRows, NV> block;
      block.product(outputs, weight + group_index * outputs * kChannelRows, 1, kChannelRows, dout_t + first * kVec<T>, capacity);
      DX_UNROLL
      for (int r = 0; r < kChannelRows; ++r) {
        DX_UNROLL
        for (int v = 0; v < NV; ++v) store(dzp + r * capacity + (first + v) * kVec<T>, block.acc[r][v]);
      }
    });
  }

  // Spreads dzp over the pixels of channel c, through ReLU and the direct part of BN, into G.
  void spread(const Tile& tile, int64_t c, const T* dzp_channel) const {
    const int64_t width = a.features.width, used = 2 * rows.width;
    const Vec<T> mean = broadcast(a.norm.mean[c]), step = broadcast(static_cast<T>(static_cast<double>(a.norm.weight[c]) * reciprocal_std(a.norm, c)));
    Vec<T> s1 = {}, s2 = {};
    for (int64_t s = 0; s < tile.samples; ++s) {
      const int64_t n = tile.sample + s, first = tile.pixel / rows.width, last = (tile.pixel + tile.count) / rows.width;
      const Vec<T> scale = broadcast(a.table.scale.row(n)[c]), shift = broadcast(a.table.shift.row(n)[c]);
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
            const Vec<T> dv = where_positive(scale * value + shift, load_first(line + x, used - x > 0 ? used - x : 0));
            s1 += dv;
            s2 += dv * (value - mean);
            store_first(g + x, step * dv, left);
          }
        }
      }
      if (last == rows.height && a.features.height > 2 * rows.height) std::fill_n(a.grad.plane(n, c) + 2 * rows.height * width, width, T(0));
    }
    sums[2 * c] += static_cast<double>(sum_lanes<T>(s1));
    sums[2 * c + 1] += static_cast<double>(sum_lanes<T>(s2));
  }

  void run(const Tile& tile) const {
    load_dout(tile);
    const int64_t channels = a.features.channels;
    for (int64_t c0 = 0; c0 < channels; c0 += kChannelRows) {
      const int64_t valid = std::min<int64_t>(kChannelRows, channels - c0);
      for (int64_t r = 0; r < valid; ++r) pool_tile(a.features, a.table, rows, tile, c0 + r, line, zp + r * capacity);
      for (int64_t r = valid; r < kChannelRows; ++r) std::fill_n(zp + r * capacity, tile.positions(), T(0));
      weight_gradient(tile, c0, valid);
      pooled_gradient(tile, c0 / kChannelRows);
      for (int64_t r = 0; r < valid; ++r) spread(tile, c0 + r, dzp + r * capacity);
    }
  }
};

// W [outputs, channels] by groups of kChannelRows columns or rows: out[group][i][r].
template <class T>
void pack_groups(const T* w, int64_t rows, int64_t row_stride, int64_t inner, int64_t inner_stride, T* out) {
  for (int64_t g = 0; g < ceil_div(rows, kChannelRows); ++g) {
    for (int64_t i = 0; i < inner; ++i) {
      for (int64_t r = 0; r < kChannelRows; ++r) {
        const int64_t row = g * kChannelRows + r;
        *out++ = row < rows ? w[row * row_stride + i * inner_stride] : T(0);
      }
    }
  }
}

}  // namespace

template <class S>
void transition_forward(const TransitionForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.features.channels, outputs = a.out.channels;
  const Rows rows(a.features.samples, a.out.height, a.out.width, tile_capacity<T>(channels, 256));
  const int64_t threads = thread_count(rows.count), capacity = rows.positions() + kPixelVectors * kLanes;
  const int64_t groups = ceil_div(outputs, kChannelRows), line = round_up(a.features.width, kLanes) + kLanes;
  const Scratch packed(sizeof(T) * (groups * kChannelRows * channels + 1));
  pack_groups(a.weight, outputs, channels, channels, int64_t{1}, packed.as<T>());
  const int64_t thread_values = round_up(channels * capacity + line, kLanes);
  const Scratch tiles(sizeof(T) * threads * thread_values);

  parallel(rows.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const zp = tiles.as<T>() + thread * thread_values;
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = rows[i];
      for (int64_t c = 0; c < channels; ++c) pool_tile(a.features, a.norm, rows, tile, c, zp + channels * capacity, zp + c * capacity);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t valid = std::min<int64_t>(kChannelRows, outputs - g * kChannelRows);
        for (int64_t s = 0; s < tile.samples; ++s) {
          for_vector_groups<kPixelVectors>(ceil_div(tile.count, kVec<T>), [&](int64_t first, auto group) {
            constexpr int NV = decltype(group)::value;
            Block<T, kChannelRows, NV> block;
            block.product(channels, packed.as<T>() + g * kChannelRows * channels, 1, kChannelRows, zp + s * tile.pitch + first * kVec<T>, capacity);
            DX_UNROLL
            for (int r = 0; r < kChannelRows; ++r) {
              if (r >= valid) continue;
              S* const out = a.out.plane(tile.sample + s, g * kChannelRows + r) + tile.pixel;
              DX_UNROLL
              for (int v = 0; v < NV; ++v) store_first(out + (first + v) * kVec<T>, block.acc[r][v], tile.count - (first + v) * kVec<T>);
            }
          });
        }
      }
    }
  });
}

template <class S>
void transition_backward(const TransitionBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, channels = a.features.channels, outputs = a.grad_out.channels, pitch = round_up(outputs, kLanes);
  const Rows rows(samples, a.grad_out.height, a.grad_out.width, tile_capacity<T>(2 * pitch, 256));
  const int64_t threads = thread_count(rows.count), capacity = rows.positions();
  const int64_t groups = ceil_div(channels, kChannelRows), padded = groups * kChannelRows, line = round_up(a.features.width, kLanes) + kLanes;
  const Scratch packed(sizeof(T) * (padded * outputs + 1));
  pack_groups(a.weight, channels, int64_t{1}, outputs, channels, packed.as<T>());

  const int64_t thread_values = round_up((2 * pitch + 2 * kChannelRows) * capacity + line, kLanes);
  const Scratch tiles(sizeof(T) * threads * thread_values);
  const Scratch partials(sizeof(T) * (threads * padded * pitch + 1));
  const Scratch sums(sizeof(double) * (threads * 2 * channels + 1));
  std::fill_n(partials.as<T>(), threads * padded * pitch, T(0));
  std::fill_n(sums.as<double>(), threads * 2 * channels, 0.0);
  if (rows.count == 0) {  // a map of one row or column pools to nothing
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) std::fill_n(a.grad.plane(n, c), a.features.pixels(), T(0));
    }
  }

  parallel(rows.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const own = tiles.as<T>() + thread * thread_values;
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
                             partials.as<T>() + thread * padded * pitch,
                             sums.as<double>() + thread * 2 * channels};
    for (int64_t i = begin; i < end; ++i) job.run(rows[i]);
  });

  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < channels; ++c) {
      T sum = 0;
      for (int64_t t = 0; t < threads; ++t) sum += partials.as<T>()[(t * padded + c) * pitch + o];
      a.dweight[o * channels + c] = sum;
    }
  }
  double* const total = sums.as<double>();
  for (int64_t t = 1; t < threads; ++t) {
    for (int64_t i = 0; i < 2 * channels; ++i) total[i] += total[t * 2 * channels + i];
  }
  finish_norm_backward(a.norm, total, channels, static_cast<double>(samples * a.features.pixels()), PerChannel<T>{}, a.coef, false, a.dnorm_weight, a.dnorm_bias);
}

DENSENET_EXT_INSTANTIATE(transition_forward, TransitionForward)
DENSENET_EXT_INSTANTIATE(transition_backward, TransitionBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
