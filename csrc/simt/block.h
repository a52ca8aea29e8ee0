// One block of threads at a time: who runs, who waits for what.
#pragma once

#include <vector>

#include "copies.h"
#include "fiber.h"
#include "host.h"

namespace simt {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned kAllLanes = 0xffffffff;

// Reasons for which a thread waits; from kSyncwarp on, for the other lanes of its warp.
enum class Wait { kNothing, kEnd, kBarrier, kSyncwarp, kShuffle, kBallot, kLdmatrix, kMma };

struct Thread {
  Fiber fiber;
  int id = 0, lane = 0, warp = 0;
  Index index = {};
  Wait wait = Wait::kNothing;
  uintptr_t pc = 0;         // the place at which it waits
  void* deposit = nullptr;  // what it brought to a collective
  // Counts in between two barriers: __syncwarp lifts both of all lanes to one more than any had.
  uint32_t step = 0;     // also one more at every fence
  uint32_t ordered = 0;  // what lanes of this warp did at lower steps came before
  Copies copies;
  bool waited = false;  // for the kernels before this one
};

struct Warp {
  unsigned ready = 0;    // lanes that can run
  unsigned arrived = 0;  // lanes that wait for others of the warp
};

// The launch and the block that run now; `current` is null while the host's code runs.
struct State {
  Thread* current = nullptr;
  uintptr_t stack = 0;  // belongs to the current thread
  const Launch* launch = nullptr;
  Index block = {};
  int threads = 0;
  uint64_t seed = 0;          // belongs to this launch
  bool copy_at_once = false;  // cp.async; otherwise at its wait
  bool stopped = false;       // after a finding that cannot be run past
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / kWarp];
};
extern State state;

// Runs all threads of state.block to their end, unless the launch is stopped.
void run_block();

// Leaves the current thread for good: its next step would be an error that cannot be undone.
[[noreturn]] void stop();

// A warp collective: returns true to the last lane that arrives, which then does the work of all
// and calls release_warp; to the others it returns false once that is done.
bool arrive(Wait kind, void* deposit, uintptr_t pc);
void release_warp();

uint64_t random_number();

}  // namespace simt

#define SIMT_CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
