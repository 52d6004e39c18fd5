// What went wrong, in words: where the program is, and what its threads wait for.
#include <cxxabi.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "state.h"

namespace emulator {

std::string demangled(const char* name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? readable : name;
  free(readable);
  return result;
}

namespace {

std::string place(Vector3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string source_of(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string where_it_waits(const Thread& thread) {
  if (thread.exited) return "have exited";
  if (thread.wait == Wait::warp) {
    char mask[16];
    snprintf(mask, sizeof mask, "%08x", thread.request.mask);
    return std::string("of warp ") + std::to_string(thread.at.warp) + " wait in " +
           describe(thread.request.kind) + " with mask " + mask + " at " + source_of(*thread.site);
  }
  const char* barrier = thread.wait == Wait::cluster_barrier ? "a cluster barrier" : "__syncthreads()";
  return std::string("wait in ") + barrier + " at " + source_of(*thread.site);
}

// The kernel, and the thread where one runs.
std::string where_it_runs() {
  std::string text = "kernel " + demangled(state.launch->kernel->name);
  if (state.running == nullptr) return text;
  const Coordinates& at = state.running->at;
  return text + ", block " + place(at.block) + ", thread " + place(at.thread);
}

} // namespace

void check_deadlock() {
  bool waiting = false;
  std::map<std::string, int> groups;
  for (const Block* block : state.cluster) {
    for (const Thread& thread : block->threads) {
      waiting = waiting || !thread.exited;
      if (block->alive > 0) ++groups["block " + place(block->position) + " " + where_it_waits(thread)];
    }
  }
  if (!waiting) return;
  std::string all = "deadlock";
  for (const auto& [group, threads] : groups)
    all += "\n  " + std::to_string(threads) + " threads of " + group;
  fail(nullptr, "%s", all.c_str());
}

void fail(const Site* site, const char* format, ...) {
  const Quiet quiet;
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string message = std::string("cuda_emulator: ") + text;
  if (site != nullptr) message += std::string("\n  at ") + source_of(*site) + ", `" + site->instruction + "`";
  if (state.launch != nullptr) message += "\n  " + where_it_runs();
  stop_launch(std::move(message));
}

void print_where_it_runs(const char*) {
  if (state.launch != nullptr) fprintf(stderr, "cuda_emulator: in %s\n", where_it_runs().c_str());
}

} // namespace emulator

#if defined(EMULATOR_TSAN)
// TSan calls it after each of its reports.
extern "C" __attribute__((visibility("default"))) void __tsan_on_report(void*) {
  const emulator::Quiet quiet;
  emulator::print_where_it_runs(nullptr);
}
#endif
