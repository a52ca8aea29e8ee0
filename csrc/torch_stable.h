// Helpers over torch's stable ABI: checks that name the argument, new tensors, calls of ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace densenet_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;  // a view of sizes, which it does not own

inline std::string describe(Shape sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}
inline Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline bool is_storage_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}
// The type of statistics, parameters and gradients for feature maps of `type`.
inline ScalarType arithmetic_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Bool:
    case ScalarType::Byte:
      return 1;
    default:
      return 2;
  }
}

inline void check_shape(const char* name, const Tensor& t, Shape sizes) {
  STD_TORCH_CHECK(t.sizes().equals(sizes), name, " must have shape ", describe(sizes), ", got ",
                  describe(t.sizes()));
}
inline void check_type(const char* name, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have dtype ",
                  torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}
inline int32_t device_type_of(const Tensor& t) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}
inline void check_device(const char* name, const Tensor& t, const Tensor& other) {
  STD_TORCH_CHECK(device_type_of(t) == device_type_of(other) &&
                      t.get_device_index() == other.get_device_index(),
                  name, " must be on the device of the other arguments");
}
inline void check_contiguous(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// True if maps [N, C, H, W] lie in memory as [N, H, W, C] without gaps. The strides of dimensions
// of size 1 do not matter.
inline bool is_dense_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != stride) return t.numel() == 0;
    stride *= t.size(dim);
  }
  return true;
}

// Returns an address for a tensor of that many bytes while this thread rehearses (workspace.h),
// else null. The pointer is null in a library without workspaces.
inline void* (*rehearsed_address)(int64_t bytes) = nullptr;
inline void (*free_rehearsed)(void*) = nullptr;
inline bool (*thread_rehearses)() = nullptr;
inline bool rehearses() { return thread_rehearses && thread_rehearses(); }

// This function and `piece` bypass the dispatcher, which takes longer than all the rest of creating
// a tensor: the stages create hundreds a step.
inline Tensor empty_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides,
                            ScalarType type) {
  if (rehearsed_address) {
    int64_t last = 0, none = 0;
    for (size_t i = 0; i < sizes.size(); ++i)
      last += (sizes[i] - 1) * strides[i], none |= !sizes[i];
    void* const address = rehearsed_address(none ? 0 : (last + 1) * element_size(type));
    if (address)
      return torch::stable::from_blob(address, sizes, strides, like.device(), type, free_rehearsed);
  }
  using torch::stable::detail::from;
  AtenTensorHandle handle = nullptr;
  // With these arguments only a lack of memory can be the cause; torch's error text may be lost.
  STD_TORCH_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(from(type)), device_type_of(like),
                               like.get_device_index(), &handle) == 0,
      "out of memory: a tensor of shape ", describe(sizes), " and dtype ",
      torch::headeronly::toString(type), " could not be allocated");
  return Tensor(handle);
}
inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  return strides;
}
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return empty_strided(like, sizes, contiguous_strides(sizes), type);
}
// A contiguous view of a contiguous tensor's elements from `offset` on.
inline Tensor piece(const Tensor& t, int64_t offset, const Sizes& sizes) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     contiguous_strides(sizes).data(), offset, &handle));
  return Tensor(handle);
}

// The error text of the last failed call; torch has this function from 2.13 on.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

inline std::string reason_of_failure() {
  const char* const text = torch_exception_get_what_without_backtrace
                               ? torch_exception_get_what_without_backtrace()
                               : nullptr;
  return text ? text : "the reason is on the standard error stream";
}

// Calls a kernel operator of this library through the dispatcher, on the device of its tensors.
template <class... Arguments>
void call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack = {
      torch::stable::detail::from(arguments)...};
  STD_TORCH_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == 0, name,
                  " failed: ", reason_of_failure());
}

// Multiplies t by a tensor that broadcasts to it, in place.
inline void multiply(const Tensor& t, const Tensor& factor) {
  if (rehearses()) return;
  std::array<StableIValue, 2> stack = {torch::stable::detail::from(t),
                                       torch::stable::detail::from(factor)};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION) == 0,
      "aten::mul_ failed: ", reason_of_failure());
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result, which is t, and lets it go
}

}  // namespace densenet_ext
