#include "tickets.h"

#include <algorithm>
#include <map>
#include <vector>

namespace simt {
namespace {

struct Block {
  uint32_t first;  // tick
  Index index;
  std::vector<Stamp> fences;
};
struct Atomic {
  Stamp stamp;
  uint32_t ordered;  // belongs to its thread
  size_t block;
};
// An atomic operation of the block that runs. It came after `seen` others on the same address.
struct Seen {
  const void* address;
  size_t seen;
  Stamp stamp;
};

std::vector<Block> blocks;  // belong to this launch, in the order in which they ran
std::map<const void*, std::vector<Atomic>> atomics;
std::vector<Seen> seen_by_block;

size_t block_number(uint32_t tick) {
  const auto next = std::upper_bound(blocks.begin(), blocks.end(), tick,
                                     [](uint32_t t, const Block& b) { return t < b.first; });
  return static_cast<size_t>(next - blocks.begin()) - 1;
}

// True if a came before b in the same block: by the same thread, across a barrier, or across a
// __syncwarp.
bool ordered(Stamp a, Stamp b, uint32_t ordered_of_b) {
  if (a.tick() != b.tick()) return a.tick() < b.tick();
  if (a.thread() == b.thread()) return a.step() <= b.step();
  return a.thread() / kWarp == b.thread() / kWarp && a.step() < ordered_of_b;
}

// True if a fence lies between the access at `stamp` and the atomic operation.
bool fenced(const Block& block, Stamp stamp, const Atomic& atomic) {
  return std::any_of(block.fences.begin(), block.fences.end(), [&](Stamp fence) {
    const bool covers = stamp.thread() == fence.thread() && stamp.tick() == fence.tick()
                            ? stamp.step() < fence.step()
                            : stamp.tick() < fence.tick();
    return covers && ordered(fence, atomic.stamp, atomic.ordered);
  });
}

}  // namespace

void record_fence(const Thread& thread) { blocks.back().fences.push_back(stamp_of(thread)); }

void record_atomic(const Thread& thread, const void* address) {
  auto& all = atomics[address];
  seen_by_block.push_back({address, all.size(), stamp_of(thread)});
  all.push_back({stamp_of(thread), thread.ordered, blocks.size() - 1});
}

bool published(Stamp stamp, const Thread& thread) {
  const size_t number = block_number(stamp.tick());
  for (const Seen& s : seen_by_block) {
    if (!ordered(s.stamp, stamp_of(thread), thread.ordered)) continue;
    const auto& all = atomics[s.address];
    for (size_t i = 0; i < s.seen; ++i) {
      if (all[i].block != number) continue;
      if (stamp.has(kAtomic) || fenced(blocks[number], stamp, all[i])) return true;
    }
  }
  return false;
}

Index block_of(uint32_t tick) { return blocks[block_number(tick)].index; }

void record_block() {
  blocks.push_back({clock_.tick, state.block, {}});
  seen_by_block.clear();
}
void forget_blocks() {
  blocks.clear();
  atomics.clear();
}

}  // namespace simt
