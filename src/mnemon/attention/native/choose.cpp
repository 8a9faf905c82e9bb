#include "choose.h"

namespace mnemon {

extern const Kernels kernels_portable;
#if defined(MNEMON_X86)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni, kernels_avx512bf16;
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(MNEMON_X86)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) usable.push_back(&kernels_avx512bf16);
  if (vnni) usable.push_back(&kernels_avx512vnni);
  if (avx512) usable.push_back(&kernels_avx512);
  if (avx2) usable.push_back(&kernels_avx2);
#endif
  usable.push_back(&kernels_portable);
  return usable;
}

}  // namespace mnemon
