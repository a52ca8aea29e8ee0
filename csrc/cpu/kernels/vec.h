// Defines a small vector type, so that one source serves AVX-512, AVX2 and whatever else the
// compiler knows (SSE2 on plain x86-64). The compiler's vector extensions do the arithmetic.
// Intrinsics do what the extensions cannot express: maximum, partial loads, half precision.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// Including all of x86's intrinsics takes a third of a second, SSE2's alone no time.
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/kernel_arguments.h"
#include "float16.h"

#ifndef DENSENET_EXT_ISA
#error "compile with -DDENSENET_EXT_ISA=baseline|avx2|avx512|amx"
#endif

// Marks a step of a kernel that must not share registers with the steps around it: inlined
// together, the constants of one step push the sums of another to the stack.
#define DX_NOINLINE __attribute__((noinline))
#define DX_UNROLL _Pragma("GCC unroll 32")

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T>
struct VecOf {
  static constexpr int size = kVectorBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kVec = VecOf<T>::size;

template <class T>
DX_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // exact, NaN and -0 included
}

// --- whole vectors ---

template <class T>
DX_INLINE Vec<T> load_native(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
DX_INLINE void store_native(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

DX_INLINE Vec<float> load(const float* p) { return load_native(p); }
DX_INLINE Vec<double> load(const double* p) { return load_native(p); }
DX_INLINE void store(float* p, Vec<float> v) { store_native(p, v); }
DX_INLINE void store(double* p, Vec<double> v) { store_native(p, v); }

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

DX_INLINE Vec<float> load(const BFloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, FloatBits) << 16);
}
DX_INLINE void store(BFloat16* p, Vec<float> v) {  // rounds to nearest, ties to even
  const FloatBits bits = (FloatBits)v;
  const FloatBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FloatBits quiet = (bits >> 16) | 0x40u;
  const HalfBits half = __builtin_convertvector((v == v) ? rounded : quiet, HalfBits);
  std::memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
DX_INLINE Vec<float> load(const Float16* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DX_INLINE void store(Float16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
DX_INLINE Vec<float> load(const Float16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DX_INLINE void store(Float16* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
DX_INLINE Vec<float> load(const Float16* p) {
  Vec<float> v;
  for (int i = 0; i < kVec<float>; ++i) v[i] = half_to_float(p[i]);
  return v;
}
DX_INLINE void store(Float16* p, Vec<float> v) {
  for (int i = 0; i < kVec<float>; ++i) p[i] = float_to_half(v[i]);
}
#endif

template <class T>
struct LaneIndices {
  T values[kVec<T>];
  constexpr LaneIndices() : values() {
    for (int i = 0; i < kVec<T>; ++i) values[i] = T(i);
  }
};
template <class T>
inline constexpr LaneIndices<T> kLaneIndices;

// Returns a mask: all ones in the first n lanes, 0 in the rest.
template <class T>
DX_INLINE auto first_lanes(int64_t n) {
  return load(kLaneIndices<T>.values) < broadcast(static_cast<T>(n));
}
template <class T>
DX_INLINE Vec<T> keep_first(Vec<T> v, int64_t n) {
  return first_lanes<T>(n) ? v : Vec<T>{};
}

// --- the first n elements, 0 <= n <= kVec; the rest load as 0 and are not stored ---

template <class S>
DX_INLINE Vec<Arithmetic<S>> load_first(const S* p, int64_t n) {
  using T = Arithmetic<S>;
  if (n >= kVec<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  if constexpr (sizeof(S) == 8)
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return (Vec<T>)_mm256_maskload_ps(p, (__m256i)first_lanes<T>(n));
  if constexpr (sizeof(S) == 8) return (Vec<T>)_mm256_maskload_pd(p, (__m256i)first_lanes<T>(n));
#endif
  S lanes[kVec<T>] = {};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(S) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    std::memcpy(lanes, &bits, sizeof bits);
    return load(lanes);
  }
#endif
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class S>
DX_INLINE void store_first(S* p, Vec<Arithmetic<S>> v, int64_t n) {
  using T = Arithmetic<S>;
  if (n >= kVec<T>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  if constexpr (sizeof(S) == 8)
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return _mm256_maskstore_ps(p, (__m256i)first_lanes<T>(n), (__m256)v);
  if constexpr (sizeof(S) == 8)
    return _mm256_maskstore_pd(p, (__m256i)first_lanes<T>(n), (__m256d)v);
#endif
  S lanes[kVec<T>];
  store(lanes, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(S) == 2) {
    __m256i bits;
    std::memcpy(&bits, lanes, sizeof bits);
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
  }
#endif
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// --- arithmetic ---

// Returns max(v, 0), but NaN stays NaN as in torch.relu: x86's maximum returns its second operand
// if either is NaN.
DX_INLINE Vec<float> relu(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_max_ps(_mm_setzero_ps(), (__m128)v);
#else
  return (v < 0.f) ? Vec<float>{} : v;
#endif
}
DX_INLINE Vec<double> relu(Vec<double> v) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd(_mm512_setzero_pd(), (__m512d)v);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_max_pd(_mm256_setzero_pd(), (__m256d)v);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_max_pd(_mm_setzero_pd(), (__m128d)v);
#else
  return (v < 0.0) ? Vec<double>{} : v;
#endif
}

// Returns the gradient of relu at z, or at anything of its sign: 0 where z <= 0, else g, also at
// NaN.
template <class V>
DX_INLINE V relu_gradient(V z, V g) {
  return (z <= V{}) ? V{} : g;
}

template <class T>
DX_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kVec<T>];
  store(lanes, v);
  for (int width = kVec<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

#if defined(__clang__) || __GNUC__ >= 12
template <int... I, class V>
DX_INLINE V shuffle(V a, V b) {
  return __builtin_shufflevector(a, b, I...);
}
#else
template <int... I, class V>
DX_INLINE V shuffle(V a, V b) {
  return __builtin_shuffle(a, b, decltype(a < b){I...});
}
#endif

// Returns sums of neighboring lanes: a[0]+a[1], a[2]+a[3], ..., b[0]+b[1], ...
template <class V, int... I>
DX_INLINE V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(2 * I)...>(a, b) + shuffle<(2 * I + 1)...>(a, b);
}
template <class T>
DX_INLINE Vec<T> add_pairs(Vec<T> a, Vec<T> b) {
  return add_pairs(a, b, std::make_integer_sequence<int, kVec<T>>{});
}
// Returns lane FIRST twice, the next lane twice, and so on.
template <int FIRST, class V, int... I>
DX_INLINE V double_lanes(V v, std::integer_sequence<int, I...>) {
  return shuffle<(FIRST + I / 2)...>(v, v);
}
template <class T, int FIRST>
DX_INLINE Vec<T> double_lanes(Vec<T> v) {
  return double_lanes<FIRST>(v, std::make_integer_sequence<int, kVec<T>>{});
}

// Transpose kVec x kVec elements in registers, in log2(kVec) rounds. The round of D exchanges
// blocks of D x D elements across the diagonal.
template <int D, int N, class V, int... I>
DX_INLINE V exchange_low(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<((I & D) ? N + I - D : I)...>(a, b);
}
template <int D, int N, class V, int... I>
DX_INLINE V exchange_high(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<((I & D) ? N + I : I + D)...>(a, b);
}
template <class T, int D>
DX_INLINE void transpose_round(Vec<T> (&v)[kVec<T>]) {
  if constexpr (D > 0) {
    constexpr int N = kVec<T>;
    DX_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i & D) continue;
      const Vec<T> a = v[i], b = v[i + D];
      v[i] = exchange_low<D, N>(a, b, std::make_integer_sequence<int, N>{});
      v[i + D] = exchange_high<D, N>(a, b, std::make_integer_sequence<int, N>{});
    }
    transpose_round<T, D / 2>(v);
  }
}
template <class T>
DX_INLINE void transpose(Vec<T> (&v)[kVec<T>]) {
  transpose_round<T, kVec<T> / 2>(v);
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
