// Dense bfloat16 tiles with the processor's bfloat16 dot products (AVX512-BF16).
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>

#include "packed_vnni.h"
#include "task.h"
#include "vec.h"

namespace mnemon {
namespace MNEMON_ISA {

MNEMON_INLINE __m512bh as_pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }

// Four steps that together sum 16 vectors to one, lane t the sum of vector t's lanes (once `in_order`
// has sorted them). Each halves the number of vectors, so few are alive at any time.
template <int kStep>
MNEMON_INLINE __m512 fold(__m512 a, __m512 b) {
  if constexpr (kStep == 0)
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  if constexpr (kStep == 1)
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  if constexpr (kStep == 2)
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

MNEMON_INLINE __m512 in_order(__m512 x) {
  // Quarter q, lane i holds vector q + 4 i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, x);
}

// scores[row][t] = scale * (query[row] . keys[t]). The query is padded to whole vectors with zeros;
// the last vector of a key is read under `last`.
template <int kRows, int kVectors>
__attribute__((flatten)) inline void dot_bf16(const uint16_t* query, int ldq, const uint16_t* keys, int64_t stride, int n,
                     __mmask32 last, float scale, float* scores, int lds) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int t = 0; t < n; t += 16) {
    __m512 waiting[4][kRows];  // sums of 1, 2, 4 and 8 tokens that wait for their other half
    int here = n - t < 16 ? n - t : 16;
    unrolled<16>([&](auto token) {
      constexpr int i = decltype(token)::value;
      // Behind the end the last key is read again; nobody looks at its scores.
      int64_t at = t + (i < here ? i : here - 1);
      const uint16_t* key = keys + at * stride;
      __m512 acc[kRows];
      unrolled<kRows>([&](auto r) { acc[r] = _mm512_setzero_ps(); });
      unrolled<kVectors>([&](auto vector) {
        constexpr int v = decltype(vector)::value;
        __m512i raw = v + 1 == kVectors ? _mm512_maskz_loadu_epi16(last, key + v * 32)
                                        : _mm512_loadu_si512(key + v * 32);
        unrolled<kRows>([&](auto r) {
          acc[r] = _mm512_dpbf16_ps(
              acc[r], as_pairs(_mm512_loadu_si512(query + r * ldq + v * 32)), as_pairs(raw));
        });
      });
      unrolled<kRows>([&](auto r) {
        __m512 x = acc[r];
        if constexpr (i % 2 == 1) x = fold<0>(waiting[0][r], x);
        if constexpr (i % 4 == 3) x = fold<1>(waiting[1][r], x);
        if constexpr (i % 8 == 7) x = fold<2>(waiting[2][r], x);
        if constexpr (i % 16 == 15) {
          x = in_order(fold<3>(waiting[3][r], x));
          _mm512_storeu_ps(scores + r * lds + t, _mm512_mul_ps(x, factor));
        } else {
          constexpr int level = i % 2 == 0 ? 0 : i % 4 == 1 ? 1 : i % 8 == 3 ? 2 : 3;
          waiting[level][r] = x;
        }
      });
    });
  }
}

// out[row] += weights[row] . values. Weights are pairs of neighbouring tokens, [row][32];
// `width` is a multiple of 32; an odd last token is paired with zeros.
template <int kRows, int kHalves>
MNEMON_INLINE void add_bf16_dims(const uint32_t* weights, int ldw, const uint16_t* values,
                                 int64_t stride, int n, float* out, int ldo) {
  const __m512i low_order = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
      3, 34, 2, 33, 1, 32, 0);
  const __m512i high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16));
  __m512 acc[kRows][kHalves][2];
  for (int r = 0; r < kRows; r++)
    for (int h = 0; h < kHalves; h++) acc[r][h][0] = acc[r][h][1] = _mm512_setzero_ps();
#pragma GCC unroll 1
  for (int t = 0; t < n; t += 2) {
    bool odd = t + 1 == n;
    __m512bh low[kHalves], high[kHalves];
    unrolled<kHalves>([&](auto h) {
      __m512i a = _mm512_loadu_si512(values + t * stride + h * 32);
      __m512i b = odd ? _mm512_setzero_si512()
                      : _mm512_loadu_si512(values + (t + 1) * stride + h * 32);
      low[h] = as_pairs(_mm512_permutex2var_epi16(a, low_order, b));
      high[h] = as_pairs(_mm512_permutex2var_epi16(a, high_order, b));
    });
    unrolled<kRows>([&](auto r) {
      __m512bh w = as_pairs(_mm512_set1_epi32(static_cast<int>(weights[r * ldw + t / 2])));
      unrolled<kHalves>([&](auto h) {
        acc[r][h][0] = _mm512_dpbf16_ps(acc[r][h][0], low[h], w);
        acc[r][h][1] = _mm512_dpbf16_ps(acc[r][h][1], high[h], w);
      });
    });
  }
  for (int r = 0; r < kRows; r++)
    for (int h = 0; h < kHalves; h++)
      for (int v = 0; v < 2; v++) {
        float* to = out + r * ldo + h * 32 + v * 16;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[r][h][v]));
      }
}

// Two rows at a time take whole values, so that memory is read from one end to the other; the next
// two rows find them in the cache.
template <int kRows, int kHalves>
MNEMON_INLINE void add_bf16_rows(const uint32_t* weights, int ldw, const uint16_t* values,
                                 int64_t stride, int n, float* out, int ldo) {
  constexpr int kTogether = kRows * kHalves <= 8 ? kRows : kHalves <= 4 ? 2 : 1;
  unrolled<(kRows + kTogether - 1) / kTogether>([&](auto part) {
    constexpr int first = decltype(part)::value * kTogether;
    constexpr int here = kRows - first < kTogether ? kRows - first : kTogether;
    add_bf16_dims<here, kHalves>(weights + first * ldw, ldw, values, stride, n, out + first * ldo,
                                 ldo);
  });
}

template <int kRows>
__attribute__((flatten)) inline void add_bf16(const uint32_t* weights, int ldw, const uint16_t* values, int64_t stride,
                     int n, int width, float* out, int ldo) {
  for (; width >= 128; width -= 128, values += 128, out += 128)
    add_bf16_rows<kRows, 4>(weights, ldw, values, stride, n, out, ldo);
  if (width == 96) add_bf16_rows<kRows, 3>(weights, ldw, values, stride, n, out, ldo);
  if (width == 64) add_bf16_rows<kRows, 2>(weights, ldw, values, stride, n, out, ldo);
  if (width == 32) add_bf16_rows<kRows, 1>(weights, ldw, values, stride, n, out, ldo);
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
#endif
