#include "memory_map.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>

#include "regions.h"

namespace simt {

Extent* recent_extents[kRecent];

namespace {

std::recursive_mutex mutex;
int depth = 0;
std::vector<Region> regions;   // each registered region, by name
std::vector<Extent*> extents;  // the union of the regions, sorted and disjoint

// Cells come from one range of addresses, which each operator uses again from its start. Contents
// that an earlier operator left there are recognized by their age.
constexpr size_t kArena = size_t{1} << 38, kKeep = size_t{1} << 31;
char* arena = nullptr;
size_t arena_used = 0;

Cell* new_cells(uintptr_t begin, uintptr_t end) {
  if (!arena) {
    void* const memory = mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    arena = static_cast<char*>(memory);
  }
  const size_t bytes = (granule_of(end - 1) - granule_of(begin) + 1) * sizeof(Cell);
  if (arena_used + bytes > kArena) throw std::bad_alloc();
  arena_used += bytes;
  return reinterpret_cast<Cell*>(arena + arena_used - bytes);
}

Extent* new_extent(uintptr_t begin, uintptr_t end, bool writable, bool scratch) {
  auto* const e = new Extent;
  e->begin = begin, e->end = end, e->writable = writable, e->scratch = scratch;
  e->birth = clock_tick();
  if (writable && kHooked) e->cells = new_cells(begin, end);
  return e;
}

auto first_after(uintptr_t address) {
  return std::upper_bound(extents.begin(), extents.end(), address,
                          [](uintptr_t a, const Extent* e) { return a < e->end; });
}

void add(const Region& r) {
  regions.push_back(r);
  std::fill(std::begin(recent_extents), std::end(recent_extents), nullptr);
  auto from = first_after(r.begin), to = from;
  while (to != extents.end() && (*to)->begin < r.end) ++to;
  const auto covers = [&](const Extent* e) {
    return e->begin <= r.begin && r.end <= e->end && (e->writable || !r.writable);
  };
  if (to - from == 1 && covers(*from)) return;
  // Cut at the ends of all extents. A piece is writable if one of the extents that cover it is.
  std::vector<uintptr_t> cuts = {r.begin, r.end};
  std::vector<Extent*> pieces, old(from, to);
  for (const Extent* e : old) cuts.insert(cuts.end(), {e->begin, e->end});
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const bool in_new = r.begin <= cuts[i] && cuts[i] < r.end;
    const Extent* under = nullptr;
    for (const Extent* e : old) {
      if (e->begin <= cuts[i] && cuts[i] < e->end) under = e;
    }
    if (!in_new && !under) continue;
    const bool writable = (in_new && r.writable) || (under && under->writable);
    const bool scratch = (in_new && r.scratch) || (under && under->scratch);
    pieces.push_back(new_extent(cuts[i], cuts[i + 1], writable, scratch));
    if (under && under->cells && writable) {
      pieces.back()->birth = under->birth;
      const size_t skip = granule_of(cuts[i]) - granule_of(under->begin);
      const size_t count = granule_of(cuts[i + 1] - 1) - granule_of(cuts[i]) + 1;
      std::memcpy(pieces.back()->cells, under->cells + skip, count * sizeof(Cell));
    }
  }
  for (Extent* e : old) delete e;
  extents.insert(extents.erase(from, to), pieces.begin(), pieces.end());
}

void clear() {
  for (Extent* e : extents) delete e;
  extents.clear();
  regions.clear();
  std::fill(std::begin(recent_extents), std::end(recent_extents), nullptr);
  if (arena && (arena_used > kKeep || clock_is_old())) {
    madvise(arena, kArena, MADV_DONTNEED);
    if (clock_is_old()) restart_clock();
  }
  arena_used = 0;
}

}  // namespace

// The lock is held from begin to end, so that one operator runs at a time.
void begin_operator() {
  mutex.lock();
  ++depth;
}
void end_operator() {
  if (--depth == 0) clear();
  mutex.unlock();
}

void region(const char* name, const void* data, int64_t bytes, bool writable) {
  if (depth == 0 || bytes <= 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  add({name, begin, begin + static_cast<uintptr_t>(bytes), writable, false});
}
void scratch(void* data, int64_t bytes) {
  if (depth == 0 || bytes <= 0) return;
  std::memset(data, 0xff, static_cast<size_t>(bytes));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  add({"scratch", begin, begin + static_cast<uintptr_t>(bytes), true, true});
}

Extent* search_extent(uintptr_t address) {
  const auto it = first_after(address);
  if (it == extents.end() || (*it)->begin > address) return nullptr;
  return recent_extents[address >> 12 & (kRecent - 1)] = *it;
}

std::string distance_text(int64_t bytes, bool is_before, const std::string& of) {
  const char* const where = is_before ? "before the start of " : "past the end of ";
  return (bytes == 0 ? "right" : std::to_string(bytes) + " bytes") + " " + where + of;
}

std::string describe_address(uintptr_t address) {
  const Region* best = nullptr;
  int64_t distance = 0;
  for (const Region& r : regions) {
    const int64_t d = address < r.begin  ? static_cast<int64_t>(r.begin - address)
                      : address >= r.end ? static_cast<int64_t>(address - r.end) + 1
                                         : 0;
    if (!best || d < distance || (d == distance && r.end - r.begin < best->end - best->begin)) {
      best = &r, distance = d;
    }
  }
  if (!best) return "in no region: none is registered";
  const std::string of =
      "'" + best->name + "' (" + std::to_string(best->end - best->begin) + " bytes)";
  if (distance == 0) return "byte " + std::to_string(address - best->begin) + " of " + of;
  const bool is_before = address < best->begin;
  return distance_text(is_before ? distance : distance - 1, is_before, of);
}

}  // namespace simt
