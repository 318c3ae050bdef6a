// Dropout masks, equal to those of mlpcore/core/dropout.py: a pure function of key, step, row of
// the batch and column.
#pragma once
#include "hash.cuh"
#include "step.cuh"

struct NoMask {
  template <class T>
  __device__ T operator()(T z, int64, int) const {
    return z;
  }
};

// Drops entries of V columns: a dropped entry becomes -0, and a kept entry that is 0 becomes +0.
template <int V>
struct Mask {
  unsigned base, column[V], threshold;
  __device__ Mask(const Slot* slot, int64 first, unsigned key, unsigned below, int64 first_column)
      : threshold(below) {
    base = mix(key + unsigned(slot->step));
    const unsigned columns = mix(base + 0x9e3779b9u) + unsigned(first_column);
#pragma unroll
    for (int v = 0; v < V; ++v) column[v] = mix(columns + v);
    base += unsigned(slot->batch_row + first);
  }
  template <class T>
  __device__ T operator()(T z, int64 row, int v) const {
    using C = Compute<T>;
    const bool dropped = scramble(mix(base + unsigned(row)) ^ column[v]) >> 1 < threshold;
    return dropped ? Narrow<T>::from(-C(0)) : widen(z) == C(0) ? Narrow<T>::from(C(0)) : z;
  }
};
