#include "workspace.h"

#include <iterator>
#include <map>
#include <mutex>
#include <set>

// AddressSanitizer watches the bounds of what malloc gives, so there every block comes from torch.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define DENSENET_EXT_ARENA 1
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#else
#define DENSENET_EXT_ARENA 0
#endif

namespace densenet_ext {

#if DENSENET_EXT_ARENA
namespace {

constexpr int64_t kPage = int64_t{2} << 20;         // what is advised, counted and released
constexpr int64_t kAlignment = 64 * 1024;           // of a block
constexpr int64_t kSmallest = int64_t{128} * 1024;  // smaller tensors are torch's

class Arena {
 public:
  Arena() : limit_(machine_memory() / 4) {}

  // Null where there is no room.
  void* allocate(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!reserve()) return nullptr;
    const int64_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const int64_t offset = it->first, room = it->second;
      if (room < size) continue;
      free_.erase(it);
      if (room > size) free_[offset + size] = room - size;
      used_[offset] = size;
      in_use_ += size;
      for (int64_t p = offset / kPage; p * kPage < offset + size; ++p) touched_.insert(p);
      return base_ + offset;
    }
    return nullptr;
  }

  void free(void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto block = used_.find(static_cast<char*>(pointer) - base_);
    int64_t offset = block->first, size = block->second;
    used_.erase(block);
    in_use_ -= size;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + size) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        offset = before->first;
        size += before->second;
      }
    }
    free_[offset] = size;
    if (idle() > limit_) release_range(offset, size);
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
  static int64_t machine_memory() { return sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE); }
  int64_t resident() const { return static_cast<int64_t>(touched_.size()) * kPage; }
  int64_t idle() const { return resident() - in_use_; }

  // The addresses, four times the machine's memory of them; memory comes when they are touched.
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

  // The pages that lie wholly inside a range that no block uses.
  void release_range(int64_t offset, int64_t size) {
    auto page = touched_.lower_bound((offset + kPage - 1) / kPage);
    while (page != touched_.end() && (*page + 1) * kPage <= offset + size) {
      madvise(base_ + *page * kPage, kPage, MADV_DONTNEED);
      page = touched_.erase(page);
    }
  }

  char* base_ = nullptr;
  bool failed_ = false;
  std::map<int64_t, int64_t> free_, used_;  // offset: size
  std::set<int64_t> touched_;               // pages
  int64_t in_use_ = 0, limit_;
};

// Never destroyed: tensors may outlive static objects. A child of fork() has the arena as it was;
// only the lock must not be held by a thread that the child does not have.
Arena& arena() {
  static Arena* const arena = [] {
    auto* const made = new Arena;
    static Arena* const shared = made;
    pthread_atfork([] { shared->mutex.lock(); }, [] { shared->mutex.unlock(); },
                   [] { shared->mutex.unlock(); });
    return made;
  }();
  return *arena;
}

}  // namespace

Tensor workspace(const Tensor& like, const Sizes& sizes, ScalarType type) {
  int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= size;
  void* const block = like.is_cpu() ? allocate_block(bytes) : nullptr;
  if (!block) return empty(like, sizes, type);
  return torch::stable::from_blob(block, sizes, contiguous_strides(sizes), like.device(), type,
                                  free_block);
}

void* allocate_block(int64_t bytes) {
  return bytes >= kSmallest ? arena().allocate(bytes) : nullptr;
}
void free_block(void* block) { arena().free(block); }

WorkspaceUse workspace_use() { return arena().use(); }
void release_workspaces() { arena().release(); }
void set_workspace_limit(int64_t bytes) { arena().set_limit(bytes); }

#else

Tensor workspace(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return empty(like, sizes, type);
}
void* allocate_block(int64_t) { return nullptr; }
void free_block(void*) {}
WorkspaceUse workspace_use() { return {0, 0}; }
void release_workspaces() {}
void set_workspace_limit(int64_t) {}

#endif

}  // namespace densenet_ext
