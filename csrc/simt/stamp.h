// Stamps say in 64 bits which thread made an access, and when.
//
// The clock ticks at every barrier of every block; blocks run one after another, so a tick also
// names its block. Within a tick, a thread's step orders it against lanes of its own warp.
#pragma once

#include "block.h"

namespace simt {

enum Flag : uint64_t {
  kNone = 0,
  kPending = 1,  // a cp.async that has not been waited for
  kAtomic = 2,
  kManyLanes = 4,    // other lanes of that warp have read the bytes, too
  kManyWarps = 8,    // other warps have read them
  kManyBlocks = 16,  // other blocks of this launch have read them earlier
};

struct Stamp {
  uint64_t word;

  uint32_t tick() const { return static_cast<uint32_t>(word >> 32); }
  uint32_t step() const { return word >> 15 & 0x1ffff; }
  int thread() const { return static_cast<int>(word >> 5 & 0x3ff); }
  bool has(uint64_t flags) const { return (word & flags) != 0; }
};
constexpr uint32_t kLastStep = 0x1ffff;

struct Clock {
  uint32_t tick = 1;
  uint32_t block = 1, launch = 1;  // when they began
};
extern Clock clock_;

inline Stamp stamp_of(const Thread& t) {
  return {static_cast<uint64_t>(clock_.tick) << 32 | static_cast<uint64_t>(t.step) << 15 |
          static_cast<uint64_t>(t.id) << 5};
}
// The place of a call as an offset in this library, which fits in a cell. pc is the address after
// the call, so 1 is subtracted.
extern uintptr_t library_begin;
inline uint32_t site(uintptr_t pc) { return static_cast<uint32_t>(pc - library_begin - 1); }

// True if an access in the current tick came before t's present access.
inline bool precedes(Stamp s, const Thread& t) {
  return s.thread() == t.id || (s.thread() / kWarp == t.warp && s.step() < t.ordered);
}

}  // namespace simt
