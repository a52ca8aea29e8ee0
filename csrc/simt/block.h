// The block of threads that runs at the moment: which threads run, and what the others wait for.
#pragma once

#include <vector>

#include "copies.h"
#include "fiber.h"
#include "host.h"

namespace simt {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned kAllLanes = 0xffffffff;

// The reasons for which a thread waits; from kSyncwarp on it waits for the other lanes of its warp.
enum class Wait { kNothing, kEnd, kBarrier, kSyncwarp, kShuffle, kBallot, kLdmatrix, kMma };

struct Thread {
  Fiber fiber;
  int id = 0, lane = 0, warp = 0;
  Index index = {};
  Wait wait = Wait::kNothing;
  uintptr_t pc = 0;         // the place at which it waits
  void* deposit = nullptr;  // its contribution to a collective
  // These count from barrier to barrier. __syncwarp raises both, in all lanes, to the highest step
  // of any lane plus one.
  uint32_t step = 0;     // a fence raises it by one, too
  uint32_t ordered = 0;  // accesses by lanes of this warp at lower steps came earlier
  Copies copies;
  bool waited = false;  // true after wait_for_earlier_kernels
};

struct Warp {
  unsigned ready = 0;    // lanes that can run
  unsigned arrived = 0;  // lanes that wait for others of the warp
};

// The launch and the block that run at the moment; `current` is null while the host's code runs.
struct State {
  Thread* current = nullptr;
  uintptr_t stack = 0;  // belongs to the current thread
  const Launch* launch = nullptr;
  Index block = {};
  int threads = 0;
  uint64_t seed = 0;          // belongs to this launch
  bool copy_at_once = false;  // cp.async copies at once; if false, at its wait
  bool stopped = false;       // true after a finding past which a kernel cannot run
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / kWarp];
};
extern State state;

// Runs all threads of state.block to their end, unless the launch is stopped.
void run_block();

// Leaves the current thread for good, because its next step would do damage.
[[noreturn]] void stop();

// Joins a warp collective. Returns true to the last lane that arrives, which has to do the work of
// all lanes and call release_warp; afterwards it returns false to the others.
bool arrive(Wait kind, void* deposit, uintptr_t pc);
void release_warp();

uint64_t random_number();

}  // namespace simt

#define SIMT_CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
