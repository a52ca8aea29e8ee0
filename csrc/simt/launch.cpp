// Runs the blocks of a launch one after another, in a random order.
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "block.h"
#include "findings.h"
#include "shadow.h"

namespace simt {

void seed_random(uint64_t seed);

namespace {

std::mutex mutex;

// The seed is SIMT_SEED for the first launch of the process, and one more for each that follows.
uint64_t& next_seed() {
  static uint64_t seed = [] {
    const char* const text = std::getenv("SIMT_SEED");
    return text ? std::strtoull(text, nullptr, 10) : 0;
  }();
  return seed;
}

void check_launch(const Launch& launch) {
  const auto fail = [](const std::string& what) { throw std::runtime_error("simt: " + what); };
  if (launch.threads <= 0 || launch.threads > kMaxThreads || launch.threads % kWarp != 0) {
    fail("a block of " + std::to_string(launch.threads) +
         " threads: it must be whole warps, at most 1024 threads");
  }
  if (launch.shared_bytes < 0 || launch.shared_bytes > shared_limit()) {
    fail(std::to_string(launch.shared_bytes) + " bytes of shared memory: the limit is " +
         std::to_string(shared_limit()));
  }
  if (launch.grid.y > 65535 || launch.grid.z > 65535 || launch.grid.x > 0x7fffffff) {
    fail("the grid is too large");
  }
}

}  // namespace

void set_seed(uint64_t seed) { next_seed() = seed; }

void run(const Launch& launch) {
  check_launch(launch);
  const std::lock_guard<std::mutex> lock(mutex);
  state.launch = &launch;
  state.threads = launch.threads;
  state.seed = next_seed()++;
  state.stopped = false;
  seed_random(state.seed);
  state.copy_at_once = random_number() % 2 != 0;
  begin_launch();
  // i * step + start goes through all blocks, because step and their number have no common divisor.
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const uint64_t start = random_number() % blocks;
  uint64_t step = random_number() % blocks | 1;
  while (std::gcd(step, blocks) != 1) ++step;
  for (uint64_t i = 0, b = start; i < blocks && !state.stopped; ++i, b = (b + step) % blocks) {
    state.block = {static_cast<unsigned>(b % launch.grid.x),
                   static_cast<unsigned>(b / launch.grid.x % launch.grid.y),
                   static_cast<unsigned>(b / launch.grid.x / launch.grid.y)};
    run_block();
  }
  throw_findings();
}

}  // namespace simt
