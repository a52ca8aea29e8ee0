// One kernel for each kind of fault, `planted` or not. The line that a report has to name ends in
// a comment "FAULT name".
#include "faults.h"

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace simt_test {
namespace {

using namespace densenet_ext::cuda;
using densenet_ext::cuda::launch;

DEVICE float* floats(unsigned char* shared) { return reinterpret_cast<float*>(shared); }
DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
DEVICE int block_id() { return static_cast<int>(blockIdx.x); }

// ---- barriers --------------------------------------------------------------------------------

template <bool planted>
KERNEL barrier_after_wait(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  float* const s = floats(shared);
  const int t = thread_id();
  if (t < 16) cp_async16(s + 4 * t, b.input + 4 * t);
  cp_async_commit();
  cp_async_wait<0>();
  if (!planted) __syncthreads();
  b.output[t] = s[kThreads - 1 - t];  // FAULT barrier_after_wait
}

template <bool planted>
KERNEL barrier_in_reduction(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  float* const s = floats(shared);
  const int t = thread_id();
  s[t] = b.input[t];
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) s[t] += s[t + half];  // FAULT barrier_in_reduction
    if (!planted || half > 16) __syncthreads();
  }
  if (t == 0) b.output[0] = s[0];
}

template <bool planted>
KERNEL barrier_before_refill(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  float* const s = floats(shared);
  const int t = thread_id();
  float sum = 0;
  for (int tile = 0; tile < 3; ++tile) {
    if (t < 16) cp_async16(s + 4 * t, b.input + 64 * tile + 4 * t);  // FAULT barrier_before_refill
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    sum += s[kThreads - 1 - t];
    if (!planted) __syncthreads();
  }
  b.output[t] = sum;
}

template <bool planted>
KERNEL divergent_barrier(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  if (!planted || t < 32) __syncthreads();  // FAULT divergent_barrier
  b.output[t] = 1;
}

template <bool planted>
KERNEL early_return(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  if (planted && t == 7) return;
  __syncthreads();  // FAULT early_return
  b.output[t] = 1;
}

// ---- warps -----------------------------------------------------------------------------------

template <bool planted>
KERNEL missing_lanes(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  float v = b.input[t];
  if (!planted || t % 32 < 16) v += __shfl_xor_sync(0xffffffff, v, 1);  // FAULT missing_lanes
  b.output[t] = v;
}

template <bool planted>
KERNEL partial_mask(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  b.output[t] =
      __shfl_xor_sync(planted ? 0xffff : 0xffffffff, b.input[t], 1);  // FAULT partial_mask
}

template <bool planted>
KERNEL syncwarp(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  float* const s = floats(shared);
  const int t = thread_id();
  s[t] = b.input[t];
  if (!planted) __syncwarp();
  b.output[t] = s[t ^ 1];  // FAULT syncwarp
}

template <bool planted>
KERNEL syncwarp_after_reads(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  float* const s = floats(shared);
  const int t = thread_id();
  s[t] = b.input[t];
  __syncwarp();
  const float v = s[t ^ 1];
  if (!planted) __syncwarp();
  s[t] = v;  // FAULT syncwarp_after_reads
  b.output[t] = v;
}

template <bool planted>
KERNEL syncwarp_before_ldmatrix(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id();
  uint32_t* const matrix = reinterpret_cast<uint32_t*>(shared) + t / 32 * 128;
  for (int i = 0; i < 4; ++i) matrix[i * 32 + t % 32] = bits_of(b.input[t]);
  if (!planted) __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, matrix + t % 32 * 4);  // FAULT syncwarp_before_ldmatrix
  b.output[t] = float_of(r[0]);
}

// ---- cp.async --------------------------------------------------------------------------------

template <bool planted>
KERNEL weak_wait(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  float* const s = floats(shared);
  const int t = thread_id();
  for (int stage = 0; stage < 2; ++stage) {
    if (t < 16) cp_async16(s + 64 * stage + 4 * t, b.input + 64 * stage + 4 * t);
    cp_async_commit();
  }
  cp_async_wait<planted ? 1 : 0>();
  __syncthreads();
  b.output[t] = s[t] + s[64 + t];  // FAULT weak_wait
}

template <bool planted>
KERNEL copy_out_of_bounds(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id(), left = (kInputs - 4 * t) * 4;
  const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
  cp_async16(shared + 16 * t, b.input + 4 * t, planted ? 16 : bytes);  // FAULT copy_out_of_bounds
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  b.output[t] = floats(shared)[t];
}

template <bool planted>
KERNEL copy_misaligned(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id();
  cp_async16(shared + 16 * t, b.input + (planted ? 2 : 4));  // FAULT copy_misaligned
  cp_async_commit();
  cp_async_wait<0>();
  b.output[t] = floats(shared)[4 * t];
}

template <bool planted>
KERNEL copy_to_misaligned(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id();
  if (t < 4) cp_async16(shared + 16 * t + (planted ? 8 : 0), b.input);  // FAULT copy_to_misaligned
  cp_async_commit();
  cp_async_wait<0>();
  b.output[t] = 1;
}

template <bool planted>
KERNEL copy_beyond_shared(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id();
  cp_async16(shared + 16 * (t + planted), b.input);  // FAULT copy_beyond_shared
  cp_async_commit();
  cp_async_wait<0>();
  b.output[t] = 1;
}

template <bool planted>
KERNEL copy_source_changed(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id();
  b.output[t] = b.output[t + 64] = 1;
  __syncthreads();
  if (t < 16) cp_async16(shared + 16 * t, b.output + 4 * t);
  cp_async_commit();
  __syncthreads();
  b.output[t + (planted ? 0 : 64)] = 2;
  cp_async_wait<0>();  // FAULT copy_source_changed
  __syncthreads();
}

// ---- bounds, alignment, rights ---------------------------------------------------------------

template <bool planted>
KERNEL shared_out_of_bounds(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id();
  floats(shared)[t + 192 + planted] = b.input[t];  // FAULT shared_out_of_bounds
  b.output[t] = 1;
}

template <bool planted>
KERNEL read_out_of_bounds(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  b.output[t] = b.input[kInputs - kThreads + t + planted];  // FAULT read_out_of_bounds
}

template <bool planted>
KERNEL write_out_of_bounds(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  b.output[planted && t == 9 ? kOutputs : t] = 1;  // FAULT write_out_of_bounds
}

template <bool planted>
KERNEL wide_misaligned(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  const Bytes16 v = ld16(b.input + (planted ? 1 : 4) * (t % 16));  // FAULT wide_misaligned
  b.output[t] = float_of(v.word[0]);
}

template <bool planted>
KERNEL double_misaligned(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  reinterpret_cast<double*>(b.output + planted)[t] = 1;  // FAULT double_misaligned
}

template <bool planted>
KERNEL read_before_wait(Buffers b) {
  if (!planted) wait_for_earlier_kernels();
  const float first = b.input[thread_id()];  // FAULT read_before_wait
  wait_for_earlier_kernels();
  b.output[thread_id()] = first;
}

template <bool planted>
KERNEL write_to_input(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  float* const to = planted ? const_cast<float*>(b.input) : b.output;
  to[t] = 2 * b.input[t];  // FAULT write_to_input
}

// ---- memory that nobody has written ----------------------------------------------------------

template <bool planted>
KERNEL unwritten_shared(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int t = thread_id();
  if (!planted || t != 5) floats(shared)[t] = 1;
  __syncthreads();
  b.output[t] = floats(shared)[t];  // FAULT unwritten_shared
}

template <bool planted>
KERNEL unwritten_scratch(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  if (!planted || t != 5) b.scratch[t] = 1;
  __syncthreads();
  b.output[t] = b.scratch[t];  // FAULT unwritten_scratch
}

template <bool planted>
KERNEL wide_unwritten(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id();
  if (t < (planted ? 63 : 64)) b.scratch[t] = 1;
  __syncthreads();
  b.output[t] = float_of(ld16(b.scratch + t / 4 * 4).word[0]);  // FAULT wide_unwritten
}

// ---- blocks ----------------------------------------------------------------------------------

template <bool planted>
KERNEL race_between_blocks(Buffers b) {
  wait_for_earlier_kernels();
  b.output[thread_id() + (kThreads - planted) * block_id()] = 1;  // FAULT race_between_blocks
}

template <bool planted>
KERNEL read_between_blocks(Buffers b) {
  wait_for_earlier_kernels();
  const int t = thread_id(), at = block_id() * kThreads;
  b.output[at + t] = 1;
  if (planted && t == 3)
    b.output[512 + at] = b.output[(at + kThreads) % 256];  // FAULT read_between_blocks
}

// Every block writes its part; the last block to draw a ticket adds them up.
template <bool planted>
KERNEL fence_before_ticket(Buffers b) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  unsigned* const drawn = reinterpret_cast<unsigned*>(shared);
  const int t = thread_id();
  b.scratch[block_id() * kThreads + t] = 1;
  if (!planted) __threadfence();
  __syncthreads();
  if (t == 0) *drawn = atomicAdd(b.ticket, 1u);
  __syncthreads();
  if (*drawn == gridDim.x - 1) {
    float sum = 0;
    for (int i = 0; i < static_cast<int>(gridDim.x); ++i)
      sum += b.scratch[i * kThreads + t];  // FAULT fence_before_ticket
    b.output[t] = sum;
    if (t == 0) *b.ticket = 0;
  }
}

#define SIMT_FAULT(name, blocks)                                                             \
  {#name, [](const Buffers& b, const Context& context, bool planted) {                       \
     launch(context, planted ? &name<true> : &name<false>, Grid{blocks}, kThreads, 1024, b); \
   }}

}  // namespace

const Fault kFaults[] = {
    SIMT_FAULT(barrier_after_wait, 1),
    SIMT_FAULT(barrier_in_reduction, 1),
    SIMT_FAULT(barrier_before_refill, 1),
    SIMT_FAULT(divergent_barrier, 1),
    SIMT_FAULT(early_return, 1),
    SIMT_FAULT(missing_lanes, 1),
    SIMT_FAULT(partial_mask, 1),
    SIMT_FAULT(syncwarp, 1),
    SIMT_FAULT(syncwarp_after_reads, 1),
    SIMT_FAULT(syncwarp_before_ldmatrix, 1),
    SIMT_FAULT(weak_wait, 1),
    SIMT_FAULT(copy_out_of_bounds, 1),
    SIMT_FAULT(copy_misaligned, 1),
    SIMT_FAULT(copy_to_misaligned, 1),
    SIMT_FAULT(copy_beyond_shared, 1),
    SIMT_FAULT(copy_source_changed, 1),
    SIMT_FAULT(shared_out_of_bounds, 1),
    SIMT_FAULT(read_out_of_bounds, 1),
    SIMT_FAULT(write_out_of_bounds, 1),
    SIMT_FAULT(wide_misaligned, 1),
    SIMT_FAULT(double_misaligned, 1),
    SIMT_FAULT(read_before_wait, 1),
    SIMT_FAULT(write_to_input, 1),
    SIMT_FAULT(unwritten_shared, 1),
    SIMT_FAULT(unwritten_scratch, 1),
    SIMT_FAULT(wide_unwritten, 1),
    SIMT_FAULT(race_between_blocks, 4),
    SIMT_FAULT(read_between_blocks, 4),
    SIMT_FAULT(fence_before_ticket, 4),
};
const int kFaultCount = static_cast<int>(sizeof kFaults / sizeof kFaults[0]);

}  // namespace simt_test
