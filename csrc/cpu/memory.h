// Large fresh buffers on the CPU.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lossops::cpu {

// Asks for 2 MiB pages under a fresh buffer, before anything touches it: first touches in 4 KiB
// pages cost more than the kernel that makes them. Only whole huge pages inside the buffer.
inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * page)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // advice: a failure changes nothing
#endif
}

} // namespace lossops::cpu
