// Calls of the kernel operators, through the dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>

#include "torch_stable.h"

namespace densenet_ext {

using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

// What the last failed call said; torch has this from 2.13 on.
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

}  // namespace densenet_ext
