// What changes a tile's scores between the products and the softmax.
#pragma once

#include "task.h"
#include "vec.h"

namespace mnemon {
namespace MNEMON_ISA {

constexpr float kUnseen = -std::numeric_limits<float>::infinity();

// The tokens that one row may see, by position: [first, last).
struct Seen {
  int64_t first, last;
};

inline Seen seen_by(const Task& task, int64_t batch, int64_t head, int64_t row_new) {
  int64_t total = task.num_tokens();
  if (task.lengths)
    total = task.lengths[batch * task.lengths_batch + head * task.lengths_head];
  Seen seen{0, total};
  if (task.starts) seen.first = task.starts[batch * task.starts_batch + head * task.starts_head];
  int64_t own = total - task.num_new + row_new + 1;
  if (task.causal) seen.last = own < total ? own : total;
  if (task.window && own - task.window > seen.first) seen.first = own - task.window;
  return seen;
}

MNEMON_INLINE void cap(float* scores, int n, float softcap) {
  float inverse = 1.0f / softcap;
  for (int t = 0; t < n; t += W) store(scores + t, tanh(load(scores + t) * inverse) * softcap);
}

// Adds numbers, or takes away what a boolean mask does not show, for tokens [begin, end) of a tile.
inline void add_scores(const Scores& from, int64_t batch, int64_t head, int64_t row, int64_t token,
                       int begin, int end, float* scores) {
  int64_t at = batch * from.batch + head * from.head + row * from.row + token * from.token;
  if (from.kind == Added::boolean) {
    const uint8_t* seen = reinterpret_cast<const uint8_t*>(from.data) + at;
    if (from.token == 1) {
      for (int t = begin; t < end; t++) scores[t] = seen[t - begin] ? scores[t] : kUnseen;
    } else {
      for (int t = begin; t < end; t++)
        scores[t] = seen[(t - begin) * from.token] ? scores[t] : kUnseen;
    }
    return;
  }
  if (from.kind == Added::f32) {
    const float* added = reinterpret_cast<const float*>(from.data) + at;
    for (int t = begin; t < end; t++) scores[t] += added[(t - begin) * from.token];
    return;
  }
  const uint16_t* added = reinterpret_cast<const uint16_t*>(from.data) + at;
  for (int t = begin; t < end; t++) {
    uint16_t bits = added[(t - begin) * from.token];
    scores[t] += from.kind == Added::f16 ? from_f16(bits) : from_bf16(bits);
  }
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
