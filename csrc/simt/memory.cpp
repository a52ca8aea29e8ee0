// Accesses that the kernels leave to the simulator: 16 bytes at a time, cp.async, atomics, fences.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cuda/ptx.cuh"
#include "memory_map.h"
#include "shadow.h"
#include "tickets.h"

namespace simt {
namespace {

void copy(const Copy& c) {
  std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
  std::memset(c.to + c.bytes, 0, static_cast<size_t>(16 - c.bytes));
}

}  // namespace

// Completes the committed groups in order, except the last `pending` ones.
void cp_async_wait(int pending) {
  Thread& self = *state.current;
  auto& copies = self.copies.pending;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < self.copies.group - pending; ++done) {
    if (!state.copy_at_once) copy(copies[done]);
    copy_ends(self, copies[done], SIMT_CALLER);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<int64_t>(done));
}

uint32_t atomic_add(void* address, uint32_t value) {
  require_aligned(*state.current, address, 4, SIMT_CALLER);
  record_atomic(*state.current, address);
  access(*state.current, address, 4, Access::kAtomic, SIMT_CALLER);
  uint32_t old = 0;
  std::memcpy(&old, address, 4);
  const uint32_t sum = old + value;
  std::memcpy(address, &sum, 4);
  return old;
}

}  // namespace simt

void __threadfence() {
  ++simt::state.current->step;
  simt::record_fence(*simt::state.current);
}

namespace densenet_ext::cuda {

using simt::Access;
using simt::Space;
using simt::state;

Bytes16 ld16(const void* from) {
  simt::require_aligned(*state.current, from, 16, SIMT_CALLER);
  simt::access(*state.current, from, 16, Access::kRead, SIMT_CALLER);
  Bytes16 v;
  std::memcpy(&v, from, 16);
  return v;
}

void st16(void* to, const Bytes16& v) {
  simt::require_aligned(*state.current, to, 16, SIMT_CALLER);
  simt::access(*state.current, to, 16, Access::kWrite, SIMT_CALLER);
  std::memcpy(to, &v, 16);
}

void cp_async16(void* shared, const void* global, int bytes) {
  simt::Thread& self = *state.current;
  const uintptr_t pc = SIMT_CALLER;
  simt::require(self, shared, Space::kShared, pc);
  simt::require(self, global, bytes > 0 ? Space::kGlobal : Space::kAny, pc);
  const simt::Copy c = {static_cast<unsigned char*>(shared),
                        static_cast<const unsigned char*>(global),
                        bytes,
                        self.copies.group,
                        pc,
                        simt::clock_tick()};
  simt::copy_begins(self, c);
  self.copies.pending.push_back(c);
  if (state.copy_at_once) {
    simt::copy(c);
  } else {
    std::memset(shared, 0xff, 16);  // reads as NaN until the copy has arrived
  }
}

void cp_async_commit() { ++state.current->copies.group; }

void wait_for_earlier_kernels() { state.current->waited = true; }

}  // namespace densenet_ext::cuda
