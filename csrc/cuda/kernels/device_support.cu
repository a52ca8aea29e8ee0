// check_device tells whether this library holds code for a device.
#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/architectures.h"
#include "cuda/launch.cuh"

// The build says what it compiled for, as in 8.0:9.0+PTX.
#ifndef DENSENET_EXT_CUDA_ARCHITECTURES
#define DENSENET_EXT_CUDA_ARCHITECTURES 8.0
#endif
#define DENSENET_EXT_TEXT(...) #__VA_ARGS__
#define DENSENET_EXT_TEXT_OF(...) DENSENET_EXT_TEXT(__VA_ARGS__)

namespace densenet_ext::cuda {
namespace {

constexpr Capability kOldest = {8, 0};

std::string text(Capability c) { return std::to_string(c.major) + "." + std::to_string(c.minor); }

}  // namespace

#ifdef __CUDACC__
// Code for 9.0 or newer waits (ptx.cuh). A binary is preferred to PTX, and newer PTX to older, so
// where some such code serves the device, it is what runs.
bool starts_early(int device) {
  static std::atomic<signed char> early_devices[64];  // 1: yes, -1: no
  signed char found = device < 64 ? early_devices[device].load(std::memory_order_relaxed) : 0;
  if (found == 0) {
    const bool early = served(DENSENET_EXT_TEXT_OF(DENSENET_EXT_CUDA_ARCHITECTURES),
                              device_capability(device), {9, 0});
    found = early ? 1 : -1;
    if (device < 64) early_devices[device].store(found, std::memory_order_relaxed);
  }
  return found > 0;
}
#endif

void check_device() {
  static std::atomic<bool> good[64];  // devices that have passed
  const int device = current_device();
  const bool cached = device < 64;
  if (cached && good[device].load(std::memory_order_relaxed)) return;

  const Capability capability = device_capability(device);
  const std::string what = "densenet_ext: " + device_name(device) +
                           " (cuda:" + std::to_string(device) + ") has compute capability " +
                           text(capability);
  if (!at_least(capability, kOldest)) {
    throw std::runtime_error(what + ", and the CUDA kernels need " + text(kOldest) +
                             " (Ampere) or newer: use efficient='checkpoint' there");
  }
  std::string architectures = DENSENET_EXT_TEXT_OF(DENSENET_EXT_CUDA_ARCHITECTURES);
  if (!served(architectures, capability, kOldest)) {
    for (char& c : architectures) c = c == ':' ? ' ' : c;
    throw std::runtime_error(what + ", and the CUDA kernels were built for " + architectures +
                             ": in a clone of densenet_ext run `TORCH_CUDA_ARCH_LIST='" +
                             text(capability) + "' pip install --force-reinstall --no-deps .`");
  }
  if (cached) good[device].store(true, std::memory_order_relaxed);
}

}  // namespace densenet_ext::cuda
