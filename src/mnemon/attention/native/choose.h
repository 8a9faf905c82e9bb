// Which instruction sets this build has and this processor runs, best first.
#pragma once

#include <vector>

#include "task.h"

namespace mnemon {

std::vector<const Kernels*> usable_kernels();

}  // namespace mnemon
