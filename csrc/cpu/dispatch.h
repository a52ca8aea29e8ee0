// The instruction set in use; it is chosen at the first call.
#pragma once

#include "kernel_arguments.h"

namespace densenet_ext {

// Returns "baseline", "avx2", "avx512" or "amx".
const char* cpu_capability();

const KernelSet& cpu_kernels();

}  // namespace densenet_ext
