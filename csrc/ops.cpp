// The schemas of all ops.
//
// Shapes: N samples, C channels of the feature buffer, c of them in use, k growth rate, K2 width of
// the bottleneck (its rows [M, K2] are padded to a multiple of 16), r hidden width of
// squeeze-and-excitation. densenet_ext/reference has every op in plain PyTorch, with the shape of
// each argument.
#include <torch/csrc/stable/library.h>

// Kernel ops write into their arguments and have no autograd. allow_tf32: float32 products may be
// computed in TF32 (CUDA).
STABLE_TORCH_LIBRARY(densenet_ext, m) {
  m.def(R"(append(
    Tensor x,
    Tensor(a!) features,
    int offset,
    Tensor(b!)? mean,
    Tensor(c!)? m2
  ) -> ())");

  m.def(R"(finish_gradient(
    Tensor features,
    Tensor grad,
    Tensor coef,
    int offset,
    Tensor(a!) out
  ) -> ())");

  m.def(R"(fold_norm(
    Tensor mean,
    Tensor m2,
    int pixels,
    Tensor? pre_mask,
    Tensor? post_mask,
    Tensor weight,
    Tensor bias,
    float eps,
    bool has_statistics,
    Tensor(a!) batch_mean,
    Tensor(b!) batch_var,
    Tensor(c!) scale,
    Tensor(d!) shift
  ) -> ())");
}

// The kernels of a dense layer.
STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(bottleneck_forward(
    Tensor features,
    Tensor scale,
    Tensor shift,
    Tensor weight,
    Tensor(a!) bottleneck,
    Tensor(b!)? mean,
    Tensor(c!)? m2,
    bool allow_tf32=False
  ) -> ())");

  m.def(R"(bottleneck_backward(
    Tensor features,
    Tensor scale,
    Tensor shift,
    Tensor? pre_mask,
    Tensor? post_mask,
    Tensor weight,
    Tensor dv,
    Tensor(a!) bottleneck,
    Tensor db_affine,
    Tensor norm_weight,
    Tensor batch_mean,
    Tensor batch_var,
    float eps,
    bool training,
    Tensor? grad_in,
    Tensor(b!) grad,
    Tensor(c!) coef,
    Tensor(d!) dweight,
    Tensor(e!) dnorm_weight,
    Tensor(f!) dnorm_bias,
    Tensor? previous_scale,
    Tensor? previous_shift,
    Tensor? previous_weight,
    bool allow_tf32=False
  ) -> ())");
}

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(conv3x3_forward(
    Tensor bottleneck,
    Tensor scale,
    Tensor shift,
    Tensor weight,
    Tensor? dropout_mask,
    float dropout_scale,
    Tensor(a!) features,
    int offset,
    Tensor(b!)? mean,
    Tensor(c!)? m2,
    bool allow_tf32=False
  ) -> ())");

  m.def(R"(conv3x3_backward(
    Tensor bottleneck,
    Tensor scale,
    Tensor shift,
    Tensor? post_mask,
    Tensor weight,
    Tensor? dropout_mask,
    float dropout_scale,
    Tensor features,
    Tensor grad,
    Tensor coef,
    int offset,
    Tensor norm_weight,
    Tensor batch_mean,
    Tensor batch_var,
    float eps,
    bool training,
    Tensor(a!) dv,
    Tensor(b!) dweight,
    Tensor(c!) dnorm_weight,
    Tensor(d!) dnorm_bias,
    Tensor(e!) db_affine,
    bool allow_tf32=False
  ) -> ())");
}

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(squeeze_excite_forward(
    Tensor(a!) features,
    int offset,
    Tensor(b!) mean,
    Tensor(c!) m2,
    Tensor fc1_weight,
    Tensor fc1_bias,
    Tensor fc2_weight,
    Tensor fc2_bias,
    Tensor(d!) pooled,
    Tensor(e!) hidden,
    Tensor(f!) gate
  ) -> ())");

  m.def(R"(squeeze_excite_backward(
    Tensor features,
    Tensor grad,
    int offset,
    Tensor fc1_weight,
    Tensor fc2_weight,
    Tensor pooled,
    Tensor hidden,
    Tensor gate,
    Tensor(a!) coef,
    Tensor(b!) dfc1_weight,
    Tensor(c!) dfc1_bias,
    Tensor(d!) dfc2_weight,
    Tensor(e!) dfc2_bias
  ) -> ())");
}

// The kernels of the tails: a transition and a head.
STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(transition_forward(
    Tensor features,
    Tensor scale,
    Tensor shift,
    Tensor weight,
    Tensor(a!) out,
    bool allow_tf32=False
  ) -> ())");

  m.def(R"(transition_backward(
    Tensor features,
    Tensor scale,
    Tensor shift,
    Tensor weight,
    Tensor norm_weight,
    Tensor batch_mean,
    Tensor batch_var,
    float eps,
    bool training,
    Tensor grad_out,
    Tensor(a!) grad,
    Tensor(b!) coef,
    Tensor(c!) dweight,
    Tensor(d!) dnorm_weight,
    Tensor(e!) dnorm_bias,
    bool allow_tf32=False
  ) -> ())");

  m.def(R"(head_forward(
    Tensor features,
    Tensor scale,
    Tensor shift,
    Tensor(a!) out
  ) -> ())");

  m.def(R"(head_backward(
    Tensor features,
    Tensor scale,
    Tensor shift,
    Tensor norm_weight,
    Tensor batch_mean,
    Tensor batch_var,
    float eps,
    bool training,
    Tensor grad_out,
    Tensor(a!) grad,
    Tensor(b!) coef,
    Tensor(c!) dnorm_weight,
    Tensor(d!) dnorm_bias
  ) -> ())");
}

// The kernels of the stem.
STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(stem_forward(
    Tensor x,
    Tensor norm_weight,
    Tensor norm_bias,
    float eps,
    bool has_statistics,
    Tensor(a!) batch_mean,
    Tensor(b!) batch_var,
    Tensor(c!) out
  ) -> ())");

  m.def(R"(stem_backward(
    Tensor x,
    Tensor norm_weight,
    Tensor norm_bias,
    Tensor batch_mean,
    Tensor batch_var,
    float eps,
    bool training,
    Tensor grad_out,
    Tensor(a!)? dx,
    Tensor(b!) dnorm_weight,
    Tensor(c!) dnorm_bias
  ) -> ())");
}

// These two talk to other processes, so they are implemented in Python, with torch.distributed.
STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(synchronize_statistics(
    Tensor(a!) mean,
    Tensor(b!) var,
    int count,
    int group,
    Tensor(c!) total
  ) -> ())");

  m.def(R"(synchronize_gradient(
    Tensor dnorm_weight,
    Tensor dnorm_bias,
    Tensor norm_weight,
    Tensor batch_mean,
    Tensor batch_var,
    float eps,
    Tensor total,
    Tensor? pre_mask,
    int group,
    Tensor(a!) coef
  ) -> ())");
}

// Stage ops return new tensors and have autograd; Python calls them. stage/protocol.h says what the
// lists hold and what the numbers mean.
STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(dense_stage(
    Tensor x,
    Tensor[] params,
    Tensor[] masks,
    Tensor[] frozen_stats,
    float[] eps,
    int[] frozen,
    float dropout_scale,
    int[] options
  ) -> (
    Tensor output,
    Tensor features,
    Tensor stats,
    Tensor gates,
    Tensor bottlenecks
  ))");

  m.def(R"(dense_stage_backward(
    Tensor grad,
    Tensor features,
    Tensor[] params,
    Tensor[] masks,
    Tensor stats,
    Tensor gates,
    Tensor bottlenecks,
    float[] eps,
    int[] frozen,
    float dropout_scale,
    int[] options,
    int in_channels,
    int dx_layout
  ) -> (Tensor dx, Tensor[] dparams))");
}

// These three are dense_stage_backward of a stage with a tail, in two parts: dense_tail_backward
// starts the gradient buffer, and dense_block_backward finishes it. The latter writes the
// gradients of the parameters into tensors that new_gradients has allocated, because
// torch.compile refuses ops that write into their arguments and also return a list of tensors.
STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(dense_tail_backward(
    Tensor grad,
    Tensor features,
    Tensor[] params,
    Tensor stats,
    float eps,
    bool frozen,
    int[] options
  ) -> (Tensor buffer, Tensor coef, Tensor[] dparams))");

  m.def(R"(new_gradients(
    Tensor[] params
  ) -> Tensor[])");

  m.def(R"(dense_block_backward(
    Tensor(a!) buffer,
    Tensor(b!) coef,
    Tensor(c!)[] dparams,
    Tensor features,
    Tensor[] params,
    Tensor[] masks,
    Tensor stats,
    Tensor gates,
    Tensor bottlenecks,
    float[] eps,
    int[] frozen,
    float dropout_scale,
    int[] options,
    int in_channels,
    int dx_layout
  ) -> Tensor dx)");
}

// A dense layer and a stem, each alone.
STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext, m) {
  m.def(R"(dense_layer(
    Tensor[] inputs,
    Tensor[] params,
    Tensor[] masks,
    Tensor[] frozen_stats,
    float[] eps,
    int[] frozen,
    float dropout_scale,
    int[] options
  ) -> (
    Tensor output,
    Tensor stats,
    Tensor gates,
    Tensor bottlenecks
  ))");

  m.def(R"(dense_layer_backward(
    Tensor grad,
    Tensor output,
    Tensor[] inputs,
    Tensor[] params,
    Tensor[] masks,
    Tensor stats,
    Tensor gates,
    Tensor bottlenecks,
    float[] eps,
    int[] frozen,
    float dropout_scale,
    int[] options
  ) -> (Tensor[] dinputs, Tensor[] dparams))");

  m.def(R"(dense_stem(
    Tensor x,
    Tensor norm_weight,
    Tensor norm_bias,
    Tensor[] frozen_stats,
    float eps
  ) -> (Tensor output, Tensor stats))");

  m.def(R"(dense_stem_backward(
    Tensor grad,
    Tensor x,
    Tensor norm_weight,
    Tensor norm_bias,
    Tensor stats,
    float eps,
    bool frozen,
    bool need_dx
  ) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias))");
}
