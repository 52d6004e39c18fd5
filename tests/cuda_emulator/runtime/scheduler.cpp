// Runs a launch: cluster after cluster of blocks, each thread a fibre that runs until it waits for others.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "state.h"

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

State state;
Options options;
const Coordinates* current;

namespace {

#if defined(EMULATOR_ASAN)
constexpr size_t kStackBytes = 128 << 10; // red zones take room
#else
constexpr size_t kStackBytes = 32 << 10; // build.py refuses kernels with larger frames
#endif
// Tops of stacks a power of two apart would all fall into one set of the cache.
constexpr size_t kStackStride = kStackBytes + 320;

// Under TSan blocks that share a slot look ordered, one after the other: as many slots as its limit of about
// 8000 fibres allows.
constexpr size_t kTsanFibres = 6144;

Fibre launcher;
std::vector<Thread*> ready; // the next one is at the end, or anywhere in random order
uint64_t random_state;
char launched, finished; // TSan's sync objects
std::string failure;

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

Thread* next_ready() {
  if (ready.empty()) return nullptr;
  const size_t index = options.order == Order::random ? random_number() % ready.size() : ready.size() - 1;
  Thread* next = ready[index];
  ready[index] = ready.back();
  ready.pop_back();
  return next;
}

// To the next ready thread, or to the launcher where there is none.
void leave(Thread& from, bool ends) {
  Thread* next = failure.empty() ? next_ready() : nullptr;
  if (next == &from) return;
  state.running = next;
  current = next == nullptr ? nullptr : &next->at;
  switch_fibre(from.fibre, next == nullptr ? launcher : next->fibre, ends);
}

void thread_entry() {
  enter_fibre(launcher);
  Thread& self = *state.running;
  acquire(&launched);
  acquire(&self.block->ended);
  state.launch->kernel->body(state.launch->arguments);
  release(&finished);
  release(&self.block->ended);
  {
    const Quiet quiet;
    self.exited = true;
    leave_warp(self);
    leave_barriers(self);
  }
  leave(self, true);
  abort();
}

// Slots

char* map_memory(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("cuda_emulator: no memory for stacks");
  return static_cast<char*>(memory);
}

void drop_tsan_fibres() {
#if defined(EMULATOR_TSAN)
  for (auto& slot : state.slots) {
    for (auto& thread : slot->threads) {
      if (thread.fibre.tsan != nullptr) __tsan_destroy_fiber(thread.fibre.tsan);
      thread.fibre.tsan = nullptr;
    }
  }
#endif
}

size_t slots_for(size_t threads, size_t cluster) {
  const size_t wanted = kTsan ? std::max(cluster, kTsanFibres / threads / cluster * cluster) : cluster;
  static size_t last_threads = 0;
  if (threads != last_threads) drop_tsan_fibres();
  last_threads = threads;
  while (state.slots.size() < wanted) state.slots.push_back(std::make_unique<Block>());
  return wanted;
}

// Blocks

void place_threads(Block& block, const Launch& launch) {
  const Vector3 size = launch.block;
  Thread* thread = block.threads.data();
  for (unsigned z = 0; z < size.z; ++z) {
    for (unsigned y = 0; y < size.y; ++y) {
      for (unsigned x = 0; x < size.x; ++x, ++thread) {
        const auto index = static_cast<unsigned>(thread - block.threads.data());
        thread->at = {{x, y, z},
                      block.position,
                      size,
                      launch.grid,
                      index % kWarpSize,
                      index / kWarpSize,
                      block.rank,
                      launch.cluster_size,
                      launch.kernel->static_shared,
                      launch.dynamic_shared};
      }
    }
  }
}

void start_thread(Block& block, size_t index) {
  Thread& thread = block.threads[index];
  prepare_fibre(thread.fibre, block.stacks + index * kStackStride, kStackBytes, thread_entry);
#if defined(EMULATOR_TSAN)
  if (thread.fibre.tsan == nullptr) thread.fibre.tsan = __tsan_create_fiber(0);
#endif
  thread.block = &block;
  thread.wait = Wait::none;
  thread.exited = false;
  thread.syncs = 0;
  thread.fences.fenced = false;
  thread.fences.read.clear();
  thread.open_copies.clear();
  thread.copy_groups.clear();
}

void start_warps(Block& block) {
  const size_t threads = block.threads.size();
  block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  for (size_t first = 0; first < threads; first += kWarpSize) {
    Warp& warp = block.warps[first / kWarpSize];
    const size_t lanes = std::min<size_t>(kWarpSize, threads - first);
    warp.threads = &block.threads[first];
    warp.lanes = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    warp.waiting = warp.exited = 0;
  }
}

void start_block(Block& block, size_t index, unsigned rank) {
  const Launch& launch = *state.launch;
  const Vector3 grid = launch.grid;
  block.position = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y)};
  block.rank = rank;
  block.threads.resize(size_t(launch.block.x) * launch.block.y * launch.block.z);
  block.alive = static_cast<unsigned>(block.threads.size());
  block.arrived = block.barriers = 0;
  reset_shared(block);
  start_warps(block);
  place_threads(block, launch);
  for (size_t i = 0; i < block.threads.size(); ++i) start_thread(block, i);
}

std::vector<size_t> order_of_clusters(size_t count) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = options.order == Order::descending ? count - 1 - i : i;
  if (options.order == Order::random) {
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  }
  return order;
}

// Running

void run_until_all_wait() {
  release(&launched);
  while (Thread* next = next_ready()) {
    state.running = next;
    current = &next->at;
    switch_fibre(launcher, next->fibre, false);
    state.running = nullptr;
    current = nullptr;
    if (!failure.empty()) throw std::runtime_error(failure);
  }
}

void run_cluster(size_t index, size_t slots) {
  const unsigned size = state.launch->cluster_size;
  state.cluster.clear();
  for (unsigned rank = 0; rank < size; ++rank) {
    const size_t block_index = index * size + rank;
    Block& block = *state.slots[block_index % slots];
    start_block(block, block_index, rank);
    state.cluster.push_back(&block);
  }
  state.cluster_alive = size * state.cluster[0]->alive;
  state.cluster_arrived = state.cluster_barriers = 0;
  ready.clear();
  std::vector<Thread*> threads;
  for (Block* block : state.cluster) {
    for (Thread& thread : block->threads) threads.push_back(&thread);
  }
  make_ready(threads.data(), threads.size());
  run_until_all_wait();
  check_deadlock();
  finish_requests();
}

void run_all(const Launch& launch) {
  const size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
  const size_t blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const size_t slots = slots_for(threads, launch.cluster_size);
  for (const size_t index : order_of_clusters(blocks / launch.cluster_size)) run_cluster(index, slots);
}

} // namespace

Block::Block()
    : stacks(map_memory(kMaxThreads * kStackStride)),
      shared(map_memory(kSharedBytes)),
      shared_state(reinterpret_cast<SharedByte*>(map_memory(kSharedBytes))),
      shared_used(kSharedBytes) {}

Block::~Block() {
  munmap(stacks, kMaxThreads * kStackStride);
  munmap(shared, kSharedBytes);
  munmap(shared_state, kSharedBytes);
}

void make_ready(Thread* const* threads, size_t count) {
  if (options.order == Order::descending) {
    ready.insert(ready.end(), threads, threads + count);
  } else {
    for (size_t i = count; i-- > 0;) ready.push_back(threads[i]);
  }
}

void wait_for_turn() {
  leave(*state.running, false);
}

void yield() {
  const Quiet quiet;
  ready.insert(ready.begin(), state.running);
  wait_for_turn();
}

void stop_launch(std::string message) {
  if (state.running == nullptr) throw std::runtime_error(message);
  // Not thrown here: the stack of a fibre has no frames to unwind to.
  failure.swap(message);
  leave(*state.running, true);
  abort();
}

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Quiet quiet;
  state.launch = &launch;
  launcher = {};
#if defined(EMULATOR_TSAN)
  launcher.tsan = __tsan_get_current_fiber();
#endif
#if defined(EMULATOR_ASAN)
  __asan_set_error_report_callback(print_where_it_runs);
#endif
  failure.clear();
  random_state = options.seed * 0x9e3779b97f4a7c15 + 0x1234567;
  reset_order();
  try {
    run_all(launch);
  } catch (...) {
    // Threads have stopped anywhere. TSan's fibres are left: to destroy one whose accesses are being
    // ignored is an error to it.
    state.slots.clear();
    state.launch = nullptr;
    finish_requests();
    throw;
  }
  state.launch = nullptr;
  acquire(&finished);
}

} // namespace emulator
