// A fast check that serves most accesses: there is nothing to report and little to remember. Every
// other access goes to access() in shadow.cpp, which checks it again and writes the report.
#pragma once

#include "memory_map.h"
#include "stamp.h"

namespace simt {

enum class Access { kRead, kWrite, kAtomic };

// The shared memory of the block that runs at the moment.
struct Shared {
  uintptr_t begin, bytes;
  Cell* cells;
};
extern Shared shared;

// Remembers a reader. A cell holds only one reader and flags: enough to detect a writer that
// conflicts with any of the readers.
inline void remember_read(Cell& cell, const Thread& thread, Stamp stamp, bool in_shared,
                          uintptr_t pc) {
  const Stamp r = {cell.read};
  if (r.tick() != stamp.tick()) {
    const bool other_block = !in_shared && r.tick() >= clock_.launch && r.tick() < clock_.block;
    const bool keeps_flag = r.tick() >= clock_.block && r.has(kManyBlocks);
    cell.read = stamp.word | (other_block || keeps_flag ? kManyBlocks : kNone);
  } else if (r.thread() / kWarp != thread.warp) {
    if (!r.has(kManyWarps)) cell.read = r.word | kManyWarps;
    return;
  } else if (r.step() < thread.ordered) {
    cell.read = stamp.word | (r.word & (kManyWarps | kManyBlocks));
  } else {
    if (r.thread() != thread.id) cell.read = r.word | kManyLanes;
    return;
  }
  cell.read_pc = site(pc);
}

// True if an access is allowed after the write w: the same thread wrote it, or this block did
// before its last barrier, or the write is old enough for all threads, in ticks [from, to).
inline bool is_settled(Stamp w, Stamp stamp, uint32_t from, uint32_t to) {
  constexpr uint64_t kWhoAndWhen = 0xffffffff00007fe0;
  if (w.has(kPending)) return false;
  return w.tick() - from < to - from || w.tick() - clock_.block < clock_.tick - clock_.block ||
         ((w.word ^ stamp.word) & kWhoAndWhen) == 0;
}
// True if a write is allowed after the reads r.
inline bool is_free(Stamp r, Stamp stamp, bool in_shared) {
  constexpr uint64_t kWhoAndWhenAndFlags =
      0xffffffff00007fe0 | kManyLanes | kManyWarps | kManyBlocks;
  if (r.tick() == stamp.tick()) return ((r.word ^ stamp.word) & kWhoAndWhenAndFlags) == 0;
  return in_shared || r.tick() < clock_.launch || (r.tick() >= clock_.block && !r.has(kManyBlocks));
}

template <int64_t bytes, Access kind>
inline bool usual_access(const Thread& thread, uintptr_t address, uintptr_t pc) {
  Cell* cells;
  uint32_t from = 0, to;  // ticks of old writes
  const uintptr_t offset = address - shared.begin;
  const bool in_shared = offset < shared.bytes;
  if (in_shared) {
    if (shared.bytes - offset < bytes) return false;
    cells = shared.cells + offset / 2;
    to = kind == Access::kRead ? 0 : clock_.block;
  } else {
    const Extent* const e = find_extent(address);
    if (!thread.waited || !e || e->end - address < bytes) return false;
    if (!e->cells) return kind == Access::kRead;
    cells = e->cells + (granule_of(address) - granule_of(e->begin));
    from = kind == Access::kRead && e->scratch ? e->birth : 0;
    to = clock_.launch;
  }
  const Stamp stamp = stamp_of(thread);
  for (int64_t i = 0; i < (bytes + 1) / 2; ++i) {
    Cell& cell = cells[i];
    if (!is_settled({cell.write}, stamp, from, to)) return false;
    if (kind == Access::kRead) {
      remember_read(cell, thread, stamp, in_shared, pc);
    } else {
      if (!is_free({cell.read}, stamp, in_shared)) return false;
      cell.write = stamp.word;
      cell.write_pc = site(pc);
    }
  }
  return true;
}

}  // namespace simt
