// Compiled once per instruction set, with MNEMON_ISA naming it.
#include <omp.h>

#include <type_traits>

#include "attend.h"

namespace mnemon {

#define MNEMON_TEXT2(x) #x
#define MNEMON_TEXT(x) MNEMON_TEXT2(x)
#define MNEMON_JOIN2(a, b) a##b
#define MNEMON_JOIN(a, b) MNEMON_JOIN2(a, b)

namespace MNEMON_ISA {
bool pack(const PackTask& task);
void unpack(const UnpackTask& task);
uint64_t stream_read(const char* data, int64_t size_bytes, int threads);
}  // namespace MNEMON_ISA

extern const Kernels MNEMON_JOIN(kernels_, MNEMON_ISA);
const Kernels MNEMON_JOIN(kernels_, MNEMON_ISA) = {
    MNEMON_TEXT(MNEMON_ISA), MNEMON_ISA::attend, MNEMON_ISA::pack, MNEMON_ISA::unpack,
    MNEMON_ISA::stream_read};

}  // namespace mnemon
