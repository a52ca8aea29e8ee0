// fold_norm makes batch statistics from moments, and folds batch normalization with the masks
// around it into one scale and one shift:
//
//   mean_c = (1/R) sum_n q mu      var_c = (1/(R P)) sum_n (q^2 M2 + P (q mu - mean_c)^2)
//   scale = r q gamma rstd         shift = r (beta - gamma rstd mean)
//
// mu, M2 [R, >= c] are the moments of P values each, q and r the masks before and after. A block
// has 8 channels, its 32 lines of threads walk down the rows. A thread sums in T, the block in
// double, always in the same order. Bytes moved: the moments once (their second reading comes from
// L1), masks, scale and shift once: latency is what counts, a layer starts with this.
#include "channel_loops.cuh"

namespace densenet_ext::cuda {
namespace {

template <class T>
DEVICE T mask_of(const PerChannel<T>& mask, int64_t n, int64_t c) {
  return mask.data ? mask.row(n)[c] : T(1);
}

template <class T>
KERNEL __launch_bounds__(kMaxThreads) fold_norm_kernel(FoldNorm<T> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const ThreadMap map = narrow_map();
  const Group group = group_of<1>(map, blockIdx.x, a.channels);
  const int64_t c = group.first, step = map.lines;

  T mean = 0, var = 0;
  if (!a.has_statistics) {
    T sum = 0;
    if (group.valid > 0) {
#pragma unroll 8
      for (int64_t n = map.line(); n < a.rows; n += step)
        sum += mask_of(a.pre_mask, n, c) * a.mean[n * a.pitch + c];
    }
    double total[1] = {static_cast<double>(sum)};
    sum_lines(total, shared, map);
    mean = static_cast<T>(total[0] / static_cast<double>(a.rows > 0 ? a.rows : 1));

    sum = 0;
    if (group.valid > 0) {
#pragma unroll 8
      for (int64_t n = map.line(); n < a.rows; n += step) {
        const T q = mask_of(a.pre_mask, n, c), delta = q * a.mean[n * a.pitch + c] - mean;
        sum += q * q * a.m2[n * a.pitch + c] + static_cast<T>(a.pixels) * delta * delta;
      }
    }
    total[0] = static_cast<double>(sum);
    sum_lines(total, shared, map);
    const double values = static_cast<double>(a.rows) * static_cast<double>(a.pixels);
    var = values > 0 ? static_cast<T>(total[0] / values) : T(0);
  }
  if (group.valid == 0) return;
  if (a.has_statistics) {
    mean = a.batch_mean[c], var = a.batch_var[c];
  } else if (map.line() == 0) {
    a.batch_mean[c] = mean, a.batch_var[c] = var;
  }
  const double gain = static_cast<double>(a.weight[c]) / sqrt(static_cast<double>(var) + a.eps),
               bias = static_cast<double>(a.bias[c]) - gain * static_cast<double>(mean);
  for (int64_t n = map.line(); n < a.scale_rows; n += step) {
    const double factor = static_cast<double>(mask_of(a.pre_mask, n, c)) *
                          static_cast<double>(mask_of(a.post_mask, n, c));
    a.scale[n * a.channels + c] = static_cast<T>(gain * factor);
  }
  for (int64_t n = map.line(); n < a.shift_rows; n += step)
    a.shift[n * a.channels + c] =
        static_cast<T>(bias * static_cast<double>(mask_of(a.post_mask, n, c)));
}

}  // namespace

template <class T>
void fold_norm(const FoldNorm<T>& a, Context& context) {
  launch(context, fold_norm_kernel<T>, {narrow_blocks(a.channels)}, kMaxThreads,
         kMaxThreads * sizeof(double), a);
}

template void fold_norm<float>(const FoldNorm<float>&, Context&);
template void fold_norm<double>(const FoldNorm<double>&, Context&);

}  // namespace densenet_ext::cuda
