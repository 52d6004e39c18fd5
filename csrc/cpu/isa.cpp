#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "foreach_isa.h"

namespace lossops::cpu {
namespace {

bool supported(Isa isa) {
#if LOSSOPS_X86_KERNELS
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512)
    return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::baseline;
}

constexpr Isa kBestFirst[] = {Isa::avx512, Isa::avx2, Isa::baseline};

Isa named(const std::string& name) {
  std::string choices;
  for (const Isa isa : kBestFirst) {
    if (!supported(isa)) continue;
    if (isa_name(isa) == name) return isa;
    choices += (choices.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("lossops: expected the CPU instruction set to be one of " + choices + ", got " +
                              name);
}

Isa initial() {
  const char* name = std::getenv("LOSSOPS_CPU_ISA");
  if (name != nullptr && *name != '\0') return named(name);
  for (const Isa isa : kBestFirst)
    if (supported(isa)) return isa;
  return Isa::baseline;
}

// In a function, so that a bad LOSSOPS_CPU_ISA throws at the first use and not while loading.
std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

} // namespace

Isa active_isa() {
  return chosen().load(std::memory_order_relaxed);
}

std::string isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kBestFirst)
    if (supported(isa)) names.push_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  chosen().store(named(name), std::memory_order_relaxed);
}

} // namespace lossops::cpu
