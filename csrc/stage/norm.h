// A batch normalization of a stage: its parameters, its statistics, and the scale and shift that
// follow from both.
#pragma once

#include "torch_stable.h"

namespace densenet_ext {

// relu(norm(x)) = relu(scale * x + shift): [1, C], or [N, C] where a mask is folded in.
struct FoldedNorm {
  Tensor scale, shift;
};

struct NormSite {
  Tensor weight, bias, mean, var;  // mean, var: views of the stage's statistics
  double eps;
  bool frozen;         // normalizes with statistics from outside the batch
  bool shared;         // normalizes with the statistics of all processes of a group
  FoldedNorm folded;   // views of the stage's statistics: scale and shift without masks
  Tensor total_count;  // [1]: number of values a channel in all processes of the group

  // True if the statistics come from this process's batch only, so that a kernel can finish the
  // norm's backward itself.
  bool is_local() const { return !frozen && !shared; }
};

// The norm whose statistics lie in the columns of `stats` from `offset` on.
inline NormSite norm_site(const Tensor& stats, int64_t offset, const Tensor& weight,
                          const Tensor& bias, double eps, bool frozen, int64_t group) {
  const int64_t width = weight.numel(), columns = stats.size(1);
  const auto row = [&](int64_t i, const Sizes& sizes) {
    return piece(stats, offset + i * columns, sizes);
  };
  NormSite site;
  site.weight = weight;
  site.bias = bias;
  site.mean = row(0, {width});
  site.var = row(1, {width});
  site.eps = eps;
  site.frozen = frozen;
  site.shared = group >= 0 && !frozen;
  site.folded = {row(2, {1, width}), row(3, {1, width})};
  if (site.shared) site.total_count = piece(stats, columns - 1, {1});
  return site;
}

// Adds to coef [3, N or 1, >= width] the part of the norm's gradient that flows through statistics
// which processes share. The kernel left it out, because it takes the sums of all processes.
inline void finish_norm_backward(const NormSite& site, const Tensor& dweight, const Tensor& dbias,
                                 const Optional& pre_mask, int64_t group, const Tensor& coef) {
  if (!site.shared) return;
  call("densenet_ext::synchronize_gradient", dweight, dbias, site.weight, site.mean, site.var,
       site.eps, site.total_count, pre_mask, group, coef);
}

}  // namespace densenet_ext
