// Which instruction set the CPU kernels run with: the best that the processor has, or the one that
// LOSSOPS_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

namespace lossops::cpu {

enum class Isa { baseline, avx2, avx512 };

Isa active_isa();
std::string isa_name(Isa);
std::vector<std::string> available_isas();
void set_isa(const std::string& name); // throws std::invalid_argument for a name not available

} // namespace lossops::cpu
