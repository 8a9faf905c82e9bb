// What one call of the kernels is given: pointers, strides and numbers, nothing of torch.
//
// Strides count elements (bytes for packed blocks). Time order of the tokens: packed blocks first,
// without the `skipped` leading tokens of the first one, then the dense part.
#pragma once

#include <cstdint>

namespace mnemon {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };
enum class Code : int { int8 = 8, int4 = 4, int2 = 2, fp8 = 9 };
enum class Axis : int { token = 0, channel = 1 };
enum class Added : int { none = 0, boolean = 1, f32 = 2, f16 = 3, bf16 = 4 };

constexpr int kBlock = 64;         // tokens of a packed block, and of a tile
constexpr int kTilesPerChunk = 16;  // tiles that one work item reduces in order

// Numbers of one side (keys or values): [batch, kv_heads, tokens, width], the last one contiguous.
struct Dense {
  const char* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
  Dtype dtype = Dtype::f32;
};

// One side in packed blocks: [batch, kv_heads, blocks, bytes], see docs/formats.md for the bytes.
struct Packed {
  const uint8_t* blocks = nullptr;
  int64_t batch = 0, head = 0, block = 0;
  const float* factors = nullptr;
  int64_t factor_batch = 0, factor_head = 0, factor_block = 0;
  Code code = Code::int8;
  Axis axis = Axis::token;
  int group_size = 64;
  int width = 0;
  bool rotated = false;

  int padded() const { return (width + 15) / 16 * 16; }
  int bits() const { return code == Code::fp8 ? 8 : static_cast<int>(code); }
  bool has_zero() const { return code != Code::fp8; }
  int64_t code_bytes() const { return static_cast<int64_t>(kBlock) * padded() * bits() / 8; }
  int groups() const { return axis == Axis::token ? (padded() + group_size - 1) / group_size : 1; }
  // float16 numbers between one group's scales and the next one's.
  int group_stride() const { return kBlock * (has_zero() ? 2 : 1); }
};

// Numbers added to the scores, or bytes that say which tokens are seen; any stride may be 0.
struct Scores {
  const char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, token = 0;
  Added kind = Added::none;
};

struct Task {
  int64_t batch = 1, kv_heads = 1, group = 1, num_new = 1, head_dim = 0, value_dim = 0;
  const char* query = nullptr;  // [batch, kv_heads * group, num_new, head_dim]
  int64_t query_batch = 0, query_head = 0, query_row = 0;
  Dtype query_dtype = Dtype::f32;
  Packed packed_keys, packed_values;
  int64_t num_blocks = 0, skipped = 0;
  Dense keys, values;
  int64_t num_dense = 0;
  Scores mask, bias;
  const int32_t* lengths = nullptr;  // tokens seen, per sequence and kv head
  int64_t lengths_batch = 0, lengths_head = 0;
  const int32_t* starts = nullptr;  // first token seen
  int64_t starts_batch = 0, starts_head = 0;
  const float* sinks = nullptr;  // [kv_heads * group]
  float scale = 1.0f, softcap = 0.0f;
  bool causal = false;
  int64_t window = 0;  // a row sees the last `window` tokens up to its own; 0: all
  char* out = nullptr;  // [batch, heads, num_new, value_dim]
  int64_t out_batch = 0, out_head = 0, out_row = 0;
  Dtype out_dtype = Dtype::f32;
  float* lse = nullptr;  // [batch, heads, num_new] contiguous, or null
  int threads = 1;

  int64_t num_packed() const { return num_blocks ? num_blocks * kBlock - skipped : 0; }
  int64_t num_tokens() const { return num_packed() + num_dense; }
  int64_t rows() const { return group * num_new; }
};

// Quantizing and its reverse: whole blocks of one side.
struct PackTask {
  Dense source;   // [batch, kv_heads, 64 * blocks, width]
  Packed target;  // blocks and factors are written
  int64_t batch = 1, kv_heads = 1, num_blocks = 0;
  bool is_keys = true;
  int threads = 1;
};

struct UnpackTask {
  Packed source;
  char* target = nullptr;  // [batch, kv_heads, 64 * blocks, width]
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
  Dtype dtype = Dtype::f32;
  int64_t batch = 1, kv_heads = 1, first_block = 0, num_blocks = 0;
  bool is_keys = true;
  bool unrotate = true;
  int threads = 1;
};

// What each instruction set offers. `pack` is false if a number was not finite.
struct Kernels {
  const char* name;
  void (*attend)(const Task&);
  bool (*pack)(const PackTask&);
  void (*unpack)(const UnpackTask&);
  uint64_t (*stream_read)(const char* data, int64_t size_bytes, int threads);
};

}  // namespace mnemon
