// Shared memory, one window a block, with the state of every byte; and errors of addresses.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {
namespace {

constexpr uint64_t kOffsetMask = (1u << kWindowBits) - 1;

Block& own_block() {
  return *state.running->block;
}

Block& block_of_window(const Site* site, uint64_t window_address) {
  const uint64_t rank_and_one = window_address >> kWindowBits;
  if (rank_and_one == 0) return own_block();
  if (rank_and_one > state.cluster.size()) {
    fail(site, "out of bounds in shared memory: address %#llx",
         static_cast<unsigned long long>(window_address));
  }
  return *state.cluster[rank_and_one - 1];
}

void open(Block& block, unsigned offset, unsigned bytes) {
  std::fill_n(block.shared_state + offset, bytes, SharedByte::unwritten);
  block.shared_used = std::max(block.shared_used, offset + bytes);
}

bool any(const SharedByte* bytes, unsigned count, SharedByte wanted) {
  return std::find(bytes, bytes + count, wanted) != bytes + count;
}

[[noreturn]] void fail_outside(const Site& site, uint64_t offset, unsigned bytes) {
  const Kernel& kernel = *state.launch->kernel;
  std::string before = "dynamic shared memory";
  uint64_t start = kernel.dynamic_offset;
  for (unsigned i = 0; i < kernel.shared_count && (i == 0 || kernel.shared[i].offset <= offset); ++i) {
    if (offset >= kernel.dynamic_offset && state.launch->dynamic_shared > 0) break;
    before = demangled(kernel.shared[i].name);
    start = kernel.shared[i].offset;
  }
  fail(&site, "out of bounds in shared memory: %u bytes at offset %llu of %s", bytes,
       static_cast<unsigned long long>(offset - start), before.c_str());
}

} // namespace

void reset_shared(Block& block) {
  // All ones is NaN in every floating-point type.
  memset(block.shared, 0xff, block.shared_used);
  memset(block.shared_state, 0, block.shared_used);
  block.shared_used = 0;
  const Launch& launch = *state.launch;
  for (unsigned i = 0; i < launch.kernel->shared_count; ++i) {
    open(block, launch.kernel->shared[i].offset, launch.kernel->shared[i].bytes);
  }
  open(block, launch.kernel->dynamic_offset, launch.dynamic_shared);
}

void forget_shared(Block& block) {
  std::fill_n(block.shared_state, block.shared_used, SharedByte::outside);
}

char* shared_address(Site& site, uint64_t window_address, unsigned bytes, Access access) {
  const Quiet quiet;
  Block& block = block_of_window(&site, window_address);
  const uint64_t offset = window_address & kOffsetMask;
  if (offset % bytes != 0) fail_address(site, offset, bytes);
  SharedByte* bytes_state = block.shared_state + offset;
  if (offset + bytes > kSharedBytes || any(bytes_state, bytes, SharedByte::outside)) {
    fail_outside(site, offset, bytes);
  }
  if (access != Access::store && options.check_unwritten && any(bytes_state, bytes, SharedByte::unwritten)) {
    fail(&site, "reads shared memory that nothing has written");
  }
  if (access != Access::load) std::fill_n(bytes_state, bytes, SharedByte::written);
  count_shared(site, offset, bytes, access);
  return block.shared + offset;
}

char* generic_address(Site& site, uint64_t address, unsigned bytes, Access access) {
  for (const Block* block : state.cluster) {
    const uint64_t offset = address - reinterpret_cast<uint64_t>(block->shared);
    if (offset >= kSharedBytes) continue;
    return shared_address(site, offset | uint64_t(block->rank + 1) << kWindowBits, bytes, access);
  }
  if (address % bytes != 0 || address < 4096) fail_address(site, address, bytes);
  count_global(site, address, bytes, access);
  return reinterpret_cast<char*>(address);
}

void fail_address(const Site& site, uint64_t address, unsigned bytes) {
  if (address % bytes != 0) {
    fail(&site, "misaligned address: %u bytes at %#llx", bytes, static_cast<unsigned long long>(address));
  }
  fail(&site, "null pointer: %u bytes at %#llx", bytes, static_cast<unsigned long long>(address));
}

uint64_t shared_to_generic(uint64_t window_address) {
  return reinterpret_cast<uint64_t>(block_of_window(nullptr, window_address).shared) +
         (window_address & kOffsetMask);
}

uint64_t generic_to_shared(uint64_t address) {
  for (const Block* block : state.cluster) {
    const uint64_t offset = address - reinterpret_cast<uint64_t>(block->shared);
    if (offset >= kSharedBytes) continue;
    return block == &own_block() ? offset : offset | uint64_t(block->rank + 1) << kWindowBits;
  }
  fail(nullptr, "a generic address that is not in shared memory is used as one that is");
}

uint64_t map_to_rank(uint64_t generic_address, unsigned rank) {
  const uint64_t offset = generic_to_shared(generic_address) & kOffsetMask;
  return shared_to_generic(offset | uint64_t(rank + 1) << kWindowBits);
}

// cp.async

void async_copy(const AsyncCopy& copy) {
  const Quiet quiet;
  state.running->open_copies.push_back(copy);
}

void async_commit() {
  const Quiet quiet;
  Thread& self = *state.running;
  self.copy_groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

bool async_complete(unsigned allowed, AsyncCopy& copy) {
  const Quiet quiet;
  auto& groups = state.running->copy_groups;
  while (groups.size() > allowed) {
    auto& oldest = groups.front();
    if (!oldest.empty()) {
      copy = oldest.back();
      oldest.pop_back();
      return true;
    }
    groups.erase(groups.begin());
  }
  return false;
}

} // namespace emulator
