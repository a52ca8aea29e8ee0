// Pads the rows of per-channel values with zeros to whole groups of lanes, so that vectors load
// them without regard to the width.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

template <class T>
class PaddedRows {
 public:
  PaddedRows(const PerChannel<T>& values, int64_t samples, int64_t width)
      : rows_(values.sample_stride ? samples : 1),
        pitch_(round_up(width, kLanes)),
        memory_(sizeof(T) * rows_ * pitch_),
        padded_{values.data ? memory_.template as<T>() : nullptr,
                values.sample_stride ? pitch_ : 0} {
    for (int64_t n = 0; n < rows_ && values.data; ++n) {
      T* const row = memory_.template as<T>() + n * pitch_;
      std::fill_n(std::copy_n(values.row(n), width, row), pitch_ - width, T(0));
    }
  }
  operator PerChannel<T>() const { return padded_; }

 private:
  int64_t rows_, pitch_;
  Scratch memory_;
  PerChannel<T> padded_;
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
