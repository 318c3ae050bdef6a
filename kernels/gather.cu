// The rows of a chunk, cast: out[i, j] = source[row(first + i), j], where row reads the batch's row numbers. Source, strides and
// row numbers come from the slot, so that the caller's arrays may be others at each step.
#include "reduce.cuh"
#include "step.cuh"

__device__ __forceinline__ int64 row_of(const Slot& slot, int64 i, Control* control) {
  if (!slot.rows) return i;
  const int64 row = slot.rows[i];
  if (row >= 0 && row < slot.source_rows) return row;
  report(control, BAD_ROW);
  return 0;
}

// field: 0 X, 1 Y, 2 row weights. scale (1 / Σ w for row weights) may be null.
template <class From, class To, int V>
__global__ void gather(const Slot* slot, int field, To* out, const Compute<To>* scale, Control* control, int64 first, int64 m,
                       int64 n) {
  using C = Compute<To>;
  const Tile<V> tile;
  if (tile.column >= n) return;
  const From* source = static_cast<const From*>(slot->source[field]);
  const int64 row_stride = slot->row_stride[field], column_stride = slot->column_stride[field];
  const C factor = scale ? *scale : C(1);
  const bool packed = column_stride == 1 && row_stride % V == 0 && reinterpret_cast<unsigned long long>(source) % (V * sizeof(From)) == 0;
  for (int64 i = tile.row; i < m; i += tile.stride) {
    const int64 row = row_of(*slot, slot->first + first + i, control);
    const From* address = source + row * row_stride + tile.column * column_stride;
    Pack<From, V> given;
    if (packed) {
      given = load<V>(address);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) given.at[v] = address[v * column_stride];
    }
    Pack<To, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.at[v] = Narrow<To>::from(C(widen(given.at[v])) * factor);
    store<V>(out + i * n + tile.column, pack);
  }
}

// *scale = 1 / Σ w over the batch's m rows, 0 where all of them are 0: such a batch says nothing and changes nothing. A weight that
// is negative or not finite is a fault.
template <class From, class C>
__global__ void sum_weights(const Slot* slot, C* scale, C* partials, unsigned* counter, Control* control, int64 m) {
  const From* w = static_cast<const From*>(slot->source[2]);
  C sum = 0;
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < m; i += int64(gridDim.x) * blockDim.x) {
    const C weight = C(widen(w[row_of(*slot, slot->first + i, control) * slot->row_stride[2]]));
    if (!(weight >= C(0)) || !is_finite(weight)) report(control, BAD_WEIGHT);
    sum += weight;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
  if (!last_block(counter, gridDim.x)) return;
  sum = 0;
  for (int64 block = threadIdx.x; block < gridDim.x; block += blockDim.x) sum += load_fresh(partials + block);
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    if (sum > C(0) && !is_finite(C(1) / sum)) report(control, BAD_WEIGHT);
    *scale = sum > C(0) ? C(1) / sum : C(0);
  }
}
