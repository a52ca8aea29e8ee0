// Backward of a dense layer's 3x3 convolution and of BN2's reduction:
//
//   dy[j, p] = coef0*G + coef1 + coef2*x, times the dropout
//   dh[q, i] = sum_{j, tap} W[j, i, tap] dy[j, q - tap]
//   dW[j, i, tap] = sum_q dy[j, q - tap] h[q, i]          h = relu(scale*b + shift), remade
//   dv = r*dh*[h > 0],  S1 = sum dv,  S2 = sum dv*bhat: dbeta, dgamma, and db = t0*dv + t1 + t2*b
//
// Unit: as in the forward. dy goes to zero-padded planes; a register block of 8 pixels by 3 vectors
// of i runs over all outputs and taps, and its epilogue remakes h, stores dv and adds both sums;
// then dW from the unit's h, 9 taps by 3 vectors for one output at a time. Threads own contiguous
// units and private sums, merged in thread order. Bytes moved: b, dv and k channels of G and x
// once.
#include "../parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "norm_backward.h"
#include "pack.h"
#include "planes.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int kTapVectors =
    kRegisters == 32 ? 3 : 1;  // 9 sums for each vector, the vectors and a broadcast

template <class S>
struct Job {
  using T = Arithmetic<S>;
  const Conv3x3Backward<S>& a;
  const Units& units;
  int64_t pitch;
  const T* weight;                       // [growth, 9, pitch]
  const T *scale, *shift, *post, *mean;  // padded tables; post null: ones
  int64_t scale_stride, shift_stride;    // 0 or pitch
  // of one thread
  T *planes, *h, *unit_sums, *dweight;
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

  // dh of up to R pixels from (s, y, x) and everything that follows from it, for the
  // vectors first .. first + NV.
  template <int R, int NV>
  void pixels(const Unit& u, int64_t s, int64_t y, int64_t x, int64_t first) const {
    Block<T, R, NV> block;
    const T* dy = planes + units.position(u, s, y) + x;
    const T* w = weight + first * kVec<T>;
    for (int64_t j = 0; j < a.growth; ++j) {
      DX_UNROLL
      for (int t = 0; t < 9; ++t) block.rank1(dy - units.offset[t], 1, w + t * pitch);
      dy += units.plane_size;
      w += 9 * pitch;
    }
    const int64_t n = u.sample + s, valid = std::min<int64_t>(R, units.width - x),
                  column = first * kVec<T>;
    const int64_t row = ((n * units.height + u.row + y) * units.width + x) * pitch + column;
    T* const h_row = h + ((s * u.rows + y) * units.width + x) * pitch + column;
    DX_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t i = v * kVec<T>;
      const Vec<T> sc = load(scale + n * scale_stride + column + i),
                   sh = load(shift + n * shift_stride + column + i),
                   center = load(mean + column + i);
      Vec<T> s1 = load(unit_sums + column + i), s2 = load(unit_sums + pitch + column + i);
      DX_UNROLL
      for (int r = 0; r < R; ++r) {
        if (r >= valid) continue;
        const Vec<T> b = load(a.bottleneck + row + r * pitch + i);
        const Vec<T> value = relu(sc * b + sh);
        Vec<T> d = where_positive(value, block.acc[r][v]);
        if (post) d *= load(post + n * pitch + column + i);
        store(h_row + r * pitch + i, value);
        store(a.dv + row + r * pitch + i, d);
        s1 += d;
        s2 += d * (b - center);
      }
      store(unit_sums + column + i, s1);
      store(unit_sums + pitch + column + i, s2);
    }
  }

  template <int R>
  void input_gradient(const Unit& u) const {
    for (int64_t s = 0; s < u.samples; ++s) {
      for (int64_t y = 0; y < u.rows; ++y) {
        for (int64_t x = 0; x < units.width; x += R) {
          for_vector_groups<kMaxVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
            pixels<R, decltype(group)::value>(u, s, y, x, first);
          });
        }
      }
    }
  }

  void weight_gradient(const Unit& u) const {
    for (int64_t j = 0; j < a.growth; ++j) {
      for_vector_groups<kTapVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
        constexpr int NV = decltype(group)::value;
        Block<T, 9, NV> block;
        for (int64_t s = 0; s < u.samples; ++s) {
          for (int64_t y = 0; y < u.rows; ++y) {
            const T* dy = planes + j * units.plane_size + units.position(u, s, y);
            const T* h_row = h + (s * u.rows + y) * units.width * pitch + first * kVec<T>;
            for (int64_t x = 0; x < units.width; ++x) {
              Vec<T> values[NV];
              DX_UNROLL
              for (int v = 0; v < NV; ++v) values[v] = load(h_row + v * kVec<T>);
              DX_UNROLL
              for (int t = 0; t < 9; ++t) {
                const Vec<T> d = broadcast(dy[-units.offset[t]]);
                DX_UNROLL
                for (int v = 0; v < NV; ++v) block.acc[t][v] += d * values[v];
              }
              ++dy;
              h_row += pitch;
            }
          }
        }
        T* const out = dweight + j * 9 * pitch + first * kVec<T>;
        DX_UNROLL
        for (int t = 0; t < 9; ++t) {
          DX_UNROLL
          for (int v = 0; v < NV; ++v)
            store(out + t * pitch + v * kVec<T>,
                  load(out + t * pitch + v * kVec<T>) + block.acc[t][v]);
        }
      });
    }
  }

  void run(const Unit& u) const {
    load_planes(u);
    std::fill_n(unit_sums, 2 * pitch, T(0));
    // widths of 7, 14 and 28 would leave an eighth of the larger block idle
    constexpr int fewer = kRegisters == 32 ? kPixelRows - 1 : kPixelRows;
    if (round_up(units.width, fewer) < round_up(units.width, kPixelRows)) {
      input_gradient<fewer>(u);
    } else {
      input_gradient<kPixelRows>(u);
    }
    for (int64_t i = 0; i < 2 * pitch; ++i) sums[i] += static_cast<double>(unit_sums[i]);
    weight_gradient(u);
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
    for (int64_t j = begin; j < end; ++j)
      copy_transposed(a.weight + j * a.width * 9, 9, a.width, 9, packed.as<T>() + j * 9 * pitch,
                      pitch, pitch);
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
  const int64_t h_values = units.maps_per_unit * units.rows_per_unit * units.width * pitch;
  const int64_t thread_values = plane_values + h_values + (2 + a.growth * 9) * pitch;
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
