// Memory that a kernel works in, kept by the calling thread between its calls: asking the allocator
// each time costs page faults, and leaves resident pages all over its heap.
#pragma once

#include <cstddef>

namespace mnemon {

// Aligned to 64 bytes; null if there is none. What was taken last need not be given back first.
char* take_scratch(size_t size_bytes);
void give_scratch(char* data);
// Gives what this thread keeps back to the system.
void release_scratch();

}  // namespace mnemon
