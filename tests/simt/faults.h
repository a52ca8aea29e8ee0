// The simulator's own test kernels, as functions that launch them.
#pragma once

#include "cuda/kernel_arguments.h"

namespace simt_test {

constexpr int kThreads = 64;
constexpr int kInputs = 249;  // 28 bytes short of a multiple of 16 floats
constexpr int kOutputs = 1024;

struct Buffers {
  const float* input;  // [kInputs], 16-byte aligned
  float* output;       // [kOutputs]
  float* scratch;      // [kOutputs]
  unsigned* ticket;    // [1], 0
};

// Launches one kernel, with its fault planted or without.
struct Fault {
  const char* name;
  void (*run)(const Buffers& buffers, const densenet_ext::cuda::Context& context, bool planted);
};
extern const Fault kFaults[];
extern const int kFaultCount;

// Fragments of one warp, lane by lane: c[32][4] += a[32][4] b[32][2]; type 0 bfloat16, 1 float16,
// 2 TF32.
struct MmaBuffers {
  const uint32_t *a, *b;
  float* c;
  int type;
};
void run_mma(const MmaBuffers& buffers, const densenet_ext::cuda::Context& context);
// 512 bytes of shared memory in rows of 16, row l given by lane l; r[32][4].
struct LdmatrixBuffers {
  const uint32_t* shared;
  uint32_t* r;
  bool transposed;
};
void run_ldmatrix(const LdmatrixBuffers& buffers, const densenet_ext::cuda::Context& context);
// out[4][32]: __shfl_sync from lane 5 + lane, xor 3, down 2 and the ballot of odd lanes.
void run_shuffles(uint32_t* out, const densenet_ext::cuda::Context& context);

}  // namespace simt_test
