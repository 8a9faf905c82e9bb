// Vectors of the compiler's own kind (GCC and Clang), as wide as the instruction set, and the few
// functions of them that attention needs. Everything here is inlined into one instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mnemon {
namespace MNEMON_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4), may_alias));

#define MNEMON_INLINE inline __attribute__((always_inline))

MNEMON_INLINE vf splat(float x) { return x - vf{}; }
MNEMON_INLINE vi splat(int32_t x) { return x - vi{}; }
MNEMON_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
MNEMON_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
MNEMON_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
MNEMON_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
MNEMON_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
MNEMON_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

#if defined(__AVX512F__)
MNEMON_INLINE float sum(vf x) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x)); }
MNEMON_INLINE float largest(vf x) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x)); }
#else
// In a fixed order: halves are added until one number is left.
MNEMON_INLINE float sum(vf x) {
  float lanes[W];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

MNEMON_INLINE float largest(vf x) {
  float lanes[W];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}
#endif

// e ** x to about 1 ulp; 0 where a float cannot be so small, infinity where not so large, nan for nan.
#if defined(__AVX512F__)
MNEMON_INLINE vf exp(vf x) {
  // Of a nan and a number the second is taken: a nan stays.
  __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-110.0f), reinterpret_cast<__m512>(x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504088896341f)),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);  // ln 2 in two parts:
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);  // the first has few digits
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.9841270e-4f), _mm512_set1_ps(1.3888889e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3333333e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1666667e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666667e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
  return reinterpret_cast<vf>(_mm512_scalef_ps(p, n));
}
#else
MNEMON_INLINE vf exp(vf x) {
  const vf lowest = splat(-87.33f);
  vi is_low = x < lowest;
  vf bounded = is_low ? lowest : x;
  // Adding and taking away 1.5 * 2 ** 23 rounds to the nearest whole number.
  vf n = (bounded * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  vf r = bounded - n * 0.693359375f;  // ln 2 in two parts: the first has few digits
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.3888889e-3f) + r * 1.9841270e-4f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  vf usable = n == n ? n : splat(0.0f);  // a nan has no whole number
  vi power = (__builtin_convertvector(usable, vi) + 127) << 23;
  vf result = p * as_float(power);
  return is_low ? splat(0.0f) : result;
}
#endif

// tanh to about 2 ulp: a series near 0, where the quotient would lose digits.
MNEMON_INLINE vf tanh(vf x) {
  vf size = as_float(as_int(x) & 0x7fffffff);
  vf u = size * size;
  vf p = splat(-1.4558344e-3f);
  p = p * u + 3.5921280e-3f;
  p = p * u - 8.8632355e-3f;
  p = p * u + 2.1869489e-2f;
  p = p * u - 5.3968254e-2f;
  p = p * u + 1.3333333e-1f;
  p = p * u - 3.3333333e-1f;
  vf near = size + size * (p * u);
  vf e = exp(vmax(size, splat(0.0f)) * -2.0f);
  vf far = (1.0f - e) / (1.0f + e);
  vf result = size < 0.5f ? near : far;
  result = x == x ? result : x;
  return as_float(as_int(result) | (as_int(x) & splat(INT32_MIN)));
}

MNEMON_INLINE float from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

MNEMON_INLINE uint16_t to_bf16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if (x != x) return static_cast<uint16_t>((wide >> 16) | 0x40);
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// float16 without the processor's help, in a form that compilers turn into vectors.
MNEMON_INLINE float from_f16(uint16_t bits) {
  uint32_t size = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float scaled;
  std::memcpy(&scaled, &size, 4);
  scaled *= 0x1p112f;  // the exponents' biases differ by 112; right for subnormal numbers too
  uint32_t wide;
  std::memcpy(&wide, &scaled, 4);
  wide = (bits & 0x7c00) == 0x7c00 ? size | 0x7f800000u : wide;
  wide |= static_cast<uint32_t>(bits & 0x8000) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

MNEMON_INLINE uint16_t to_f16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  uint32_t sign = (wide >> 16) & 0x8000;
  uint32_t size = wide & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000) {  // subnormal: let the adder round
    float y;
    std::memcpy(&y, &size, 4);
    y += 0.5f;
    uint32_t low;
    std::memcpy(&low, &y, 4);
    return static_cast<uint16_t>(sign | (low - 0x3f000000));
  }
  uint32_t odd = (size >> 13) & 1;
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + odd) >> 13));
}

// n numbers of any dtype as float32.
MNEMON_INLINE void load_floats(const char* from, int type, int64_t n, float* to) {
  if (type == 0) {
    std::memcpy(to, from, n * 4);
  } else if (type == 1) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; i++) to[i] = from_f16(half[i]);
  } else {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; i++) to[i] = from_bf16(half[i]);
  }
}

MNEMON_INLINE void store_floats(const float* from, int type, int64_t n, char* to) {
  if (type == 0) {
    std::memcpy(to, from, n * 4);
  } else {
    uint16_t* half = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; i++) half[i] = type == 1 ? to_f16(from[i]) : to_bf16(from[i]);
  }
}

// Orthonormal Hadamard transform of the largest power of two that divides n, block after block.
inline void hadamard(float* x, int n) {
  int size = n & -n;
  float norm = 1.0f / std::sqrt(static_cast<float>(size));
  for (int start = 0; start < n; start += size)
    for (int half = 1; half < size; half *= 2)
      for (int i = start; i < start + size; i += 2 * half)
        for (int j = i; j < i + half; j++) {
          float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
  for (int i = 0; i < n; i++) x[i] *= norm;
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
