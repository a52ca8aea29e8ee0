// Backward of a dense layer's 3x3 convolution and of BN2's reduction:
//
//   dy[j, p] = coef0*G + coef1 + coef2*x, times the dropout
//   dh[q, i] = sum_{j, tap} W[j, i, tap] dy[j, q - tap]
//   dW[j, i, tap] = sum_q dy[j, q - tap] h[q, i]          h = relu(scale*b + shift), remade
//   dv = r*dh*[h > 0],  S1 = sum dv,  S2 = sum dv*bhat: dbeta, dgamma, and db = t0*dv + t1 + t2*b
//
// Unit: half of the forward's. dy goes to zero-padded planes and from them to the transformed of
// winograd.h, which serve both products. Then for 2 or 3 vectors of i columns a time: for each term
// a register block of 6 or 8 column_count of row planes runs over all outputs; dh is gathered from
// these products, h remade, dv stored, both sums added to, and h put as transformed in the
// products' place; dW from those, 6 or 9 rows of its transformed by the vectors over all
// column_count. Columns follow each other regardless of rows and maps, by a table of where they
// are, so that small maps leave no part of a block idle. Threads memory contiguous units and
// private sums, merged in thread order. Bytes moved: b, dv and k channels of G and x once.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "norm_backward.h"
#include "pack.h"
#include "pixel_tiles.h"
#include "winograd.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

// Register blocks of both products: column_count of row planes, or rows of three taps of an output,
// by vectors of i.
constexpr int kBlockColumns = kRegisters == 32 ? 8 : 6;
constexpr int kTapRows = kRegisters == 32 ? 3 : 2;
constexpr int kVectors = kRegisters == 32 ? 3 : 2;

template <class S>
struct Conv3x3BackwardWorker {
  using T = Arithmetic<S>;
  const Conv3x3Backward<S>& a;
  const Units& units;
  const WinogradPlanes& planes;
  int64_t pitch;
  int64_t h_stride;  // of a vector of h
  const T* weight;   // groups of vectors [growth, kWinogradPoints, 3, NV * kVec]
  const T *scale, *shift, *post_mask, *mean;  // padded tables; post_mask null: ones
  int64_t scale_stride, shift_stride;         // 0 or pitch
  // of one thread
  PairColumn* columns;  // the column_count of the unit
  T* plane;
  T* transformed;  // [kWinogradPoints, growth] planes, of dy
  T* h;            // [kWinogradPoints, kVectors, column_count, kVec], of one group of vectors
  T* unit_sums;    // [2, pitch]
  T* dweight;      // [kWinogradPoints, growth, 3, pitch]
  double* sums;

  void load_transformed(const Unit& u) const {
    for (int64_t j = 0; j < a.growth; ++j) {
      load_gradient_plane(a, units, u, j, plane);
      for (int64_t s = 0; s < u.samples; ++s) {
        for (int64_t y = 0; y < u.rows; y += 2) {
          // From the lowest row up, because taps look back. A row below the padding is one that
          // nothing inside depends on.
          const T* const first = plane + units.position(u, s, y - 1);
          const T* const last = plane + units.position(u, s, std::min(y + 2, u.rows));
          transform_data(last, first + 2 * units.pitch, first + units.pitch, first, units.pitch,
                         transformed + j * planes.plane_size + planes.position(u, s, y / 2),
                         a.growth * planes.plane_size);
        }
      }
    }
  }

  // Product k of dh of kBlockColumns column_count and the vectors first .. first + NV.
  template <int NV>
  DX_NOINLINE Block<T, kBlockColumns, NV> product(const PairColumn* block_columns, int k,
                                                  int64_t first) const {
    const T* column[kBlockColumns];
    DX_UNROLL
    for (int r = 0; r < kBlockColumns; ++r)
      column[r] = transformed + k * a.growth * planes.plane_size + block_columns[r].plane;
    Block<T, kBlockColumns, NV> block;
    const T* w = weight + (first * a.growth * kWinogradPoints + k * NV) * 3 * kVec<T>;
    int64_t offset = 1;
    for (int64_t j = 0; j < a.growth; ++j) {
      DX_UNROLL
      for (int t = 0; t < 3; ++t)
        block.update([&](int r) { return (column[r] + offset)[-t]; }, w + t * NV * kVec<T>);
      w += kWinogradPoints * 3 * NV * kVec<T>;
      offset += planes.plane_size;
    }
    return block;
  }

  // All of them, to h. Meanwhile b and dv are fetched for what follows.
  template <int NV>
  void products(const Unit& u, int64_t column_count, int64_t first) const {
    const int64_t origin =
        (u.sample * units.height + u.row) * units.width * pitch + first * kVec<T>;
    for (int k = 0; k < kWinogradPoints; ++k) {
      for (int64_t p = 0; p < column_count; p += kBlockColumns) {
        for (int r = 0; r < kBlockColumns; ++r) {
          const PairColumn& pair = columns[p + r];
          const int64_t row = origin + (pair.pixel + (k % 2) * pair.lower) * pitch;
          if (k < 2) {
            fetch<NV, 0>(a.bottleneck + row);
          } else {
            fetch<NV, 1>(a.dv + row);
          }
        }
        const Block<T, kBlockColumns, NV> block = product<NV>(columns + p, k, first);
        T* const out = h + k * kVectors * h_stride + p * kVec<T>;
        DX_UNROLL
        for (int v = 0; v < NV; ++v) {
          DX_UNROLL
          for (int r = 0; r < kBlockColumns; ++r)
            store(out + v * h_stride + r * kVec<T>, block.acc[r][v]);
        }
      }
    }
  }

  template <int NV, int FOR_WRITE, class E>
  static DX_INLINE void fetch(const E* row) {
    constexpr int64_t line = 64 / sizeof(E);
    for (int64_t i = 0; i < NV * kVec<T>; i += line) __builtin_prefetch(row + i, FOR_WRITE, 2);
  }

  // Of one vector of i.
  struct Channels {
    Vec<T> scale, shift, post_mask, mean, s1, s2;
  };

  // dv of a pixel, whose row of b starts columns `o`, from its dh, and both sums; returns h.
  DX_INLINE Vec<T> finish_pixel(int64_t o, Vec<T> dh, Channels& c) const {
    const Vec<T> b = load(a.bottleneck + o), value = relu(c.scale * b + c.shift);
    const Vec<T> d = relu_gradient(value, dh) * c.post_mask;
    store(a.dv + o, d);
    c.s1 += d;
    c.s2 += d * (b - c.mean);
    return value;
  }

  // What follows from the products, which the transformed of h replace.
  template <int NV>
  void finish_columns(const Unit& u, int64_t column_count, int64_t first) const {
    const int64_t first_row = (u.sample * units.height + u.row) * units.width;
    for (int v = 0; v < NV; ++v) {
      const int64_t i = (first + v) * kVec<T>;
      Channels c{{}, {}, {}, load(mean + i), {}, {}};
      int32_t sample = -1;
      for (int64_t p = 0; p < column_count; ++p) {
        const PairColumn& pair = columns[p];
        if (pair.sample != sample) {
          sample = pair.sample;
          const int64_t n = u.sample + sample;
          c.scale = load(scale + n * scale_stride + i);
          c.shift = load(shift + n * shift_stride + i);
          c.post_mask = post_mask ? load(post_mask + n * pitch + i) : broadcast(T(1));
        }
        T* const h0 = h + v * h_stride + p * kVec<T>;
        T* const h1 = h0 + kVectors * h_stride;
        T* const h2 = h1 + kVectors * h_stride;
        T* const h3 = h2 + kVectors * h_stride;
        const Vec<T> m1 = load(h1), m2 = load(h2);
        const int64_t upper = (first_row + pair.pixel) * pitch + i;
        Vec<T> lower_h = {};
        if (pair.lower) lower_h = finish_pixel(upper + pair.lower * pitch, load(h0) + (m1 + m2), c);
        const Vec<T> upper_h = finish_pixel(upper, load(h3) + (m1 - m2), c);
        store(h0, lower_h);
        store(h1, lower_h + upper_h);
        store(h2, lower_h - upper_h);
        store(h3, upper_h);
      }
      store(unit_sums + i, c.s1);
      store(unit_sums + pitch + i, c.s2);
    }
  }

  // Terms k of dW of ROWS outputs from j on.
  template <int ROWS, int NV>
  void tap_rows(int64_t column_count, int k, int64_t j, int64_t first) const {
    Block<T, 3 * ROWS, NV> block;
    const T* dy[ROWS];
    for (int i = 0; i < ROWS; ++i) dy[i] = transformed + (k * a.growth + j + i) * planes.plane_size;
    const T* h_column = h + k * kVectors * h_stride;
    for (int64_t p = 0; p < column_count; ++p) {
      const int64_t position = columns[p].plane;
      block.update([&](int t) { return (dy[t / 3] + 1 - t % 3)[position]; }, h_column, h_stride);
      h_column += kVec<T>;
    }
    block.add_to_rows(dweight + (k * a.growth + j) * 3 * pitch + first * kVec<T>, pitch);
  }

  template <int NV>
  void weight_gradient(int64_t column_count, int64_t first) const {
    for (int k = 0; k < kWinogradPoints; ++k) {
      int64_t j = 0;
      for (; j + kTapRows <= a.growth; j += kTapRows)
        tap_rows<kTapRows, NV>(column_count, k, j, first);
      for (; j < a.growth; ++j) tap_rows<1, NV>(column_count, k, j, first);
    }
  }

  void run(const Unit& u) const {
    load_transformed(u);
    const int64_t column_count = planes.column_count(u);
    planes.positions(u, columns);
    std::fill_n(columns + column_count, kBlockColumns, columns[0]);
    for_vector_groups<kVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
      constexpr int NV = decltype(group)::value;
      products<NV>(u, column_count, first);
      finish_columns<NV>(u, column_count, first);
      weight_gradient<NV>(column_count, first);
    });
    for (int64_t i = 0; i < 2 * pitch; ++i) sums[i] += static_cast<double>(unit_sums[i]);
  }
};

}  // namespace

template <class S>
void conv3x3_backward(const Conv3x3Backward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, pitch = round_up(a.width, kLanes);
  const Units units(samples, a.features.height, a.features.width, 2 * a.width,
                    thread_count(samples));
  const int64_t threads = thread_count(units.count);

  const WinogradPlanes planes(units);

  constexpr int64_t kTaps = kWinogradPoints * 3;
  const Scratch packed(sizeof(T) * a.growth * kTaps * (pitch + a.width));
  T* const weight = packed.as<T>();
  T* const unpacked = weight + a.growth * kTaps * pitch;
  parallel_items(a.growth, kTaps * pitch, [&](int64_t begin, int64_t end) {
    transform_weight(a.weight + begin * a.width * 9, (end - begin) * a.width,
                     unpacked + begin * a.width * kTaps, kTaps, 3);
    for_vector_groups<kVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
      constexpr int64_t lanes = decltype(group)::value * kVec<T>;
      const int64_t column = first * kVec<T>;
      for (int64_t j = begin; j < end; ++j) {
        copy_transposed(unpacked + (j * a.width + column) * kTaps, kTaps,
                        std::clamp<int64_t>(a.width - column, 0, lanes), kTaps,
                        weight + (column * a.growth + j * lanes) * kTaps, lanes, lanes);
      }
    });
  });
  const int64_t scale_rows = a.scale_shift.scale.sample_stride ? samples : 1,
                shift_rows = a.scale_shift.shift.sample_stride ? samples : 1;
  const int64_t mask_rows = a.post_mask.data ? samples : 0;
  const Scratch tables(sizeof(T) * (scale_rows + shift_rows + mask_rows + 1) * pitch);
  T* const scale = tables.as<T>();
  T* const shift = scale + scale_rows * pitch;
  T* const post_mask = shift + shift_rows * pitch;
  T* const mean = post_mask + mask_rows * pitch;
  pad_rows(a.scale_shift.scale.data, a.scale_shift.scale.sample_stride, scale_rows, a.width, scale);
  pad_rows(a.scale_shift.shift.data, a.scale_shift.shift.sample_stride, shift_rows, a.width, shift);
  if (mask_rows)
    pad_rows(a.post_mask.data, a.post_mask.sample_stride, mask_rows, a.width, post_mask);
  pad_rows(a.norm.mean, int64_t{0}, 1, a.width, mean);

  const int64_t column_count = planes.columns_per_unit();
  const int64_t transformed_values = kWinogradPoints * a.growth * planes.plane_size;
  const int64_t h_stride = padded_stride(round_up(column_count + kBlockColumns, kLanes) * kVec<T>);
  const int64_t h_values = kWinogradPoints * kVectors * h_stride,
                dweight_values = kTaps * a.growth * pitch;
  const int64_t thread_values =
      units.plane_size + transformed_values + h_values + 2 * pitch + dweight_values;
  const Scratch positions(sizeof(PairColumn) * threads * (column_count + kBlockColumns));
  const Scratch work(sizeof(T) * threads * thread_values);
  const Scratch sums(sizeof(double) * threads * 2 * pitch);
  std::fill_n(sums.as<double>(), threads * 2 * pitch, 0.0);
  const auto dweight_of = [&](int64_t thread) {
    return work.as<T>() + (thread + 1) * thread_values - dweight_values;
  };
  if (units.count == 0) std::fill_n(dweight_of(0), dweight_values, T(0));

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const memory = work.as<T>() + thread * thread_values;
    T* const thread_h = memory + units.plane_size + transformed_values;
    std::fill_n(memory, units.plane_size + transformed_values, T(0));
    std::fill_n(dweight_of(thread), dweight_values, T(0));
    const Conv3x3BackwardWorker<S> job{
        a,
        units,
        planes,
        pitch,
        h_stride,
        weight,
        scale,
        shift,
        mask_rows ? post_mask : nullptr,
        mean,
        a.scale_shift.scale.sample_stride ? pitch : 0,
        a.scale_shift.shift.sample_stride ? pitch : 0,
        positions.as<PairColumn>() + thread * (column_count + kBlockColumns),
        memory,
        memory + units.plane_size,
        thread_h,
        thread_h + h_values,
        dweight_of(thread),
        sums.as<double>() + thread * 2 * pitch};
    for (int64_t i = begin; i < end; ++i) job.run(units[i]);
  });

  parallel_items(a.growth, threads * kTaps * pitch, [&](int64_t begin, int64_t end) {
    const int64_t distance = a.growth * 3 * pitch;  // of transformed
    for (int64_t j = begin; j < end; ++j) {
      T* const total = dweight_of(0) + j * 3 * pitch;
      for (int k = 0; k < kWinogradPoints; ++k)
        add_partials(total + k * distance, threads, thread_values, 3 * pitch);
      collect_weight_gradient(total, distance, 3 * pitch);
      for (const int k : {0, 1, 3}) {
        const int64_t y = (k + 1) / 2;  // of the taps' rows
        copy_transposed(total + k * distance, pitch, 3, a.width,
                        a.dweight + j * a.width * 9 + y * 3, 9, 3);
      }
    }
  });
  finish_bottleneck_norm(a, sums.as<double>(), threads, pitch);
}

DENSENET_EXT_INSTANTIATE(conv3x3_backward, Conv3x3Backward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
