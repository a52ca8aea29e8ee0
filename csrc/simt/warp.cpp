// Warp collectives: every lane deposits its part, and the last one that arrives does all the work.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cuda/ptx.cuh"
#include "findings.h"
#include "shadow.h"

namespace simt {
namespace {

void check_mask(unsigned mask, uintptr_t pc) {
  if (mask == kAllLanes) return;
  report(
      "partial mask",
      thread_name(state.current->id, state.block) + " gives a mask that is not full " + source(pc),
      pc, 0);
  stop();
}

Thread& lane_of_warp(int lane) { return state.thread[state.current->warp * kWarp + lane]; }
template <class T>
T& deposit_of(int lane) {
  return *static_cast<T*>(lane_of_warp(lane).deposit);
}

struct ShuffleDeposit {
  uint64_t value, result;
  Shuffle from;
  int operand, width;
};

// The lane whose value `lane` gets: `lane` itself if the source would lie outside of its group.
int source_lane(int lane, const ShuffleDeposit& d) {
  const int first = lane / d.width * d.width, in_group = lane - first;
  int source = in_group;
  if (d.from == Shuffle::kIndex) source = d.operand & (d.width - 1);
  if (d.from == Shuffle::kXor) source = in_group ^ d.operand;
  if (d.from == Shuffle::kDown) source = in_group + d.operand;
  if (d.from == Shuffle::kUp) source = in_group - d.operand;
  return source < 0 || source >= d.width ? lane : first + source;
}

struct BallotDeposit {
  int predicate;
  unsigned result;
};

struct MatrixDeposit {
  uint32_t* r;
  const void* row;
};

void load_matrices(MatrixDeposit& mine, bool transposed, uintptr_t pc) {
  if (!arrive(Wait::kLdmatrix, &mine, pc)) return;
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread& t = lane_of_warp(lane);
    const void* const row = deposit_of<MatrixDeposit>(lane).row;
    require(t, row, Space::kShared, pc);
    access(t, row, 16, Access::kRead, pc);
  }
  for (int i = 0; i < 4; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(matrix[row], deposit_of<MatrixDeposit>(8 * i + row).row, 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint16_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      deposit_of<MatrixDeposit>(lane).r[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
  release_warp();
}

struct MmaDeposit {
  float* c;
  const uint32_t *a, *b;
};

// c[16, 8] += a[16, K] b[K, 8], with c in the accumulator's layout. Sums in order of k, in float.
template <int K>
void accumulate(const float (&a)[16][K], const float (&b)[K][8]) {
  float c[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const float* const part = deposit_of<MmaDeposit>(lane).c;
    for (int i = 0; i < 4; ++i) c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = part[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* const part = deposit_of<MmaDeposit>(lane).c;
    for (int i = 0; i < 4; ++i) part[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

using densenet_ext::cuda::widen_half;

template <class S>
void multiply_16bit(MmaDeposit& mine, uintptr_t pc) {
  if (!arrive(Wait::kMma, &mine, pc)) return;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& d = deposit_of<MmaDeposit>(lane);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = widen_half<S>(d.a[i], half);
      }
      for (int i = 0; i < 2; ++i) b[2 * t + half + i * 8][g] = widen_half<S>(d.b[i], half);
    }
  }
  accumulate(a, b);
  release_warp();
}

}  // namespace

uint64_t shuffle(unsigned mask, uint64_t value, Shuffle from, int operand, int width) {
  check_mask(mask, SIMT_CALLER);
  ShuffleDeposit mine = {value, value, from, operand, width};
  if (arrive(Wait::kShuffle, &mine, SIMT_CALLER)) {
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& d = deposit_of<ShuffleDeposit>(lane);
      d.result = deposit_of<ShuffleDeposit>(source_lane(lane, d)).value;
    }
    release_warp();
  }
  return mine.result;
}

}  // namespace simt

using simt::Wait;

unsigned __ballot_sync(unsigned mask, int predicate) {
  simt::check_mask(mask, SIMT_CALLER);
  simt::BallotDeposit mine = {predicate, 0};
  if (simt::arrive(Wait::kBallot, &mine, SIMT_CALLER)) {
    unsigned votes = 0;
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      votes |= static_cast<unsigned>(simt::deposit_of<simt::BallotDeposit>(lane).predicate != 0)
               << lane;
    }
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      simt::deposit_of<simt::BallotDeposit>(lane).result = votes;
    }
    simt::release_warp();
  }
  return mine.result;
}

void __syncwarp(unsigned mask) {
  simt::check_mask(mask, SIMT_CALLER);
  if (!simt::arrive(Wait::kSyncwarp, nullptr, SIMT_CALLER)) return;
  uint32_t step = 0;
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    step = std::max(step, simt::lane_of_warp(lane).step + 1);
  }
  if (step > simt::kLastStep) {
    simt::report("limit", "too many __syncwarp between two barriers for the simulator", SIMT_CALLER,
                 0);
    simt::stop();
  }
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    simt::lane_of_warp(lane).step = simt::lane_of_warp(lane).ordered = step;
  }
  simt::release_warp();
}

namespace densenet_ext::cuda {

void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  simt::MatrixDeposit mine = {r, row};
  simt::load_matrices(mine, false, SIMT_CALLER);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  simt::MatrixDeposit mine = {r, row};
  simt::load_matrices(mine, true, SIMT_CALLER);
}

template <>
void mma_16bit<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::MmaDeposit mine = {c, a, b};
  simt::multiply_16bit<BFloat16>(mine, SIMT_CALLER);
}
template <>
void mma_16bit<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::MmaDeposit mine = {c, a, b};
  simt::multiply_16bit<Float16>(mine, SIMT_CALLER);
}

void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::MmaDeposit mine = {c, a, b};
  if (!simt::arrive(Wait::kMma, &mine, SIMT_CALLER)) return;
  // The hardware looks at the upper 19 bits only.
  const auto value = [](uint32_t bits) { return simt::float_of(bits & 0xffffe000); };
  float left[16][8], right[8][8];
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    const auto& d = simt::deposit_of<simt::MmaDeposit>(lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = value(d.a[i]);
    for (int i = 0; i < 2; ++i) right[t + i * 4][g] = value(d.b[i]);
  }
  simt::accumulate(left, right);
  simt::release_warp();
}

}  // namespace densenet_ext::cuda
