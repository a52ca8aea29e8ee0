// csrc/cuda/ptx.cuh includes this file in place of the CUDA toolkit. It defines CUDA's keywords and
// the functions that wrap PTX, so that a C++ compiler can read kernels and the simulator run them.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "types.h"

// Device functions are inlined, so that the hooks of the kernel see their loads and stores.
#define DEVICE inline __attribute__((always_inline))
#define KERNEL __attribute__((noinline)) void
#define DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx ::simt::thread_index()
#define blockIdx ::simt::block_index()
#define blockDim ::simt::block_size()
#define gridDim ::simt::grid_size()

namespace simt {

struct Index {
  unsigned x, y, z;
};
// These are constant for a thread, whatever other threads do between two calls.
__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();
__attribute__((const)) unsigned char* dynamic_shared();

enum class Shuffle { kIndex, kXor, kDown, kUp };
uint64_t shuffle(unsigned mask, uint64_t value, Shuffle from, int operand, int width);
uint32_t atomic_add(void* address, uint32_t value);
void cp_async_wait(int pending);

template <class T>
DEVICE T shuffle_value(unsigned mask, T value, Shuffle from, int operand, int width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = shuffle(mask, word, from, operand, width);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace simt

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffff);
void __threadfence();
unsigned __ballot_sync(unsigned mask, int predicate);

template <class T>
DEVICE T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return simt::shuffle_value(mask, value, simt::Shuffle::kIndex, lane, width);
}
template <class T>
DEVICE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return simt::shuffle_value(mask, value, simt::Shuffle::kXor, lanes, width);
}
template <class T>
DEVICE T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  return simt::shuffle_value(mask, value, simt::Shuffle::kDown, delta, width);
}
template <class T>
DEVICE T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  return simt::shuffle_value(mask, value, simt::Shuffle::kUp, delta, width);
}

DEVICE unsigned atomicAdd(unsigned* address, unsigned value) {
  return simt::atomic_add(address, value);
}
DEVICE int atomicAdd(int* address, int value) {
  return static_cast<int>(simt::atomic_add(address, static_cast<uint32_t>(value)));
}

namespace densenet_ext::cuda {

struct Bytes16;

void wait_for_earlier_kernels();

// These are not inlined: the simulator does their accesses itself, and checks them.
Bytes16 ld16(const void* from);
void st16(void* to, const Bytes16& v);
DEVICE void st16_global(void* to, const Bytes16& v) { st16(to, v); }
void cp_async16(void* shared, const void* global, int bytes = 16);
void cp_async_commit();
template <int pending>
DEVICE void cp_async_wait() {
  simt::cp_async_wait(pending);
}
void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
template <class S>
void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void mma_16bit<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void mma_16bit<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

DEVICE uint32_t bits_of(float v) { return simt::bits_of(v); }
DEVICE float float_of(uint32_t bits) { return simt::float_of(bits); }
DEVICE float round_tf32(float v) { return simt::round_tf32(v); }
DEVICE float widen(BFloat16 s) { return simt::from_bfloat16(s.bits); }
DEVICE float widen(Float16 s) { return simt::from_float16(s.bits); }
template <class S>
DEVICE S narrow(float v);
template <>
DEVICE BFloat16 narrow<BFloat16>(float v) {
  return {simt::to_bfloat16(v)};
}
template <>
DEVICE Float16 narrow<Float16>(float v) {
  return {simt::to_float16(v)};
}
// Converts to two 16-bit values in one word, the first in the low half.
template <class S>
DEVICE uint32_t narrow2(float low, float high) {
  return narrow<S>(low).bits | static_cast<uint32_t>(narrow<S>(high).bits) << 16;
}
// Converts max(v, 0) for both values; NaN stays NaN.
template <class S>
DEVICE uint32_t narrow2_relu(float low, float high) {
  return narrow2<S>(low < 0 ? 0 : low, high < 0 ? 0 : high);
}

}  // namespace densenet_ext::cuda
