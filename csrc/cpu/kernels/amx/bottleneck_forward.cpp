// Computes the 1x1 convolution of a dense layer on AMX; formula: ../bottleneck_forward.cpp.
//
// bottleneck_narrow.h is for up to 48 outputs. With more, columns of sums are pixels and rows are
// outputs: x is planar, so that normalized, rectified and split it is a right operand without a
// transposition; W is the left one. Between the products the next group of columns is formed, and
// the sums of the preceding strip of four columns are transposed in registers into rows of b.
#include "bottleneck_narrow.h"
#include "cpu/kernels/instantiate.h"
#include "cpu/kernels/row_moments.h"
#include "cpu/parallel.h"
#include "pixel_columns.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

// A group has as many columns as make a stretch of a plane that is worth a prefetcher's while.
constexpr int64_t kMaxColumns = 16;

// The columns of a group are formed together.
template <class S>
struct ColumnGroup {
  uint32_t* z;
  ForwardColumn<S> columns[kMaxColumns];
};

template <class S>
struct WideBottleneck {
  using Group = ColumnGroup<S>;
  static constexpr int P = kParts<S>;
  static constexpr int64_t kChunk = P * kTilePairs,
                           kRowSums = 4 * kSide * kSide;  // of four columns
  const BottleneckForward<S>& a;
  const PixelColumns& columns;
  int64_t chunks, pitch, width, column_step;  // of a group in columns, of z in pairs
  const uint32_t* weight = nullptr;           // [outputs / 16, chunks, P, 16, 16]
  // These belong to one thread.
  uint32_t* z = nullptr;  // [2, width, chunks, P, 16, 16], with a gap from column to column
  float* sums = nullptr;  // [2, pitch / 16, 4, 16, 16]

  // A group is formed cell by cell; a cell is one channel pair of a chunk in one column.
  struct FormProgress {
    const Group* group;
    int64_t remaining, row = 0, column = 0;
  };

  void form(FormProgress& f, int64_t n) const {
    const int64_t step = a.features.plane_stride;
    n = std::min(n, f.remaining);
    f.remaining -= n;
    while (n > 0) {
      const int64_t row = f.row, last = std::min(width, f.column + n);
      const int64_t c0 = row / kSide * kDepth + row % kSide, c1 = c0 + kSide;
      uint32_t* out =
          f.group->z + row / kSide * kChunk + row % kSide * kSide + f.column * column_step;
      n -= last - f.column;
      for (int64_t i = f.column; i < last; ++i, out += column_step) {
        const auto& column = f.group->columns[i];
        const auto value = [&](int64_t c) __attribute__((always_inline)) {
          if (c >= a.channels) return Vec<float>{};
          __builtin_prefetch(column.prefetch + c * step, 0, 2);
          return relu(broadcast(column.scale[c]) * load_first(column.x + c * step, column.count) +
                      broadcast(column.shift[c]));
        };
        split<P>(value(c0), value(c1), out);
      }
      f.column = last;
      if (last == width) {
        f.column = 0;
        ++f.row;
      }
    }
  }

  Group group(int64_t index) const {
    Group group;
    group.z = z + index % 2 * width * column_step;
    for (int64_t i = 0; i < width; ++i)
      group.columns[i] = {a, columns, index * width + i, width, pitch};
    return group;
  }

  int64_t outputs() const { return pitch / kSide; }
  float* sums_of(int64_t strip) const { return sums + strip % 2 * outputs() * kRowSums; }

  // Writes tile t of a group's s-th strip from its sums to rows of b.
  void finish(const Group& group, int64_t s, int64_t t) const {
    const int64_t i = t / outputs(), o = t % outputs();
    const auto& column = group.columns[s * 4 + i];
    Vec<float> rows[kSide];
    load_transposed(sums_of(s) + o * kRowSums + i * kSide * kSide, rows);
    DX_UNROLL
    for (int r = 0; r < kSide; ++r) {
      if (r < column.count) store(column.b + r * pitch + o * kSide, rows[r]);
    }
  }

  // Multiplies a group and forms `next` between the products, if there is one.
  void run(const Group& group, const Group& next, bool last) const {
    const int64_t strips = width / 4, slots = outputs() * chunks;
    FormProgress forming{&next, last ? 0 : chunks * kSide * width};
    const int64_t portion = ceil_div(forming.remaining, strips * slots);
    for (int64_t s = 0; s < strips; ++s) {
      Pace pace{4 * outputs(), slots};
      int64_t finished = 0;
      const auto work = [&]() __attribute__((always_inline)) {
        form(forming, portion);
        if (s > 0)
          pace.step([&]() __attribute__((always_inline)) { finish(group, s - 1, finished++); });
      };
      strip_product<P>(outputs(), chunks, {weight, chunks * kChunk, kChunk},
                       {group.z + s * 4 * column_step, column_step, kChunk}, sums_of(s), work);
    }
    form(forming, forming.remaining);
    for (int64_t t = 0; t < 4 * outputs(); ++t) finish(group, strips - 1, t);
  }
};

// Calls body(memory, begin, end, moments) on each thread, with memory of `memory_values` values.
template <class S, class F>
void parallel_with_moments(const BottleneckForward<S>& a, int64_t items, int64_t memory_values,
                           int64_t pitch, const F& body) {
  const int64_t threads = thread_count(items);
  const Scratch memory(4 * threads * memory_values);
  const RowMoments moments(threads, pitch);
  parallel(items, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileConfiguration configuration;
    body(memory.as<uint32_t>() + thread * memory_values, begin, end, moments[thread]);
  });
  if (a.mean) moments.finish(a.width, a.mean, a.m2);
}

template <class S>
void narrow_forward(const BottleneckForward<S>& a, const ForwardWeight<S>& weight) {
  const PixelColumns columns(a.features.samples, a.features.pixels());
  parallel_with_moments(
      a, ceil_div(columns.count, kNarrowColumns), kNarrowMemory<S>, weight.outputs * kSide,
      [&](uint32_t* memory, int64_t begin, int64_t end, const RunningMoments& moments) {
        run_narrow<S>({a, columns, weight, memory, begin, end, moments});
      });
}

template <class S>
void wide_forward(const BottleneckForward<S>& a, const ForwardWeight<S>& weight) {
  using Worker = WideBottleneck<S>;
  const int64_t pitch = weight.outputs * kSide, chunks = weight.chunks;
  const PixelColumns columns(a.features.samples, a.features.pixels());
  // The step has one line more than a power of two, so that a row's columns do not share cache sets
  const int64_t column_step = chunks * Worker::kChunk + kSide;
  const int64_t fit = std::min(kAmxTileBytes / (2 * 4 * column_step),
                               ceil_div(columns.count, 4 * thread_count(columns.count)));
  const int64_t width = std::clamp<int64_t>(fit / 4 * 4, 4, kMaxColumns);
  const int64_t z_pairs = 2 * width * column_step;

  parallel_with_moments(
      a, ceil_div(columns.count, width), z_pairs + 2 * pitch / kSide * Worker::kRowSums, pitch,
      [&](uint32_t* z, int64_t begin, int64_t end, const RunningMoments& moments) {
        Worker worker{a, columns, chunks, pitch, width, column_step};
        worker.weight = weight.data();
        worker.z = z;
        worker.sums = reinterpret_cast<float*>(z + z_pairs);
        ColumnGroup<S> group = worker.group(begin);
        typename Worker::FormProgress whole_group{&group, chunks * kSide * width};
        worker.form(whole_group, whole_group.remaining);
        for (int64_t g = begin; g < end; ++g) {
          const ColumnGroup<S> next = worker.group(g + 1);
          worker.run(group, next, g + 1 == end);
          group = next;
          add_moments(a, columns, g * width, (g + 1) * width, moments);
        }
      });
}

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>& a) {
  const ForwardWeight<S> weight(a);
  is_narrow(a.width) ? narrow_forward(a, weight) : wide_forward(a, weight);
}

DENSENET_EXT_INSTANTIATE_AMX(bottleneck_forward, BottleneckForward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
