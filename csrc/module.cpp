// The Python module densenet_ext._C reports how the library was built and what it uses. The ops are
// not in the module: ops.cpp registers them with torch.
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "cpu/dispatch.h"
#include "stage/memory_limit.h"
#include "stage/workspace.h"

// If pybind11 is not installed, torch's copy serves. Its headers refuse to be included by users of
// the stable ABI; in this file alone they may be, because it uses nothing else of torch's C++ API.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

namespace py = pybind11;

namespace densenet_ext {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = DENSENET_EXT_VERSION;
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["instruction_sets"] = py::make_tuple(DENSENET_EXT_INSTRUCTION_SETS);
  // The following describe densenet_ext/_cuda, which is built together with this library.
  const std::string cuda_version = DENSENET_EXT_CUDA_VERSION;
  info["cuda"] = !cuda_version.empty();
  info["cuda_version"] = cuda_version;
  info["cuda_architectures"] = py::make_tuple(DENSENET_EXT_CUDA_ARCHITECTURES);
  info["cuda_missing"] = DENSENET_EXT_CUDA_MISSING;  // why there are none
  info["simulated"] = false;
  info["torch_target"] = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["torch_built_with"] = DENSENET_EXT_TORCH;
  info["sanitizers"] = DENSENET_EXT_SANITIZERS;
  return info;
}

// Counts the threads that take part when torch runs a loop in parallel.
size_t parallel_threads() {
  py::gil_scoped_release release;
  std::mutex mutex;
  std::set<std::thread::id> seen;
  torch::stable::parallel_for(0, 1024, 1, [&](int64_t, int64_t) {
    // Each item takes long enough for every thread to get some.
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
    while (std::chrono::steady_clock::now() < end) {
    }
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return seen.size();
}

}  // namespace
}  // namespace densenet_ext

PYBIND11_MODULE(_C, m) {
  densenet_ext::cpu_capability();  // fails the import if DENSENET_EXT_CPU_CAPABILITY cannot be met
  m.def("build_info", &densenet_ext::build_info, "How this library was built.");
  m.def("cpu_capability", &densenet_ext::cpu_capability,
        "The instruction set of the CPU kernels in use.");
  m.def("parallel_threads", &densenet_ext::parallel_threads,
        "The number of threads that run torch's parallel loops.");
  m.def(
      "workspace_use",
      [] {
        const densenet_ext::WorkspaceUse use = densenet_ext::workspace_use();
        return py::make_tuple(use.in_use, use.resident);
      },
      "Bytes of workspaces that tensors hold, and bytes of memory that they occupy.");
  m.def("release_workspaces", &densenet_ext::release_workspaces,
        "Gives the memory of workspaces that no tensor holds back to the system.");
  m.def("set_workspace_limit", &densenet_ext::set_workspace_limit,
        "Limits how many bytes may stay occupied without being held.");
  m.def("start_rehearsal", &densenet_ext::start_rehearsal,
        "From now on ops on this thread compute nothing and take no memory, but count it.");
  m.def("stop_rehearsal", &densenet_ext::stop_rehearsal, "Ends what start_rehearsal began.");
  m.def(
      "rehearsal_use",
      [] {
        const densenet_ext::RehearsalUse use = densenet_ext::rehearsal_use();
        return py::make_tuple(use.tensors, use.most_tensors, use.most_in_all, use.occupied);
      },
      "Bytes of tensors now; the most since the last call; the most with held workspaces; bytes "
      "that "
      "workspaces occupy.");
  m.def("memory_limit", &densenet_ext::memory_limit, py::arg("root"), py::arg("most"),
        "The memory that control groups leave to this process, `most` at most.");
}
