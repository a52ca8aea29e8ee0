// Forward of the 1x1 convolution of a dense layer on the tile unit; formula:
// ../bottleneck_forward.cpp.
//
// Up to 48 outputs: bottleneck_narrow.h. More:
//
// PixelColumns of sums are pixels, rows are outputs: x is planar, so that normalized, rectified and
// split it is a right operand as it comes; W is the remaining one. The unit works while the vector
// instructions that follow its memory_values in the program go on: meanwhile the next group of
// columns is formed, and the sums of the strip of four columns before are transposed in registers
// into rows of b.
#include "bottleneck_narrow.h"
#include "cpu/kernels/row_moments.h"
#include "cpu/parallel.h"
#include "pixel_columns.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kMostColumns =
    16;  // of a group: a stretch of a plane that is worth a prefetcher's while
constexpr int64_t kBudget = 1200 * 1024;

// PixelColumns that are formed together.
template <class S>
struct ColumnGroup {
  uint32_t* z;
  struct {
    const S *x, *prefetch;  // of channel 0; what the next group has there
    const float *scale, *shift;
    S* b;
    int64_t count;
  } columns[kMostColumns];
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
  const uint32_t* weight;                     // [outputs / 16, chunks, P, 16, 16]
  // of one thread
  uint32_t* z;  // [2, width, chunks, P, 16, 16], a little more than that from column to column
  float* sums;  // [2, pitch / 16, 4, 16, 16]

  // What is to be formed of a group: cells of one channel pair of a chunk in one column.
  struct Forming {
    const Group* group;
    int64_t remaining, row = 0, column = 0;
  };

  void form(Forming& f, int64_t n) const {
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
    for (int64_t i = 0; i < width; ++i) {
      const PixelColumn column = columns[index * width + i];
      const PixelColumn later = columns[std::min((index + 1) * width + i, columns.count - 1)];
      group.columns[i] = {
          a.features.plane(column.sample, 0) + column.pixel,
          a.features.plane(later.sample, 0) + later.pixel,
          a.scale_shift.scale.row(column.sample),
          a.scale_shift.shift.row(column.sample),
          a.bottleneck + (column.sample * a.features.pixels() + column.pixel) * pitch,
          column.count};
    }
    return group;
  }

  int64_t outputs() const { return pitch / kSide; }
  float* sums_of(int64_t strip) const { return sums + strip % 2 * outputs() * kRowSums; }

  // Tile t of a group's s-th strip, from its sums to rows of b.
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

  // Meanwhile `next` is formed, if there is one.
  void run(const Group& group, const Group& next, bool last) const {
    const int64_t strips = width / 4, slots = outputs() * chunks;
    Forming forming{&next, last ? 0 : chunks * kSide * width};
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

// body(memory_values, begin, end, count, mean) for each thread's parallel_with_moments of the
// items: `memory_values` values of memory, and where it merges the moments of its `count` rows,
// mean and behind it m2.
template <class S, class F>
void parallel_with_moments(const BottleneckForward<S>& a, int64_t items, int64_t memory_values,
                           int64_t pitch, const F& body) {
  const int64_t threads = thread_count(items);
  const Scratch tiles(4 * threads * memory_values);
  const Scratch sums(sizeof(double) * threads * 2 * pitch);
  const Scratch counts(sizeof(double) * threads);
  std::fill_n(sums.as<double>(), threads * 2 * pitch, 0.0);
  std::fill_n(counts.as<double>(), threads, 0.0);
  parallel(items, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileConfiguration unit;
    body(tiles.as<uint32_t>() + thread * memory_values, begin, end, counts.as<double>()[thread],
         sums.as<double>() + thread * 2 * pitch);
  });
  if (a.mean)
    finish_row_moments(counts.as<double>(), sums.as<double>(), threads, pitch, a.width, a.mean,
                       a.m2);
}

template <class S>
void run_narrow(const BottleneckForward<S>& a, const ForwardWeight<S>& weight) {
  const PixelColumns columns(a.features.samples, a.features.pixels());
  parallel_with_moments(
      a, ceil_div(columns.count, kNarrowColumns), kNarrowMemory<S>, weight.outputs * kSide,
      [&](uint32_t* memory_values, int64_t begin, int64_t end, double& count, double* mean) {
        run_narrow_strips(a, columns, weight, memory_values, begin, end, count, mean);
      });
}

template <class S>
void run_wide(const BottleneckForward<S>& a, const ForwardWeight<S>& packed) {
  using Work = WideBottleneck<S>;
  const uint32_t* const weight = packed.data();
  const int64_t pitch = packed.outputs * kSide, chunks = packed.chunks;
  const PixelColumns columns(a.features.samples, a.features.pixels());
  // one line more than a power of two, so that a row's columns do not parallel_with_moments cache
  // sets
  const int64_t column_step = chunks * Work::kChunk + kSide;
  const int64_t fit = std::min(kBudget / (2 * 4 * column_step),
                               ceil_div(columns.count, 4 * thread_count(columns.count)));
  const int64_t width = std::clamp<int64_t>(fit / 4 * 4, 4, kMostColumns);
  const int64_t z_pairs = 2 * width * column_step,
                memory_values = z_pairs + 2 * pitch / kSide * Work::kRowSums;

  parallel_with_moments(a, ceil_div(columns.count, width), memory_values, pitch,
                        [&](uint32_t* z, int64_t begin, int64_t end, double& count, double* mean) {
                          const Work job{a,      columns, chunks,
                                         pitch,  width,   column_step,
                                         weight, z,       reinterpret_cast<float*>(z + z_pairs)};
                          ColumnGroup<S> group = job.group(begin);
                          typename Work::Forming whole_group{&group, chunks * kSide * width};
                          job.form(whole_group, whole_group.remaining);
                          for (int64_t g = begin; g < end; ++g) {
                            const ColumnGroup<S> next = job.group(g + 1);
                            job.run(group, next, g + 1 == end);
                            group = next;
                            add_moments(a, columns, g * width, (g + 1) * width, pitch, count, mean);
                          }
                        });
}

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>& a) {
  const ForwardWeight<S> weight(a);
  is_narrow(a.width) ? run_narrow(a, weight) : run_wide(a, weight);
}

template void bottleneck_forward<float>(const BottleneckForward<float>&);
template void bottleneck_forward<BFloat16>(const BottleneckForward<BFloat16>&);
template void bottleneck_forward<Float16>(const BottleneckForward<Float16>&);

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
