// Quantizing whole blocks and reading them back: the same bytes as mnemon.formats makes in torch.
#pragma once

#include <cmath>
#include <cstdlib>

#include "decode.h"
#include "task.h"
#include "vec.h"

namespace mnemon {
namespace MNEMON_ISA {

// The largest float16 that is not above x / the smallest that is not below.
MNEMON_INLINE uint16_t f16_below(float x) {
  uint16_t bits = to_f16(x);
  if (from_f16(bits) <= x) return bits;
  if (bits == 0) return 0x8001;  // below zero lies the smallest negative number
  return bits & 0x8000 ? bits + 1 : bits - 1;
}
MNEMON_INLINE uint16_t f16_above(float x) {
  return static_cast<uint16_t>(f16_below(-x) ^ 0x8000);
}

MNEMON_INLINE uint8_t to_e4m3(float x) {
  // Round to nearest even by hand: the step is 2 ** (exponent - 3), at least 2 ** -9.
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  uint32_t size = bits & 0x7fffffff;
  if (size < 0x3c800000) {  // below 2 ** -6: subnormal, steps of 2 ** -9
    float y;
    std::memcpy(&y, &size, 4);
    y += 0x1p14f;  // its last bit is worth 2 ** -9
    uint32_t low;
    std::memcpy(&low, &y, 4);
    return sign | static_cast<uint8_t>(low - 0x46800000);
  }
  uint32_t odd = size >> 20 & 1;
  uint32_t rounded = (size - 0x3c000000 + 0x7ffff + odd) >> 20;
  return sign | static_cast<uint8_t>(rounded > 0x7e ? 0x7e : rounded);
}

struct Quantizer {
  uint16_t scale = 0, zero = 0;
  float inverse = 0.0f, start = 0.0f;

  Quantizer(float low, float high, int levels, bool has_zero) {
    if (has_zero) {
      zero = f16_below(low + 0.0f);  // -0 counts as 0
      start = from_f16(zero);
      scale = f16_above((high + 0.0f - start) / static_cast<float>(levels));
    } else {
      float size = (-low > high ? -low : high) + 0.0f;
      scale = f16_above(size / 448.0f);
    }
    float step = from_f16(scale);
    inverse = step > 0.0f ? 1.0f / step : 0.0f;
  }
  MNEMON_INLINE int code(float x, int levels) const {
    float y = (x - start) * inverse;
    y = (y + 12582912.0f) - 12582912.0f;
    y = y < 0.0f ? 0.0f : y;
    return static_cast<int>(y > static_cast<float>(levels) ? static_cast<float>(levels) : y);
  }
};

// codes[token][padded] to the bytes of a block.
inline void lay_out(const uint8_t* codes, int bits, bool is_keys, int padded, uint8_t* to) {
  int fields = 8 / bits;
  if (is_keys) {
    int planes = 4 / fields;
    for (int quad = 0; quad < padded / 4; quad++)
      for (int i = 0; i < planes; i++)
        for (int lane = 0; lane < 16; lane++)
          for (int dim = 0; dim < 4; dim++) {
            int byte = 0;
            for (int f = 0; f < fields; f++)
              byte |= codes[((i * fields + f) * 16 + lane) * padded + quad * 4 + dim] << f * bits;
            to[((quad * planes + i) * 16 + lane) * 4 + dim] = static_cast<uint8_t>(byte);
          }
    return;
  }
  int planes = 16 / fields;
  for (int chunk = 0; chunk < padded / 16; chunk++)
    for (int i = 0; i < planes; i++)
      for (int dim = 0; dim < 16; dim++)
        for (int token = 0; token < 4; token++) {
          int byte = 0;
          for (int f = 0; f < fields; f++)
            byte |= codes[((i + f * planes) * 4 + token) * padded + chunk * 16 + dim] << f * bits;
          to[((chunk * planes + i) * 16 + dim) * 4 + token] = static_cast<uint8_t>(byte);
        }
}

// Dimensions of a block that are quantized at once: whole groups, and so few that the scratch is
// small and fits the stack. A rotation needs them all.
constexpr int kStrip = 64;

inline int strip_of(const Packed& side) {
  if (side.rotated) return side.padded();
  int strip = kStrip;
  if (side.axis == Axis::token)
    strip = side.group_size < kStrip ? kStrip / side.group_size * side.group_size : side.group_size;
  return strip < side.padded() ? strip : side.padded();
}

// x and codes: [64][strip].
inline bool pack_block(const PackTask& task, const char* source, uint8_t* block, float* factor,
                       int strip, float* x, uint8_t* codes) {
  const Packed& side = task.target;
  int width = side.width, padded = side.padded(), bits = side.bits();
  int levels = (1 << bits) - 1;
  int64_t item = task.source.dtype == Dtype::f32 ? 4 : 2;
  auto load_strip = [&](int first) {
    int n = width - first < strip ? width - first : strip;
    for (int t = 0; t < kBlock; t++) {
      load_floats(source + (t * task.source.token + first) * item,
                  static_cast<int>(task.source.dtype), n, x + t * strip);
      if (side.rotated) hadamard(x + t * strip, width);
    }
    return n;
  };
  float most = 0.0f;
  bool finite = true;
  for (int first = 0; first < padded; first += strip) {
    int n = load_strip(first);
    for (int t = 0; t < kBlock; t++)
      for (int d = 0; d < n; d++) {
        float value = x[t * strip + d], size = value < 0.0f ? -value : value;
        finite &= size <= 3.4028235e38f;  // false for nan too
        most = size > most ? size : most;
      }
  }
  if (!finite) return false;
  float f = 1.0f;
  if (most != 0.0f && !(most >= 0x1p-6f && most <= 16384.0f))
    f = std::ldexp(1.0f, std::ilogb(most) - 10 < -126 ? -126 : std::ilogb(most) - 10);
  *factor = f;
  uint16_t* scales = reinterpret_cast<uint16_t*>(block + side.code_bytes());
  auto encode = [&](const Quantizer& q, float value) {
    return side.has_zero() ? static_cast<uint8_t>(q.code(value, levels))
                           : to_e4m3(value * q.inverse);
  };
  for (int first = 0; first < padded; first += strip) {
    int n = strip < padded ? load_strip(first) : width;
    int whole = padded - first < strip ? padded - first : strip;  // with what fills it up
    if (f != 1.0f)
      for (int t = 0; t < kBlock; t++)
        for (int d = 0; d < n; d++) x[t * strip + d] /= f;
    std::memset(codes, 0, static_cast<size_t>(kBlock) * whole);
    if (side.axis == Axis::token) {
      for (int begin = 0; begin < n; begin += side.group_size) {
        int end = begin + side.group_size < n ? begin + side.group_size : n;
        uint16_t* at = scales + (first + begin) / side.group_size * side.group_stride();
        for (int t = 0; t < kBlock; t++) {
          const float* row = x + t * strip;
          float low = row[begin], high = row[begin];
          for (int d = begin; d < end; d++) {
            low = row[d] < low ? row[d] : low;
            high = row[d] > high ? row[d] : high;
          }
          Quantizer q(low, high, levels, side.has_zero());
          at[t] = q.scale;
          if (side.has_zero()) at[kBlock + t] = q.zero;
          for (int d = begin; d < end; d++) codes[t * whole + d] = encode(q, row[d]);
        }
      }
    } else {
      for (int d = 0; d < whole; d++) {
        scales[first + d] = 0;
        if (side.has_zero()) scales[padded + first + d] = 0;
        if (d >= n) continue;
        float low = x[d], high = x[d];
        for (int t = 0; t < kBlock; t++) {
          float value = x[t * strip + d];
          low = value < low ? value : low;
          high = value > high ? value : high;
        }
        Quantizer q(low, high, levels, side.has_zero());
        scales[first + d] = q.scale;
        if (side.has_zero()) scales[padded + first + d] = q.zero;
        for (int t = 0; t < kBlock; t++) codes[t * whole + d] = encode(q, x[t * strip + d]);
      }
    }
    // Sixteen dimensions take as many bytes whether they are keys or values.
    lay_out(codes, bits, task.is_keys, whole, block + static_cast<int64_t>(first) * kBlock * bits / 8);
  }
  return true;
}

bool pack(const PackTask& task) {
  const Packed& side = task.target;
  int64_t pairs = task.batch * task.kv_heads, items = pairs * task.num_blocks;
  int64_t item = task.source.dtype == Dtype::f32 ? 4 : 2;
  int strip = strip_of(side);
  bool finite = true;
#pragma omp parallel num_threads(task.threads) if (task.threads > 1) reduction(&& : finite)
  {
    alignas(64) float x_here[kBlock * kStrip];
    alignas(64) uint8_t codes_here[kBlock * kStrip];
    float* x = x_here;
    uint8_t* codes = codes_here;
    if (strip > kStrip) {
      size_t size = static_cast<size_t>(kBlock) * strip;
      x = static_cast<float*>(std::aligned_alloc(64, size * 4));
      codes = static_cast<uint8_t*>(std::aligned_alloc(64, size));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; i++) {
      int64_t pair = i / task.num_blocks, n = i % task.num_blocks;
      int64_t b = pair / task.kv_heads, h = pair % task.kv_heads;
      const char* source = task.source.data +
                           (b * task.source.batch + h * task.source.head +
                            n * kBlock * task.source.token) * item;
      uint8_t* block = const_cast<uint8_t*>(side.blocks) + b * side.batch + h * side.head +
                       n * side.block;
      float* factor = const_cast<float*>(side.factors) + b * side.factor_batch +
                      h * side.factor_head + n * side.factor_block;
      finite = pack_block(task, source, block, factor, strip, x, codes) && finite;
    }
    if (strip > kStrip) {
      std::free(x);
      std::free(codes);
    }
  }
  return finite;
}

void unpack(const UnpackTask& task) {
  const Packed& side = task.source;
  int64_t pairs = task.batch * task.kv_heads, items = pairs * task.num_blocks;
  int padded = side.padded(), width = side.width;
  int64_t item = task.dtype == Dtype::f32 ? 4 : 2;
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
  {
    size_t size = static_cast<size_t>(kBlock) * padded * 4;
    float* x = static_cast<float*>(std::aligned_alloc(64, size));
    float* rows = static_cast<float*>(std::aligned_alloc(64, size));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; i++) {
      int64_t pair = i / task.num_blocks, n = i % task.num_blocks;
      int64_t b = pair / task.kv_heads, h = pair % task.kv_heads;
      int64_t at = task.first_block + n;
      const uint8_t* block = side.blocks + b * side.batch + h * side.head + at * side.block;
      float factor = side.factors[b * side.factor_batch + h * side.factor_head +
                                  at * side.factor_block];
      const float* from = x;
      if (task.is_keys) {
        decode_keys(side, block, factor, x);
        for (int d = 0; d < padded; d += 16)
          for (int t = 0; t < kBlock; t++)
            for (int j = 0; j < 16; j++) rows[t * padded + d + j] = x[(d + j) * kBlock + t];
        from = rows;
      } else {
        decode_values(side, block, factor, x);
      }
      char* to = task.target + (b * task.batch_stride + h * task.head_stride +
                                n * kBlock * task.token_stride) * item;
      for (int t = 0; t < kBlock; t++) {
        float* row = const_cast<float*>(from) + t * padded;
        if (side.rotated && task.unrotate) hadamard(row, width);
        store_floats(row, static_cast<int>(task.dtype), width, to + t * task.token_stride * item);
      }
    }
    std::free(x);
    std::free(rows);
  }
}

// Reads every byte and adds them up: what the memory can deliver, for the benchmark's floor.
uint64_t stream_read(const char* data, int64_t size_bytes, int threads) {
  uint64_t total = 0;
  int64_t lines = size_bytes / 512;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t i = 0; i < lines; i++) {
    vi sum[4] = {};
    const char* at = data + i * 512;
    for (int j = 0; j < 512; j += 4 * W * 4)
      for (int k = 0; k < 4; k++) {
        vi x;
        std::memcpy(&x, at + j + k * W * 4, sizeof x);
        sum[k] ^= x;
      }
    vi all = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
    total += static_cast<uint32_t>(all[0]);
  }
  return total;
}

}  // namespace MNEMON_ISA
}  // namespace mnemon
