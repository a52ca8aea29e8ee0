#include "kernel_ops/operators.h"
#include "backend.h"

#ifdef DENSENET_EXT_SIMT  // tensors on the CPU stand for those on CUDA
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
#endif
  densenet_ext::kernel_ops::register_operators<densenet_ext::cuda::Cuda>(m);
}
