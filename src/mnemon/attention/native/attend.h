// Decode attention over packed blocks and dense tokens: split over tokens, reduced in a fixed order.
//
// A work item is one (sequence, kv head, chunk of 1,024 tokens): it goes through its tiles of 64
// tokens with a running maximum, and leaves maximum, sum and weighted values. Chunks are cut by
// position alone and are joined in order, so neither the number of threads nor the other rows of a
// batch can change a bit.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "decode.h"
#include "dense_bf16.h"
#include "masking.h"
#include "packed_vnni.h"
#include "scratch.h"
#include "task.h"
#include "tiles.h"
#include "vec.h"

namespace mnemon {
namespace MNEMON_ISA {

constexpr int64_t kChunk = kBlock * kTilesPerChunk;
// Dense tokens of a tile. Keys and values are read in turns, each from one end to the other: so
// short, the processor's own prefetching of the one goes on while the other is worked on. Asking for
// lines ahead in the program is slower (few can be under way), and so are more runs at once.
constexpr int kDenseTile = 32;
constexpr int kRowsAtOnce = 4;

// Memory of one thread, aligned for vectors; handed out in order and given back as a whole.
class Arena {
 public:
  explicit Arena(int64_t size_bytes)
      : data_(take_scratch(static_cast<size_t>(size_bytes))) {
    if (!data_) throw std::bad_alloc();  // before threads start: an exception cannot leave them
  }
  ~Arena() { give_scratch(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <class T>
  T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(data_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return here;
  }

 private:
  char* data_;
  int64_t used_ = 0;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Shape {
  int64_t rows, key_width, value_width;  // widths in whole vectors
  int64_t packed_chunks, dense_chunks;
  bool bf16;   // dense products in bfloat16
  bool exact;  // packed products to float32's precision

  explicit Shape(const Task& task)
      : rows(round_up(task.rows(), kRowsAtOnce)),
        key_width(round_up(task.head_dim, 32)),
        value_width(round_up(task.value_dim, 32)),
        packed_chunks((task.num_blocks + kTilesPerChunk - 1) / kTilesPerChunk),
        dense_chunks((task.num_dense + kChunk - 1) / kChunk),
        bf16(false),
        exact(task.query_dtype != Dtype::bf16) {
#if defined(__AVX512BF16__)
    bf16 = task.query_dtype == Dtype::bf16 && task.keys.dtype == Dtype::bf16 &&
           task.values.dtype == Dtype::bf16;
#endif
  }

  int64_t chunks() const { return packed_chunks + dense_chunks; }
  // Floats of one item's result: maximum and sum per row, then the rows.
  int64_t part_size() const { return rows * (value_width + 2); }
};

// What one thread works with.
struct Work {
  const Task& task;
  const Shape& shape;
  int64_t batch = 0, head = 0;  // head: kv head
  float *query, *packed_query, *top, *out, *tile;
  float* scores;        // [rows][64] of the tile at hand: scores, then weights
  float *totals;  // [rows][W]: sums of weights, lane by lane
  float *peaks;   // [rows]: the largest weight of the tile (packed values)
  uint16_t* query_bf16;
  uint32_t *words, *weight_words;
  float *units, *group_sums, *offsets, *weight_units;
  float *zeros;  // [rows][value groups][16]
  int64_t words_per_row;  // of a query's digits
  int zero_groups = 0;
  int64_t ahead_keys = 0, ahead_values = 0;  // bytes to the next block
  bool rotated_ready = false;
  Seen first_row{0, 0}, last_row{0, 0};  // what the first and the last new token may see

  static int64_t widest(const Shape& shape) {
    return round_up(
        shape.key_width > shape.value_width ? shape.key_width : shape.value_width, 64);
  }
  static int64_t size_bytes(const Shape& shape) {
    int64_t most = widest(shape);
    int64_t per_row = (2 * shape.key_width + kBlock + W + 8) * 4 + shape.key_width * 2 +
                      round_up(shape.key_width, 64) * 3 + shape.key_width / 16 * 4 +
                      shape.value_width / 16 * 64;
    return shape.rows * per_row + most / 16 * (kRowsAtOnce * (3 * 64 + 4)) + most * kBlock * 4 +
           24 * 64 + 4096;
  }

  Work(const Task& t, const Shape& s, Arena& arena) : task(t), shape(s) {
    query = arena.take<float>(s.rows * s.key_width);
    packed_query = arena.take<float>(s.rows * s.key_width);
    scores = arena.take<float>(s.rows * kBlock);
    totals = arena.take<float>(s.rows * W);
    peaks = arena.take<float>(round_up(s.rows, W));
    query_bf16 = arena.take<uint16_t>(s.rows * s.key_width);
    words_per_row = round_up(s.key_width, 64) / 4 * 3;
    words = arena.take<uint32_t>(s.rows * words_per_row);
    int64_t key_groups = s.key_width / 16, value_groups = s.value_width / 16;
    units = arena.take<float>(s.rows);
    group_sums = arena.take<float>(s.rows * key_groups);
    offsets = arena.take<float>(s.rows);
    weight_words = arena.take<uint32_t>(value_groups * 16 * kRowsAtOnce * 3);
    weight_units = arena.take<float>(value_groups * kRowsAtOnce);
    zeros = arena.take<float>(s.rows * value_groups * 16);
    tile = arena.take<float>(widest(s) * kBlock);
  }

  void take_query(int64_t b, int64_t h) {
    batch = b;
    head = h;
    rotated_ready = false;
    first_row = seen_by(task, b, h, 0);
    last_row = seen_by(task, b, h, task.num_new - 1);
    std::memset(query, 0, shape.rows * shape.key_width * sizeof(float));
    int64_t item = task.query_dtype == Dtype::f32 ? 4 : 2;
    for (int64_t r = 0; r < task.rows(); r++) {
      int64_t query_head = h * task.group + r / task.num_new;
      const char* from = task.query + (b * task.query_batch + query_head * task.query_head +
                                       r % task.num_new * task.query_row) * item;
      load_floats(from, static_cast<int>(task.query_dtype), task.head_dim,
                  query + r * shape.key_width);
    }
    if (shape.bf16)
      for (int64_t i = 0; i < shape.rows * shape.key_width; i++)
        query_bf16[i] = to_bf16(query[i]);
  }
};

#if defined(__AVX512VNNI__)
template <int kRows, int kDigits, int kBits>
inline void packed_scores(Work& work, int64_t row, const uint8_t* block, float factor) {
  const Packed& side = work.task.packed_keys;
  DigitQuery query{work.words + row * work.words_per_row, work.units + row,
                   work.group_sums + row * side.groups(), work.offsets + row};
  if (side.axis == Axis::channel)
    prepare_channels<kRows, kDigits>(side, block, factor,
                                     work.packed_query + row * work.shape.key_width,
                                     static_cast<int>(work.shape.key_width), query);
  dot_packed<kRows, kDigits, kBits>(side, block, factor, query, work.task.scale, work.ahead_keys,
                                    work.scores + row * kBlock, kBlock);
}

template <int kRows, int kDigits, int kBits>
inline void packed_sums(Work& work, int64_t row, const uint8_t* block, float factor) {
  const Packed& side = work.task.packed_values;
  DigitWeights weights{work.weight_words, work.weight_units,
                       work.zeros + row * side.groups() * 16, work.peaks + row};
  int ldo = static_cast<int>(work.shape.value_width);
  prepare_weights<kRows, kDigits>(side, block, factor, work.scores + row * kBlock, kBlock, weights);
  add_packed<kRows, kDigits, kBits>(side, block, weights, work.ahead_values, work.out + row * ldo, ldo);
}

template <int kRows, int kDigits>
inline void query_digits(Work& work, int64_t row) {
  const Packed& side = work.task.packed_keys;
  int padded = side.padded(), groups = side.groups();
  for (int r = 0; r < kRows; r++) {
    const float* query = work.packed_query + (row + r) * work.shape.key_width;
    uint32_t* words = work.words + row * work.words_per_row + r * kDigits * 16;
    work.units[row + r] = to_digits<kDigits>(query, padded, largest_of(query, padded), words,
                                             kRows * kDigits * 16);
    for (int g = 0; g < groups; g++) {
      int end = g + 1 == groups ? padded : (g + 1) * side.group_size;
      float sum = 0.0f;
      for (int d = g * side.group_size; d < end; d++) sum += query[d];
      work.group_sums[(row + r) * groups + g] = sum;
    }
  }
}
#endif

// Calls what(rows as a constant, row) for all row blocks: fours, then what is left.
template <class F>
inline void each_row_block(int64_t rows, F&& what) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) what(std::integral_constant<int, 4>{}, row);
  if (rows - row == 3) what(std::integral_constant<int, 3>{}, row);
  if (rows - row == 2) what(std::integral_constant<int, 2>{}, row);
  if (rows - row == 1) what(std::integral_constant<int, 1>{}, row);
}

template <class F>
inline void with_digits(bool exact, F&& what) {
  if (exact)
    what(std::integral_constant<int, 3>{});
  else
    what(std::integral_constant<int, 2>{});
}

template <class F>
inline void with_bits(Code code, F&& what) {
  if (code == Code::int8)
    what(std::integral_constant<int, 8>{});
  else if (code == Code::int4)
    what(std::integral_constant<int, 4>{});
  else
    what(std::integral_constant<int, 2>{});
}

// The query as packed keys want it: rotated, and as digits.
inline void prepare_packed_query(Work& work) {
  const Task& task = work.task;
  if (work.rotated_ready) return;
  work.rotated_ready = true;
  std::memcpy(work.packed_query, work.query,
              work.shape.rows * work.shape.key_width * sizeof(float));
  if (task.packed_keys.rotated)
    for (int64_t r = 0; r < task.rows(); r++)
      hadamard(work.packed_query + r * work.shape.key_width, task.packed_keys.width);
#if defined(__AVX512VNNI__)
  if (task.packed_keys.code != Code::fp8 && task.packed_keys.axis == Axis::token)
    each_row_block(task.rows(), [&](auto rows, int64_t row) {
      with_digits(work.shape.exact, [&](auto digits) {
        query_digits<decltype(rows)::value, decltype(digits)::value>(work, row);
      });
    });
#endif
}

inline void scale_scores(Work& work, int n) {
  for (int64_t r = 0; r < work.task.rows(); r++) {
    float* scores = work.scores + r * kBlock;
    for (int t = 0; t < n; t++) scores[t] *= work.task.scale;
  }
}

inline void score_block(Work& work, const uint8_t* block, float factor) {
  const Task& task = work.task;
  prepare_packed_query(work);
#if defined(__AVX512VNNI__)
  if (task.packed_keys.code != Code::fp8) {
    each_row_block(task.rows(), [&](auto rows, int64_t row) {
      with_digits(work.shape.exact, [&](auto digits) {
        with_bits(task.packed_keys.code, [&](auto bits) {
          packed_scores<decltype(rows)::value, decltype(digits)::value, decltype(bits)::value>(
              work, row, block, factor);
        });
      });
    });
    return;
  }
#endif
  decode_keys(task.packed_keys, block, factor, work.tile);
  each_row_block(task.rows(), [&](auto rows, int64_t row) {
    dot_columns<decltype(rows)::value>(work.packed_query + row * work.shape.key_width,
                                       static_cast<int>(work.shape.key_width), work.tile,
                                       task.packed_keys.padded(), work.scores + row * kBlock, kBlock);
  });
  scale_scores(work, kBlock);
}

inline void sum_block(Work& work, const uint8_t* block, float factor) {
  const Task& task = work.task;
#if defined(__AVX512VNNI__)
  if (task.packed_values.code != Code::fp8) {
    each_row_block(task.rows(), [&](auto rows, int64_t row) {
      with_digits(work.shape.exact, [&](auto digits) {
        with_bits(task.packed_values.code, [&](auto bits) {
          packed_sums<decltype(rows)::value, decltype(digits)::value, decltype(bits)::value>(
              work, row, block, factor);
        });
      });
    });
    return;
  }
#endif
  decode_values(task.packed_values, block, factor, work.tile);
  each_row_block(task.rows(), [&](auto rows, int64_t row) {
    add_values<decltype(rows)::value>(work.scores + row * kBlock, kBlock, work.tile,
                                      task.packed_values.padded(), kBlock,
                                      task.packed_values.padded(),
                                      work.out + row * work.shape.value_width,
                                      static_cast<int>(work.shape.value_width));
  });
}

MNEMON_INLINE const char* dense_at(const Dense& side, int64_t batch, int64_t head, int64_t token) {
  int64_t item = side.dtype == Dtype::f32 ? 4 : 2;
  return side.data + (batch * side.batch + head * side.head + token * side.token) * item;
}

inline void score_dense(Work& work, int64_t token, int n) {
  const Task& task = work.task;
  const char* keys = dense_at(task.keys, work.batch, work.head, token);
  int width = static_cast<int>(task.head_dim);
#if defined(__AVX512BF16__)
  if (work.shape.bf16 && width <= 256) {
    int vectors = (width + 31) / 32;
    __mmask32 last = width % 32 ? (1u << width % 32) - 1 : ~0u;
    each_row_block(task.rows(), [&](auto rows, int64_t row) {
      auto run = [&](auto count) {
        dot_bf16<decltype(rows)::value, decltype(count)::value>(
            work.query_bf16 + row * work.shape.key_width, static_cast<int>(work.shape.key_width),
            reinterpret_cast<const uint16_t*>(keys), task.keys.token, n, last,
            task.scale,
            work.scores + row * kBlock, kBlock);
      };
      switch (vectors) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        case 4: run(std::integral_constant<int, 4>{}); break;
        case 5: run(std::integral_constant<int, 5>{}); break;
        case 6: run(std::integral_constant<int, 6>{}); break;
        case 7: run(std::integral_constant<int, 7>{}); break;
        default: run(std::integral_constant<int, 8>{}); break;
      }
    });
    return;
  }
#endif
  const float* rows_of_keys = reinterpret_cast<const float*>(keys);
  int64_t stride = task.keys.token;
  if (task.keys.dtype != Dtype::f32) {
    int64_t item = 2;
    for (int t = 0; t < n; t++)
      load_floats(keys + t * task.keys.token * item, static_cast<int>(task.keys.dtype), width,
                  work.tile + t * work.shape.key_width);
    rows_of_keys = work.tile;
    stride = work.shape.key_width;
  }
  each_row_block(task.rows(), [&](auto rows, int64_t row) {
    dot_rows<decltype(rows)::value>(work.query + row * work.shape.key_width,
                                    static_cast<int>(work.shape.key_width), rows_of_keys, stride,
                                    n, width, work.scores + row * kBlock, kBlock);
  });
  scale_scores(work, n);
}

inline void sum_dense(Work& work, int64_t token, int n) {
  const Task& task = work.task;
  const char* values = dense_at(task.values, work.batch, work.head, token);
  int width = static_cast<int>(task.value_dim);
  int ldo = static_cast<int>(work.shape.value_width);
#if defined(__AVX512BF16__)
  if (work.shape.bf16 && width % 32 == 0) {
    each_row_block(task.rows(), [&](auto rows, int64_t row) {
      add_bf16<decltype(rows)::value>(
          reinterpret_cast<const uint32_t*>(work.scores + row * kBlock), kBlock,
          reinterpret_cast<const uint16_t*>(values), task.values.token, n, width,
          work.out + row * ldo, ldo);
    });
    return;
  }
#endif
  const float* rows_of_values = reinterpret_cast<const float*>(values);
  int64_t stride = task.values.token;
  int padded = static_cast<int>(round_up(width, 16));
  if (task.values.dtype != Dtype::f32 || width % 16) {
    int64_t item = task.values.dtype == Dtype::f32 ? 4 : 2;
    std::memset(work.tile, 0, static_cast<size_t>(n) * ldo * sizeof(float));
    for (int t = 0; t < n; t++)
      load_floats(values + t * task.values.token * item, static_cast<int>(task.values.dtype),
                  width, work.tile + t * ldo);
    rows_of_values = work.tile;
    stride = ldo;
  }
  each_row_block(task.rows(), [&](auto rows, int64_t row) {
    add_values<decltype(rows)::value>(work.scores + row * kBlock, kBlock, rows_of_values, stride,
                                      n, padded, work.out + row * ldo, ldo);
  });
}

// exp(scores - top) as bfloat16 in pairs, and their sum as the products will see them.
MNEMON_INLINE vf weights_as_bf16(float* scores, int length, float top) {
  vf total = {};
#if defined(__AVX512BF16__)
  for (int t = 0; t < length; t += 32) {
    __m512 low = reinterpret_cast<__m512>(exp(load(scores + t) - top));
    __m512 high = reinterpret_cast<__m512>(exp(load(scores + t + 16) - top));
    __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    total += reinterpret_cast<vf>(_mm512_slli_epi32(both, 16));
    total += reinterpret_cast<vf>(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
    _mm512_storeu_si512(scores + t / 2, both);
  }
#else
  (void)scores;
  (void)length;
  (void)top;
#endif
  return total;
}

// What one row of a tile must not see, and what is added to its scores.
inline void change_scores(Work& work, int64_t r, int64_t position, int n, int length) {
  const Task& task = work.task;
  float* scores = work.scores + r * kBlock;
  int64_t row_new = r % task.num_new, head = work.head * task.group + r / task.num_new;
  Seen seen = seen_by(task, work.batch, work.head, row_new);
  int64_t first = seen.first - position, last = seen.last - position;
  if (position + first < 0) first = -position;
  int begin = static_cast<int>(first < 0 ? 0 : first > n ? n : first);
  int end = static_cast<int>(last < begin ? begin : last > n ? n : last);
  if (task.softcap > 0.0f) cap(scores, length, task.softcap);
  for (int t = 0; t < begin; t++) scores[t] = kUnseen;
  for (int t = end; t < length; t++) scores[t] = kUnseen;
  if (begin < end) {
    if (task.bias.kind != Added::none)
      add_scores(task.bias, work.batch, head, row_new, position + begin, begin, end, scores);
    if (task.mask.kind != Added::none)
      add_scores(task.mask, work.batch, head, row_new, position + begin, begin, end, scores);
  }
}

// Whether every row sees all tokens of a tile, with the scores that the products gave.
inline bool is_plain(const Work& work, int64_t position, int n) {
  const Task& task = work.task;
  return position >= 0 && work.first_row.last >= position + n &&
         work.last_row.first <= position && !(task.softcap > 0.0f) &&
         task.bias.kind == Added::none && task.mask.kind == Added::none;
}

// From scores to weights: mask, running maximum, exponentials; scales what was summed so far.
// `position` is the logical position of the first of n tokens; it may be negative (skipped tokens);
// `length` is what a whole tile has.
inline void weigh(Work& work, int64_t position, int n, int length, bool as_pairs_of_bf16) {
  const int64_t rows = work.task.rows();
  if (n < length || !is_plain(work, position, n))
    for (int64_t r = 0; r < rows; r++) change_scores(work, r, position, n, length);
  float* tops = work.peaks;  // of the tile, for now
  for (int64_t r = 0; r < rows; r++) {
    const float* scores = work.scores + r * kBlock;
    vf most = load(scores);
    for (int t = W; t < length; t += W) most = vmax(load(scores + t), most);
    tops[r] = largest(most);
  }
  for (int64_t r = 0; r < rows; r++) {
    float* scores = work.scores + r * kBlock;
    float before = work.top[r], now = before;
    float* totals = work.totals + r * W;
    if (!(tops[r] > kUnseen)) {
      bool strange = false;  // nan
      for (int t = 0; t < length; t++) strange |= scores[t] != scores[t];
      if (!strange) {  // nothing seen here
        std::memset(scores, 0, length * sizeof(float));
        tops[r] = kUnseen;
        continue;
      }
      tops[r] = 0.0f;
    }
    if (tops[r] > before) {
      now = work.top[r] = tops[r];
      float rescale = before == kUnseen ? 0.0f : exp(splat(before - now))[0];
      float* out = work.out + r * work.shape.value_width;
      for (int64_t d = 0; d < work.shape.value_width; d += W)
        store(out + d, load(out + d) * rescale);
      store(totals, load(totals) * rescale);
      float* zeros = work.zeros + r * work.zero_groups * 16;
      for (int d = 0; d < work.zero_groups * 16; d += W) store(zeros + d, load(zeros + d) * rescale);
    }
    tops[r] -= now;
    vf total = load(totals);
    if (as_pairs_of_bf16) {
      total += weights_as_bf16(scores, length, now);
    } else {
      for (int t = 0; t < length; t += W) {
        vf weight = exp(load(scores + t) - now);
        store(scores + t, weight);
        total += weight;
      }
    }
    store(totals, total);
  }
  if (!as_pairs_of_bf16)  // only packed values ask for the largest weight
    for (int64_t r = 0; r < rows; r += W) store(work.peaks + r, exp(load(work.peaks + r)));
}

// Whether any row sees any of these positions: tiles behind a window or a length are not read.
inline bool any_seen(const Work& work, int64_t begin, int64_t end) {
  return begin < work.last_row.last && end > work.first_row.first && end > 0;
}

// Whether a boolean mask shows any token of these to any row: padding is not read either.
inline bool any_shown(const Work& work, int64_t begin, int64_t end) {
  const Task& task = work.task;
  const Scores& mask = task.mask;
  if (mask.kind != Added::boolean) return true;
  if (begin < 0) begin = 0;
  int64_t heads = mask.head ? task.group : 1, rows = mask.row ? task.num_new : 1;
  const uint8_t* data = reinterpret_cast<const uint8_t*>(mask.data) + work.batch * mask.batch;
  for (int64_t g = 0; g < heads; g++)
    for (int64_t i = 0; i < rows; i++) {
      const uint8_t* row = data + (work.head * task.group + g) * mask.head + i * mask.row;
      uint8_t any = 0;
      for (int64_t t = begin; t < end; t++) any |= row[t * mask.token];
      if (any) return true;
    }
  return false;
}

// Whether tokens have to be read at all.
inline bool is_read(const Work& work, int64_t begin, int64_t end) {
  return any_seen(work, begin, end) && any_shown(work, begin, end);
}

// What the zeros of token-axis values add to every dim of a group, for all tiles of the chunk.
inline void add_zeros(Work& work) {
#if defined(__AVX512VNNI__)
  const Packed& side = work.task.packed_values;
  if (side.axis != Axis::token || !side.has_zero()) return;
  for (int64_t r = 0; r < work.task.rows(); r++)
    for (int g = 0; g < work.zero_groups; g++) {
      float zero = sum(load(work.zeros + (r * work.zero_groups + g) * 16));
      float* out = work.out + r * work.shape.value_width;
      int end = g + 1 == work.zero_groups ? side.padded() : (g + 1) * side.group_size;
      for (int d = g * side.group_size; d < end; d++) out[d] += zero;
    }
#else
  (void)work;
#endif
}

// The blocks of one chunk, from `first` on.
inline void run_packed(Work& work, int64_t first) {
  const Task& task = work.task;
  work.zero_groups = task.packed_values.groups();
  std::memset(work.zeros, 0, work.shape.rows * work.zero_groups * 16 * sizeof(float));
  int64_t last = first + kTilesPerChunk < task.num_blocks ? first + kTilesPerChunk : task.num_blocks;
  for (int64_t i = first; i < last; i++) {
    int64_t position = i * kBlock - task.skipped;
    if (!is_read(work, position, position + kBlock)) continue;
    auto block = [&](const Packed& side) {
      return side.blocks + work.batch * side.batch + work.head * side.head + i * side.block;
    };
    auto factor = [&](const Packed& side) {
      return side.factors[work.batch * side.factor_batch + work.head * side.factor_head +
                          i * side.factor_block];
    };
    bool is_last = i + 1 == task.num_blocks;
    work.ahead_keys = is_last ? 0 : task.packed_keys.block;
    work.ahead_values = is_last ? 0 : task.packed_values.block;
    score_block(work, block(task.packed_keys), factor(task.packed_keys));
    weigh(work, position, kBlock, kBlock, false);
    sum_block(work, block(task.packed_values), factor(task.packed_values));
  }
  add_zeros(work);
  if (task.packed_values.rotated)
    for (int64_t r = 0; r < task.rows(); r++)
      hadamard(work.out + r * work.shape.value_width, task.packed_values.width);
}

// The dense tokens of one chunk, from `begin` on.
inline void run_dense(Work& work, int64_t begin) {
  const Task& task = work.task;
  int64_t end = begin + kChunk < task.num_dense ? begin + kChunk : task.num_dense;
  for (int64_t token = begin; token < end; token += kDenseTile) {
    int n = static_cast<int>(end - token < kDenseTile ? end - token : kDenseTile);
    int64_t position = task.num_packed() + token;
    if (!is_read(work, position, position + n)) continue;
    score_dense(work, token, n);
    weigh(work, position, n, kDenseTile, work.shape.bf16 && task.value_dim % 32 == 0);
    sum_dense(work, token, n);
  }
}

inline void run_item(Work& work, int64_t chunk, float* part) {
  const Task& task = work.task;
  const Shape& shape = work.shape;
  float *top = part, *total = part + shape.rows, *out = part + 2 * shape.rows;
  work.top = top;
  work.out = out;
  for (int64_t r = 0; r < shape.rows; r++) top[r] = kUnseen;
  std::memset(work.totals, 0, shape.rows * W * sizeof(float));
  std::memset(out, 0, shape.rows * shape.value_width * sizeof(float));
  work.zero_groups = 0;
  if (chunk < shape.packed_chunks)
    run_packed(work, chunk * kTilesPerChunk);
  else
    run_dense(work, (chunk - shape.packed_chunks) * kChunk);
  for (int64_t r = 0; r < task.rows(); r++) total[r] = sum(load(work.totals + r * W));
}

// Joins the chunks of one (sequence, kv head) in order and writes the output.
inline void join(const Task& task, const Shape& shape, const float* parts, int64_t batch,
                 int64_t head, double* sums, float* row_out) {
  int64_t item = task.out_dtype == Dtype::f32 ? 4 : 2;
  for (int64_t r = 0; r < task.rows(); r++) {
    int64_t query_head = head * task.group + r / task.num_new;
    float top = task.sinks ? task.sinks[query_head] : kUnseen;
    for (int64_t c = 0; c < shape.chunks(); c++) {
      float chunk_top = parts[c * shape.part_size() + r];
      top = chunk_top > top ? chunk_top : top;
    }
    double total = task.sinks ? std::exp(static_cast<double>(task.sinks[query_head]) - top) : 0.0;
    if (task.sinks && task.sinks[query_head] == kUnseen) total = 0.0;
    for (int64_t d = 0; d < task.value_dim; d++) sums[d] = 0.0;
    for (int64_t c = 0; c < shape.chunks(); c++) {
      const float* part = parts + c * shape.part_size();
      if (part[r] == kUnseen) continue;
      double weight = std::exp(static_cast<double>(part[r]) - top);
      total += weight * part[shape.rows + r];
      const float* out = part + 2 * shape.rows + r * shape.value_width;
      for (int64_t d = 0; d < task.value_dim; d++) sums[d] += weight * out[d];
    }
    double inverse = total != 0.0 ? 1.0 / total : 0.0;  // a row that sees nothing is zero
    for (int64_t d = 0; d < task.value_dim; d++) row_out[d] = static_cast<float>(sums[d] * inverse);
    char* to = task.out + (batch * task.out_batch + query_head * task.out_head +
                           r % task.num_new * task.out_row) * item;
    store_floats(row_out, static_cast<int>(task.out_dtype), task.value_dim, to);
    if (task.lse)
      task.lse[(batch * task.kv_heads * task.group + query_head) * task.num_new +
               r % task.num_new] =
          total != 0.0 ? static_cast<float>(top + std::log(total)) : kUnseen;
  }
}

void attend(const Task& task) {
  Shape shape(task);
  int64_t pairs = task.batch * task.kv_heads, items = pairs * shape.chunks();
  Arena parts_memory(items * shape.part_size() * static_cast<int64_t>(sizeof(float)) + 64);
  float* parts = parts_memory.take<float>(items * shape.part_size());
  std::vector<std::unique_ptr<Arena>> arenas;
  for (int i = 0; i < task.threads; i++)
    arenas.push_back(
        std::make_unique<Arena>(Work::size_bytes(shape) + round_up(task.value_dim * 12, 64) + 256));
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
  {
    Arena& arena = *arenas[omp_get_thread_num()];
    Work work(task, shape, arena);
    int64_t ready = -1;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < items; i++) {
      int64_t pair = i / shape.chunks();
      if (pair != ready) {
        work.take_query(pair / task.kv_heads, pair % task.kv_heads);
        ready = pair;
      }
      run_item(work, i % shape.chunks(), parts + i * shape.part_size());
    }
    double* sums = arena.take<double>(task.value_dim);
    float* row_out = arena.take<float>(task.value_dim);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++)
      join(task, shape, parts + pair * shape.chunks() * shape.part_size(), pair / task.kv_heads,
           pair % task.kv_heads, sums, row_out);
  }
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
