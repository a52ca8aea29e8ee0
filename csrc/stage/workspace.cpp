#include "workspace.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <set>

// AddressSanitizer watches the bounds of malloc's blocks only, so with it tensors come from torch.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define DENSENET_EXT_ARENA 1
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory_limit.h"
#else
#define DENSENET_EXT_ARENA 0
#endif

namespace densenet_ext {

#if DENSENET_EXT_ARENA
namespace {

constexpr int64_t kPage = int64_t{2} << 20;  // the unit of madvise, of counting and of release
constexpr int64_t kAlignment = 64 * 1024;    // blocks start at multiples of this
int64_t machine_memory() { return sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE); }

constexpr int64_t kSmallest = int64_t{128} * 1024;  // smaller tensors come from torch

class Arena {
 public:
  explicit Arena(int64_t limit, int64_t alignment = kAlignment)
      : limit_(limit), alignment_(alignment) {}

  // Returns null if there is no room.
  void* allocate(int64_t bytes, Use use) {
    const std::lock_guard<std::mutex> lock(mutex);
    return reserve() ? first_fit(rounded(bytes), use) : nullptr;
  }
  void* allocate_aside(int64_t bytes, int64_t times, const std::vector<Tensor>& leaving) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!reserve()) return nullptr;
    std::map<int64_t, Block> staying = used_;
    Ranges free_without_leaving = free_;
    for (const Tensor& tensor : leaving) {
      const auto block = staying.find(static_cast<char*>(tensor.data_ptr()) - base_);
      if (block == staying.end()) continue;  // it is not in the arena
      add(free_without_leaving, block->first, block->second.size);
      staying.erase(block);
    }
    int64_t room = 0, latest = 0;
    for (const auto& [offset, block] : staying)
      if (block.buffer > latest) latest = block.buffer, room = times * block.size;
    const auto next = std::find_if(free_without_leaving.begin(), free_without_leaving.end(),
                                   [&](const auto& range) { return range.second >= room; });
    const int64_t size = rounded(bytes),
                  above = next == free_without_leaving.end() ? 0 : next->first + room;
    // Else the next room above, but not far: a block below would push that buffer up.
    const int64_t farthest = above + room / 2;
    auto range = free_.upper_bound(above);
    if (range != free_.begin()) --range;
    for (; range != free_.end() && range->first <= farthest; ++range) {
      const int64_t start = std::max(range->first, above);
      if (start + size <= range->first + range->second)
        return take(range, start, size, Use::kOther);
    }
    return first_fit(size, Use::kOther);
  }

  void free(void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto block = used_.find(static_cast<char*>(pointer) - base_);
    const int64_t offset = block->first, size = block->second.size;
    used_.erase(block);
    in_use_ -= size;
    const auto range = add(free_, offset, size);
    if (idle() > limit_) release_range(range->first, range->second);
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [offset, size] : free_) release_range(offset, size);
  }

  void set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    limit_ = bytes;
    for (const auto& [offset, size] : free_) {
      if (idle() > limit_) release_range(offset, size);
    }
  }

  WorkspaceUse use() {
    const std::lock_guard<std::mutex> lock(mutex);
    return {in_use_, resident()};
  }

  int64_t in_use() const { return in_use_; }

  bool owns(const void* pointer) const { return base_ <= pointer && pointer < base_ + bytes_; }

  std::mutex mutex;

 private:
  struct Block {
    int64_t size;
    int64_t buffer;  // serial number of a buffer, from 1 on; 0: the block is no buffer
  };
  using Ranges = std::map<int64_t, int64_t>;  // offset: size

  int64_t rounded(int64_t bytes) const {
    return (bytes + alignment_ - 1) / alignment_ * alignment_;
  }

  void* first_fit(int64_t size, Use use) {
    const auto range = std::find_if(free_.begin(), free_.end(),
                                    [&](const auto& range) { return range.second >= size; });
    return range == free_.end() ? nullptr : take(range, range->first, size, use);
  }
  // Takes a block at that offset of a free range.
  void* take(Ranges::iterator range, int64_t offset, int64_t size, Use use) {
    const int64_t start = range->first, end = start + range->second;
    free_.erase(range);
    if (offset > start) free_[start] = offset - start;
    if (end > offset + size) free_[offset + size] = end - offset - size;
    used_[offset] = {size, use == Use::kBuffer ? ++buffers_ : 0};
    in_use_ += size;
    for (int64_t p = offset / kPage; p * kPage < offset + size; ++p) touched_.insert(p);
    return base_ + offset;
  }

  // Adds a range to others, merged with its neighbors.
  static Ranges::iterator add(Ranges& ranges, int64_t offset, int64_t size) {
    auto next = ranges.lower_bound(offset);
    if (next != ranges.end() && next->first == offset + size) {
      size += next->second;
      next = ranges.erase(next);
    }
    if (next != ranges.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == offset) {
        previous->second += size;
        return previous;
      }
    }
    return ranges.emplace(offset, size).first;
  }

  int64_t resident() const { return static_cast<int64_t>(touched_.size()) * kPage; }
  int64_t idle() const { return resident() - in_use_; }

  // Reserves addresses for four times the machine's memory; they take memory when they are touched.
  bool reserve() {
    if (base_ || failed_) return base_ != nullptr;
    const int64_t bytes = bytes_ = 4 * machine_memory() / kPage * kPage;
    void* const range = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    failed_ = range == MAP_FAILED;
    if (failed_) return false;
    base_ =
        static_cast<char*>(range) + (kPage - reinterpret_cast<uintptr_t>(range) % kPage) % kPage;
    madvise(base_, bytes, MADV_HUGEPAGE);
    free_[0] = bytes;
    return true;
  }

  // Releases the pages that lie wholly inside a range that no block uses.
  void release_range(int64_t offset, int64_t size) {
    auto page = touched_.lower_bound((offset + kPage - 1) / kPage);
    while (page != touched_.end() && (*page + 1) * kPage <= offset + size) {
      madvise(base_ + *page * kPage, kPage, MADV_DONTNEED);
      page = touched_.erase(page);
    }
  }

  char* base_ = nullptr;
  int64_t bytes_ = 0;
  bool failed_ = false;
  Ranges free_;
  std::map<int64_t, Block> used_;  // by offset
  std::set<int64_t> touched_;      // pages
  int64_t in_use_ = 0, buffers_ = 0, limit_;
  const int64_t alignment_;
};

// Arenas are never destroyed: tensors may outlive static objects. A child of fork() gets a copy, so
// no lock of theirs may be held by a thread that the child does not have.
struct Arenas {
  Arena real{memory_limit("", machine_memory()) / 4};
  // A rehearsal has two, for workspaces and in place of torch's allocator.
  Arena workspaces{std::numeric_limits<int64_t>::max()};
  Arena tensors{std::numeric_limits<int64_t>::max(), 64};
};
void unlock(Arenas& arenas) {
  for (Arena* arena : {&arenas.real, &arenas.workspaces, &arenas.tensors}) arena->mutex.unlock();
}
Arenas& arenas() {
  static Arenas* const arenas = [] {
    auto* const instance = new Arenas;
    static Arenas* const shared = instance;
    pthread_atfork(
        [] {
          for (Arena* arena : {&shared->real, &shared->workspaces, &shared->tensors})
            arena->mutex.lock();
        },
        [] { unlock(*shared); }, [] { unlock(*shared); });
    return instance;
  }();
  return *arenas;
}

thread_local bool rehearsing = false;
int64_t most_tensors = 0, most_in_all = 0;  // see RehearsalUse

void note_rehearsal() {
  const int64_t tensors = arenas().tensors.in_use();
  most_tensors = std::max(most_tensors, tensors);
  most_in_all = std::max(most_in_all, tensors + arenas().workspaces.in_use());
}

// Calls allocate(arena) with the arena that workspaces come from.
template <class F>
void* from_workspaces(const F& allocate) {
  if (!rehearsing) return allocate(arenas().real);
  void* const block = allocate(arenas().workspaces);
  note_rehearsal();
  return block;
}

}  // namespace

// A tensor in the block that `allocate` returns for its bytes, or from torch if there is none.
template <class F>
static Tensor in_arena(const Tensor& like, const Sizes& sizes, ScalarType type, const F& allocate) {
  int64_t bytes = element_size(type);
  for (const int64_t size : sizes) bytes *= size;
  void* const block = like.is_cpu() && bytes >= kSmallest ? allocate(bytes) : nullptr;
  if (!block) return empty(like, sizes, type);
  return torch::stable::from_blob(block, sizes, contiguous_strides(sizes), like.device(), type,
                                  free_block);
}

Tensor workspace(const Tensor& like, const Sizes& sizes, ScalarType type, Use use) {
  return in_arena(like, sizes, type, [&](int64_t bytes) {
    return from_workspaces([&](Arena& arena) { return arena.allocate(bytes, use); });
  });
}
Tensor workspace_aside(const Tensor& like, const Sizes& sizes, ScalarType type, int64_t times,
                       const std::vector<Tensor>& leaving) {
  return in_arena(like, sizes, type, [&](int64_t bytes) {
    return from_workspaces(
        [&](Arena& arena) { return arena.allocate_aside(bytes, times, leaving); });
  });
}

void* allocate_block(int64_t bytes) {
  if (bytes < kSmallest) return nullptr;
  return from_workspaces([&](Arena& arena) { return arena.allocate(bytes, Use::kOther); });
}
void free_block(void* block) {
  for (Arena* arena : {&arenas().workspaces, &arenas().tensors})
    if (arena->owns(block)) return arena->free(block);
  arenas().real.free(block);
}

WorkspaceUse workspace_use() { return arenas().real.use(); }
void release_workspaces() { arenas().real.release(); }
void set_workspace_limit(int64_t bytes) { arenas().real.set_limit(bytes); }

void start_rehearsal() {
  Arenas& all = arenas();
  STD_TORCH_CHECK(!rehearsing && !all.workspaces.use().in_use && !all.tensors.use().in_use,
                  "tensors of another rehearsal are still there");
  all.workspaces.release();
  all.tensors.release();
  rehearsed_address = [](int64_t bytes) -> void* {
    if (!rehearsing || bytes == 0) return nullptr;
    void* const block = arenas().tensors.allocate(bytes, Use::kOther);
    note_rehearsal();
    return block;
  };
  free_rehearsed = free_block;
  thread_rehearses = is_rehearsing;
  rehearsing = true;
  most_tensors = most_in_all = 0;
}
void stop_rehearsal() { rehearsing = false; }
bool is_rehearsing() { return rehearsing; }
RehearsalUse rehearsal_use() {
  const int64_t tensors = arenas().tensors.in_use();
  const RehearsalUse use = {tensors, most_tensors, most_in_all, arenas().workspaces.use().resident};
  most_tensors = tensors;
  most_in_all = tensors + arenas().workspaces.in_use();
  return use;
}

#else

Tensor workspace(const Tensor& like, const Sizes& sizes, ScalarType type, Use) {
  return empty(like, sizes, type);
}
Tensor workspace_aside(const Tensor& like, const Sizes& sizes, ScalarType type, int64_t,
                       const std::vector<Tensor>&) {
  return empty(like, sizes, type);
}
void* allocate_block(int64_t) { return nullptr; }
void free_block(void*) {}
WorkspaceUse workspace_use() { return {0, 0}; }
void release_workspaces() {}
void set_workspace_limit(int64_t) {}
void start_rehearsal() {
  STD_TORCH_CHECK(false, "this build has no workspaces that a rehearsal could count");
}
void stop_rehearsal() {}
bool is_rehearsing() { return false; }
RehearsalUse rehearsal_use() { return {0, 0, 0, 0}; }

#endif

}  // namespace densenet_ext
