// One token into the slots of a compressing cache: which slot is each row's and head's own affair.
//
// Slots of a part (keys, values, positions) lie as [batch, kv_heads, capacity] runs of bytes.
#pragma once

#include <cstdint>
#include <cstring>

namespace mnemon {

struct SlotPart {
  char* data = nullptr;
  int64_t slot_bytes = 0;
  const char* fresh = nullptr;  // the new token, [batch, kv_heads], strides in bytes; null: numbers
  int64_t fresh_batch = 0, fresh_head = 0;
};

struct SlotTask {
  int64_t batch = 0, kv_heads = 0, capacity = 0;
  SlotPart keys, values, positions;  // positions without data: none are kept
  int32_t* lengths = nullptr;        // [batch, kv_heads]
  int64_t* counts = nullptr;         // real tokens of each row, [batch]
  const uint8_t* decisions = nullptr;
  int64_t decisions_batch = 0, decisions_head = 0;
  int64_t ring = 0;          // DMS: slots of the ring; 0: DMC
  uint8_t* marks = nullptr;  // DMS: of the ring, [batch, kv_heads, ring]
};

namespace slots {

inline void move(const SlotPart& part, int64_t base, int64_t from, int64_t to) {
  if (part.data && from != to)
    std::memcpy(part.data + (base + to) * part.slot_bytes,
                part.data + (base + from) * part.slot_bytes, part.slot_bytes);
}

inline void put(const SlotPart& part, int64_t base, int64_t at, int64_t b, int64_t h) {
  std::memcpy(part.data + (base + at) * part.slot_bytes,
              part.fresh + b * part.fresh_batch + h * part.fresh_head, part.slot_bytes);
}

}  // namespace slots

inline void store_token(const SlotTask& task) {
  for (int64_t b = 0; b < task.batch; ++b) {
    const int64_t count = task.counts[b];
    const int32_t position = static_cast<int32_t>(count);
    for (int64_t h = 0; h < task.kv_heads; ++h) {
      const int64_t head = b * task.kv_heads + h, base = head * task.capacity;
      int32_t& length = task.lengths[head];
      const bool decided =
          task.decisions[b * task.decisions_batch + h * task.decisions_head] != 0;
      int64_t at;
      if (task.ring) {
        // The decision marks the token before; what leaves the ring unmarked is kept behind it.
        uint8_t* marks = task.marks + head * task.ring;
        if (count > 0) marks[(count - 1) % task.ring] = decided;
        at = count % task.ring;
        if (count < task.ring) {
          ++length;
        } else if (!marks[at]) {
          slots::move(task.keys, base, at, length);
          slots::move(task.values, base, at, length);
          slots::move(task.positions, base, at, length);
          ++length;
        }
        marks[at] = 0;
      } else {
        // A merged token writes the newest slot anew.
        if (!decided || length == 0) ++length;
        at = length - 1;
      }
      slots::put(task.keys, base, at, b, h);
      slots::put(task.values, base, at, b, h);
      if (task.positions.data)
        std::memcpy(task.positions.data + (base + at) * 4, &position, 4);
    }
    task.counts[b] = count + 1;
  }
}

}  // namespace mnemon
