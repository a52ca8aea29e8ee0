// Neighboring channels are read and written in one access: V values of storage type S, V *
// sizeof(S) bytes at an address that is a multiple of them.
//
// Slices of a feature buffer start at any channel, so the largest V depends on the slice: kernels
// are templates of V, and with_vector picks the widest one that all its addresses allow. Channels
// beyond the slice are never touched: the last group of a row goes element by element.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/mma.cuh"

namespace densenet_ext::cuda {

// Elements of the widest access, 16 bytes.
template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

template <int bytes>
using Word = std::conditional_t<
    bytes == 16, Bytes16,
    std::conditional_t<bytes == 8, uint64_t, std::conditional_t<bytes == 4, uint32_t, uint16_t>>>;

template <int bytes>
DEVICE Word<bytes> load_word(const void* source) {
  if constexpr (bytes == 16) {
    return ld16(source);
  } else {
    return *static_cast<const Word<bytes>*>(source);
  }
}
template <int bytes>
DEVICE void store_word(void* target, const Word<bytes>& word) {
  if constexpr (bytes == 16) {
    st16(target, word);
  } else {
    *static_cast<Word<bytes>*>(target) = word;
  }
}

template <int V, class S>
DEVICE void load(const S* source, Arithmetic<S> (&v)[V]) {
  constexpr int bytes = V * sizeof(S);
  static_assert(bytes <= 16, "the widest access");
  const Word<bytes> word = load_word<bytes>(source);
  S s[V];
  memcpy(s, &word, bytes);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = widen(s[i]);
}
// Stores v, with kRectify max(v, 0); NaN stays NaN.
template <int V, bool kRectify = false, class S>
DEVICE void store(S* target, const Arithmetic<S> (&v)[V]) {
  constexpr int bytes = V * sizeof(S);
  Word<bytes> word;
  if constexpr (sizeof(S) == 2 && V > 1) {
    uint32_t pairs[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      pairs[i] =
          kRectify ? narrow2_relu<S>(v[2 * i], v[2 * i + 1]) : narrow2<S>(v[2 * i], v[2 * i + 1]);
    }
    memcpy(&word, pairs, bytes);
  } else {
    S s[V];
#pragma unroll
    for (int i = 0; i < V; ++i) s[i] = store_as<S>(kRectify ? relu(v[i]) : v[i]);
    memcpy(&word, s, bytes);
  }
  store_word<bytes>(target, word);
}

// Gives v the values that it has when it is stored and loaded again.
template <class S, int V>
DEVICE void round_values(Arithmetic<S> (&v)[V]) {
  if constexpr (sizeof(S) == 2 && V > 1) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const uint32_t pair = narrow2<S>(v[i], v[i + 1]);
      v[i] = widen_half<S>(pair, 0), v[i + 1] = widen_half<S>(pair, 1);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = rounded<S>(v[i]);
  }
}

// Stores values as operands of a product.
template <class Math, bool kRectify = false, int V>
DEVICE void store_operands(typename Math::Storage* target, const typename Math::T (&source)[V]) {
  if constexpr (sizeof(typename Math::Storage) == 2) {  // stored is rounded
    store<V, kRectify>(target, source);
  } else {
    typename Math::T v[V];
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = Math::operand(kRectify ? relu(source[i]) : source[i]);
    store<V>(target, v);
  }
}

// Loads the first `valid` values as they are stored, 0 beyond them.
template <int V, class S>
DEVICE void load_raw(const S* source, int valid, S (&v)[V]) {
  if (valid >= V) {
    const Word<V * sizeof(S)> word = load_word<V * sizeof(S)>(source);
    memcpy(v, &word, sizeof v);
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = i < valid ? source[i] : S{};
}

// Loads or stores the first `valid` values; those beyond are loaded as 0.
template <int V, class S>
DEVICE void load_first(const S* source, int valid, Arithmetic<S> (&v)[V]) {
  if (valid >= V) return load<V>(source, v);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = i < valid ? widen(source[i]) : Arithmetic<S>(0);
}
template <int V, class S>
DEVICE void store_first(S* target, int valid, const Arithmetic<S> (&v)[V]) {
  if (valid >= V) return store<V>(target, v);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i < valid) target[i] = store_as<S>(v[i]);
  }
}
// Copies the first `valid` values as they are.
template <int V, class S>
DEVICE void copy_first(const S* source, int valid, S* target) {
  constexpr int bytes = V * sizeof(S);
  if (valid >= V) return store_word<bytes>(target, load_word<bytes>(source));
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i < valid) target[i] = source[i];
  }
}
// Loads the first `valid` values from any address, one by one; those beyond are 0.
template <int V, class S>
DEVICE void load_each(const S* source, int valid, Arithmetic<S> (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = i < valid ? widen(source[i]) : Arithmetic<S>(0);
}

// Ors all distances between the addresses that a kernel uses: the result is aligned as they all
// are.
inline uint64_t spacing(const void* data, int64_t pitch_bytes) {
  return reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(pitch_bytes);
}
template <class E>
uint64_t spacing(const Maps<E>& maps, int64_t offset = 0) {
  return spacing(maps.data + offset, maps.pitch * static_cast<int64_t>(sizeof(E)));
}
template <class E>
uint64_t spacing(const StridedMaps<E>& maps) {
  const int64_t pitch = (maps.samples > 1 ? maps.stride_n : 0) |
                        (maps.height > 1 ? maps.stride_h : 0) |
                        (maps.width > 1 ? maps.stride_w : 0);
  return spacing(maps.data, pitch * static_cast<int64_t>(sizeof(E)));
}

// Values of a thread that keeps several numbers for each: with 16 bytes of 16-bit types it would
// have too few registers.
template <class S>
constexpr int kSummedVector = sizeof(S) == 8 ? 2 : 4;

// Calls body with the largest V, as a constant, that these distances allow.
template <class S, int V = kVector<S>, class F>
void with_vector(uint64_t distances, const F& body) {
  if constexpr (V > 1) {
    if (distances % (V * sizeof(S)) != 0) return with_vector<S, V / 2>(distances, body);
  }
  body(std::integral_constant<int, V>{});
}

}  // namespace densenet_ext::cuda
