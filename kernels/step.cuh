// What a step reads from device memory, so that a captured graph can be replayed: the slot, written anew before each step, and
// the control block, which stays.
#pragma once
#include "numbers.cuh"

constexpr int SETTINGS = 12;

struct Slot {
  const void* source[3];  // X, Y, row weights
  int64 row_stride[3];    // in entries
  int64 column_stride[3];
  const int64* rows;  // row numbers of the batch; null: all in order
  int64 first;        // of the batch's rows, that the graph begins with
  int64 batch_row;    // its number in the batch, where `rows` are those of a staged part
  int64 source_rows;
  int64 step;              // number of the update, from 1
  int64 recast;            // whether the low-precision weights must be made anew
  double* answer;          // J, status, step of the first fault
  double settings[SETTINGS];  // learning rate and what else the optimizer's formulas read
};

enum Status : unsigned { NOT_FINITE = 1, BAD_LABEL = 2, BAD_WEIGHT = 4, BAD_ROW = 8 };

static_assert(sizeof(Slot) == 224, "mlpcore/backends/cuda_step.py says so");

struct Control {
  int64 updates;     // done so far: t of the optimizer
  int64 fault_step;  // of the first fault
  int64 good_steps;  // since the loss scale last changed
  double loss_scale;
  int64 skipped;    // updates left out because loss or gradient was not finite
  unsigned status;  // faults: they stay, and no update happens after one
  unsigned skip;    // this step's update
};
static_assert(sizeof(Control) == 48, "mlpcore/backends/cuda_step.py says so");

__device__ __forceinline__ void report(Control* control, Status fault) {
  if (control) atomicOr(&control->status, unsigned(fault));
}
