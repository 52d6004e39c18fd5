// Shuffles, votes, reductions and __syncwarp: the lanes that a mask names meet, in any order.
#include "state.h"

namespace emulator {

const char* describe(Collective kind) {
  switch (kind) {
    case Collective::shuffle_xor: return "__shfl_xor_sync";
    case Collective::shuffle_down: return "__shfl_down_sync";
    case Collective::shuffle_up: return "__shfl_up_sync";
    case Collective::shuffle_index: return "__shfl_sync";
    case Collective::vote: return "a warp vote";
    case Collective::sync: return "__syncwarp";
    default: return "a warp reduction";
  }
}

namespace {

template <class Visit>
void for_each_lane(uint32_t mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(static_cast<unsigned>(__builtin_ctz(mask)));
}

void check_mask(const Site& site, const WarpRequest& request, const Warp& warp, unsigned lane) {
  const uint32_t mask = request.mask;
  if ((mask >> lane & 1) == 0) {
    fail(&site, "%s: the mask %08x is without the calling lane %u", describe(request.kind), mask, lane);
  }
  if ((mask & ~warp.lanes) != 0) {
    fail(&site, "%s: the mask %08x names lane %d, which the warp does not have", describe(request.kind), mask,
         __builtin_ctz(mask & ~warp.lanes));
  }
}

void check_exited(const Site& site, const WarpRequest& request, const Warp& warp) {
  const uint32_t gone = request.mask & warp.exited;
  if (gone == 0) return;
  fail(&site, "%s: the mask %08x names lane %d, which has exited", describe(request.kind), request.mask,
       __builtin_ctz(gone));
}

// Whether all lanes of the mask wait for the same. One that waits for something else and counts on this
// one is an error; else it may still come.
bool all_agree(const Site& site, const Warp& warp, const WarpRequest& request, unsigned self) {
  bool agree = true;
  for_each_lane(request.mask, [&](unsigned lane) {
    const Thread& other = warp.threads[lane];
    if (other.request.kind == request.kind && other.request.mask == request.mask) return;
    agree = false;
    if ((other.request.mask >> self & 1) == 0) return;
    fail(&site, "%s with mask %08x meets %s with mask %08x of lane %u at %s:%d", describe(request.kind),
         request.mask, describe(other.request.kind), other.request.mask, lane, other.site->file,
         other.site->line);
  });
  return agree;
}

// The lane that PTX's shfl reads, or none: then a lane keeps its own value.
struct Source {
  unsigned lane;
  bool in_range;
};

Source source_of(const WarpRequest& request, unsigned lane) {
  const unsigned segment = request.clamp >> 8 & 31;
  const unsigned clamp = request.clamp & 31;
  const unsigned first = lane & segment;
  const unsigned last = first | (clamp & ~segment);
  const unsigned operand = request.operand & 31;
  unsigned from = lane;
  bool in_range = false;
  switch (request.kind) {
    case Collective::shuffle_up:
      from = lane - operand;
      in_range = static_cast<int>(from) >= static_cast<int>(last);
      break;
    case Collective::shuffle_down:
      from = lane + operand;
      in_range = from <= last;
      break;
    case Collective::shuffle_xor:
      from = lane ^ operand;
      in_range = from <= last;
      break;
    default:
      from = first | (operand & ~segment & 31);
      in_range = from <= last;
      break;
  }
  return {in_range ? from : lane, in_range};
}

void exchange(const Warp& warp, uint32_t mask) {
  for_each_lane(mask, [&](unsigned lane) {
    Thread& thread = warp.threads[lane];
    const Source source = source_of(thread.request, lane);
    if ((mask >> source.lane & 1) == 0) {
      fail(thread.site, "%s: lane %u reads lane %u, which is not in the mask %08x",
           describe(thread.request.kind), lane, source.lane, mask);
    }
    thread.result = {warp.threads[source.lane].request.value, source.in_range};
  });
}

uint32_t combine(Collective kind, uint32_t a, uint32_t b) {
  const auto signed_a = static_cast<int32_t>(a);
  const auto signed_b = static_cast<int32_t>(b);
  switch (kind) {
    case Collective::reduce_add: return a + b;
    case Collective::reduce_min: return signed_b < signed_a ? b : a;
    case Collective::reduce_max: return signed_a < signed_b ? b : a;
    case Collective::reduce_unsigned_min: return b < a ? b : a;
    case Collective::reduce_unsigned_max: return a < b ? b : a;
    case Collective::reduce_and: return a & b;
    case Collective::reduce_or: return a | b;
    default: return a ^ b;
  }
}

uint32_t ballot(const Warp& warp, uint32_t mask) {
  uint32_t result = 0;
  for_each_lane(mask, [&](unsigned lane) {
    if (warp.threads[lane].request.value != 0) result |= 1u << lane;
  });
  return result;
}

uint32_t reduce(const Warp& warp, uint32_t mask, Collective kind) {
  uint32_t result = warp.threads[__builtin_ctz(mask)].request.value;
  for_each_lane(mask & (mask - 1),
                [&](unsigned lane) { result = combine(kind, result, warp.threads[lane].request.value); });
  return result;
}

void give_results(const Warp& warp, const WarpRequest& request) {
  if (request.kind <= Collective::shuffle_index) return exchange(warp, request.mask);
  if (request.kind == Collective::sync) return;
  const uint32_t result = request.kind == Collective::vote ? ballot(warp, request.mask)
                                                           : reduce(warp, request.mask, request.kind);
  for_each_lane(request.mask, [&](unsigned lane) { warp.threads[lane].result = {result, true}; });
}

void wake(Warp& warp, uint32_t mask) {
  Thread* woken[kWarpSize];
  size_t count = 0;
  for_each_lane(mask, [&](unsigned lane) {
    warp.threads[lane].wait = Wait::none;
    woken[count++] = &warp.threads[lane];
  });
  warp.waiting &= ~mask;
  make_ready(woken, count);
}

Shuffled meet(const Site& site, const WarpRequest& request) {
  const Quiet quiet;
  Thread& self = *state.running;
  Warp& warp = self.block->warps[self.at.warp];
  check_mask(site, request, warp, self.at.lane);
  self.request = request;
  self.site = &site;
  self.wait = Wait::warp;
  warp.waiting |= 1u << self.at.lane;
  // Only __syncwarp orders memory; a shuffle does not.
  char* synced = request.kind == Collective::sync ? &warp.synced[self.syncs++ % 2] : nullptr;
  if (synced != nullptr) release(synced);
  if ((request.mask & ~warp.waiting) != 0) {
    check_exited(site, request, warp);
  } else if (all_agree(site, warp, request, self.at.lane)) {
    give_results(warp, request);
    wake(warp, request.mask);
  }
  wait_for_turn();
  if (synced != nullptr) acquire(synced);
  return self.result;
}

} // namespace

Shuffled shuffle(const Site& site, Collective kind, uint32_t mask, uint32_t value, uint32_t operand,
                 uint32_t clamp) {
  return meet(site, {kind, mask, value, operand, clamp});
}

uint32_t collective(const Site& site, Collective kind, uint32_t mask, uint32_t value) {
  return meet(site, {kind, mask, value, 0, 0}).value;
}

void leave_warp(Thread& exited) {
  Warp& warp = exited.block->warps[exited.at.warp];
  warp.exited |= 1u << exited.at.lane;
  for_each_lane(warp.waiting, [&](unsigned lane) {
    const Thread& other = warp.threads[lane];
    if ((other.request.mask >> exited.at.lane & 1) == 0) return;
    fail(other.site, "%s: the mask %08x of lane %u names lane %u, which has exited",
         describe(other.request.kind), other.request.mask, lane, exited.at.lane);
  });
}

} // namespace emulator
