// Splits a grid of tiles by groups of input channels over the threads of a backward kernel.
//
// If threads share the tiles, the operand of a tile is formed once, but each thread has a private
// sum of the whole weight gradient. If threads share the channels, there is nothing to merge, but
// every thread forms the operand of every tile. The first is better for large maps, the second for
// small ones.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "pack.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

struct ThreadSplit {
  int64_t tiles, groups, tile_parts = 1, group_parts = 1;

  // Picks the split of least cost. The unit is the product of one tile with one group: forming the
  // operand of a tile costs about two, a further private sum about half a unit for each group.
  ThreadSplit(int64_t tiles, int64_t groups, int64_t threads) : tiles(tiles), groups(groups) {
    int64_t least = -1;
    for (int64_t parts = 1; parts <= std::min(tiles, threads); ++parts) {
      const int64_t parts_of_groups = std::max<int64_t>(1, std::min(groups, threads / parts));
      const int64_t cost = 4 * ceil_div(tiles, parts) * (ceil_div(groups, parts_of_groups) + 2) +
                           (parts > 1 ? 2 * parts * ceil_div(groups, threads) : 0);
      if (least >= 0 && cost >= least) continue;
      least = cost;
      tile_parts = parts;
      group_parts = parts_of_groups;
    }
  }

  int64_t threads() const { return tile_parts * group_parts; }
};

struct Share {
  int64_t thread, tile_part, first_tile, last_tile, first_group, last_group;
};

// Calls body(share) for the share of each thread.
template <class F>
void parallel_shares(const ThreadSplit& s, const F& body) {
  if (s.tiles == 0) return;
  parallel(s.threads(), s.threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const int64_t i = thread / s.group_parts, j = thread % s.group_parts;
      body(Share{thread, i, s.tiles * i / s.tile_parts, s.tiles * (i + 1) / s.tile_parts,
                 s.groups * j / s.group_parts, s.groups * (j + 1) / s.group_parts});
    }
  });
}

// Holds private sums of the gradient of a weight, transposed and padded, and of a norm, one for
// each part of the tiles. A share clears its channels.
template <class T>
class PartialGradients {
 public:
  PartialGradients(const ThreadSplit& split, int64_t dweight_values, int64_t sum_values)
      : parts_(split.tile_parts),
        dweight_values_(dweight_values),
        sum_values_(sum_values),
        dweight_(sizeof(T) * parts_ * dweight_values),
        sums_(sizeof(double) * parts_ * sum_values) {
    if (split.tiles > 0) return;
    std::fill_n(dweight_.as<T>(), dweight_values, T(0));
    std::fill_n(sums_.as<double>(), sum_values, 0.0);
  }

  T* dweight(const Share& share, int64_t begin, int64_t end) const {
    return cleared(dweight_.as<T>() + share.tile_part * dweight_values_, begin, end);
  }
  double* sums(const Share& share, int64_t begin, int64_t end) const {
    return cleared(sums_.as<double>() + share.tile_part * sum_values_, begin, end);
  }

  // Writes dW [rows, columns] from its transpose, whose rows have `pitch` values.
  void merge_dweight(int64_t pitch, int64_t rows, int64_t columns, T* out) const {
    merge_transposed(dweight_.as<T>(), parts_, dweight_values_, pitch, rows, columns, out);
  }
  const double* merge_sums() const {
    add_partials(sums_.as<double>(), parts_, sum_values_, sum_values_);
    return sums_.as<double>();
  }

 private:
  template <class E>
  static E* cleared(E* values, int64_t begin, int64_t end) {
    std::fill(values + begin, values + end, E(0));
    return values;
  }

  int64_t parts_, dweight_values_, sum_values_;
  Scratch dweight_, sums_;
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
