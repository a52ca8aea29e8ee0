// Computes the backward of a dense layer's 3x3 convolution and BN2's reduction:
//
//   dy[j, p] = coef0*G + coef1 + coef2*x, times the dropout
//   dh[q, i] = sum_{j, tap} W[j, i, tap] dy[j, q - tap]
//   dW[j, i, tap] = sum_q dy[j, q - tap] h[q, i]          h = relu(scale*b + shift), computed again
//   dv = r*dh*[h > 0],  S1 = sum dv,  S2 = sum dv*bhat: dbeta, dgamma, and db = t0*dv + t1 + t2*b
//
// A unit is half of the forward's. dy goes to zero-padded planes and is transformed as in
// winograd.h, for both products. Then for 2 or 3 vectors of i at a time: for each point a register
// block of 6 or 8 columns of row pairs runs over all outputs; dh is gathered from these products, h
// computed again, dv stored, both sums added to, and h transformed in the place of the products; dW
// is summed from that, 6 or 9 rows by the vectors over all columns. Columns follow each other
// regardless of rows and maps, by a list of their positions, so that small maps leave no part of a
// block idle. Threads have contiguous units and private sums, merged in thread order. Bytes moved:
// b, dv and k channels of G and x once.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "norm_backward.h"
#include "pack.h"
#include "padded_rows.h"
#include "winograd.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

// Register blocks have columns of row pairs, or rows of three taps of an output, by vectors of i.
constexpr int kBlockColumns = kRegisters == 32 ? 8 : 6;
constexpr int kTapRows = kRegisters == 32 ? 3 : 2;
constexpr int kVectors = kRegisters == 32 ? 3 : 2;

constexpr int64_t kTaps = kWinogradPoints * 3;  // of a transformed filter

template <class S>
struct Conv3x3BackwardWorker {
  using T = Arithmetic<S>;
  const Conv3x3Backward<S>& a;
  const Units& units;
  const WinogradPlanes& planes;
  const T* weight;                 // groups of vectors [growth, kWinogradPoints, 3, NV * kVec]
  ScaleShiftTable<T> scale_shift;  // padded, as are those that follow
  PerChannel<T> post_mask;
  PerChannel<T> mean;
  double* sums = nullptr;         // [2, pitch]
  T* dweight = nullptr;           // [kWinogradPoints, growth, 3, pitch]
  PairColumn* columns = nullptr;  // of the unit
  T* plane = nullptr;
  T* transformed = nullptr;  // [kWinogradPoints, growth] planes, of dy
  T* h = nullptr;            // [kWinogradPoints, kVectors, columns, kVec], of one group of vectors
  T* unit_sums = nullptr;    // [2, pitch]
  int64_t pitch = round_up(a.width, kLanes),
          max_columns = planes.columns_per_unit() + kBlockColumns;
  int64_t h_stride = padded_stride(round_up(max_columns, kLanes) * kVec<T>);  // of a vector of h

  void take_memory(Carver& memory) {
    plane = memory.take<T>(units.plane_size);
    transformed = memory.take<T>(transformed_values());
    h = memory.take<T>(kWinogradPoints * kVectors * h_stride);
    unit_sums = memory.take<T>(2 * pitch);
    columns = memory.take<PairColumn>(max_columns);
  }
  int64_t transformed_values() const { return kWinogradPoints * a.growth * planes.plane_size; }

  // Transforms dy of a unit.
  void load_transformed(const Unit& u) const {
    for (int64_t j = 0; j < a.growth; ++j) {
      load_gradient_plane(a, units, u, j, plane);
      for (int64_t s = 0; s < u.samples; ++s) {
        for (int64_t y = 0; y < u.rows; y += 2) {
          // Rows go from the lowest up, because taps look back. Nothing inside depends on a row
          // that lies below the padding.
          const T* const first = plane + units.position(u, s, y - 1);
          const T* const last = plane + units.position(u, s, std::min(y + 2, u.rows));
          transform_data(last, first + 2 * units.pitch, first + units.pitch, first, units.pitch,
                         transformed + j * planes.plane_size + planes.position(u, s, y / 2),
                         a.growth * planes.plane_size);
        }
      }
    }
  }

  // Computes product k of dh of kBlockColumns columns and the vectors first .. first + NV.
  template <int NV>
  DX_NOINLINE Block<T, kBlockColumns, NV> product(const PairColumn* block_columns, int k,
                                                  int64_t first) const {
    const T* column[kBlockColumns];
    DX_UNROLL
    for (int r = 0; r < kBlockColumns; ++r)
      column[r] = transformed + k * a.growth * planes.plane_size + block_columns[r].position;
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

  // Stores all products to h. Meanwhile b and dv are fetched for finish_columns.
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

  // Holds the constants and sums of one vector of i.
  struct Channels {
    Vec<T> scale, shift, post_mask, mean, s1, s2;
  };

  // Stores dv of a pixel from its dh, adds to both sums and returns h. Its row of b starts at `o`.
  DX_INLINE Vec<T> finish_pixel(int64_t o, Vec<T> dh, Channels& c) const {
    const Vec<T> b = load(a.bottleneck + o), value = relu(c.scale * b + c.shift);
    const Vec<T> d = relu_gradient(value, dh) * c.post_mask;
    store(a.dv + o, d);
    c.s1 += d;
    c.s2 += d * (b - c.mean);
    return value;
  }

  // Finishes the columns from their products, which transformed h replaces.
  template <int NV>
  void finish_columns(const Unit& u, int64_t column_count, int64_t first) const {
    const int64_t first_row = (u.sample * units.height + u.row) * units.width;
    for (int v = 0; v < NV; ++v) {
      const int64_t i = (first + v) * kVec<T>;
      Channels c{{}, {}, {}, load(mean.data + i), {}, {}};
      int32_t sample = -1;
      for (int64_t p = 0; p < column_count; ++p) {
        const PairColumn& pair = columns[p];
        if (pair.sample != sample) {
          sample = pair.sample;
          const int64_t n = u.sample + sample;
          c.scale = load(scale_shift.scale.row(n) + i);
          c.shift = load(scale_shift.shift.row(n) + i);
          c.post_mask = post_mask.data ? load(post_mask.row(n) + i) : broadcast(T(1));
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

  // Adds to point k of dW of ROWS outputs from j on.
  template <int ROWS, int NV>
  void tap_rows(int64_t column_count, int k, int64_t j, int64_t first) const {
    Block<T, 3 * ROWS, NV> block;
    const T* dy[ROWS];
    for (int i = 0; i < ROWS; ++i) dy[i] = transformed + (k * a.growth + j + i) * planes.plane_size;
    const T* h_column = h + k * kVectors * h_stride;
    for (int64_t p = 0; p < column_count; ++p) {
      const int64_t position = columns[p].position;
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
    planes.list_columns(u, columns);
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

// Packs the transformed weight for groups of vectors; a transformed copy lies behind it.
template <class T>
void pack_weight(const T* w, int64_t growth, int64_t width, T* memory) {
  const int64_t pitch = round_up(width, kLanes);
  T* const transformed = memory + growth * kTaps * pitch;
  parallel_items(growth, kTaps * pitch, [&](int64_t begin, int64_t end) {
    transform_weight(w + begin * width * 9, (end - begin) * width,
                     transformed + begin * width * kTaps, kTaps, 3);
    for_vector_groups<kVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
      constexpr int64_t lanes = decltype(group)::value * kVec<T>;
      const int64_t column = first * kVec<T>;
      for (int64_t j = begin; j < end; ++j) {
        copy_transposed(transformed + (j * width + column) * kTaps, kTaps,
                        std::clamp<int64_t>(width - column, 0, lanes), kTaps,
                        memory + (column * growth + j * lanes) * kTaps, lanes, lanes);
      }
    });
  });
}

// Merges the threads' dweight, of which thread 0 has the total, into dW [growth, width, 3, 3].
template <class T>
void merge_dweight(T* total, int64_t threads, int64_t growth, int64_t width, T* out) {
  const int64_t pitch = round_up(width, kLanes), values = growth * kTaps * pitch;
  parallel_items(growth, threads * kTaps * pitch, [&](int64_t begin, int64_t end) {
    const int64_t distance = growth * 3 * pitch;  // of points
    for (int64_t j = begin; j < end; ++j) {
      T* const output = total + j * 3 * pitch;
      for (int k = 0; k < kWinogradPoints; ++k)
        add_partials(output + k * distance, threads, values, 3 * pitch);
      collect_weight_gradient(output, distance, 3 * pitch);
      for (const int k : {0, 1, 3}) {
        const int64_t y = (k + 1) / 2;  // of the taps' rows
        copy_transposed(output + k * distance, pitch, 3, width, out + j * width * 9 + y * 3, 9, 3);
      }
    }
  });
}

}  // namespace

template <class S>
void conv3x3_backward(const Conv3x3Backward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, pitch = round_up(a.width, kLanes);
  const Units units(samples, a.features.height, a.features.width, 2 * a.width,
                    thread_count(samples));
  const WinogradPlanes planes(units);
  const int64_t threads = thread_count(units.count);

  const Scratch weight(sizeof(T) * a.growth * kTaps * (pitch + a.width));
  pack_weight(a.weight, a.growth, a.width, weight.as<T>());
  const PaddedRows<T> scale(a.scale_shift.scale, samples, a.width),
      shift(a.scale_shift.shift, samples, a.width);
  const PaddedRows<T> post_mask(a.post_mask, samples, a.width), mean({a.norm.mean}, 1, a.width);
  const Workers<Conv3x3BackwardWorker<S>> workers(
      {a, units, planes, weight.as<T>(), {scale, shift}, post_mask, mean}, threads);
  const int64_t dweight_values = a.growth * kTaps * pitch;
  const Scratch dweight(sizeof(T) * threads * dweight_values);
  const Scratch sums(sizeof(double) * threads * 2 * pitch);
  std::fill_n(sums.as<double>(), threads * 2 * pitch, 0.0);
  if (units.count == 0) std::fill_n(dweight.as<T>(), dweight_values, T(0));

  parallel(units.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    Conv3x3BackwardWorker<S> worker = workers[thread];
    worker.sums = sums.as<double>() + thread * 2 * pitch;
    worker.dweight = dweight.as<T>() + thread * dweight_values;
    std::fill_n(worker.plane, units.plane_size, T(0));
    std::fill_n(worker.transformed, worker.transformed_values(), T(0));
    std::fill_n(worker.dweight, dweight_values, T(0));
    for (int64_t i = begin; i < end; ++i) worker.run(units[i]);
  });

  merge_dweight(dweight.as<T>(), threads, a.growth, a.width, a.dweight);
  finish_bottleneck_norm(a, sums.as<double>(), threads, pitch);
}

DENSENET_EXT_INSTANTIATE(conv3x3_backward, Conv3x3Backward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
