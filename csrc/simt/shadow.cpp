#include "shadow.h"

#include <algorithm>
#include <cstring>

#include "findings.h"
#include "memory_map.h"
#include "tickets.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

Clock clock_;
Shared shared;

namespace {

// Shared memory lies between guards, so that an access just outside can be reported as such.
constexpr int64_t kGuard = 64 * 1024;
alignas(128) unsigned char zone[kGuard + kMostShared + kGuard];
unsigned char* const shared_memory = zone + kGuard;
Cell shared_cells[kMostShared / 2 + 1];

const char* verb(Access kind) {
  return kind == Access::kRead ? "reads" : kind == Access::kWrite ? "writes" : "atomically adds to";
}

// One access, with all that its checks and reports need.
struct Check {
  Thread& thread;
  uintptr_t address;
  int64_t bytes;
  Access kind;
  uintptr_t pc;
  bool in_shared;
  bool scratch;
  uint32_t birth;

  std::string place(uintptr_t at) const {
    if (!in_shared) return describe_address(at);
    return "byte " + std::to_string(at - reinterpret_cast<uintptr_t>(shared_memory)) +
           " of shared memory";
  }
  std::string subject(uintptr_t at) const {
    return thread_name(thread.id, state.block) + " " + verb(kind) + " " + place(at) + " " +
           source(pc);
  }
  std::string other(Stamp s, const char* did, uint32_t other_pc) const {
    return thread_name(s.thread(), block_of(s.tick())) + " " + did + " " + source_of(other_pc);
  }
  void race(uintptr_t at, Stamp s, const char* did, uint32_t other_pc, bool blocks) const {
    report(blocks ? "race between blocks" : "race",
           subject(at) + "; " + other(s, did, other_pc) + ", " +
               (blocks ? "with no fence and ticket between them"
                : s.thread() / kWarp == thread.warp
                    ? "the same warp, with no __syncwarp or barrier between them"
                    : "with no barrier between them"),
           pc, other_pc);
  }

  // Checks that this access may come after the last write.
  void against_write(const Cell& cell, uintptr_t at) const {
    const Stamp w = {cell.write};
    const uint32_t tick = w.tick();
    const bool both_atomic = kind == Access::kAtomic && w.has(kAtomic);
    if (tick >= clock_.block) {
      if (w.has(kPending)) {
        report("cp.async",
               subject(at) + " before its cp.async has been waited for: " +
                   other(w, "issued it", cell.write_pc),
               pc, cell.write_pc);
      } else if (tick == clock_.tick && !precedes(w, thread) && !both_atomic) {
        race(at, w, "wrote it", cell.write_pc, false);
      }
    } else if (in_shared) {
      if (kind == Access::kRead) unwritten(at);
    } else if (tick >= clock_.launch) {
      if (!both_atomic && !published(w, thread)) race(at, w, "wrote it", cell.write_pc, true);
    } else if (scratch && tick < birth && kind != Access::kWrite) {
      unwritten(at);
    }
  }

  void against_read(const Cell& cell, uintptr_t at) const {
    const Stamp r = {cell.read};
    const uint32_t tick = r.tick();
    if (tick >= clock_.block) {
      const bool conflict = r.has(kManyWarps) || !precedes(r, thread) ||
                            (r.has(kManyLanes) && r.step() >= thread.ordered);
      if (tick == clock_.tick && conflict)
        race(at, r, r.thread() == thread.id ? "and others read it" : "read it", cell.read_pc,
             false);
      if (r.has(kManyBlocks)) race(at, r, "and others read it", cell.read_pc, true);
    } else if (!in_shared && tick >= clock_.launch && !published(r, thread)) {
      race(at, r, "read it", cell.read_pc, true);
    }
  }

  void unwritten(uintptr_t at) const {
    report("unwritten", subject(at) + ", which nobody has written", pc, 0);
  }

  void run(Cell* cell) const {
    const Stamp stamp = stamp_of(thread);
    const uintptr_t first = granule_of(address);
    const uintptr_t last = granule_of(address + static_cast<uintptr_t>(bytes) - 1);
    for (uintptr_t g = first; g <= last; ++g, ++cell) {
      const uintptr_t at = g == first ? address : g * 2;
      against_write(*cell, at);
      if (kind == Access::kRead) {
        remember_read(*cell, thread, stamp, in_shared, pc);
      } else {
        against_read(*cell, at);
        cell->write = stamp.word | (kind == Access::kAtomic ? kAtomic : kNone);
        cell->write_pc = site(pc);
      }
    }
  }
};

[[noreturn]] void out_of_bounds(const Check& c, const std::string& where) {
  report("out of bounds",
         thread_name(c.thread.id, state.block) + " " + verb(c.kind) + " " +
             std::to_string(c.bytes) + " bytes, " + where + " " + source(c.pc),
         c.pc, 0);
  stop();
}

void access_shared(Check& c, int64_t offset) {
  const int64_t size = state.launch->shared_bytes;
  if (offset < 0 || offset + c.bytes > size) {
    const int64_t inside = offset < 0 ? 0 : std::clamp<int64_t>(size - offset, 0, c.bytes);
    c.bytes -= inside, c.address += static_cast<uintptr_t>(inside), offset += inside;
    out_of_bounds(c, distance_text(offset < 0 ? -offset : offset - size, offset < 0,
                                   "shared memory (" + std::to_string(size) + " bytes)"));
  }
  if (kHooked) c.run(shared_cells + offset / 2);
}

void access_global(Check& c) {
  const uintptr_t end = c.address + static_cast<uintptr_t>(c.bytes);
  const auto in_arguments = c.address - reinterpret_cast<uintptr_t>(state.launch->arguments);
  if (in_arguments < static_cast<uintptr_t>(state.launch->arguments_bytes)) return;
  if (!c.thread.waited) {
    report("too early",
           c.subject(c.address) + " before it has waited for the kernels before this one", c.pc, 0);
    stop();
  }
  while (c.address < end) {
    const Extent* const e = find_extent(c.address);
    if (!e) out_of_bounds(c, describe_address(c.address));
    c.bytes = static_cast<int64_t>((end < e->end ? end : e->end) - c.address);
    if (c.kind != Access::kRead && !e->writable) {
      report("read-only", c.subject(c.address) + ", an input", c.pc, 0);
      stop();
    }
    if (e->cells) {
      c.scratch = e->scratch, c.birth = e->birth;
      c.run(e->cells + (granule_of(c.address) - granule_of(e->begin)));
    }
    c.address += static_cast<uintptr_t>(c.bytes);
    c.bytes = static_cast<int64_t>(end - c.address);
  }
}

Cell* cells_of_copy(const void* to) {
  return shared_cells + (static_cast<const unsigned char*>(to) - shared_memory) / 2;
}

}  // namespace

void access(Thread& thread, const void* address, int64_t bytes, Access kind, uintptr_t pc) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  Check c = {thread, at, bytes, kind, pc, false, false, 0};
  const uintptr_t in_zone = at - reinterpret_cast<uintptr_t>(zone);
  if (in_zone < sizeof zone) {
    c.in_shared = true;
    access_shared(c, static_cast<int64_t>(in_zone) - kGuard);
  } else if (at - thread.fiber.stack() >= Fiber::kStack) {
    access_global(c);
  }
}

void misaligned(Thread& thread, const void* address, int64_t bytes, uintptr_t pc) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const bool in_shared = at - reinterpret_cast<uintptr_t>(zone) < sizeof zone;
  const Check c = {thread, at, bytes, Access::kRead, pc, in_shared, false, 0};
  const std::string size = std::to_string(bytes);
  report("misaligned",
         thread_name(thread.id, state.block) + " accesses " + size +
             " bytes at an address that is " + std::to_string(at % static_cast<uintptr_t>(bytes)) +
             " more than a multiple of " + size + ": " + c.place(at) + " " + source(pc),
         pc, 0);
  stop();
}

void require(Thread& thread, const void* address, Space space, uintptr_t pc) {
  require_aligned(thread, address, 16, pc);
  const uintptr_t in_zone =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(zone);
  if (space == Space::kAny || (space == Space::kShared) == (in_zone < sizeof zone)) return;
  report("wrong memory",
         thread_name(thread.id, state.block) + " gives an address that is not in " +
             (space == Space::kShared ? "shared" : "global") + " memory " + source(pc),
         pc, 0);
  stop();
}

void copy_begins(Thread& thread, const Copy& copy) {
  if (copy.bytes > 0) access(thread, copy.from, copy.bytes, Access::kRead, copy.pc);
  access(thread, copy.to, 16, Access::kWrite, copy.pc);
  if (!kHooked) return;
  for (int i = 0; i < 8; ++i) cells_of_copy(copy.to)[i].write |= kPending;
}

void copy_ends(Thread& thread, const Copy& copy, uintptr_t wait_pc) {
  if (!kHooked) return;
  for (int i = 0; i < 8; ++i) {
    cells_of_copy(copy.to)[i].write = stamp_of(thread).word;
    cells_of_copy(copy.to)[i].write_pc = site(copy.pc);
  }
  // A barrier does not order a copy that nobody has waited for, so its source is checked here.
  const auto from = reinterpret_cast<uintptr_t>(copy.from);
  const Extent* const e = copy.bytes > 0 ? find_extent(from) : nullptr;
  if (!e || !e->cells) return;
  const Cell& cell = e->cells[granule_of(from) - granule_of(e->begin)];
  const Stamp w = {cell.write};
  if (w.tick() <= copy.issued) return;
  report("cp.async",
         thread_name(thread.id, state.block) + " waits for its cp.async " + source(wait_pc) +
             " of " + source(copy.pc) + ", whose source " + describe_address(from) + " " +
             thread_name(w.thread(), block_of(w.tick())) + " has written in between " +
             source_of(cell.write_pc),
         wait_pc, cell.write_pc);
}

unsigned char* dynamic_shared() { return shared_memory; }

void next_barrier() { ++clock_.tick; }
void next_block() {
  clock_.block = ++clock_.tick;
  record_block();
  std::memset(shared_memory, 0xff, static_cast<size_t>(state.launch->shared_bytes));
}
void begin_launch() {
  clock_.launch = ++clock_.tick;
  forget_blocks();
  shared = {reinterpret_cast<uintptr_t>(shared_memory),
            static_cast<uintptr_t>(state.launch->shared_bytes), shared_cells};
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(zone, sizeof zone);
  __asan_unpoison_memory_region(shared_memory, static_cast<size_t>(state.launch->shared_bytes));
#endif
}

uint32_t clock_tick() { return clock_.tick; }
bool clock_is_old() { return clock_.tick > 0xf0000000; }
void restart_clock() {
  clock_ = {};
  std::memset(shared_cells, 0, sizeof shared_cells);
}

}  // namespace simt
