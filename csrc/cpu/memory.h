// Large fresh buffers on the CPU: huge pages, and a few blocks kept for the next step.
//
// A gradient of the logits' size is made and given back in every step of a training. Were it mapped anew each
// time, the kernel of the operating system would have to clear its pages, which takes longer than the kernel
// that fills them. Blocks that are kept are marked as free (MADV_FREE): where memory runs short, the system
// takes their pages without asking, and the block is as good as new.
#pragma once

#include <cstdint>

namespace lossops::cpu {

constexpr int64_t kHugePage = int64_t{1} << 21;

// From here on a buffer is worth pages of its own; below, malloc keeps its memory anyway.
constexpr int64_t kLargeBytes = 2 * kHugePage;

struct Pages {
  void* data = nullptr; // aligned to a huge page
  int64_t bytes = 0;
};

// At least this many bytes, of any content, for give_pages(). Null where there are none to be had so: then
// the caller takes what torch's allocator gives.
Pages take_pages(int64_t bytes);
void give_pages(Pages);

// Returns kept blocks to the system.
void release_pages();

// Gradients of this size and more are written past the caches. Set by tests; returns what it was.
int64_t stream_bytes();
int64_t set_stream_bytes(int64_t);

// Gives the whole pages among these bytes back to the system, zeros from now on, while the block they are of
// stays its owner's.
void drop_pages(uintptr_t begin, int64_t bytes);

// Asks for huge pages under a buffer that nothing has touched yet.
void use_huge_pages(void* data, int64_t bytes);

} // namespace lossops::cpu
