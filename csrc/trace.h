// What lossops.explain() records: the kernels that a call launched, and what it had to copy for them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lossops {

struct TraceEntry {
  std::string what;   // the kernel, or what was copied
  std::string how;    // the way through the memory, or why
  std::string device; // the CPU's instruction set, cuda, or "copy"
  int64_t amount;     // threads that have work at most, blocks of a GPU, or bytes copied
};

bool tracing();
void start_trace();
std::vector<TraceEntry> stop_trace();
void record(TraceEntry);

} // namespace lossops
