#include "block.h"

#include "findings.h"
#include "shadow.h"

namespace simt {

State state;

namespace {

uint64_t random_state;

// Each thread of a block runs this: the whole kernel.
void thread_main() {
  state.launch->call(state.launch->kernel, state.launch->arguments);
  Thread& self = *state.current;
  self.wait = Wait::kEnd;
  state.warp[self.warp].ready &= ~(1u << self.lane);
  self.fiber.suspend();
  __builtin_unreachable();
}

void start_threads() {
  const int threads = state.threads;
  for (int id = 0; id < threads; ++id) {
    Thread& t = state.thread[id];
    t.id = id, t.lane = id % kWarp, t.warp = id / kWarp;
    t.index = {static_cast<unsigned>(id), 0, 0};
    t.wait = Wait::kNothing;
    t.step = t.ordered = 0;
    t.copies.pending.clear();
    t.copies.group = 0;
    t.waited = false;
    t.fiber.start(thread_main);
  }
  for (int w = 0; w < threads / kWarp; ++w) state.warp[w] = {kAllLanes, 0};
}

void run_thread(Thread& t) {
  state.current = &t;
  state.stack = t.fiber.stack();
  t.fiber.resume();
  state.current = nullptr;
}

// Runs a warp as far as it can go. This finds more races than letting all warps advance evenly.
void run_warp(int w) {
  Warp& warp = state.warp[w];
  // Begin with a random lane.
  const auto start = static_cast<unsigned>(random_number() % kWarp);
  while (warp.ready != 0 && !state.stopped) {
    for (unsigned i = 0; i < kWarp && !state.stopped; ++i) {
      const unsigned lane = (start + i) % kWarp;
      if (warp.ready >> lane & 1) run_thread(state.thread[w * kWarp + lane]);
    }
  }
}

// Returns a random warp that can run, or -1.
int choose_warp() {
  const int warps = state.threads / kWarp;
  const auto start = static_cast<int>(random_number() % static_cast<unsigned>(warps));
  for (int i = 0; i < warps; ++i) {
    const int w = (start + i) % warps;
    if (state.warp[w].ready != 0) return w;
  }
  return -1;
}

// True if all threads of the block wait for this.
bool all_wait_for(Wait kind) {
  for (int id = 0; id < state.threads; ++id) {
    if (state.thread[id].wait != kind) return false;
  }
  return true;
}

void release_barrier() {
  next_barrier();
  for (int id = 0; id < state.threads; ++id) {
    Thread& t = state.thread[id];
    t.wait = Wait::kNothing;
    t.step = t.ordered = 0;
  }
  for (int w = 0; w < state.threads / kWarp; ++w) state.warp[w].ready = kAllLanes;
}

void wait(Wait kind, uintptr_t pc) {
  Thread& self = *state.current;
  self.wait = kind;
  self.pc = pc;
  state.warp[self.warp].ready &= ~(1u << self.lane);
  self.fiber.suspend();
}

}  // namespace

uint64_t random_number() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}
void seed_random(uint64_t seed) { random_state = seed; }

void run_block() {
  next_block();
  start_threads();
  while (!state.stopped) {
    const int w = choose_warp();
    if (w >= 0) {
      run_warp(w);
    } else if (all_wait_for(Wait::kEnd)) {
      return;
    } else if (all_wait_for(Wait::kBarrier)) {
      release_barrier();
    } else {
      report_deadlock();
      state.stopped = true;
    }
  }
  for (int id = 0; id < state.threads; ++id) state.thread[id].fiber.abandon();
}

void stop() {
  state.stopped = true;
  state.current->fiber.suspend();
  __builtin_unreachable();
}

bool arrive(Wait kind, void* deposit, uintptr_t pc) {
  Thread& self = *state.current;
  Warp& warp = state.warp[self.warp];
  self.deposit = deposit;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived != kAllLanes) {
    wait(kind, pc);
    return false;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread& other = state.thread[self.warp * kWarp + lane];
    if (&other != &self && other.wait != kind) {
      self.wait = kind, self.pc = pc;
      report_deadlock();
      stop();
    }
  }
  return true;
}

void release_warp() {
  Thread& self = *state.current;
  Warp& warp = state.warp[self.warp];
  warp.arrived = 0;
  warp.ready = kAllLanes;
  for (int lane = 0; lane < kWarp; ++lane) {
    state.thread[self.warp * kWarp + lane].wait = Wait::kNothing;
  }
}

Index thread_index() { return state.current->index; }
Index block_index() { return state.block; }
Index block_size() { return {static_cast<unsigned>(state.threads), 1, 1}; }
Index grid_size() { return state.launch->grid; }

}  // namespace simt

void __syncthreads() { simt::wait(simt::Wait::kBarrier, SIMT_CALLER); }
