// The data that a step reads from device memory, so that a captured graph can be replayed: the
// slot, written before each launch and advanced from step to step, and the control block, which
// persists.
#pragma once
#include "numbers.cuh"
#include "slot.cuh"  // struct Slot, struct Control: generated from mlpcore/backends/cuda/slot.py

__device__ __forceinline__ void report(Control* control, Status fault) {
  if (control) atomicOr(&control->status, unsigned(fault));
}

// Returns the row of X, Y and the weights at position i of the slot's list.
__device__ __forceinline__ int64 row_of(const Slot& slot, int64 i, Control* control) {
  if (!slot.rows) return i;
  const int64 row = slot.rows[i];
  if (row >= 0 && row < slot.source_rows) return row;
  report(control, BAD_ROW);
  return 0;
}
