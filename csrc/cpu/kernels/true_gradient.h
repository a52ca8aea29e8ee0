// Reads the gradient of the channels of a stage.
#pragma once

#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Computes the true gradient of channel c of sample n, coef0*G + coef1 + coef2*x, a vector of
// pixels at a time. The arguments have `features`, `grad` and `coef`.
template <class S, class T = Arithmetic<S>>
class TrueGradient {
 public:
  template <class Arguments>
  TrueGradient(const Arguments& a, int64_t n, int64_t c)
      : c0_(broadcast(a.coef.at(0, n, c))),
        c1_(broadcast(a.coef.at(1, n, c))),
        c2_(broadcast(a.coef.at(2, n, c))),
        g_(a.grad.plane(n, c)),
        x_(a.features.plane(n, c)) {}

  // Returns it at the pixels from p on, of which `remaining` exist.
  DX_INLINE Vec<T> operator()(int64_t p, int64_t remaining) const {
    return c0_ * load_first(g_ + p, remaining) + (c1_ + c2_ * load_first(x_ + p, remaining));
  }

 private:
  Vec<T> c0_, c1_, c2_;
  const T* g_;
  const S* x_;
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
