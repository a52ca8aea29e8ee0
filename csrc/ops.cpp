// All operators, by schema. The kernel operators write into their arguments and have no autograd;
// the functional ones at the end are what Python calls. Shapes: N samples, C channels of the
// feature buffer, c of them in use, k growth rate, K2 bottleneck width (its rows padded to a
// multiple of 16), r SE width. allow_tf32: whether products of float32 may be of TF32 (CUDA).
// dx_layout: 0 no dx, 1 that of the device's maps, 2 channels last.
// group: number of the processes that share batch statistics, -1 for this one alone.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(densenet_ext, m) {
  m.def(
      "append(Tensor x, Tensor(a!) features, int offset, Tensor(b!)? mean, Tensor(c!)? m2) -> ()");
  m.def(
      "fold_norm(Tensor mean, Tensor m2, int pixels, Tensor? pre_mask, Tensor? post_mask, Tensor "
      "weight, Tensor bias, float eps, bool has_statistics, "
      "Tensor(a!) batch_mean, Tensor(b!) batch_var, Tensor(c!) scale, Tensor(d!) shift) -> ()");
  m.def(
      "bottleneck_forward(Tensor features, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) "
      "bottleneck, Tensor(b!)? mean, Tensor(c!)? m2, bool allow_tf32=False) -> ()");
  m.def(
      "bottleneck_backward(Tensor features, Tensor scale, Tensor shift, Tensor? pre_mask, Tensor? "
      "post_mask, Tensor weight, Tensor dv, Tensor(a!) bottleneck, "
      "Tensor db_affine, Tensor norm_weight, Tensor batch_mean, Tensor batch_var, float eps, bool "
      "training, Tensor? grad_in, Tensor(b!) grad, Tensor(c!) coef, "
      "Tensor(d!) dweight, Tensor(e!) dnorm_weight, Tensor(f!) dnorm_bias, Tensor? "
      "previous_scale, Tensor? previous_shift, Tensor? previous_weight, bool allow_tf32=False) -> "
      "()");
  m.def(
      "conv3x3_forward(Tensor bottleneck, Tensor scale, Tensor shift, Tensor weight, Tensor? "
      "dropout_mask, float dropout_scale, Tensor(a!) features, "
      "int offset, Tensor(b!)? mean, Tensor(c!)? m2, bool allow_tf32=False) -> ()");
  m.def(
      "conv3x3_backward(Tensor bottleneck, Tensor scale, Tensor shift, Tensor? post_mask, Tensor "
      "weight, Tensor? dropout_mask, float dropout_scale, "
      "Tensor features, Tensor grad, Tensor coef, int offset, Tensor norm_weight, Tensor "
      "batch_mean, Tensor batch_var, float eps, bool training, "
      "Tensor(a!) dv, Tensor(b!) dweight, Tensor(c!) dnorm_weight, Tensor(d!) dnorm_bias, "
      "Tensor(e!) db_affine, bool allow_tf32=False) -> ()");
  m.def(
      "squeeze_excite_forward(Tensor(a!) features, int offset, Tensor(b!) mean, Tensor(c!) m2, "
      "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
      "Tensor fc2_bias, Tensor(d!) pooled, Tensor(e!) hidden, Tensor(f!) gate) -> ()");
  m.def(
      "squeeze_excite_backward(Tensor features, Tensor grad, int offset, Tensor fc1_weight, Tensor "
      "fc2_weight, Tensor pooled, Tensor hidden, Tensor gate, "
      "Tensor(a!) coef, Tensor(b!) dfc1_weight, Tensor(c!) dfc1_bias, Tensor(d!) dfc2_weight, "
      "Tensor(e!) dfc2_bias) -> ()");
  m.def(
      "transition_forward(Tensor features, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) "
      "out, bool allow_tf32=False) -> ()");
  m.def(
      "transition_backward(Tensor features, Tensor scale, Tensor shift, Tensor weight, Tensor "
      "norm_weight, Tensor batch_mean, Tensor batch_var, float eps, "
      "bool training, Tensor grad_out, Tensor(a!) grad, Tensor(b!) coef, Tensor(c!) dweight, "
      "Tensor(d!) dnorm_weight, Tensor(e!) dnorm_bias, bool allow_tf32=False) -> ()");
  m.def("head_forward(Tensor features, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");
  m.def(
      "head_backward(Tensor features, Tensor scale, Tensor shift, Tensor norm_weight, Tensor "
      "batch_mean, Tensor batch_var, float eps, bool training, "
      "Tensor grad_out, Tensor(a!) grad, Tensor(b!) coef, Tensor(c!) dnorm_weight, Tensor(d!) "
      "dnorm_bias) -> ()");
  m.def(
      "stem_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool "
      "has_statistics, "
      "Tensor(a!) batch_mean, Tensor(b!) batch_var, Tensor(c!) out) -> ()");
  m.def(
      "stem_backward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor batch_mean, Tensor "
      "batch_var, float eps, bool training, Tensor grad_out, Tensor(a!)? dx, Tensor(b!) "
      "dnorm_weight, Tensor(c!) dnorm_bias) -> ()");
  m.def(
      "finish_gradient(Tensor features, Tensor grad, Tensor coef, int offset, Tensor(a!) out) -> "
      "()");

  // These two talk to other processes, so they are implemented in Python, with torch.distributed.
  m.def(
      "synchronize_statistics(Tensor(a!) mean, Tensor(b!) var, int count, int group, Tensor(c!) "
      "total) -> ()");
  m.def(
      "synchronize_gradient(Tensor dnorm_weight, Tensor dnorm_bias, Tensor norm_weight, Tensor "
      "batch_mean, Tensor batch_var, float eps, Tensor total, Tensor? pre_mask, int group, "
      "Tensor(a!) coef) -> ()");

  m.def(
      "dense_stage(Tensor x, Tensor[] params, Tensor[] masks, Tensor[] frozen_stats, int "
      "mask_kind, float dropout_scale, float[] eps, int[] frozen, "
      "bool squeeze_excite, int tail, bool keep_bottleneck, bool allow_tf32, int group) -> (Tensor "
      "output, Tensor features, "
      "Tensor stats, Tensor gates, Tensor bottlenecks)");
  m.def(
      "dense_stage_backward(Tensor grad, Tensor features, Tensor[] params, Tensor[] masks, Tensor "
      "stats, Tensor gates, Tensor bottlenecks, int mask_kind, "
      "float dropout_scale, float[] eps, int[] frozen, bool squeeze_excite, int tail, int "
      "in_channels, int dx_layout, bool allow_tf32, int group) -> (Tensor dx, Tensor[] dparams)");
  // The same in two parts, for a stage with a tail: what the tail starts, the block works on. The
  // gradients of the block's parameters are written into new_gradients of those.
  m.def("new_gradients(Tensor[] params) -> Tensor[]");
  m.def(
      "dense_tail_backward(Tensor grad, Tensor features, Tensor[] params, Tensor stats, float eps, "
      "bool frozen, bool allow_tf32, int group) -> (Tensor buffer, Tensor coef, Tensor[] dparams)");
  m.def(
      "dense_block_backward(Tensor(a!) buffer, Tensor(b!) coef, Tensor(c!)[] dparams, Tensor "
      "features, Tensor[] params, Tensor[] masks, Tensor stats, Tensor gates, Tensor bottlenecks, "
      "int mask_kind, float dropout_scale, float[] eps, int[] frozen, bool squeeze_excite, int "
      "tail, int in_channels, int dx_layout, bool allow_tf32, int group) -> Tensor dx");
  m.def(
      "dense_layer(Tensor[] inputs, Tensor[] params, Tensor[] masks, Tensor[] frozen_stats, int "
      "mask_kind, float dropout_scale, float[] eps, int[] frozen, "
      "bool squeeze_excite, bool keep_bottleneck, bool allow_tf32, int group) -> (Tensor output, "
      "Tensor "
      "stats, Tensor gates, "
      "Tensor bottlenecks)");
  m.def(
      "dense_layer_backward(Tensor grad, Tensor output, Tensor[] inputs, Tensor[] params, Tensor[] "
      "masks, Tensor stats, Tensor gates, Tensor bottlenecks, "
      "int mask_kind, float dropout_scale, float[] eps, int[] frozen, bool squeeze_excite, "
      "bool allow_tf32, int group) -> "
      "(Tensor[] dinputs, Tensor[] dparams)");
  m.def(
      "dense_stem(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor[] frozen_stats, float "
      "eps) -> (Tensor output, Tensor stats)");
  m.def(
      "dense_stem_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor "
      "stats, float eps, bool frozen, bool need_dx) -> (Tensor dx, Tensor dnorm_weight, Tensor "
      "dnorm_bias)");
}
