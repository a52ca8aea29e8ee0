// How the threads of a backward share a grid of tiles by groups of input channels.
//
// ThreadSplit of the tiles alone have every thread form a tile's common operand once, but leave a
// private sum of the whole weight gradient in each; shares of the channels alone leave nothing to
// merge, but every thread forms the operand of every tile. Large maps want the first, small ones
// the second.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

struct ThreadSplit {
  int64_t tiles, groups, tile_parts = 1, group_parts = 1;

  // Picks the split of least cost, in products of one tile with one group: forming the operand of a
  // tile costs about two of them, a further private sum about a half of one for each group.
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

// body(share) for the share of each thread.
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

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
