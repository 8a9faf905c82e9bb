#include "scratch.h"

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mnemon {
namespace {

constexpr size_t kMostKept = 8 << 20;
constexpr size_t kPage = 4096;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// One block, handed out from its beginning on; what does not fit is allocated by itself, and the
// block is larger the next time.
struct Scratch {
  char* block = nullptr;
  size_t size = 0, used = 0, wanted = 0;
  int taken = 0;

  ~Scratch() { std::free(block); }
  void resize(size_t bytes) {
    std::free(block);
    block = bytes ? static_cast<char*>(std::aligned_alloc(kPage, bytes)) : nullptr;
    size = block ? bytes : 0;
  }
};

Scratch& here() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace

char* take_scratch(size_t size_bytes) {
  Scratch& scratch = here();
  size_bytes = round_up(size_bytes, 64);
  char* data = scratch.used + size_bytes <= scratch.size
                   ? scratch.block + scratch.used
                   : static_cast<char*>(std::aligned_alloc(64, size_bytes));
  if (!data) return nullptr;
  scratch.used += size_bytes;
  scratch.wanted = scratch.used > scratch.wanted ? scratch.used : scratch.wanted;
  scratch.taken++;
  return data;
}

void give_scratch(char* data) {
  Scratch& scratch = here();
  if (data < scratch.block || data >= scratch.block + scratch.size) std::free(data);
  if (--scratch.taken) return;
  scratch.used = 0;
  if (scratch.wanted > scratch.size && scratch.wanted <= kMostKept)
    scratch.resize(round_up(scratch.wanted + scratch.wanted / 4, kPage));
}

void release_scratch() {
  Scratch& scratch = here();
  if (scratch.taken || !scratch.block) return;
#ifdef __linux__
  madvise(scratch.block, scratch.size, MADV_DONTNEED);  // whole pages, all of them ours
#else
  scratch.resize(0);
  scratch.wanted = 0;
#endif
}

}  // namespace mnemon
