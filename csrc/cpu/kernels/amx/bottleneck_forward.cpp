// Forward of the 1x1 convolution of a dense layer on the tile unit; formula:
// ../bottleneck_forward.cpp.
//
// Columns of sums are pixels, rows are outputs: x is planar, so that normalized, rectified and
// split it is a right operand as it comes; W is the left one. The unit works while the vector
// instructions that follow its own in the program go on: meanwhile the next group of columns is
// formed, and the sums of the strip of four columns before are transposed in registers into rows of
// b.
#include "../../parallel.h"
#include "../row_moments.h"
#include "columns.h"
#include "tiles.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kMostColumns =
    16;  // of a group: a stretch of a plane that is worth a prefetcher's while
constexpr int64_t kBudget = 1200 * 1024;

// Columns that are formed together.
template <class S>
struct ColumnGroup {
  uint32_t* z;
  struct {
    const S *x, *ahead;  // of channel 0; what the next group has there
    const float *scale, *shift;
    S* b;
    int64_t count;
  } columns[kMostColumns];
};

template <class S>
struct Job {
  using Group = ColumnGroup<S>;
  static constexpr int P = kParts<S>;
  static constexpr int64_t kChunk = P * kTilePairs,
                           kRowSums = 4 * kSide * kSide;  // of four columns
  const BottleneckForward<S>& a;
  const Columns& columns;
  int64_t chunks, pitch, width, column_step;  // of a group in columns, of z in pairs
  const uint32_t* weight;                     // [outputs / 16, chunks, P, 16, 16]
  // of one thread
  uint32_t* z;  // [2, width, chunks, P, 16, 16], a little more than that from column to column
  float* sums;  // [2, pitch / 16, 4, 16, 16]

  // Of a group's columns the rows first .. last: of these are 16 in a chunk, of two channels each.
  void form(const Group& group, int64_t first, int64_t last) const {
    const int64_t step = a.features.plane_stride;
    for (int64_t at = first; at < last; ++at) {
      const int64_t c0 = at / kSide * kDepth + at % kSide, c1 = c0 + kSide;
      uint32_t* out = group.z + at / kSide * kChunk + at % kSide * kSide;
      for (int64_t i = 0; i < width; ++i, out += column_step) {
        const auto& column = group.columns[i];
        const auto value = [&](int64_t c) __attribute__((always_inline)) {
          if (c >= a.channels) return Vec<float>{};
          __builtin_prefetch(column.ahead + c * step, 0, 2);
          return relu(broadcast(column.scale[c]) * load_first(column.x + c * step, column.count) +
                      broadcast(column.shift[c]));
        };
        split<P>(value(c0), value(c1), out);
      }
    }
  }

  Group group(int64_t index) const {
    Group group;
    group.z = z + index % 2 * width * column_step;
    for (int64_t i = 0; i < width; ++i) {
      const Column at = columns[index * width + i];
      const Column then = columns[std::min((index + 1) * width + i, columns.count - 1)];
      group.columns[i] = {a.features.plane(at.sample, 0) + at.pixel,
                          a.features.plane(then.sample, 0) + then.pixel,
                          a.norm.scale.row(at.sample),
                          a.norm.shift.row(at.sample),
                          a.bottleneck + (at.sample * a.features.pixels() + at.pixel) * pitch,
                          at.count};
    }
    return group;
  }

  int64_t outputs() const { return pitch / kSide; }
  float* sums_of(int64_t strip) const { return sums + strip % 2 * outputs() * kRowSums; }

  // Outputs first .. last (in 16s) of a group's s-th strip, from its sums to rows of b.
  void finish(const Group& group, int64_t s, int64_t first, int64_t last) const {
    for (int64_t i = 0; i < 4; ++i) {
      const auto& column = group.columns[s * 4 + i];
      for (int64_t o = first; o < last; ++o) {
        Vec<float> rows[kSide];
        load_transposed(sums_of(s) + o * kRowSums + i * kSide * kSide, rows);
        DX_UNROLL
        for (int r = 0; r < kSide; ++r) {
          if (r < column.count) store(column.b + r * pitch + o * kSide, rows[r]);
        }
      }
    }
  }

  // Meanwhile `next` is formed, if there is one.
  void run(const Group& group, const Group& next, bool last) const {
    const int64_t strips = width / 4, rows = last ? 0 : chunks * kSide;
    for (int64_t s = 0; s < strips; ++s) {
      const auto after = [&](int64_t i, int64_t n) {
        form(next, rows * (s * n + i) / (strips * n), rows * (s * n + i + 1) / (strips * n));
        if (s > 0) finish(group, s - 1, outputs() * i / n, outputs() * (i + 1) / n);
      };
      strip_product<P>(outputs(), chunks, {weight, chunks * kChunk, kChunk},
                       {group.z + s * 4 * column_step, column_step, kChunk}, sums_of(s), false,
                       after);
    }
    finish(group, strips - 1, 0, outputs());
  }
};

template <class S>
void run(const BottleneckForward<S>& a, int64_t pitch, int64_t chunks, const uint32_t* weight) {
  using Work = Job<S>;
  const Columns columns(a.features.samples, a.features.pixels());
  // one line more than a power of two, so that a row's columns do not share cache sets
  const int64_t column_step = chunks * Work::kChunk + kSide;
  const int64_t fit = std::min(kBudget / (2 * 4 * column_step),
                               ceil_div(columns.count, 4 * thread_count(columns.count)));
  const int64_t width = std::clamp<int64_t>(fit / 4 * 4, 4, kMostColumns);
  const int64_t groups = ceil_div(columns.count, width), threads = thread_count(groups);
  const int64_t z_pairs = 2 * width * column_step,
                own = z_pairs + 2 * pitch / kSide * Work::kRowSums;
  const Scratch tiles(4 * threads * own);
  const Scratch sums(sizeof(double) * threads * 2 * pitch);
  const Scratch counts(sizeof(double) * threads);
  std::fill_n(sums.as<double>(), threads * 2 * pitch, 0.0);
  std::fill_n(counts.as<double>(), threads, 0.0);

  parallel(groups, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const TileUnit unit;
    uint32_t* const z = tiles.as<uint32_t>() + thread * own;
    const Work job{a,      columns, chunks,
                   pitch,  width,   column_step,
                   weight, z,       reinterpret_cast<float*>(z + z_pairs)};
    double* const mean = sums.as<double>() + thread * 2 * pitch;
    double& count = counts.as<double>()[thread];
    ColumnGroup<S> group = job.group(begin);
    job.form(group, 0, chunks * kSide);
    for (int64_t g = begin; g < end; ++g) {
      const ColumnGroup<S> next = job.group(g + 1);
      job.run(group, next, g + 1 == end);
      group = next;
      if (!a.mean) continue;
      const int64_t first = columns.row(g * width), rows = columns.row((g + 1) * width) - first;
      add_row_moments<S>(a.bottleneck + first * pitch, rows, pitch, count, mean, mean + pitch);
      count += static_cast<double>(rows);
    }
  });
  if (a.mean)
    finish_row_moments(counts.as<double>(), sums.as<double>(), threads, pitch, a.width, a.mean,
                       a.m2);
}

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>& a) {
  constexpr int P = kParts<S>;
  constexpr int64_t chunk = P * kTilePairs;
  const int64_t pitch = round_up(a.width, kLanes), chunks = ceil_div(a.channels, kDepth),
                outputs = pitch / kSide;
  const Scratch packed(4 * outputs * chunks * chunk);
  parallel(outputs, thread_count(outputs), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t o = begin * kSide; o < end * kSide; ++o) {
      uint32_t* const row = packed.as<uint32_t>() + o / kSide * chunks * chunk + o % kSide * kSide;
      split_row<P>(a.weight + o * a.channels, o < a.width ? a.channels : 0, chunks, row);
    }
  });
  run<S>(a, pitch, chunks, packed.as<uint32_t>());
}

template void bottleneck_forward<float>(const BottleneckForward<float>&);
template void bottleneck_forward<BFloat16>(const BottleneckForward<BFloat16>&);
template void bottleneck_forward<Float16>(const BottleneckForward<Float16>&);

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
