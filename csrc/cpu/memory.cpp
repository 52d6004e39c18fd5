#include "memory.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lossops::cpu {
namespace {

std::atomic<int64_t> streamed_from{4 * kHugePage};

} // namespace

int64_t stream_bytes() {
  return streamed_from.load(std::memory_order_relaxed);
}

int64_t set_stream_bytes(int64_t bytes) {
  return streamed_from.exchange(bytes, std::memory_order_relaxed);
}

void use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLargeBytes) return;
  constexpr auto page = static_cast<uintptr_t>(kHugePage); // only whole ones inside the buffer
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // advice: a failure changes nothing
#endif
}

void drop_pages(uintptr_t begin, int64_t bytes) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED); // or they stay
#endif
}

#if defined(__linux__) && defined(MADV_FREE) && !defined(__SANITIZE_ADDRESS__) // which guards malloc's alone

namespace {

int64_t rounded(int64_t bytes) {
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

Pages map(int64_t bytes) {
  // A huge page more, to cut an aligned block out of.
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  char* const begin = static_cast<char*>(mapped);
  char* const aligned = reinterpret_cast<char*>(rounded(reinterpret_cast<intptr_t>(begin)));
  if (aligned != begin) munmap(begin, aligned - begin);
  munmap(aligned + bytes, begin + kHugePage - aligned);
  use_huge_pages(aligned, bytes);
  return {aligned, bytes};
}

void unmap(Pages block) {
  if (block.data != nullptr) munmap(block.data, block.bytes);
}

// Never waits: a thread that finds the cache taken goes on as if it were empty, so that a fork in the middle
// of a call leaves no lock behind that anybody waits for.
class Cache {
 public:
  // The smallest block that is large enough; or none.
  Pages take(int64_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    Pages* best = nullptr;
    for (Pages& block : lock ? blocks_ : none_)
      if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) best = &block;
    return best == nullptr ? Pages{} : std::exchange(*best, Pages{});
  }
  // Keeps the block in the place of the smallest one, and returns what was there.
  Pages exchange(Pages block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return block;
    Pages* smallest = &blocks_[0];
    for (Pages& kept : blocks_)
      if (kept.bytes < smallest->bytes) smallest = &kept;
    return smallest->bytes > block.bytes ? block : std::exchange(*smallest, block);
  }

 private:
  using Blocks = std::array<Pages, 2>; // gradients of logits and of probabilities, or of two losses
  std::mutex mutex_;
  Blocks blocks_, none_;
};

// Never destroyed: a tensor may outlive what is.
Cache& cache() {
  static Cache* const cache = new Cache;
  return *cache;
}

bool keeps_pages() {
  static const bool keeps = [] {
    const char* value = std::getenv("LOSSOPS_KEEP_PAGES");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return keeps;
}

} // namespace

Pages take_pages(int64_t bytes) {
  if (!keeps_pages()) return {};
  const Pages kept = cache().take(bytes);
  return kept.data != nullptr ? kept : map(rounded(bytes));
}

void give_pages(Pages block) {
  const bool free = madvise(block.data, block.bytes, MADV_FREE) == 0; // else an old Linux
  unmap(free ? cache().exchange(block) : block);
}

void release_pages() {
  for (Pages block = cache().take(1); block.data != nullptr; block = cache().take(1)) unmap(block);
}

#else

Pages take_pages(int64_t) {
  return {};
}
void give_pages(Pages) {}
void release_pages() {}

#endif

} // namespace lossops::cpu
