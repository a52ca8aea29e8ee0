// This file starts kernels, and asks the device for what that takes.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "architectures.h"
#include "kernel_arguments.h"
#include "ptx.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "simt/host.h"
#endif

namespace densenet_ext::cuda {

struct Grid {
  int64_t x, y = 1, z = 1;
};

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it for the next call
  throw std::runtime_error(std::string("densenet_ext: ") + what + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  return device;
}
inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "an attribute of the device");
  return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, current_device()); }
// Bytes of shared memory that one block may have.
inline int64_t shared_limit() {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device());
}
inline Capability device_capability(int device) {
  return {attribute(cudaDevAttrComputeCapabilityMajor, device),
          attribute(cudaDevAttrComputeCapabilityMinor, device)};
}
inline std::string device_name(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "the properties of the device");
  return properties.name;
}

// True if kernels may be started before those in front of them have ended: the code that runs on
// this device has to wait for them itself (device_support.cu).
bool starts_early(int device);

// Launches nothing where the grid is empty. Shared memory is whole units of 16 bytes, because
// the compiler may read it in such units, past the last value that is used.
template <class... P>
void launch(const Context& context, void (*kernel)(P...), Grid grid, int threads,
            int64_t shared_bytes, const P&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  shared_bytes = round_up(shared_bytes, 16);
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  }
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z)};
  config.blockDim = {static_cast<unsigned>(threads), 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(context.stream);
  config.attrs = &early;
  config.numAttrs = starts_early(current_device()) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "a kernel could not be launched");
}

#else

inline int current_device() { return 0; }
inline Capability device_capability(int) { return {simt::capability(), 0}; }
inline std::string device_name(int) { return "the simulated device"; }
inline int multiprocessors() { return simt::kMultiprocessors; }
inline int64_t shared_limit() { return simt::shared_limit(); }

template <class... P>
void launch(const Context&, void (*kernel)(P...), Grid grid, int threads, int64_t shared_bytes,
            const P&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  simt::launch(
      {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)},
      threads, shared_bytes, kernel, arguments...);
}

#endif

// Kernels count pixels in 32 bits, a tile beyond the last pixel included.
inline int as_int(int64_t value) {
  if (value > std::numeric_limits<int>::max() - 1024)
    throw std::runtime_error("densenet_ext: 2^31 pixels or more are too many");
  return static_cast<int>(value);
}

constexpr int kMaxThreads = 256;  // of a block, where a kernel needs no other number

// The grid of kMaxThreads threads a block that has a thread for each of n elements.
inline Grid cover(int64_t n) { return {ceil_div(n, kMaxThreads)}; }

// The last line of a kernel file: DENSENET_EXT_INSTANTIATE(function, Arguments) makes a launch
// function for the four storage types; DENSENET_EXT_STORAGE_TYPES(X) is X(S) for each of them.
#define DENSENET_EXT_STORAGE_TYPES(X) X(float) X(double) X(BFloat16) X(Float16)
#define DENSENET_EXT_INSTANTIATE(function, Arguments)                     \
  template void function<float>(const Arguments<float>&, Context&);       \
  template void function<double>(const Arguments<double>&, Context&);     \
  template void function<BFloat16>(const Arguments<BFloat16>&, Context&); \
  template void function<Float16>(const Arguments<Float16>&, Context&);

}  // namespace densenet_ext::cuda
