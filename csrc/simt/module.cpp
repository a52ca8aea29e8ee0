// The Python module densenet_ext._C of the library whose kernels run on the simulated device.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "simt/host.h"
#include "stage/workspace.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = DENSENET_EXT_VERSION;
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["simulated"] = true;
  info["instruction_sets"] = py::make_tuple("simulated");
  info["cuda"] = false;
  info["cuda_architectures"] = py::tuple();
  info["torch_target"] = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["torch_built_with"] = DENSENET_EXT_TORCH;
  info["sanitizers"] = DENSENET_EXT_SANITIZERS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return "simulated"; });
  m.def("parallel_threads", [] { return 1; });  // the simulator runs one launch at a time
  m.def("workspace_use", [] {
    const densenet_ext::WorkspaceUse use = densenet_ext::workspace_use();
    return py::make_tuple(use.in_use, use.resident);
  });
  m.def("release_workspaces", &densenet_ext::release_workspaces);
  m.def("set_workspace_limit", &densenet_ext::set_workspace_limit);
  m.def("start_rehearsal", [] {
    densenet_ext::start_rehearsal();
    simt::skips_launches = true;
  });
  m.def("stop_rehearsal", [] {
    simt::skips_launches = false;
    densenet_ext::stop_rehearsal();
  });
  m.def("rehearsal_use", [] {
    const densenet_ext::RehearsalUse use = densenet_ext::rehearsal_use();
    return py::make_tuple(use.tensors, use.most_tensors, use.most_in_all, use.occupied);
  });
}
