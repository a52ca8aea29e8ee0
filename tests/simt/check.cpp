// The test kernels for ctypes. Every function returns the text of the findings, empty if none.
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "faults.h"
#include "simt/convert.h"
#include "simt/host.h"
#include "simt/regions.h"

namespace simt_test {
namespace {

class HostContext final : public densenet_ext::cuda::Context {
  void* allocate(int64_t) override { return nullptr; }
};

std::string message;

// Runs `body` as an operator, between begin_operator and end_operator.
template <class F>
const char* caught(const F& body) {
  message.clear();
  simt::begin_operator();
  try {
    body(HostContext());
  } catch (const std::exception& error) {
    message = error.what();
  }
  simt::end_operator();
  return message.c_str();
}

template <class E>
E* registered(const char* name, E* data, int64_t count) {
  simt::region(name, data, count * static_cast<int64_t>(sizeof(E)), !std::is_const_v<E>);
  return data;
}

// The arrays lie apart, with bytes between them that belong to no region.
struct Memory {
  alignas(16) float input[kInputs];
  alignas(16) float output[kOutputs];
  float gap[16];
  alignas(16) float scratch[kOutputs];
  float another_gap[16];
  unsigned ticket;
};

}  // namespace
}  // namespace simt_test

using namespace simt_test;
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fault_count() { return kFaultCount; }
EXPORT const char* fault_name(int i) { return kFaults[i].name; }

EXPORT const char* run_fault(int i, bool planted, uint64_t seed) {
  static Memory memory;
  memory = {};
  simt::set_seed(seed);
  return caught([&](const HostContext& context) {
    const float* const input = memory.input;
    Buffers b = {registered("input", input, kInputs), registered("output", memory.output, kOutputs),
                 memory.scratch, registered("ticket", &memory.ticket, 1)};
    simt::scratch(memory.scratch, sizeof memory.scratch);
    kFaults[i].run(b, context, planted);
  });
}

EXPORT const char* run_mma(const uint32_t* a, const uint32_t* b, float* c, int type) {
  return caught([&](const HostContext& context) {
    simt_test::run_mma(
        {registered("a", a, 128), registered("b", b, 64), registered("c", c, 128), type}, context);
  });
}
EXPORT const char* run_ldmatrix(const uint32_t* shared, uint32_t* r, bool transposed) {
  return caught([&](const HostContext& context) {
    simt_test::run_ldmatrix(
        {registered("shared", shared, 128), registered("r", r, 128), transposed}, context);
  });
}
EXPORT const char* run_shuffles(uint32_t* out) {
  return caught([&](const HostContext& context) {
    simt_test::run_shuffles(registered("out", out, 128), context);
  });
}

EXPORT void to_bfloat16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = simt::to_bfloat16(from[i]);
}
EXPORT void to_float16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = simt::to_float16(from[i]);
}
EXPORT void from_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = simt::from_bfloat16(from[i]);
}
EXPORT void from_float16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = simt::from_float16(from[i]);
}
EXPORT void round_tf32(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = simt::round_tf32(from[i]);
}
