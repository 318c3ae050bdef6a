// Gathers and casts the rows of a chunk, out[i, j] = X[row(first + i), j], and sums the batch's row
// weights. Addresses, strides and row numbers come from the slot, so the caller's arrays may change
// from step to step.
#include "reduce.cuh"
#include "step.cuh"

template <class From, class To, int V>
__global__ void gather(const Slot* slot, To* out, Control* control, int64 first, int64 m, int64 n) {
  using C = Compute<To>;
  const Tile<V> tile;
  if (tile.column >= n) return;
  const From* source = static_cast<const From*>(slot->source[0]);
  const int64 row_stride = slot->row_stride[0], column_stride = slot->column_stride[0];
  const bool packed = column_stride == 1 && is_aligned<V>(source, row_stride);
  for (int64 i = tile.row; i < m; i += tile.stride) {
    const int64 row = row_of(*slot, slot->first + first + i, control);
    const From* address = source + row * row_stride + tile.column * column_stride;
    const Pack<From, V> given = packed ? load<V>(address) : collect<V>(address, column_stride);
    Pack<To, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.at[v] = Narrow<To>::from(C(widen(given.at[v])));
    store<V>(out + i * n + tile.column, pack);
  }
}

// *scale = 1 / Σ w over the batch's m rows, or 0 if all weights are 0: such a batch changes
// nothing. A weight that is negative or not finite is a fault.
template <class From, class C>
__global__ void sum_weights(const Slot* slot, C* scale, C* partials, unsigned* counter,
                            Control* control, int64 m) {
  const From* w = static_cast<const From*>(slot->source[2]);
  C sum[1] = {};
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < m;
       i += int64(gridDim.x) * blockDim.x) {
    const C weight = C(widen(w[row_of(*slot, slot->first + i, control) * slot->row_stride[2]]));
    if (!(weight >= C(0)) || !is_finite(weight)) report(control, BAD_WEIGHT);
    sum[0] += weight;
  }
  if (!grid_sums(sum, partials, counter) || thread_number() != 0) return;
  if (sum[0] > C(0) && !is_finite(C(1) / sum[0])) report(control, BAD_WEIGHT);
  *scale = sum[0] > C(0) ? C(1) / sum[0] : C(0);
}
