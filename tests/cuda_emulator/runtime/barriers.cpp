// __syncthreads and the barrier of a cluster.
#include <cstring>

#include "state.h"

namespace emulator {
namespace {

std::vector<Thread*> woken;

bool same_line(const Site& a, const Site& b) {
  return a.line == b.line && strcmp(a.file, b.file) == 0;
}

void release_block(Block& block) {
  woken.clear();
  const Site* met = nullptr;
  for (Thread& thread : block.threads) {
    if (thread.wait != Wait::block_barrier) continue;
    if (met != nullptr && !same_line(*met, *thread.site)) {
      fail(met, "threads of a block meet at different __syncthreads(): another is at %s:%d",
           thread.site->file, thread.site->line);
    }
    met = thread.site;
    thread.wait = Wait::none;
    woken.push_back(&thread);
  }
  if (woken.size() != block.threads.size()) {
    fail(met, "__syncthreads() after %zu of %zu threads have exited", block.threads.size() - woken.size(),
         block.threads.size());
  }
  block.arrived = 0;
  ++block.barriers;
  make_ready(woken.data(), woken.size());
}

void release_cluster() {
  woken.clear();
  for (Block* block : state.cluster) {
    for (Thread& thread : block->threads) {
      if (thread.wait != Wait::cluster_barrier) continue;
      thread.wait = Wait::none;
      woken.push_back(&thread);
    }
  }
  state.cluster_arrived = 0;
  ++state.cluster_barriers;
  make_ready(woken.data(), woken.size());
}

} // namespace

void block_barrier(const Site& site) {
  const Quiet quiet;
  Thread& self = *state.running;
  Block& block = *self.block;
  // Two objects in turn: a thread may arrive at the next barrier before another has left this one.
  char* met = &block.met[block.barriers % 2];
  release(met);
  self.wait = Wait::block_barrier;
  self.site = &site;
  if (++block.arrived == block.alive) release_block(block);
  wait_for_turn();
  acquire(met);
}

unsigned block_barrier_count(const Site& site, bool predicate) {
  const Quiet quiet;
  Thread& self = *state.running;
  self.predicate = predicate;
  block_barrier(site);
  unsigned count = 0;
  for (const Thread& thread : self.block->threads) count += thread.predicate;
  block_barrier(site);
  return count;
}

void cluster_barrier(const Site& site) {
  const Quiet quiet;
  Thread& self = *state.running;
  char* met = &state.cluster_met[state.cluster_barriers % 2];
  release(met);
  self.wait = Wait::cluster_barrier;
  self.site = &site;
  if (++state.cluster_arrived == state.cluster_alive) release_cluster();
  wait_for_turn();
  acquire(met);
}

// A thread that has exited counts as arrived.
void leave_barriers(Thread& exited) {
  Block& block = *exited.block;
  --block.alive;
  --state.cluster_alive;
  if (block.alive > 0 && block.arrived == block.alive) release_block(block);
  if (state.cluster_alive > 0 && state.cluster_arrived == state.cluster_alive) release_cluster();
  if (block.alive == 0 && exited.at.cluster_size > 1) forget_shared(block);
}

} // namespace emulator
