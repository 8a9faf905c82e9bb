// Packed tiles with integer dot products (AVX512-VNNI): codes are multiplied as they are stored.
//
// A float row is written as whole numbers of 16 bits (two signed bytes, "digits") or 24 bits (three),
// so that one instruction multiplies 64 codes by 64 bytes:
//     x = unit * (256 * digit[1] + digit[0])
// 24 bits serve float32 and float16 queries, 16 bits bfloat16 ones, whose own numbers have 8.
#pragma once

#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include <type_traits>

#include "task.h"
#include "vec.h"

namespace mnemon {
namespace MNEMON_ISA {

// 127 in every digit would be 32639 and 8355711; room is left for the rounding of a float product.
template <int kDigits>
constexpr float kTop = kDigits == 2 ? 32639.0f : 8355584.0f;

// Calls what(constant) for 0 .. n - 1, unrolled.
template <int n, class F>
MNEMON_INLINE void unrolled(F&& what) {
  if constexpr (n > 0) {
    unrolled<n - 1>(what);
    what(std::integral_constant<int, n - 1>{});
  }
}

// 64 whole numbers to bytes in order; signed ones in -128..127, others in 0..255.
template <bool kSigned>
MNEMON_INLINE __m512i bytes_of(const __m512i* x) {
  __m512i low, high, mixed;
  if constexpr (kSigned) {
    low = _mm512_packs_epi32(x[0], x[1]);
    high = _mm512_packs_epi32(x[2], x[3]);
    mixed = _mm512_packs_epi16(low, high);
  } else {
    low = _mm512_packus_epi32(x[0], x[1]);
    high = _mm512_packus_epi32(x[2], x[3]);
    mixed = _mm512_packus_epi16(low, high);
  }
  // Packing works within quarters; put the words back in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, mixed);
}

// 64 whole numbers to their digits: kDigits times 64 signed bytes.
template <int kDigits>
MNEMON_INLINE void store_digits(__m512i* x, uint32_t* words) {
  for (int k = 0; k + 1 < kDigits; k++) {
    __m512i low[4];
    for (int i = 0; i < 4; i++) {
      low[i] = _mm512_and_si512(x[i], _mm512_set1_epi32(255));
      x[i] = _mm512_srai_epi32(_mm512_add_epi32(x[i], _mm512_set1_epi32(128)), 8);
    }
    _mm512_storeu_si512(words + k * 16, bytes_of<false>(low));
  }
  _mm512_storeu_si512(words + (kDigits - 1) * 16, bytes_of<true>(x));
}

// Digits of n numbers (a multiple of 16), four to a word, 64 numbers together: digit k of number i is
// a byte of words[i / 64 * step + k * 16 + i % 64 / 4]; none is larger than `largest_size`. Returns
// the unit.
template <int kDigits>
MNEMON_INLINE float to_digits(const float* x, int n, float largest_size, uint32_t* words,
                              int step) {
  __m512 scale = _mm512_set1_ps(largest_size > 1e-30f ? kTop<kDigits> / largest_size : 0.0f);
  for (int i = 0; i < n; i += 64) {
    __m512i whole[4];
    for (int j = 0; j < 4; j++) {
      __m512 part = i + j * 16 < n ? _mm512_loadu_ps(x + i + j * 16) : _mm512_setzero_ps();
      whole[j] = _mm512_cvtps_epi32(_mm512_mul_ps(part, scale));
    }
    store_digits<kDigits>(whole, words + i / 64 * step);
  }
  return largest_size / kTop<kDigits>;
}

inline float largest_of(const float* x, int n) {
  __m512 top = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  return _mm512_reduce_max_ps(top);
}

// The digits' sums as one float. With 8-bit codes 256 times a sum may leave 32 bits.
template <int kDigits, int kBits>
MNEMON_INLINE __m512 joined(const __m512i* acc) {
  const __m512 base = _mm512_set1_ps(256.0f);
  __m512i top = acc[kDigits - 1];
  if constexpr (kBits == 8) {
    __m512 x = _mm512_cvtepi32_ps(top);
    for (int k = kDigits - 2; k >= 0; k--) x = _mm512_fmadd_ps(x, base, _mm512_cvtepi32_ps(acc[k]));
    return x;
  }
  __m512 x = _mm512_cvtepi32_ps(
      _mm512_add_epi32(_mm512_slli_epi32(top, 8), acc[kDigits - 2]));
  if constexpr (kDigits == 3) x = _mm512_fmadd_ps(x, base, _mm512_cvtepi32_ps(acc[0]));
  return x;
}

// Asks for a line of the next block while this one is worked on. Two blocks of each side fit into the
// first level with 2 bits; with more they would drive each other out. The address may be anything.
template <int kBits>
MNEMON_INLINE void prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), kBits == 2 ? _MM_HINT_T0 : _MM_HINT_T1);
}

MNEMON_INLINE __m512 half_floats(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// The four subs (16 tokens each) of a quad's codes.
template <int kBits>
MNEMON_INLINE void four_subs(const uint8_t* quad, __m512i* codes) {
  if constexpr (kBits == 8) {
    for (int s = 0; s < 4; s++) codes[s] = _mm512_loadu_si512(quad + s * 64);
  } else if constexpr (kBits == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int i = 0; i < 2; i++) {
      __m512i both = _mm512_loadu_si512(quad + i * 64);
      codes[2 * i] = _mm512_and_si512(both, mask);
      codes[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
  } else {
    const __m512i mask = _mm512_set1_epi8(3);
    __m512i all = _mm512_loadu_si512(quad);
    codes[0] = _mm512_and_si512(all, mask);
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(all, 2), mask);
    codes[2] = _mm512_and_si512(_mm512_srli_epi16(all, 4), mask);
    codes[3] = _mm512_and_si512(_mm512_srli_epi16(all, 6), mask);
  }
}

// One row block's query for packed keys.
struct DigitQuery {
  uint32_t* words;    // [width / 64][kRows][kDigits][16 quads]
  float* unit;        // [kRows]
  float* group_sums;  // [kRows][groups]: sum of the query over a group's dims (token axis)
  float* offset;      // [kRows]: what the zeros of a channel-axis block add
};

// Two rows (kFirst and the next) of `dot_packed`: a block is read from one end to the other, which
// the processor's own prefetching follows, and 16 to 24 sums fill the registers.
template <int kRows, int kFirst, int kDigits, int kBits>
MNEMON_INLINE void dot_two_rows(const Packed& side, const uint8_t* block, float factor,
                                const DigitQuery& query, float scale, int64_t ahead,
                                float* scores, int lds) {
  constexpr int kQuadBytes = 256 * kBits / 8;
  constexpr int kHere = kRows - kFirst < 2 ? kRows - kFirst : 2;
  const int groups = side.groups(), padded = side.padded();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + side.code_bytes());
  const bool by_token = side.axis == Axis::token;
  for (int g = 0; g < groups; g++) {
    __m512i acc[kHere][4][kDigits];
    for (int r = 0; r < kHere; r++)
      for (int s = 0; s < 4; s++)
        for (int k = 0; k < kDigits; k++) acc[r][s][k] = _mm512_setzero_si512();
    int first = by_token ? g * side.group_size / 4 : 0;
    int last = g + 1 == groups ? padded / 4 : (g + 1) * side.group_size / 4;
    const uint8_t* codes = block + first * kQuadBytes;
    for (int quad = first; quad < last;) {
      const uint32_t* words = query.words + quad / 16 * kRows * kDigits * 16 + quad % 16;
      int stop = quad / 16 * 16 + 16 < last ? quad / 16 * 16 + 16 : last;
#pragma GCC unroll 1
      for (; quad < stop; quad++, words++, codes += kQuadBytes) {
        __m512i subs[4];
        four_subs<kBits>(codes, subs);
        if constexpr (kFirst == 0)
          for (int line = 0; line < kQuadBytes; line += 64) prefetch<kBits>(codes + line + ahead);
        unrolled<kHere * kDigits>([&](auto i) {
          constexpr int r = decltype(i)::value / kDigits, k = decltype(i)::value % kDigits;
          __m512i word =
              _mm512_set1_epi32(static_cast<int>(words[((kFirst + r) * kDigits + k) * 16]));
          for (int s = 0; s < 4; s++)
            acc[r][s][k] = _mm512_dpbusd_epi32(acc[r][s][k], subs[s], word);
        });
      }
    }
    for (int s = 0; s < 4; s++) {
      __m512 unit = _mm512_set1_ps(scale), zero = _mm512_setzero_ps();
      if (by_token) {
        const uint16_t* at = scales + g * side.group_stride() + s * 16;
        unit = _mm512_mul_ps(half_floats(at), _mm512_set1_ps(factor * scale));
        zero = _mm512_mul_ps(half_floats(at + kBlock), _mm512_set1_ps(factor * scale));
      }
      for (int r = 0; r < kHere; r++) {
        float* to = scores + (kFirst + r) * lds + s * 16;
        __m512 total = g ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
        if (by_token)
          total = _mm512_fmadd_ps(
              zero, _mm512_set1_ps(query.group_sums[(kFirst + r) * groups + g]), total);
        else
          total = _mm512_set1_ps(query.offset[kFirst + r] * scale);
        __m512 whole = _mm512_mul_ps(joined<kDigits, kBits>(acc[r][s]),
                                     _mm512_set1_ps(query.unit[kFirst + r]));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(whole, unit, total));
      }
    }
  }
}

// scores[row][64] = scale * (query[row] . keys), rows of one row block.
template <int kRows, int kDigits, int kBits>
inline void dot_packed(const Packed& side, const uint8_t* block, float factor,
                       const DigitQuery& query, float scale, int64_t ahead, float* scores, int lds) {
  const uint8_t* scales = block + side.code_bytes() + ahead;
  for (int line = 0; line < side.groups() * side.group_stride() * 2; line += 64)
    prefetch<kBits>(scales + line);
  dot_two_rows<kRows, 0, kDigits, kBits>(side, block, factor, query, scale, ahead, scores, lds);
  if constexpr (kRows > 2)
    dot_two_rows<kRows, 2, kDigits, kBits>(side, block, factor, query, scale, ahead, scores, lds);
}

// The weights of one tile and row block for packed values.
struct DigitWeights {
  uint32_t* words;     // [groups][kRows][kDigits][16 tq]
  float* unit;         // [groups][kRows]
  float* zeros;        // [kRows][groups][16]: weight times zero, summed lane by lane, all tiles
  float* peaks;        // [kRows]: the largest weight of the tile
};

// Weights [row][64] to digits, with the tokens' scales taken in (token axis). Instead of the largest
// product, what it cannot exceed sets the unit: largest weight times largest scale.
template <int kRows, int kDigits>
inline void prepare_weights(const Packed& side, const uint8_t* block, float factor,
                            const float* weights, int ldw, const DigitWeights& to) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + side.code_bytes());
  const bool by_token = side.axis == Axis::token;
  const int groups = side.groups();
  __m512 inverse[kRows];
  for (int r = 0; r < kRows; r++)
    inverse[r] = _mm512_set1_ps(to.peaks[r] > 1e-30f ? 1.0f / to.peaks[r] : 0.0f);
  for (int g = 0; g < groups; g++) {
    __m512 scale[4], zero[4];
    float most = 1.0f;
    if (by_token) {
      const uint16_t* at = scales + g * side.group_stride();
      for (int i = 0; i < 4; i++) {
        scale[i] = half_floats(at + i * 16);
        zero[i] = _mm512_mul_ps(half_floats(at + kBlock + i * 16), _mm512_set1_ps(factor));
      }
      most = _mm512_reduce_max_ps(
          _mm512_max_ps(_mm512_max_ps(scale[0], scale[1]), _mm512_max_ps(scale[2], scale[3])));
    } else {
      for (int i = 0; i < 4; i++) {
        scale[i] = _mm512_set1_ps(1.0f);
        zero[i] = _mm512_set1_ps(factor);
      }
    }
    __m512 top = _mm512_set1_ps(most > 0.0f ? kTop<kDigits> / most : 0.0f);
    for (int i = 0; i < 4; i++) scale[i] = _mm512_mul_ps(scale[i], top);
    for (int r = 0; r < kRows; r++) {
      float* lanes = to.zeros + (r * groups + g) * 16;
      // With one zero per channel it is this tile's sum of weights that counts.
      __m512 zeros = by_token ? _mm512_loadu_ps(lanes) : _mm512_setzero_ps();
      __m512i whole[4];
      for (int i = 0; i < 4; i++) {
        __m512 weight = _mm512_loadu_ps(weights + r * ldw + i * 16);
        zeros = _mm512_fmadd_ps(weight, zero[i], zeros);
        whole[i] = _mm512_cvtps_epi32(
            _mm512_mul_ps(_mm512_mul_ps(weight, inverse[r]), scale[i]));
      }
      if (!by_token) zeros = _mm512_set1_ps(_mm512_reduce_add_ps(zeros));
      _mm512_storeu_ps(lanes, zeros);
      store_digits<kDigits>(whole, to.words + (g * kRows + r) * kDigits * 16);
      to.unit[g * kRows + r] = to.peaks[r] * most / kTop<kDigits> * factor;
    }
  }
}

// The codes of plane i, field f of a chunk.
template <int kBits, int kField>
MNEMON_INLINE __m512i one_field(__m512i plane) {
  if constexpr (kBits == 8) return plane;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
  if constexpr (kField == 0) return _mm512_and_si512(plane, mask);
  return _mm512_and_si512(_mm512_srli_epi16(plane, kField * kBits), mask);
}

// out[row] += weights[row] . values, without the zeros of the token axis.
template <int kRows, int kDigits, int kBits>
inline void add_packed(const Packed& side, const uint8_t* block, const DigitWeights& weights,
                       int64_t ahead, float* out, int ldo) {
  constexpr int kFields = 8 / kBits, kPlanes = 16 / kFields;
  const int padded = side.padded();
  const bool by_token = side.axis == Axis::token;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + side.code_bytes());
  const uint8_t* codes = block;
  for (int line = 0; line < side.groups() * side.group_stride() * 2; line += 64)
    prefetch<kBits>(block + side.code_bytes() + ahead + line);
  for (int chunk = 0; chunk < padded / 16; chunk++) {
    const int g = by_token ? chunk * 16 / side.group_size : 0;
    const uint32_t* words = weights.words + g * kRows * kDigits * 16;
    __m512i acc[kRows][kDigits];
    for (int r = 0; r < kRows; r++)
      for (int k = 0; k < kDigits; k++) acc[r][k] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (int i = 0; i < kPlanes; i++, codes += 64) {
      __m512i plane = _mm512_loadu_si512(codes);
      prefetch<kBits>(codes + ahead);
      unrolled<kFields>([&](auto field) {
        constexpr int f = decltype(field)::value;
        __m512i code = one_field<kBits, f>(plane);
        unrolled<kRows * kDigits>([&](auto j) {
          constexpr int r = decltype(j)::value / kDigits, k = decltype(j)::value % kDigits;
          __m512i word = _mm512_set1_epi32(
              static_cast<int>(words[(r * kDigits + k) * 16 + i + f * kPlanes]));
          acc[r][k] = _mm512_dpbusd_epi32(acc[r][k], code, word);
        });
      });
    }
    for (int r = 0; r < kRows; r++) {
      float* to = out + r * ldo + chunk * 16;
      __m512 whole = joined<kDigits, kBits>(acc[r]);
      __m512 unit = _mm512_set1_ps(weights.unit[g * kRows + r]);
      if (!by_token) unit = _mm512_mul_ps(unit, half_floats(scales + chunk * 16));
      __m512 sum = _mm512_fmadd_ps(whole, unit, _mm512_loadu_ps(to));
      if (!by_token)  // weights.zeros: this tile's sum of weights times the factor, in every lane
        sum = _mm512_fmadd_ps(half_floats(scales + padded + chunk * 16),
                              _mm512_set1_ps(weights.zeros[r * 16]), sum);
      _mm512_storeu_ps(to, sum);
    }
  }
}

// The query of one row block for a block of keys with one scale per channel. All rows go through the
// channels together: their sums and largest sizes are chains that wait for one another otherwise.
template <int kRows, int kDigits>
inline void prepare_channels(const Packed& side, const uint8_t* block, float factor,
                             const float* query, int ldq, const DigitQuery& to) {
  const int padded = side.padded();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + side.code_bytes());
  alignas(64) float scaled[kRows][1024];
  __m512 offset[kRows], top[kRows];
  unrolled<kRows>([&](auto r) { offset[r] = top[r] = _mm512_setzero_ps(); });
  for (int d = 0; d < padded; d += 16) {
    __m512 scale = _mm512_mul_ps(half_floats(scales + d), _mm512_set1_ps(factor));
    __m512 zero = _mm512_mul_ps(half_floats(scales + padded + d), _mm512_set1_ps(factor));
    unrolled<kRows>([&](auto r) {
      __m512 q = _mm512_loadu_ps(query + r * ldq + d);
      __m512 x = _mm512_mul_ps(q, scale);
      _mm512_store_ps(scaled[r] + d, x);
      offset[r] = _mm512_fmadd_ps(q, zero, offset[r]);
      top[r] = _mm512_max_ps(top[r], _mm512_abs_ps(x));
    });
  }
  unrolled<kRows>([&](auto r) {
    to.offset[r] = _mm512_reduce_add_ps(offset[r]);
    to.unit[r] = to_digits<kDigits>(scaled[r], padded, _mm512_reduce_max_ps(top[r]),
                                    to.words + r * kDigits * 16, kRows * kDigits * 16);
  });
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
#endif
