// What translated kernels, the stand-in for libcudart and the run time share.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(hidden) // calls within the library need no indirection

namespace emulator {

struct Vector3 {
  unsigned x, y, z;
};

// Where a CUDA thread is in its launch: PTX's special registers.
struct Coordinates {
  Vector3 thread, block, block_size, grid;
  unsigned lane, warp;
  unsigned cluster_rank, cluster_size;
  unsigned static_shared, dynamic_shared; // bytes
};

// Of the running CUDA thread.
extern const Coordinates* current;

// PTX instructions, of all threads, by the stats flavour.
extern uint64_t executed;

// An instruction of a kernel, and what the stats flavour counted there.
struct Site {
  const char* kernel; // mangled
  const char* file;
  int line;
  const char* instruction;

  bool is_shared, is_store;
  unsigned bytes_per_lane;
  uint64_t requests;   // executions by a warp
  uint64_t lanes;      // of all requests
  uint64_t sectors;    // 32-byte pieces of global memory that the requests touch
  uint64_t wavefronts; // turns that the banks of shared memory need
};

struct SharedVariable {
  const char* name;
  unsigned offset, bytes; // in the shared window
};

struct Kernel {
  const char* name; // mangled
  void (*body)(void** arguments);
  const SharedVariable* shared;
  unsigned shared_count;
  unsigned static_shared;  // bytes that the GPU would reserve
  unsigned dynamic_offset; // of dynamic shared memory in the shared window
  unsigned max_threads;    // of __launch_bounds__, or 0
  unsigned cluster_size;
  Site* sites;
  unsigned site_count;
};

struct Variable {
  const char* name; // mangled
  void* address;
  size_t bytes;
};

// One translated source. The lists end with a null name.
struct Module {
  const Kernel* kernels;
  const Variable* variables;
  Module* next;
};

struct Launch {
  const Kernel* kernel;
  Vector3 grid, block;
  unsigned dynamic_shared;
  unsigned cluster_size;
  void** arguments;
};

// Runs every thread of a launch to its end. Throws std::runtime_error for what a kernel did wrong.
void run(const Launch& launch);

// Makes the site statistics of a module readable (see control.h).
void add_module(Module& module);

// Leaves the launch with an error that names the site (may be null), the kernel, the thread and the block.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(const Site* site, const char* format, ...);

// Memory. Every access goes through one of these.

enum class Access : uint8_t { load, store, update };

// Shared windows are addressed as in PTX: an offset, and above it 1 + the rank of the block in its cluster,
// or 0 for the own block.
constexpr unsigned kWindowBits = 24;

char* shared_address(Site& site, uint64_t window_address, unsigned bytes, Access access);
char* generic_address(Site& site, uint64_t address, unsigned bytes, Access access);
[[noreturn]] void fail_address(const Site& site, uint64_t address, unsigned bytes);
void count_global(Site& site, uint64_t address, unsigned bytes, Access access);

uint64_t shared_to_generic(uint64_t window_address);
uint64_t generic_to_shared(uint64_t address);
uint64_t map_to_rank(uint64_t generic_address, unsigned rank);

// Order of memory accesses: only TSan asks.
#ifdef EMULATOR_TSAN
void fence();
void atomic_access(const void* address);
#else
inline void fence() {}
inline void atomic_access(const void*) {}
#endif

// Lets the other threads run: in loops that wait for them.
void yield();

// Barriers

void block_barrier(const Site& site);
unsigned block_barrier_count(const Site& site, bool predicate); // of threads with a true predicate
void cluster_barrier(const Site& site);

// Warp collectives

enum class Collective : uint8_t {
  shuffle_xor,
  shuffle_down,
  shuffle_up,
  shuffle_index,
  vote, // the ballot: `any` and `all` follow from it
  reduce_add,
  reduce_min,
  reduce_max,
  reduce_unsigned_min,
  reduce_unsigned_max,
  reduce_and,
  reduce_or,
  reduce_xor,
  sync,
};

struct Shuffled {
  uint32_t value;
  bool in_range;
};

Shuffled shuffle(const Site& site, Collective kind, uint32_t mask, uint32_t value, uint32_t operand,
                 uint32_t clamp);
uint32_t collective(const Site& site, Collective kind, uint32_t mask, uint32_t value);

// cp.async: the data lands as late as allowed, when a wait asks for its group.

struct AsyncCopy {
  Site* site;
  uint64_t to; // shared window
  const char* from;
  unsigned bytes, source_bytes; // zeros follow the source's
};

void async_copy(const AsyncCopy& copy);
void async_commit();
// Takes a copy of a group that has to be complete when `allowed` groups may still be open.
bool async_complete(unsigned allowed, AsyncCopy& copy);

} // namespace emulator

#pragma GCC visibility pop
