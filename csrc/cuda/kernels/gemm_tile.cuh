// A block computes a tile of a matrix product C[m, n] = sum_k A(m, k) B(k, n): 128 x 64, by 8 warps
// of 32 x 32.
//
// Either operand may lie in memory as it is named or transposed; 64 bytes of k at a time (in any
// layout the same elements) go through three stages of shared memory by cp.async, those beyond a
// matrix as zeros. Math (mma.cuh) sets the arithmetic. Bytes: each operand is read from L2
// once for each tile of the other.
#pragma once

#include "channel_loops.cuh"

namespace densenet_ext::cuda {

// The rows of a matrix are contiguous, `pitch` apart; each starts at a multiple of 16 bytes.
template <class S>
struct Matrix {
  const S* data;
  int64_t rows, columns, pitch;
};

// The first row and column of a tile, and the range of k that it sums over.
struct TilePlace {
  int64_t m, n, k_begin, k_end;
};

// kMFirst: rows of A in memory are its columns (k); kNFirst: rows of B in memory are k.
template <class Math, bool kMFirst, bool kNFirst>
struct TileProduct {
  using S = typename Math::Storage;
  using T = typename Math::T;
  static constexpr int kThreads = 256;
  static constexpr int kM = 128, kN = 64, kWarpsM = 4;
  static constexpr int kK = 4 * kVector<S>;
  static constexpr int kStages = 3;
  static constexpr int kRowsA = kMFirst ? kK : kM, kColumnsA = kMFirst ? kM : kK;
  static constexpr int kRowsB = kNFirst ? kK : kN, kColumnsB = kNFirst ? kN : kK;
  static constexpr int kPitchA = kColumnsA + kVector<S>, kPitchB = kColumnsB + kVector<S>;
  static constexpr int kSizeA = kRowsA * kPitchA, kSizeB = kRowsB * kPitchB;
  static constexpr int64_t kStageBytes = (kSizeA + kSizeB) * sizeof(S);
  // The result is [kM, kN] in shared memory.
  static constexpr int kPitchC = kN + 8;
  static constexpr int64_t kResultBytes = kM * kPitchC * sizeof(T);
  static constexpr int64_t kBytes =
      kStages * kStageBytes > kResultBytes ? kStages * kStageBytes : kResultBytes;

  // A warp has [2][2] units of 16 rows by 16 columns, each two accumulators.
  T acc[2][2][2][4];

  // All threads take part; `memory` may be used again afterwards.
  DEVICE void compute(unsigned char* memory, const Matrix<S>& a, const Matrix<S>& b,
                      const TilePlace& place) {
    for_accumulators([](int, int, T& value) { value = T(0); });
    const int64_t steps = ceil_div(place.k_end - place.k_begin, kK);
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(memory, stage, steps, a, b, place);
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch(memory, step + kStages - 1, steps, a, b, place);
      multiply(stage_of(memory, step));
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // Calls body(row, column, value) for the accumulators of this thread.
  template <class F>
  DEVICE void for_accumulators(const F& body) {
    const int row = warp_id() % kWarpsM * 32 + lane_id() / 4,
              column = warp_id() / kWarpsM * 32 + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            body(row + 16 * i + e / 2 * 8, column + 16 * j + 8 * tile + e % 2, acc[i][j][tile][e]);
        }
      }
    }
  }

  // Writes the tile to shared memory, [kM] rows kPitchC apart, for all threads to read.
  DEVICE void store_shared(T* result) {
    for_accumulators(
        [&](int row, int column, T& value) { result[row * kPitchC + column] = value; });
    __syncthreads();
  }

 private:
  DEVICE static S* stage_of(unsigned char* memory, int64_t step) {
    return reinterpret_cast<S*>(memory + step % kStages * kStageBytes);
  }

  template <int rows, int columns>
  DEVICE static void fetch_operand(S* shared, const Matrix<S>& m, int64_t row, int64_t column,
                                   int64_t row_end, int64_t column_end) {
    constexpr int row_vectors = columns / kVector<S>, count = rows * row_vectors;
#pragma unroll
    for (int first = 0; first < count; first += kThreads) {
      const int i = first + thread_id();
      if (count % kThreads != 0 && i >= count) continue;
      const int64_t r = row + i / row_vectors, c = column + i % row_vectors * kVector<S>,
                    remaining = column_end - c;
      const int valid = r >= row_end || remaining <= 0 ? 0
                        : remaining < kVector<S>       ? static_cast<int>(remaining)
                                                       : kVector<S>;
      cp_async16(shared + i / row_vectors * (columns + kVector<S>)+i % row_vectors * kVector<S>,
                 valid > 0 ? m.data + r * m.pitch + c : m.data,
                 valid * static_cast<int>(sizeof(S)));
    }
  }

  DEVICE static void fetch(unsigned char* memory, int64_t step, int64_t steps, const Matrix<S>& a,
                           const Matrix<S>& b, const TilePlace& place) {
    if (step < steps) {
      S* const shared = stage_of(memory, step);
      const int64_t k = place.k_begin + step * kK;
      if constexpr (kMFirst) {
        fetch_operand<kRowsA, kColumnsA>(shared, a, k, place.m, place.k_end, a.columns);
      } else {
        fetch_operand<kRowsA, kColumnsA>(shared, a, place.m, k, a.rows, place.k_end);
      }
      if constexpr (kNFirst) {
        fetch_operand<kRowsB, kColumnsB>(shared + kSizeA, b, k, place.n, place.k_end, b.columns);
      } else {
        fetch_operand<kRowsB, kColumnsB>(shared + kSizeA, b, place.n, k, b.rows, place.k_end);
      }
    }
    cp_async_commit();
  }

  template <int count>
  DEVICE static void round(uint32_t (&words)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) words[i] = bits_of(round_tf32(float_of(words[i])));
  }

  DEVICE void multiply(const S* shared) {
    const int m = warp_id() % kWarpsM * 32, n = warp_id() / kWarpsM * 32;
    const S* const second = shared + kSizeA;
#pragma unroll
    for (int k = 0; k < kK; k += Math::kDepth) {
      typename Math::A a[2];
      typename Math::B b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kMFirst) {
          Math::load_a_t(a[i], [&](int r) { return shared + (k + r) * kPitchA; }, m + 16 * i);
        } else {
          Math::load_a(a[i], [&](int r) { return shared + (m + 16 * i + r) * kPitchA; }, k);
        }
        if constexpr (kNFirst) {
          Math::load_b_t(b[i], [&](int r) { return second + (k + r) * kPitchB; }, n + 16 * i);
        } else {
          Math::load_b(b[i], [&](int r) { return second + (n + 16 * i + r) * kPitchB; }, k);
        }
        if constexpr (std::is_same_v<Math, Tf32>) {
          round(a[i].r);
          round(b[i].r[0]);
          round(b[i].r[1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) Math::mma(acc[i][j], a[i], b[j]);
      }
    }
  }
};

}  // namespace densenet_ext::cuda
