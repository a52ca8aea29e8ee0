// The instruction set in use is chosen once, when it is first asked for.
#pragma once

#include "kernel_arguments.h"

namespace densenet_ext {

// "baseline", "avx2", "avx512" or "amx".
const char* cpu_capability();

const KernelSet& cpu_kernels();

}  // namespace densenet_ext
