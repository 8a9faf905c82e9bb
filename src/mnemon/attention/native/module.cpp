// The door from Python: numbers and pointers in, nothing of torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "choose.h"
#include "scratch.h"
#include "slots.h"
#include "task.h"

namespace nb = nanobind;
using namespace mnemon;

namespace {

// Reads whole numbers in the order in which Python wrote them (native.py).
class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& numbers) : numbers_(numbers) {}
  int64_t next() {
    if (at_ >= numbers_.size()) throw std::invalid_argument("too few numbers for a kernel");
    return numbers_[at_++];
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<intptr_t>(next()));
  }
  template <class T>
  T kind() {
    return static_cast<T>(static_cast<int>(next()));
  }
  void done() const {
    if (at_ != numbers_.size()) throw std::invalid_argument("too many numbers for a kernel");
  }

  Dense dense() {
    Dense side;
    side.data = pointer<const char>();
    side.batch = next();
    side.head = next();
    side.token = next();
    side.dtype = kind<Dtype>();
    return side;
  }
  Packed packed() {
    Packed side;
    side.blocks = pointer<const uint8_t>();
    if (!side.blocks) return side;
    side.batch = next();
    side.head = next();
    side.block = next();
    side.factors = pointer<const float>();
    side.factor_batch = next();
    side.factor_head = next();
    side.factor_block = next();
    side.code = kind<Code>();
    side.axis = kind<Axis>();
    side.group_size = static_cast<int>(next());
    side.width = static_cast<int>(next());
    side.rotated = next() != 0;
    return side;
  }
  Scores scores() {
    Scores from;
    from.kind = kind<Added>();
    if (from.kind == Added::none) return from;
    from.data = pointer<const char>();
    from.batch = next();
    from.head = next();
    from.row = next();
    from.token = next();
    return from;
  }

 private:
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

const Kernels& kernels(const std::string& name) {
  static const std::vector<const Kernels*> usable = usable_kernels();
  if (name.empty()) return *usable.front();
  for (const Kernels* candidate : usable)
    if (name == candidate->name) return *candidate;
  throw std::invalid_argument("this processor or build has no kernels called " + name);
}

void attend(const std::vector<int64_t>& numbers, float scale, float softcap,
            const std::string& isa) {
  Reader in(numbers);
  Task task;
  task.threads = static_cast<int>(in.next());
  task.batch = in.next();
  task.kv_heads = in.next();
  task.group = in.next();
  task.num_new = in.next();
  task.head_dim = in.next();
  task.value_dim = in.next();
  task.query = in.pointer<const char>();
  task.query_batch = in.next();
  task.query_head = in.next();
  task.query_row = in.next();
  task.query_dtype = in.kind<Dtype>();
  task.out = in.pointer<char>();
  task.out_batch = in.next();
  task.out_head = in.next();
  task.out_row = in.next();
  task.out_dtype = in.kind<Dtype>();
  task.lse = in.pointer<float>();
  task.num_dense = in.next();
  task.keys = in.dense();
  task.values = in.dense();
  task.num_blocks = in.next();
  task.skipped = in.next();
  task.packed_keys = in.packed();
  task.packed_values = in.packed();
  task.mask = in.scores();
  task.bias = in.scores();
  task.sinks = in.pointer<const float>();
  task.causal = in.next() != 0;
  task.window = in.next();
  task.lengths = in.pointer<const int32_t>();
  task.lengths_batch = in.next();
  task.lengths_head = in.next();
  task.starts = in.pointer<const int32_t>();
  task.starts_batch = in.next();
  task.starts_head = in.next();
  in.done();
  task.scale = scale;
  task.softcap = softcap;
  const Kernels& chosen = kernels(isa);
  nb::gil_scoped_release release;
  chosen.attend(task);
}

bool pack(const std::vector<int64_t>& numbers, const std::string& isa) {
  Reader in(numbers);
  PackTask task;
  task.threads = static_cast<int>(in.next());
  task.batch = in.next();
  task.kv_heads = in.next();
  task.num_blocks = in.next();
  task.is_keys = in.next() != 0;
  task.source = in.dense();
  task.target = in.packed();
  in.done();
  const Kernels& chosen = kernels(isa);
  nb::gil_scoped_release release;
  return chosen.pack(task);
}

void unpack(const std::vector<int64_t>& numbers, const std::string& isa) {
  Reader in(numbers);
  UnpackTask task;
  task.threads = static_cast<int>(in.next());
  task.batch = in.next();
  task.kv_heads = in.next();
  task.first_block = in.next();
  task.num_blocks = in.next();
  task.is_keys = in.next() != 0;
  task.unrotate = in.next() != 0;
  task.target = in.pointer<char>();
  task.batch_stride = in.next();
  task.head_stride = in.next();
  task.token_stride = in.next();
  task.dtype = in.kind<Dtype>();
  task.source = in.packed();
  in.done();
  const Kernels& chosen = kernels(isa);
  nb::gil_scoped_release release;
  chosen.unpack(task);
}

void store(const std::vector<int64_t>& numbers) {
  Reader in(numbers);
  SlotTask task;
  task.batch = in.next();
  task.kv_heads = in.next();
  task.capacity = in.next();
  for (SlotPart* part : {&task.keys, &task.values}) {
    part->data = in.pointer<char>();
    part->slot_bytes = in.next();
    part->fresh = in.pointer<const char>();
    part->fresh_batch = in.next();
    part->fresh_head = in.next();
  }
  task.positions.data = in.pointer<char>();
  task.positions.slot_bytes = 4;
  task.lengths = in.pointer<int32_t>();
  task.counts = in.pointer<int64_t>();
  task.decisions = in.pointer<const uint8_t>();
  task.decisions_batch = in.next();
  task.decisions_head = in.next();
  task.ring = in.next();
  task.marks = in.pointer<uint8_t>();
  in.done();
  store_token(task);
}

uint64_t stream_read(int64_t address, int64_t size_bytes, int threads) {
  const Kernels& chosen = kernels("");
  nb::gil_scoped_release release;
  return chosen.stream_read(reinterpret_cast<const char*>(address), size_bytes, threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* candidate : usable_kernels()) names.push_back(candidate->name);
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("attend", &attend, nb::arg("numbers"), nb::arg("scale"), nb::arg("softcap"),
        nb::arg("isa") = "");
  m.def("pack", &pack, nb::arg("numbers"), nb::arg("isa") = "");
  m.def("unpack", &unpack, nb::arg("numbers"), nb::arg("isa") = "");
  m.def("store_token", &store, nb::arg("numbers"));
  m.def("stream_read", &stream_read, nb::arg("address"), nb::arg("size_bytes"),
        nb::arg("threads"));
  m.def("release_scratch", &release_scratch);
  m.def("instruction_sets", &instruction_sets);
}
