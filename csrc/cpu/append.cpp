#include "backend.h"

namespace densenet_ext {
namespace {

void append_cpu(const Tensor& x, const Tensor& features, int64_t offset,
                const std::optional<Tensor>& mean, const std::optional<Tensor>& m2) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    const auto f = maps<S>("features", features);
    const auto in = maps_of_either_layout<const S>("x", x);
    check_shape("x", x, {f.samples, in.channels, f.height, f.width});
    check_range("features", f, offset, in.channels);
    kernels.append({in, f, offset, moments<Arithmetic<S>>(mean, m2, f)});
  });
}

void finish_gradient_cpu(const Tensor& features, const Tensor& grad, const Tensor& coef,
                         int64_t offset, const Tensor& out) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<const S>("features", features);
    const auto o = maps_of_either_layout<S>("out", out);
    check_shape("out", out, {f.samples, o.channels, f.height, f.width});
    check_range("features", f, offset, o.channels);
    kernels.finish_gradient(
        {f, maps_like<const T>("grad", grad, f), coefficients<T>(coef, f), offset, o});
  });
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("append", TORCH_BOX(&densenet_ext::append_cpu));
  m.impl("finish_gradient", TORCH_BOX(&densenet_ext::finish_gradient_cpu));
}
