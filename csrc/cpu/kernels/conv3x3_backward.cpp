// Backward of a dense layer's 3x3 convolution and of BN2's reduction:
//
//   dy[j, p] = coef0*G + coef1 + coef2*x, times the dropout
//   dh[q, i] = sum_{j, tap} W[j, i, tap] dy[j, q - tap]
//   dW[j, i, tap] = sum_q dy[j, q - tap] h[q, i]          h = relu(scale*b + shift), remade
//   dv = r*dh*[h > 0],  S1 = sum dv,  S2 = sum dv*bhat: dbeta, dgamma, and db = t0*dv + t1 + t2*b
//
// Unit: as in the forward. dy goes to zero-padded planes. Then for 2 or 3 vectors of i at a time,
// so that their weights and their h stay in the first-level cache: a register block of 6 or 8
// pixels runs over all outputs and taps, and its epilogue remakes h, stores dv and adds both sums;
// dW from that h, 6 or 9 rows of W by the vectors over all pixels. Pixels follow each other
// regardless of rows and maps, by a table of where they are, so that small maps leave no part of a
// block idle. Threads own contiguous units and private sums, merged in thread order. Bytes moved:
// b, dv and k channels of G and x once.
#include "../parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "norm_backward.h"
#include "pack.h"
#include "planes.h"
#include "tile.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

// Register blocks of both products: pixels, or rows of three taps of an output, by vectors of i.
constexpr int kPixels = kRegisters == 32 ? 8 : 6;
constexpr int kTapRows = kRegisters == 32 ? 3 : 2;
constexpr int kVectors = kRegisters == 32 ? 3 : 2;

template <class S>
struct Job {
  using T = Arithmetic<S>;
  const Conv3x3Backward<S>& a;
  const Units& units;
  int64_t pitch;
  const int32_t* at;                     // where the unit's pixels are in a padded plane
  int64_t h_stride;                      // of a vector of h
  const T* weight;                       // groups of vectors [growth, 9, NV * kVec]
  const T *scale, *shift, *post, *mean;  // padded tables; post null: ones
  int64_t scale_stride, shift_stride;    // 0 or pitch
  // of one thread
  T *planes, *h, *unit_sums, *dweight;  // h [NV, pixels, kVec], of one group
  double* sums;

  void load_planes(const Unit& u) const {
    for (int64_t j = 0; j < a.growth; ++j) {
      T* const plane = planes + j * units.plane_size;
      const int64_t c = a.offset + j;
      units.clear_outside(u, plane);
      units.for_rows_with_halo(u, [&](int64_t s, int64_t y) {
        const int64_t n = u.sample + s, first = (u.row + y) * units.width;
        const Vec<T> c0 = broadcast(a.coef.at(0, n, c)), c1 = broadcast(a.coef.at(1, n, c)),
                     c2 = broadcast(a.coef.at(2, n, c));
        const T* const g = a.grad.plane(n, c) + first;
        const S* const x = a.features.plane(n, c) + first;
        T* const row = plane + units.position(u, s, y);
        for (int64_t i = 0; i < units.width; i += kVec<T>) {
          const int64_t left = units.width - i;
          store_first(row + i, c0 * load_first(g + i, left) + (c1 + c2 * load_first(x + i, left)),
                      left);
        }
        if (a.dropout_mask) {
          const bool* const mask =
              a.dropout_mask + (n * a.growth + j) * units.height * units.width + first;
          const T keep_scale = static_cast<T>(a.dropout_scale);
          for (int64_t i = 0; i < units.width; ++i) row[i] = mask[i] ? row[i] * keep_scale : T(0);
        }
      });
    }
  }

  // dh of the unit's pixels p, p + 1, ... and the vectors first .. first + NV.
  template <int NV>
  DX_NOINLINE Block<T, kPixels, NV> product(int64_t p, int64_t first) const {
    const T* pixel[kPixels];
    DX_UNROLL
    for (int r = 0; r < kPixels; ++r) pixel[r] = planes + at[p + r];
    Block<T, kPixels, NV> block;
    const T* w = weight + first * kVec<T> * a.growth * 9;
    for (int64_t j = 0; j < a.growth; ++j) {
      int64_t offset = j * units.plane_size + units.pitch + 1;
      // Not unrolled: GCC would keep a register for each of the nine taps of each pixel.
#pragma GCC unroll 1
      for (int y = 0; y < 3; ++y) {
        DX_UNROLL
        for (int t = 0; t < 3; ++t) {
          block.update([&](int r) { return (pixel[r] + offset)[-t]; }, w);
          w += NV * kVec<T>;
        }
        offset -= units.pitch;
      }
    }
    return block;
  }

  // The same and everything that follows from it. The pixels may lie in several rows and samples:
  // the first of them is of sample n, as are those before `next`.
  template <int NV>
  void pixels(const Unit& u, int64_t p, int64_t n, int64_t next, int64_t first) const {
    const int64_t valid = std::min<int64_t>(kPixels, u.pixels(units.width) - p),
                  column = first * kVec<T>;
    const int64_t row = ((u.sample * units.height + u.row) * units.width + p) * pitch + column;
    for (int64_t r = 0; r < valid; ++r) __builtin_prefetch(a.bottleneck + row + r * pitch, 0, 3);
    const Block<T, kPixels, NV> block = product<NV>(p, first);

    const int64_t map_pixels = units.height * units.width;
    DX_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = column + v * kVec<T>;
      const Vec<T> center = load(mean + i);
      Vec<T> s1 = load(unit_sums + i), s2 = load(unit_sums + pitch + i);
      Vec<T> sc = load(scale + n * scale_stride + i), sh = load(shift + n * shift_stride + i);
      int64_t sample = n, end = next - p;
      DX_UNROLL
      for (int r = 0; r < kPixels; ++r) {
        if (r >= valid) break;
        if (r == end) {
          ++sample;
          end += map_pixels;
          sc = load(scale + sample * scale_stride + i);
          sh = load(shift + sample * shift_stride + i);
        }
        const int64_t o = row + r * pitch + v * kVec<T>;
        const Vec<T> b = load(a.bottleneck + o);
        const Vec<T> value = relu(sc * b + sh);
        Vec<T> d = where_positive(value, block.acc[r][v]);
        if (post) d *= load(post + sample * pitch + i);
        store(h + v * h_stride + (p + r) * kVec<T>, value);
        store(a.dv + o, d);
        s1 += d;
        s2 += d * (b - center);
      }
      store(unit_sums + i, s1);
      store(unit_sums + pitch + i, s2);
    }
  }

  template <int NV>
  void input_gradient(const Unit& u, int64_t first) const {
    const int64_t map_pixels = units.height * units.width;
    int64_t n = u.sample, next = u.rows * units.width;
    for (int64_t p = 0; p < u.pixels(units.width); p += kPixels) {
      for (; p >= next; next += map_pixels) ++n;
      pixels<NV>(u, p, n, next, first);
    }
  }

  // dW of ROWS rows of three taps from `row` on. Row 0 is the first of output 0, row 3 that of
  // output 1.
  template <int ROWS, int NV>
  void tap_rows(const Unit& u, int64_t row, int64_t first) const {
    Block<T, 3 * ROWS, NV> block;
    const T* dy[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      const int64_t j = (row + i) / 3, y = (row + i) % 3;
      dy[i] = planes + j * units.plane_size + (1 - y) * units.pitch;
    }
    const int64_t count = u.pixels(units.width);
    const T* h_pixel = h;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t position = at[p];
      block.update([&](int t) { return (dy[t / 3] + 1 - t % 3)[position]; }, h_pixel, h_stride);
      h_pixel += kVec<T>;
    }
    block.add_to_rows(dweight + row * 3 * pitch + first * kVec<T>, pitch);
  }

  template <int NV>
  void weight_gradient(const Unit& u, int64_t first) const {
    const int64_t rows = 3 * a.growth;
    int64_t row = 0;
    for (; row + kTapRows <= rows; row += kTapRows) tap_rows<kTapRows, NV>(u, row, first);
    for (; row < rows; ++row) tap_rows<1, NV>(u, row, first);
  }

  void run(const Unit& u) const {
    load_planes(u);
    std::fill_n(unit_sums, 2 * pitch, T(0));
    for_vector_groups<kVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
      input_gradient<decltype(group)::value>(u, first);
      weight_gradient<decltype(group)::value>(u, first);
    });
    for (int64_t i = 0; i < 2 * pitch; ++i) sums[i] += static_cast<double>(unit_sums[i]);
  }
};

}  // namespace

template <class S>
void conv3x3_backward(const Conv3x3Backward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, pitch = round_up(a.width, kLanes);
  const Units units(samples, a.features.height, a.features.width, a.width, thread_count(samples));
  const int64_t threads = thread_count(units.count);

  const Scratch packed(sizeof(T) * a.growth * 9 * pitch);
  parallel_items(a.growth, 9 * pitch, [&](int64_t begin, int64_t end) {
    for_vector_groups<kVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
      constexpr int64_t lanes = decltype(group)::value * kVec<T>;
      const int64_t column = first * kVec<T>;
      for (int64_t j = begin; j < end; ++j) {
        copy_transposed(a.weight + (j * a.width + column) * 9, 9,
                        std::clamp<int64_t>(a.width - column, 0, lanes), 9,
                        packed.as<T>() + (column * a.growth + j * lanes) * 9, lanes, lanes);
      }
    });
  });
  const int64_t scale_rows = a.table.scale.sample_stride ? samples : 1,
                shift_rows = a.table.shift.sample_stride ? samples : 1;
  const int64_t post_rows = a.post_mask.data ? samples : 0;
  const Scratch tables(sizeof(T) * (scale_rows + shift_rows + post_rows + 1) * pitch);
  T* const scale = tables.as<T>();
  T* const shift = scale + scale_rows * pitch;
  T* const post = shift + shift_rows * pitch;
  T* const mean = post + post_rows * pitch;
  pad_rows(a.table.scale.data, a.table.scale.sample_stride, scale_rows, a.width, scale);
  pad_rows(a.table.shift.data, a.table.shift.sample_stride, shift_rows, a.width, shift);
  if (post_rows) pad_rows(a.post_mask.data, a.post_mask.sample_stride, post_rows, a.width, post);
  pad_rows(a.norm.mean, int64_t{0}, 1, a.width, mean);

  const int64_t plane_values = a.growth * units.plane_size;
  const int64_t h_stride = padded_stride(units.pixels_per_unit() * kVec<T>);
  const int64_t h_values = kVectors * h_stride;
  const int64_t thread_values = plane_values + h_values + (2 + a.growth * 9) * pitch;
  const Scratch positions(sizeof(int32_t) * (units.pixels_per_unit() + kPixels));
  units.pixel_positions(positions.as<int32_t>());
  std::fill_n(positions.as<int32_t>() + units.pixels_per_unit(), kPixels, units.base);
  const Scratch work(sizeof(T) * threads * thread_values);
  const Scratch sums(sizeof(double) * threads * 2 * pitch);
  std::fill_n(sums.as<double>(), threads * 2 * pitch, 0.0);
  const auto dweight_of = [&](int64_t thread) {
    return work.as<T>() + thread * thread_values + plane_values + h_values + 2 * pitch;
  };
  if (units.count == 0) std::fill_n(dweight_of(0), a.growth * 9 * pitch, T(0));

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const own = work.as<T>() + thread * thread_values;
    std::fill_n(own, plane_values, T(0));
    std::fill_n(dweight_of(thread), a.growth * 9 * pitch, T(0));
    const Job<S> job{a,
                     units,
                     pitch,
                     positions.as<int32_t>(),
                     h_stride,
                     packed.as<T>(),
                     scale,
                     shift,
                     post_rows ? post : nullptr,
                     mean,
                     a.table.scale.sample_stride ? pitch : 0,
                     a.table.shift.sample_stride ? pitch : 0,
                     own,
                     own + plane_values,
                     own + plane_values + h_values,
                     dweight_of(thread),
                     sums.as<double>() + thread * 2 * pitch};
    for (int64_t i = begin; i < end; ++i) job.run(units[i]);
  });

  parallel_items(a.growth, threads * 9 * pitch, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T* const total = dweight_of(0) + j * 9 * pitch;
      add_partials(total, threads, thread_values, 9 * pitch);
      copy_transposed(total, pitch, 9, a.width, a.dweight + j * a.width * 9, 9, 9);
    }
  });
  finish_bottleneck_norm(a, sums.as<double>(), threads, pitch);
}

DENSENET_EXT_INSTANTIATE(conv3x3_backward, Conv3x3Backward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
