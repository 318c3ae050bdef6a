// The hash of dropout masks, on a GPU and on the CPU: that of mlpcore/core/dropout.py.
#pragma once

// C. Wellons, "Prospecting for Hash Functions" (2018): lowbias32, up to its last multiplication
__device__ __forceinline__ unsigned scramble(unsigned x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  return (x ^ x >> 15) * 0x846ca68bu;
}
__device__ __forceinline__ unsigned mix(unsigned x) {
  x = scramble(x);
  return x ^ x >> 16;
}
