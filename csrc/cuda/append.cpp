#include "backend.h"

namespace densenet_ext::cuda {
namespace {

void append_cuda(const Tensor& x, const Tensor& features, int64_t offset,
                 const std::optional<Tensor>& mean, const std::optional<Tensor>& m2) {
  DeviceContext context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    const auto f = rows<S>("features", features);
    const auto in = strided<const S>("x", x);
    check_shape("x", x, {f.samples, in.channels, f.height, f.width});
    check_range("features", f, offset, in.channels);
    append<S>({in, f, offset, moments<Arithmetic<S>>(mean, m2, f)}, context);
  });
}

void finish_gradient_cuda(const Tensor& features, const Tensor& grad, const Tensor& coef,
                          int64_t offset, const Tensor& out) {
  DeviceContext context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    const auto o = strided<S>("out", out);
    check_shape("out", out, {f.samples, o.channels, f.height, f.width});
    check_range("features", f, offset, o.channels);
    finish_gradient<S>(
        {f, rows_like<const S>("grad", grad, f), coefficients<T>(coef, f), offset, o}, context);
  });
}

}  // namespace
}  // namespace densenet_ext::cuda

DENSENET_EXT_CUDA_OPERATORS(m) {
  m.impl("append", TORCH_BOX(&densenet_ext::cuda::append_cuda));
  m.impl("finish_gradient", TORCH_BOX(&densenet_ext::cuda::finish_gradient_cuda));
}
