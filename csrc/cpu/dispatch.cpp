// Chooses the kernels of the best instruction set of this machine. DENSENET_EXT_CPU_CAPABILITY
// forces a lower one.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(DENSENET_EXT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace densenet_ext {
namespace {

struct Capability {
  const char* name;
  const KernelSet& (*kernels)();
};

#if defined(DENSENET_EXT_AMX)
// True if the processor has AMX and AVX-512 for bfloat16, and the system lets this process use AMX.
// A process has to ask Linux once for the large registers; the answer holds for all threads.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, avx512_bf16 = 1u << 5;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & avx512_bf16)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Capability> available() {
  std::vector<Capability> list = {{"baseline", &baseline::kernel_set}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (avx2) list.push_back({"avx2", &avx2::kernel_set});
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    list.push_back({"avx512", &avx512::kernel_set});
#if defined(DENSENET_EXT_AMX)
    if (may_use_amx()) list.push_back({"amx", &amx::kernel_set});
#endif
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
const KernelSet& cpu_kernels() { return chosen().kernels(); }

}  // namespace densenet_ext
