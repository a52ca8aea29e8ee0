// A batch normalization of a stage: its parameters, its statistics among those of all, its table.
#pragma once

#include "call.h"

namespace densenet_ext {

struct Folded {
  Tensor scale, shift;
};
// Its place in `eps`, `frozen` and `stats`.
struct NormSite {
  Tensor weight, bias, mean, var;
  double eps;
  bool frozen;   // normalizes with given statistics
  bool shared;   // normalizes with the statistics of all processes of a group
  Folded table;  // kept from forward to backward where no mask is folded in

  // Whether the kernels see all that its statistics come from, and can do its whole backward.
  bool local() const { return !frozen && !shared; }
};

// The number of values a channel that all processes have, at the end of a stage's statistics.
inline Tensor total_of(const Tensor& stats) { return piece(stats, stats.size(1) - 1, {1}); }

// The norm whose statistics lie in the columns of `stats` from `offset` on.
inline NormSite norm_site(const Tensor& stats, int64_t offset, const Tensor& weight,
                          const Tensor& bias, double eps, bool frozen, int64_t group) {
  const int64_t width = weight.numel();
  const auto row = [&](int64_t i, const Sizes& sizes) {
    return piece(stats, offset + i * stats.size(1), sizes);
  };
  return {weight, bias,   row(0, {width}),       row(1, {width}),
          eps,    frozen, group >= 0 && !frozen, {row(2, {1, width}), row(3, {1, width})}};
}

// What BN's statistics add to the gradient of its input, into coef [3, samples or 1, >= width],
// where the kernel has left it out because it takes the sums of all processes.
inline void finish_norm_backward(const NormSite& site, const Tensor& stats, const Tensor& dweight,
                                 const Tensor& dbias, const Optional& pre_mask, int64_t group,
                                 const Tensor& coef) {
  if (!site.shared) return;
  call("densenet_ext::synchronize_gradient", dweight, dbias, site.weight, site.mean, site.var,
       site.eps, total_of(stats), pre_mask, group, coef);
}

}  // namespace densenet_ext
