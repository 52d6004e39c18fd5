/* What a host may set and read; exported by every library that is built for the emulator. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EMULATOR_EXPORT __attribute__((visibility("default")))

/* Of blocks and threads: 0 ascending, 1 descending, 2 random. */
EMULATOR_EXPORT void emulator_set_order(int order);
EMULATOR_EXPORT void emulator_set_seed(uint64_t seed);

/* Whether a read of shared memory that nothing has written is an error. It is unless switched off. */
EMULATOR_EXPORT void emulator_check_unwritten(int check);

/* Counts of a source instruction, by the flavour stats. */
struct EmulatorSite {
  const char* kernel; /* mangled */
  const char* file;
  const char* instruction;
  int line;
  int is_shared;
  int is_store;
  unsigned bytes_per_lane;
  uint64_t requests; /* executions by a warp */
  uint64_t lanes;
  uint64_t bytes;
  uint64_t sectors;    /* 32-byte pieces of global memory */
  uint64_t wavefronts; /* turns of shared memory's banks */
};

EMULATOR_EXPORT void emulator_reset_statistics(void);
/* PTX instructions since the reset, of all threads; one that its predicate switches off counts, too. */
EMULATOR_EXPORT uint64_t emulator_executed(void);
/* Sites that were executed since the reset, and the index-th of them. */
EMULATOR_EXPORT int emulator_count_sites(void);
EMULATOR_EXPORT void emulator_read_site(int index, struct EmulatorSite* site);

#ifdef __cplusplus
}
#endif
