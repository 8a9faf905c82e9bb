// Scores and sums of one tile of tokens in float32, for every instruction set.
#pragma once

#include "vec.h"

namespace mnemon {
namespace MNEMON_ISA {

// scores[row][t] = query[row] . keys[t] for kRows rows; keys[t] lie `stride` floats apart.
template <int kRows>
inline void dot_rows(const float* query, int ldq, const float* keys, int64_t stride, int n,
                     int width, float* scores, int lds) {
  int whole = width / W * W;
  for (int t = 0; t < n; t++) {
    const float* key = keys + t * stride;
    vf acc[kRows] = {};
    for (int d = 0; d < whole; d += W) {
      vf k = load(key + d);
      for (int r = 0; r < kRows; r++) acc[r] += load(query + r * ldq + d) * k;
    }
    for (int r = 0; r < kRows; r++) {
      float total = sum(acc[r]);
      for (int d = whole; d < width; d++) total += query[r * ldq + d] * key[d];
      scores[r * lds + t] = total;
    }
  }
}

// The same for keys that lie with their tokens side by side: keys[dim][64 tokens].
template <int kRows>
inline void dot_columns(const float* query, int ldq, const float* keys, int width, float* scores,
                        int lds) {
  constexpr int kVectors = 64 / W < 4 ? 64 / W : 4;
  for (int t = 0; t < 64; t += kVectors * W) {
    vf acc[kRows][kVectors] = {};
    for (int d = 0; d < width; d++)
      for (int v = 0; v < kVectors; v++) {
        vf k = load(keys + d * 64 + t + v * W);
        for (int r = 0; r < kRows; r++) acc[r][v] += query[r * ldq + d] * k;
      }
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVectors; v++) store(scores + r * lds + t + v * W, acc[r][v]);
  }
}

// out[row] += sum over t of weights[row][t] * values[t]; `width` is a multiple of 16.
template <int kRows>
inline void add_values(const float* weights, int ldw, const float* values, int64_t stride, int n,
                       int width, float* out, int ldo) {
  constexpr int kVectors = 16 / W > 2 ? 2 : 16 / W;
  for (int d = 0; d < width; d += kVectors * W) {
    vf acc[kRows][kVectors] = {};
    for (int t = 0; t < n; t++)
      for (int v = 0; v < kVectors; v++) {
        vf x = load(values + t * stride + d + v * W);
        for (int r = 0; r < kRows; r++) acc[r][v] += weights[r * ldw + t] * x;
      }
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVectors; v++) {
        float* to = out + r * ldo + d + v * W;
        store(to, load(to) + acc[r][v]);
      }
  }
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
