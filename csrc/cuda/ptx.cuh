// Every primitive of the GPU that C++ has no word for has a function here. Only this file and
// launch.cuh know which compiler reads them: nvcc gets PTX, a C++ compiler the twins that run on a
// CPU (csrc/simt).
#pragma once

#include <cstdint>

#include "types.h"

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define KERNEL __global__ void
// The one buffer of shared memory of a kernel, its size given at launch.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "simt/device.h"
#endif

namespace densenet_ext::cuda {

constexpr int kWarp = 32;

DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
DEVICE int lane_id() { return thread_id() % kWarp; }
DEVICE int warp_id() { return thread_id() / kWarp; }

// 16 bytes, the widest access.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

#ifdef __CUDACC__

// Every kernel calls this first. On devices that can, its blocks start while the last ones of the
// previous kernel are still running (launch.cuh); here they wait until that one has ended and what
// it has written can be read.
DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

DEVICE Bytes16 ld16(const void* source) {
  const uint4 v = *static_cast<const uint4*>(source);
  return {{v.x, v.y, v.z, v.w}};
}
DEVICE void st16(void* target, const Bytes16& v) {
  *static_cast<uint4*>(target) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// Stores to global memory, in one access wherever the values come from: compilers make four of some
// st16.
DEVICE void st16_global(void* target, const Bytes16& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(target)),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes from global to shared memory, past the registers and L1; the last 16 - bytes of
// them become 0. Both addresses are multiples of 16. With bytes == 0 nothing is read.
DEVICE void cp_async16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `pending` of this thread's committed groups are in flight.
template <int pending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements (8x4 of 32 bits): lane l gives the address of row l%8
// of matrix l/8, 16 bytes, and gets in r[i] word l%4 of row l/4 of matrix i.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Loads each matrix transposed: lane l gets in r[i] elements (2*(l%4), l/4) and (2*(l%4)+1, l/4) of
// matrix i.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, m16n8k16 for 16-bit types.
template <class S>
DEVICE void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
DEVICE void mma_16bit<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE void mma_16bit<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a b, m16n8k8, of values that round_tf32 has been applied to.
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to the nearest value with 10 bits of mantissa, ties away from 0.
DEVICE float round_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}

DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Rounds to the nearest, ties to even; NaN stays NaN.
template <class S>
DEVICE S narrow(float v);
template <>
DEVICE BFloat16 narrow<BFloat16>(float v) {
  BFloat16 s;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(s.bits) : "f"(v));
  return s;
}
template <>
DEVICE Float16 narrow<Float16>(float v) {
  Float16 s;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(s.bits) : "f"(v));
  return s;
}
DEVICE float widen(BFloat16 s) { return __uint_as_float(static_cast<uint32_t>(s.bits) << 16); }
DEVICE float widen(Float16 s) {
  float v;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(v) : "h"(s.bits));
  return v;
}

// Two 16-bit values in one word, the first in the low half.
template <class S>
DEVICE uint32_t narrow2(float low, float high);
template <>
DEVICE uint32_t narrow2<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
DEVICE uint32_t narrow2<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Two values max(v, 0) in one word; NaN stays NaN.
template <class S>
DEVICE uint32_t narrow2_relu(float low, float high);
template <>
DEVICE uint32_t narrow2_relu<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
DEVICE uint32_t narrow2_relu<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

#endif  // __CUDACC__

// float and double are stored as they are.
DEVICE float widen(float v) { return v; }
DEVICE double widen(double v) { return v; }
// The storage type's value nearest to v.
template <class S>
DEVICE S store_as(Arithmetic<S> v) {
  if constexpr (sizeof(S) == sizeof(Arithmetic<S>)) {
    return v;
  } else {
    return narrow<S>(v);
  }
}
// The value that v becomes when it is stored and loaded again.
template <class S>
DEVICE Arithmetic<S> rounded(Arithmetic<S> v) {
  return widen(store_as<S>(v));
}

// One of the two values of a word.
template <class S>
DEVICE float widen_half(uint32_t word, int high) {
  return widen(S{static_cast<uint16_t>(high ? word >> 16 : word)});
}

}  // namespace densenet_ext::cuda
