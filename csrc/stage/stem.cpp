// The stem after its convolution: batch normalization, ReLU and the 3x3 max pool of stride 2 as one
// op. x and its gradient are channels last, like the convolution's output; the pooled maps have the
// layout that the first stage reads. On CPU large tensors come from the workspace, since they are
// freed within a step.
#include <tuple>

#include "layout.h"
#include "protocol.h"

namespace densenet_ext {
namespace {

Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor> dense_stem(const Tensor& x, const Tensor& norm_weight,
                                      const Tensor& norm_bias, const Tensors& frozen_stats,
                                      double eps) {
  check_spatial("x", x);
  STD_TORCH_CHECK(frozen_stats.empty() || frozen_stats.size() == 2,
                  "frozen_stats must hold a mean and a variance or nothing, got ",
                  frozen_stats.size(), " tensors");
  const Sizes channels = {x.size(1)};
  const Tensor stats = empty(x, {2, x.size(1)}, arithmetic_type(x.scalar_type()));
  Tensor rows[2] = {piece(stats, 0, channels), piece(stats, x.size(1), channels)};
  for (size_t i = 0; i < frozen_stats.size(); ++i) {
    check_shape("frozen_stats", frozen_stats[i], channels);
    torch::stable::copy_(rows[i], frozen_stats[i]);
  }
  Sizes pooled = sizes_of(x);
  for (size_t dim = 2; dim < pooled.size(); ++dim) pooled[dim] = (pooled[dim] + 1) / 2;
  const Tensor output = stage_maps(x, pooled, x.scalar_type());
  call("densenet_ext::stem_forward", channels_last(x), norm_weight, norm_bias, eps,
       !frozen_stats.empty(), rows[0], rows[1], output);
  return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor> dense_stem_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& norm_weight,
                                                       const Tensor& norm_bias, const Tensor& stats,
                                                       double eps, bool frozen, bool need_dx) {
  check_spatial("x", x);
  const ScalarType type = arithmetic_type(x.scalar_type());
  const Tensor dx = need_dx ? channels_last_workspace(x, sizes_of(x), x.scalar_type())
                            : empty(x, {0}, x.scalar_type()),
               dweight = empty(x, {x.size(1)}, type), dbias = empty(x, {x.size(1)}, type);
  check_shape("stats", stats, {2, x.size(1)});
  check_contiguous("stats", stats);
  call("densenet_ext::stem_backward", channels_last(x), norm_weight, norm_bias,
       piece(stats, 0, {x.size(1)}), piece(stats, x.size(1), {x.size(1)}), eps, !frozen,
       is_channels_last(x) ? channels_last(grad) : readable(grad),
       need_dx ? Optional(dx) : std::nullopt, dweight, dbias);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("dense_stem", TORCH_BOX(&densenet_ext::dense_stem));
  m.impl("dense_stem_backward", TORCH_BOX(&densenet_ext::dense_stem_backward));
}
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
  m.impl("dense_stem", TORCH_BOX(&densenet_ext::dense_stem));
  m.impl("dense_stem_backward", TORCH_BOX(&densenet_ext::dense_stem_backward));
}
