// Global memory as the simulator sees it: the registered regions and the history of their bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace simt {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kHooked = false;  // AddressSanitizer's build has no hooks, so no history of bytes
#else
constexpr bool kHooked = true;
#endif

// The last write and the last read of two bytes. Stamps say which thread did it and when (stamp.h);
// one reader stands for several (history.h). Kernels write at least 16 bits at a time.
struct Cell {
  uint64_t write, read;
  uint32_t write_pc, read_pc;
};
constexpr uintptr_t granule_of(uintptr_t address) { return address / 2; }

struct Region {
  std::string name;
  uintptr_t begin, end;
  bool writable, scratch;
};

// A piece of memory that is uniform: writable or not, scratch or not. Memory that nobody writes
// needs no cells.
struct Extent {
  uintptr_t begin, end;
  bool writable, scratch;
  uint32_t birth;         // tick of its registration; older stamps belong to other operators
  Cell* cells = nullptr;  // null unless it is writable
};

// The extents of the latest accesses, by address.
constexpr uintptr_t kRecent = 256;
extern Extent* recent_extents[kRecent];

Extent* search_extent(uintptr_t address);
inline Extent* find_extent(uintptr_t address) {
  Extent* const e = recent_extents[address >> 12 & (kRecent - 1)];
  return e && e->begin <= address && address < e->end ? e : search_extent(address);
}
// Returns a text such as "28 bytes past the end of 'weight' (6144 bytes)".
std::string describe_address(uintptr_t address);
std::string distance_text(int64_t bytes, bool is_before, const std::string& of);

uint32_t clock_tick();
bool clock_is_old();
void restart_clock();

}  // namespace simt
