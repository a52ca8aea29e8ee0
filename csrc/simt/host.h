// Launches a kernel on the simulated device.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <tuple>

#include "device.h"

namespace simt {

// The number is small, so that persistent blocks have several tiles each.
constexpr int kMultiprocessors = 3;
// Shared memory that the supported architectures give one block, at least and at most.
constexpr int64_t kLeastShared = 99 * 1024, kMostShared = 227 * 1024;

struct Launch {
  Index grid;
  int threads;
  int64_t shared_bytes;
  void (*kernel)();                                       // for its name in a report
  void (*call)(void (*kernel)(), const void* arguments);  // runs it as the current thread
  const void* arguments;
  int64_t arguments_bytes;
};

// Runs all blocks; throws std::runtime_error with everything that was found.
void run(const Launch& launch);

// Sets the seed of the next launch, in place of SIMT_SEED; every launch adds 1.
void set_seed(uint64_t seed);

// The major compute capability that the device reports: SIMT_CAPABILITY, or 8.
inline int capability() {
  const char* const setting = std::getenv("SIMT_CAPABILITY");
  return setting != nullptr ? std::atoi(setting) : 8;
}

// Bytes of shared memory for one block: SIMT_SHARED=most, or the least.
inline int64_t shared_limit() {
  const char* const setting = std::getenv("SIMT_SHARED");
  return setting != nullptr && std::string_view(setting) == "most" ? kMostShared : kLeastShared;
}

// While this is true no kernel runs: a rehearsal of the stage only counts memory.
inline bool skips_launches = false;

template <class... P, class... A>
void launch(Index grid, int threads, int64_t shared_bytes, void (*kernel)(P...),
            const A&... arguments) {
  if (skips_launches) return;
  const std::tuple<P...> copy(arguments...);
  run({grid, threads, shared_bytes, reinterpret_cast<void (*)()>(kernel),
       [](void (*kernel)(), const void* copy) {
         std::apply(reinterpret_cast<void (*)(P...)>(kernel),
                    *static_cast<const std::tuple<P...>*>(copy));
       },
       &copy, static_cast<int64_t>(sizeof copy)});
}

}  // namespace simt
