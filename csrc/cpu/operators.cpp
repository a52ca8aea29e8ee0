#include "kernel_ops/operators.h"
#include "backend.h"

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  densenet_ext::kernel_ops::register_operators<densenet_ext::Cpu>(m);
}
