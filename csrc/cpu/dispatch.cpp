// Chooses the kernels of the best instruction set that this machine has;
// DENSENET_EXT_CPU_CAPABILITY forces a lower one.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace densenet_ext {
namespace {

struct Capability {
  const char* name;
  const KernelTable& (*table)();
};

std::vector<Capability> available() {
  std::vector<Capability> list = {{"baseline", &baseline::kernel_table}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (avx2) list.push_back({"avx2", &avx2::kernel_table});
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    list.push_back({"avx512", &avx512::kernel_table});
  }
#endif
  return list;
}

Capability choose() {
  const std::vector<Capability> list = available();
  const char* forced = std::getenv("DENSENET_EXT_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return list.back();
  std::string names;
  for (const Capability& c : list) {
    if (c.name == std::string(forced)) return c;
    names += (names.empty() ? "" : ", ") + std::string(c.name);
  }
  throw std::runtime_error("DENSENET_EXT_CPU_CAPABILITY is '" + std::string(forced) +
                           "'; on this machine it may be one of: " + names);
}

const Capability& chosen() {
  static const Capability capability = choose();
  return capability;
}

}  // namespace

const char* cpu_capability() { return chosen().name; }
const KernelTable& cpu_kernels() { return chosen().table(); }

}  // namespace densenet_ext
