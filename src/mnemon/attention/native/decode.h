// A packed block as float32 numbers, for every instruction set.
#pragma once

#include "task.h"
#include "vec.h"

namespace mnemon {
namespace MNEMON_ISA {


MNEMON_INLINE void scales_as_floats(const uint8_t* scales, int n, float factor, float* to) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(scales);
  for (int i = 0; i < n; i++) to[i] = from_f16(half[i]) * factor;
}

// One byte of each word as numbers: a field of it, or an fp8 number.
template <bool kFp8>
MNEMON_INLINE vf numbers_of(vi words, int byte, int shift, int mask) {
  if constexpr (kFp8) {
    vi top = words << (24 - 8 * byte);
    // As the upper bits of a float the exponent is 120 too small; right for subnormal numbers too.
    vf size = as_float((top & 0x7f000000) >> 4) * 0x1p120f;
    return as_float(as_int(size) | (top & splat(INT32_MIN)));
  }
  return __builtin_convertvector((words >> (8 * byte + shift)) & mask, vf);
}

MNEMON_INLINE vi load_words(const uint8_t* from) {
  vi words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

template <bool kFp8>
inline void key_codes(const uint8_t* codes, int bits, int padded, float* to) {
  // to[dim][token]
  int fields = 8 / bits, mask = (1 << bits) - 1, planes = 4 / fields;
  for (int quad = 0; quad < padded / 4; quad++)
    for (int i = 0; i < planes; i++)
      for (int lane = 0; lane < 16; lane += W) {
        vi words = load_words(codes + (quad * planes + i) * 64 + lane * 4);
        for (int field = 0; field < fields; field++) {
          float* row = to + quad * 4 * kBlock + (i * fields + field) * 16 + lane;
          for (int dim = 0; dim < 4; dim++)
            store(row + dim * kBlock, numbers_of<kFp8>(words, dim, field * bits, mask));
        }
      }
}

template <bool kFp8>
inline void value_codes(const uint8_t* codes, int bits, int padded, float* to) {
  // to[token][dim]
  int fields = 8 / bits, mask = (1 << bits) - 1, planes = 16 / fields;
  for (int chunk = 0; chunk < padded / 16; chunk++)
    for (int i = 0; i < planes; i++)
      for (int lane = 0; lane < 16; lane += W) {
        vi words = load_words(codes + (chunk * planes + i) * 64 + lane * 4);
        for (int field = 0; field < fields; field++) {
          float* row = to + (i + field * planes) * 4 * padded + chunk * 16 + lane;
          for (int token = 0; token < 4; token++)
            store(row + token * padded, numbers_of<kFp8>(words, token, field * bits, mask));
        }
      }
}

// Keys of a block, still rotated if they are stored so: to[padded][64 tokens].
inline void decode_keys(const Packed& side, const uint8_t* block, float factor, float* to) {
  int padded = side.padded();
  if (side.code == Code::fp8)
    key_codes<true>(block, 8, padded, to);
  else
    key_codes<false>(block, side.bits(), padded, to);
  const uint8_t* scales = block + side.code_bytes();
  if (side.axis == Axis::token) {
    for (int g = 0; g < side.groups(); g++) {
      float scale[kBlock], zero[kBlock] = {};
      scales_as_floats(scales + g * side.group_stride() * 2, kBlock, factor, scale);
      if (side.has_zero())
        scales_as_floats(scales + (g * side.group_stride() + kBlock) * 2, kBlock, factor, zero);
      int end = g + 1 == side.groups() ? padded : (g + 1) * side.group_size;
      for (int d = g * side.group_size; d < end; d++)
        for (int t = 0; t < kBlock; t++)
          to[d * kBlock + t] = scale[t] * to[d * kBlock + t] + zero[t];
    }
  } else {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(scales);
    for (int d = 0; d < padded; d++) {
      float scale = from_f16(half[d]) * factor;
      float zero = side.has_zero() ? from_f16(half[padded + d]) * factor : 0.0f;
      for (int t = 0; t < kBlock; t++) to[d * kBlock + t] = scale * to[d * kBlock + t] + zero;
    }
  }
}

// Values of a block: to[64 tokens][padded].
inline void decode_values(const Packed& side, const uint8_t* block, float factor, float* to) {
  int padded = side.padded();
  if (side.code == Code::fp8)
    value_codes<true>(block, 8, padded, to);
  else
    value_codes<false>(block, side.bits(), padded, to);
  const uint8_t* scales = block + side.code_bytes();
  if (side.axis == Axis::token) {
    for (int g = 0; g < side.groups(); g++) {
      float scale[kBlock], zero[kBlock] = {};
      scales_as_floats(scales + g * side.group_stride() * 2, kBlock, factor, scale);
      if (side.has_zero())
        scales_as_floats(scales + (g * side.group_stride() + kBlock) * 2, kBlock, factor, zero);
      int begin = g * side.group_size;
      int end = g + 1 == side.groups() ? padded : begin + side.group_size;
      for (int t = 0; t < kBlock; t++)
        for (int d = begin; d < end; d++)
          to[t * padded + d] = scale[t] * to[t * padded + d] + zero[t];
    }
  } else {
    float scale[1024], zero[1024] = {};
    scales_as_floats(scales, padded, factor, scale);
    if (side.has_zero()) scales_as_floats(scales + padded * 2, padded, factor, zero);
    for (int t = 0; t < kBlock; t++)
      for (int d = 0; d < padded; d++)
        to[t * padded + d] = scale[d] * to[t * padded + d] + zero[d];
  }
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
