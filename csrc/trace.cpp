#include "trace.h"

#include <atomic>
#include <mutex>
#include <utility>

namespace lossops {
namespace {

std::atomic<bool> active{false};
std::mutex mutex; // a backward may run in a thread of autograd's
std::vector<TraceEntry> entries;

} // namespace

bool tracing() {
  return active.load(std::memory_order_relaxed);
}

void start_trace() {
  const std::lock_guard lock(mutex);
  entries.clear();
  active = true;
}

std::vector<TraceEntry> stop_trace() {
  const std::lock_guard lock(mutex);
  active = false;
  return std::exchange(entries, {});
}

void record(TraceEntry entry) {
  const std::lock_guard lock(mutex);
  entries.push_back(std::move(entry));
}

} // namespace lossops
