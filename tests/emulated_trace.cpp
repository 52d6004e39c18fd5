// The record of lossops.explain() in the emulated library, which has one of its own, for ctypes.
#include <string>

#include "../csrc/trace.h"

extern "C" __attribute__((visibility("default"))) void emulated_start_trace() {
  lossops::start_trace();
}

// A line for each entry, its parts between tabs; valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* emulated_stop_trace() {
  static std::string text;
  text.clear();
  for (const auto& e : lossops::stop_trace())
    text += e.what + '\t' + e.how + '\t' + e.device + '\t' + std::to_string(e.amount) + '\n';
  return text.c_str();
}
