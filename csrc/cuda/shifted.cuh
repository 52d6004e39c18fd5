// Packs that lie across 16-byte boundaries, of a tensor that does not begin where another one's packs do.
#pragma once

#include "reduce.cuh"

namespace lossops::cuda {

// The 16 bytes that begin `bytes` after the first of two packs; fewer than 16.
LOSSOPS_DEVICE uint4 across(uint4 a, uint4 b, int bytes) {
  if (bytes & 8) {
    a = {a.z, a.w, b.x, b.y};
    b = {b.z, b.w};
  }
  if (bytes & 4) {
    a = {a.y, a.z, a.w, b.x};
    b.x = b.y;
  }
  const int bits = bytes % 4 * 8;
  return {__funnelshift_r(a.x, a.y, bits), __funnelshift_r(a.y, a.z, bits), __funnelshift_r(a.z, a.w, bits),
          __funnelshift_r(a.w, b.x, bits)};
}

// The pack at p of each of kLanes neighbours, or of a warp where they are more, one behind the other. The
// lanes read at the boundaries, and hand on what is of the pack before: a sector is asked for once, and by 16
// bytes. From the boundary before the first pack to the one behind the last all must be there, and every lane
// come along.
template <int kLanes, class T>
LOSSOPS_DEVICE Pack<T> load_shifted(const T* p) {
  constexpr int kGroup = kLanesOfWarp<kLanes>;
  const int lane = threadIdx.x % kWarp, bytes = static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16);
  const uint4* const boundary = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(p) - bytes);
  uint4 own = *boundary;
  if (bytes != 0) {
    const unsigned group = (kAllLanes >> (kWarp - kGroup)) << (lane / kGroup * kGroup);
    uint4 next = {__shfl_down_sync(group, own.x, 1, kGroup), __shfl_down_sync(group, own.y, 1, kGroup),
                  __shfl_down_sync(group, own.z, 1, kGroup), __shfl_down_sync(group, own.w, 1, kGroup)};
    if (lane % kGroup == kGroup - 1) next = boundary[1];
    own = across(own, next, bytes);
  }
  return *reinterpret_cast<const Pack<T>*>(&own);
}

} // namespace lossops::cuda
