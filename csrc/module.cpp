// The module lossops._C: what was built, which kernels run, and a short way into them.
#undef TORCH_TARGET_VERSION // under which torch 2.10 to 2.12 refuse their own copy of pybind11

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "direct.h"
#include "product.h"
#include "trace.h"
#ifdef LOSSOPS_CUDA
#include "cuda/runtime.h"
#endif

#ifndef LOSSOPS_VERSION
#error "LOSSOPS_VERSION is set by setup.py"
#endif

namespace lossops {
namespace {

// (toolkit, architectures), or None where CUDA is not built in.
std::optional<std::pair<std::string, std::string>> cuda_build_info() {
#ifdef LOSSOPS_CUDA
  const cuda::BuildInfo info = cuda::build_info();
  return std::pair(std::string(info.toolkit), std::string(info.architectures));
#else
  return std::nullopt;
#endif
}

// (what, how, device, amount) of every entry; see trace.h.
std::vector<std::tuple<std::string, std::string, std::string, int64_t>> trace_entries() {
  std::vector<std::tuple<std::string, std::string, std::string, int64_t>> entries;
  for (const TraceEntry& e : stop_trace()) entries.emplace_back(e.what, e.how, e.device, e.amount);
  return entries;
}

} // namespace
} // namespace lossops

PYBIND11_MODULE(_C, m) {
  using namespace lossops;
  using namespace lossops::cpu;
  m.attr("__version__") = LOSSOPS_VERSION;
  m.def(
      "cpu_isa", [] { return isa_name(active_isa()); }, "The instruction set that the CPU kernels run with.");
  m.def("set_cpu_isa", &set_isa, "Chooses one of available_cpu_isas() for all later calls.");
  m.def("available_cpu_isas", &available_isas,
        "The instruction sets built in that this processor has, best first.");
  m.def("start_trace", &start_trace, "Records launches and copies from now on, for lossops.explain.");
  m.def("stop_trace", &trace_entries, "What was recorded: (what, how, device, amount) each.");
  m.def("empty_cache", &release_pages, "Returns the pages kept for gradients to the system.");
  m.def("drop_pages", &drop_pages, "Gives the whole pages among these bytes back to the system.");
  m.def("set_stream_bytes", &set_stream_bytes,
        "Gradients of this size and more are written past the caches; returns what it was. For tests.");
  m.def("multiplies_faster", &multiplies_faster,
        "Whether products of float32 and float64 are faster by the op multiply_ than by torch.");
  m.def("cuda_build_info", &cuda_build_info, "The CUDA toolkit and architectures built in, or None.");
  define_direct(m);
}
