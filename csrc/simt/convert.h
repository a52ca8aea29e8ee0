// Conversions with the same bits as on a GPU. They need no compiler's 16-bit types.
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// Rounds to the nearest, ties to even. Every NaN becomes 0x7fff, as on a GPU.
inline uint16_t to_bfloat16(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + 0x38000000));
  const float v = static_cast<float>(rest) * 0x1p-24f;  // subnormal: exact in float
  return sign ? -v : v;
}

inline uint16_t to_float16(float v) {
  const uint32_t bits = bits_of(v), rest = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (rest > 0x7f800000) return 0x7fff;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves multiples of 2^-24 and rounds to them
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

// Rounds to the nearest value with 10 bits of mantissa, ties away from 0.
inline float round_tf32(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return float_of(0x7fffffff);
  if ((bits & 0x7f800000) == 0x7f800000) return v;
  return float_of((bits + 0x1000) & 0xffffe000);
}

}  // namespace simt
