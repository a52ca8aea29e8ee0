// Per-channel values whose rows are padded with zeros to whole groups of lanes, so that vectors
// load them without regard to the width.
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
      : pitch_(values.sample_stride ? round_up(width, kLanes) : 0),
        memory_(sizeof(T) * (values.sample_stride ? samples : 1) * round_up(width, kLanes)),
        is_null_(values.data == nullptr) {
    if (is_null_) return;
    T* out = memory_.template as<T>();
    for (int64_t n = 0; n < (pitch_ ? samples : 1); ++n) {
      out = std::copy_n(values.row(n), width, out);
      out = std::fill_n(out, round_up(width, kLanes) - width, T(0));
    }
  }

  PerChannel<T> values() const { return {is_null_ ? nullptr : memory_.template as<T>(), pitch_}; }

 private:
  int64_t pitch_;  // 0 if all samples share a row
  Scratch memory_;
  bool is_null_;
};

// Likewise for scale and shift.
template <class T>
class PaddedScaleShift {
 public:
  PaddedScaleShift(const ScaleShiftTable<T>& table, int64_t samples, int64_t width)
      : scale_(table.scale, samples, width), shift_(table.shift, samples, width) {}

  ScaleShiftTable<T> values() const { return {scale_.values(), shift_.values()}; }

 private:
  PaddedRows<T> scale_, shift_;
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
