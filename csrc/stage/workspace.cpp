#include "workspace.h"

#include <algorithm>
#include <iterator>
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
constexpr int64_t kSmallest = int64_t{128} * 1024;  // smaller tensors come from torch

class Arena {
 public:
  Arena() : limit_(memory_limit("", machine_memory()) / 4) {}

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
    const auto range = free_.upper_bound(above);
    if (range == free_.begin()) return first_fit(size, Use::kOther);
    const auto [start, space] = *std::prev(range);
    return above + size <= start + space ? take(std::prev(range), above, size, Use::kOther)
                                         : first_fit(size, Use::kOther);
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

  std::mutex mutex;

 private:
  struct Block {
    int64_t size;
    int64_t buffer;  // serial number of a buffer, from 1 on; 0: the block is no buffer
  };
  using Ranges = std::map<int64_t, int64_t>;  // offset: size

  static int64_t rounded(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
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

  static int64_t machine_memory() { return sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE); }
  int64_t resident() const { return static_cast<int64_t>(touched_.size()) * kPage; }
  int64_t idle() const { return resident() - in_use_; }

  // Reserves addresses for four times the machine's memory; they take memory when they are touched.
  bool reserve() {
    if (base_ || failed_) return base_ != nullptr;
    const int64_t bytes = 4 * machine_memory() / kPage * kPage;
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
  bool failed_ = false;
  Ranges free_;
  std::map<int64_t, Block> used_;  // by offset
  std::set<int64_t> touched_;      // pages
  int64_t in_use_ = 0, buffers_ = 0, limit_;
};

// The arena is never destroyed: tensors may outlive static objects. A child of fork() gets a copy,
// so its lock must not be held by a thread that the child does not have.
Arena& arena() {
  static Arena* const arena = [] {
    auto* const instance = new Arena;
    static Arena* const shared = instance;
    pthread_atfork([] { shared->mutex.lock(); }, [] { shared->mutex.unlock(); },
                   [] { shared->mutex.unlock(); });
    return instance;
  }();
  return *arena;
}

}  // namespace

// A tensor in the block that `allocate` returns for its bytes, or from torch if there is none.
template <class F>
static Tensor in_arena(const Tensor& like, const Sizes& sizes, ScalarType type, const F& allocate) {
  int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= size;
  void* const block = like.is_cpu() && bytes >= kSmallest ? allocate(bytes) : nullptr;
  if (!block) return empty(like, sizes, type);
  return torch::stable::from_blob(block, sizes, contiguous_strides(sizes), like.device(), type,
                                  free_block);
}

Tensor workspace(const Tensor& like, const Sizes& sizes, ScalarType type, Use use) {
  return in_arena(like, sizes, type, [&](int64_t bytes) { return arena().allocate(bytes, use); });
}
Tensor workspace_aside(const Tensor& like, const Sizes& sizes, ScalarType type, int64_t times,
                       const std::vector<Tensor>& leaving) {
  return in_arena(like, sizes, type,
                  [&](int64_t bytes) { return arena().allocate_aside(bytes, times, leaving); });
}

void* allocate_block(int64_t bytes) {
  return bytes >= kSmallest ? arena().allocate(bytes, Use::kOther) : nullptr;
}
void free_block(void* block) { arena().free(block); }

WorkspaceUse workspace_use() { return arena().use(); }
void release_workspaces() { arena().release(); }
void set_workspace_limit(int64_t bytes) { arena().set_limit(bytes); }

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

#endif

}  // namespace densenet_ext
