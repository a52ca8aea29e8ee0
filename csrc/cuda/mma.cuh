// Matrix products of a warp: one class for each arithmetic, all with one layout of accumulators.
//
// D[16, 8] += A[16, kDepth] B[kDepth, 8]. With g = lane / 4 and t = lane % 4, a lane holds of the
// accumulator (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1): acc[0..3]. Operands come from shared
// memory. `rows(i)` gives the address of row i (any function: rows may lie anywhere, and a row that
// does not exist may be a row of zeros), `column` an offset in it; the bytes of every row are
// aligned to 16, and column is a multiple of 16 bytes. Names: load_a has A's rows in memory,
// load_a_t has A's columns as rows; load_b has B's columns as rows (an [n, k] matrix), load_b_t
// B's rows; load_b_direct is load_b from any memory, for operands that stay in registers. B is
// loaded for 16 columns, two accumulators, at a time.
//
// Row pitches of an odd number of 16 bytes make these loads free of bank conflicts.
#pragma once

#include "ptx.cuh"

namespace densenet_ext::cuda {

// z = relu(scale * x + shift) for one channel.
template <class T>
struct alignas(2 * sizeof(T)) ScaleShift {
  T scale, shift;
};

// Returns v, which the compiler cannot know to be one value in every round of a loop: what follows
// from it takes no registers from round to round.
DEVICE int fresh(int v) { return __shfl_xor_sync(0xffffffff, v, 0); }

// NaN stays NaN.
template <class T>
DEVICE T relu(T v) {
  return v < T(0) ? T(0) : v;
}
// scale * x + shift, rounded once: the same bits wherever it is computed again.
DEVICE float affine(float x, float scale, float shift) { return fmaf(x, scale, shift); }
DEVICE double affine(double x, double scale, double shift) { return fma(x, scale, shift); }

// Two channels in a 16-byte access.
DEVICE void load_pair(const ScaleShift<float>* source, ScaleShift<float> (&s)[2]) {
  const Bytes16 v = ld16(source);
  s[0] = {float_of(v.word[0]), float_of(v.word[1])};
  s[1] = {float_of(v.word[2]), float_of(v.word[3])};
}

// bfloat16 and float16 on the tensor cores.
template <class S>
struct Half {
  using Storage = S;
  using T = float;
  static constexpr bool kTensor = true;
  static constexpr int kDepth = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2][2];
  };

  template <class RowAddress>
  DEVICE static void load_a(A& a, const RowAddress& rows, int column) {
    const int l = lane_id();
    ldmatrix_x4(a.r, rows(l % 16) + column + l / 16 * 8);
  }
  template <class RowAddress>
  DEVICE static void load_a_t(A& a, const RowAddress& rows, int column) {
    const int l = lane_id();
    ldmatrix_x4_trans(a.r, rows(l % 8 + l / 16 * 8) + column + l / 8 % 2 * 8);
  }
  template <class RowAddress>
  DEVICE static void load_b(B& b, const RowAddress& rows, int column) {
    const int l = lane_id();
    uint32_t r[4];
    ldmatrix_x4(r, rows(l % 8 + l / 16 * 8) + column + l / 8 % 2 * 8);
    b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
  }
  template <class RowAddress>
  DEVICE static void load_b_t(B& b, const RowAddress& rows, int column) {
    const int l = lane_id();
    uint32_t r[4];
    ldmatrix_x4_trans(r, rows(l % 16) + column + l / 16 * 8);
    b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
  }
  template <class RowAddress>
  DEVICE static void load_b_direct(B& b, const RowAddress& rows, int column) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b.r[i / 2][i % 2] =
          *reinterpret_cast<const uint32_t*>(rows(i / 2 * 8 + g) + column + i % 2 * 8 + 2 * t);
  }
  DEVICE static void mma(float (&acc)[2][4], const A& a, const B& b) {
    mma_16bit<S>(acc[0], a.r, b.r[0]);
    mma_16bit<S>(acc[1], a.r, b.r[1]);
  }

  // a = relu(scale * a + shift); `low` and `high` are those of rows g and g+8, from A's first
  // column on, and equal if `same`.
  DEVICE static void norm_relu(A& a, const ScaleShift<float>* low, const ScaleShift<float>* high,
                               bool same) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // columns 2t, 2t+1 and 2t+8, 2t+9
      ScaleShift<float> s[2];
      load_pair(low + 8 * half + 2 * t, s);
      a.r[2 * half] = norm_relu(a.r[2 * half], s);
      if (!same) load_pair(high + 8 * half + 2 * t, s);
      a.r[2 * half + 1] = norm_relu(a.r[2 * half + 1], s);
    }
  }
  // Rounds an operand that is to be stored as S in shared memory.
  DEVICE static S operand(float v) { return store_as<S>(v); }

 private:
  DEVICE static uint32_t norm_relu(uint32_t word, const ScaleShift<float> (&s)[2]) {
    return narrow2_relu<S>(affine(widen_half<S>(word, 0), s[0].scale, s[0].shift),
                           affine(widen_half<S>(word, 1), s[1].scale, s[1].shift));
  }
};

// float32 on the tensor cores, operands rounded to TF32.
struct Tf32 {
  using Storage = float;
  using T = float;
  static constexpr bool kTensor = true;
  static constexpr int kDepth = 8;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2][2];
  };

  // ldmatrix serves 32 bits, too: an 8x8 matrix of 16 bits is an 8x4 matrix of these, word for
  // word.
  template <class RowAddress>
  DEVICE static void load_a(A& a, const RowAddress& rows, int column) {
    const int l = lane_id();
    ldmatrix_x4(a.r, rows(l % 16) + column + l / 16 * 4);
  }
  template <class RowAddress>
  DEVICE static void load_a_t(A& a, const RowAddress& rows, int column) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = bits_of(rows(t + i / 2 * 4)[column + g + i % 2 * 8]);
  }
  template <class RowAddress>
  DEVICE static void load_b(B& b, const RowAddress& rows, int column) {
    const int l = lane_id();
    uint32_t r[4];
    ldmatrix_x4(r, rows(l % 8 + l / 16 * 8) + column + l / 8 % 2 * 4);
    b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
  }
  template <class RowAddress>
  DEVICE static void load_b_t(B& b, const RowAddress& rows, int column) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b.r[i / 2][i % 2] = bits_of(rows(t + i % 2 * 4)[column + g + i / 2 * 8]);
  }
  template <class RowAddress>
  DEVICE static void load_b_direct(B& b, const RowAddress& rows, int column) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b.r[i / 2][i % 2] = bits_of(rows(i / 2 * 8 + g)[column + i % 2 * 4 + t]);
  }
  DEVICE static void mma(float (&acc)[2][4], const A& a, const B& b) {
    mma_tf32(acc[0], a.r, b.r[0]);
    mma_tf32(acc[1], a.r, b.r[1]);
  }

  DEVICE static void norm_relu(A& a, const ScaleShift<float>* low, const ScaleShift<float>* high,
                               bool same) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // columns t and t+4
      ScaleShift<float> s = low[4 * half + t];
      a.r[2 * half] = norm_relu(a.r[2 * half], s);
      if (!same) s = high[4 * half + t];
      a.r[2 * half + 1] = norm_relu(a.r[2 * half + 1], s);
    }
  }
  DEVICE static float operand(float v) { return round_tf32(v); }

 private:
  DEVICE static uint32_t norm_relu(uint32_t word, const ScaleShift<float>& s) {
    return bits_of(round_tf32(relu(affine(float_of(word), s.scale, s.shift))));
  }
};

// float and double on the ordinary units: exact float32, and float64. A lane holds what its own
// accumulators need, so that quads hold the same.
template <class E>
struct Exact {
  using Storage = E;
  using T = E;
  static constexpr bool kTensor = false;
  static constexpr int kDepth = 4;
  struct A {
    E v[2][kDepth];
  };
  struct B {
    E v[2][kDepth][2];
  };

  template <class RowAddress>
  DEVICE static void load_a(A& a, const RowAddress& rows, int column) {
    const int g = lane_id() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < kDepth; ++k) a.v[i][k] = rows(g + 8 * i)[column + k];
  }
  template <class RowAddress>
  DEVICE static void load_a_t(A& a, const RowAddress& rows, int column) {
    const int g = lane_id() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < kDepth; ++k) a.v[i][k] = rows(k)[column + g + 8 * i];
  }
  template <class RowAddress>
  DEVICE static void load_b(B& b, const RowAddress& rows, int column) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
        for (int j = 0; j < 2; ++j) b.v[tile][k][j] = rows(8 * tile + 2 * t + j)[column + k];
  }
  template <class RowAddress>
  DEVICE static void load_b_t(B& b, const RowAddress& rows, int column) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
        for (int j = 0; j < 2; ++j) b.v[tile][k][j] = rows(k)[column + 8 * tile + 2 * t + j];
  }
  template <class RowAddress>
  DEVICE static void load_b_direct(B& b, const RowAddress& rows, int column) {
    load_b(b, rows, column);
  }
  DEVICE static void mma(E (&acc)[2][4], const A& a, const B& b) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          acc[tile][i] = affine(a.v[i / 2][k], b.v[tile][k][i % 2], acc[tile][i]);
  }

  DEVICE static void norm_relu(A& a, const ScaleShift<E>* low, const ScaleShift<E>* high,
                               bool same) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      ScaleShift<E> s = low[k];
      a.v[0][k] = relu(affine(a.v[0][k], s.scale, s.shift));
      if (!same) s = high[k];
      a.v[1][k] = relu(affine(a.v[1][k], s.scale, s.shift));
    }
  }
  DEVICE static E operand(E v) { return v; }
};

}  // namespace densenet_ext::cuda
