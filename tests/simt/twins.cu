// Kernels of warp collectives, whose results Python compares with its own.
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "faults.h"

namespace simt_test {
namespace {

using namespace densenet_ext::cuda;

KERNEL mma_kernel(MmaBuffers m) {
  wait_for_earlier_kernels();
  const int lane = lane_id();
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = m.a[4 * lane + i], c[i] = m.c[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = m.b[2 * lane + i];
  if (m.type == 0) mma_16bit<densenet_ext::BFloat16>(c, a, b);
  if (m.type == 1) mma_16bit<densenet_ext::Float16>(c, a, b);
  if (m.type == 2) mma_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) m.c[4 * lane + i] = c[i];
}

KERNEL ldmatrix_kernel(LdmatrixBuffers m) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(shared);
  const int lane = lane_id();
  st16(shared + 16 * lane, ld16(m.shared + 4 * lane));
  __syncwarp();
  uint32_t r[4];
  if (m.transposed) {
    ldmatrix_x4_trans(r, shared + 16 * lane);
  } else {
    ldmatrix_x4(r, shared + 16 * lane);
  }
  for (int i = 0; i < 4; ++i) m.r[4 * lane + i] = r[i];
}

KERNEL shuffle_kernel(uint32_t* out) {
  wait_for_earlier_kernels();
  const int lane = lane_id();
  const auto value = static_cast<uint32_t>(100 + lane);
  out[lane] = __shfl_sync(0xffffffff, value, 5 + lane);
  out[32 + lane] = __shfl_xor_sync(0xffffffff, value, 3);
  out[64 + lane] = __shfl_down_sync(0xffffffff, value, 2);
  out[96 + lane] = __ballot_sync(0xffffffff, lane % 2);
}

}  // namespace

void run_mma(const MmaBuffers& buffers, const Context& context) {
  launch(context, &mma_kernel, Grid{1}, kWarp, 0, buffers);
}
void run_ldmatrix(const LdmatrixBuffers& buffers, const Context& context) {
  launch(context, &ldmatrix_kernel, Grid{1}, kWarp, 512, buffers);
}
void run_shuffles(uint32_t* out, const Context& context) {
  launch(context, &shuffle_kernel, Grid{1}, kWarp, 0, out);
}

}  // namespace simt_test
