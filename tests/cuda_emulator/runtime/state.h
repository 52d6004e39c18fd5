// The run time's own view of a launch: blocks, warps and threads, and the scheduler that runs them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "fibre.h"

#pragma GCC visibility push(hidden)

namespace emulator {

#if defined(EMULATOR_STATISTICS)
constexpr bool kStatistics = true;
#else
constexpr bool kStatistics = false;
#endif

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kWarpSize;

enum class Wait : uint8_t { none, block_barrier, cluster_barrier, warp };

struct WarpRequest {
  Collective kind;
  uint32_t mask;
  uint32_t value;
  uint32_t operand; // of shuffles
  uint32_t clamp;   // of shuffles: PTX's c, segment mask and clamp
};

struct Block;

// Of TSan's model of fences, see order.cpp.
struct AtomicObject;
struct FenceState {
  char published;
  bool fenced;
  std::vector<AtomicObject*> read;
};

struct Thread {
  Coordinates at;
  Fibre fibre;
  Block* block;
  const Site* site; // where it waits
  Wait wait;
  bool exited;
  bool predicate; // given to block_barrier_count
  WarpRequest request;
  Shuffled result;
  unsigned syncs; // __syncwarp calls
  FenceState fences;
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> copy_groups; // the oldest first
};

struct Warp {
  Thread* threads; // of this warp
  uint32_t lanes;  // that exist
  uint32_t waiting, exited;
  char synced[2]; // TSan's sync objects, used in turn
};

// Whether a byte of shared memory is in a variable and was written.
enum class SharedByte : uint8_t { outside, unwritten, written };

// What a block runs in, used for one block after the other.
struct Block {
  Block();
  ~Block();
  Block(const Block&) = delete;

  Vector3 position;
  unsigned rank; // in its cluster
  unsigned alive, arrived;
  unsigned barriers; // passed so far
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  char* stacks;
  char* shared;
  SharedByte* shared_state;
  unsigned shared_used; // end of the window that the last block has used
  char ended, met[2];   // TSan's sync objects
};

constexpr size_t kSharedBytes = 256 << 10; // of a window: the largest of any GPU, and gaps

struct State {
  const Launch* launch;                      // null: none runs
  std::vector<std::unique_ptr<Block>> slots; // kept for later launches
  std::vector<Block*> cluster;               // the blocks that run now
  unsigned cluster_alive, cluster_arrived, cluster_barriers;
  char cluster_met[2];
  Thread* running; // null: the launching thread
};

extern State state;

// Scheduling

// In the order of the option, for the first to run first.
void make_ready(Thread* const* threads, size_t count);
// Runs others; returns when the caller was made ready and chosen again.
void wait_for_turn();

[[noreturn]] void stop_launch(std::string message);

// Of blocks and threads.
enum class Order { ascending, descending, random };

struct Options {
  Order order = Order::ascending;
  uint64_t seed = 1;
  bool check_unwritten = true; // reads of shared memory that nothing has written
};

extern Options options;

// Parts

void reset_shared(Block& block);
void forget_shared(Block& block); // its cluster must not read it any more
void leave_warp(Thread& exited);
void reset_order();
void finish_requests();
void count_shared(Site& site, uint64_t offset, unsigned bytes, Access access);
void leave_barriers(Thread& exited);
const char* describe(Collective kind);
std::string demangled(const char* name);
void check_deadlock();
void print_where_it_runs(const char* report); // after that of a sanitizer

} // namespace emulator

#pragma GCC visibility pop
