// Sums in a fixed order: over a warp, over a block, down the columns of a tile, over the blocks of
// a grid. There are no float atomics: the block that finishes last (an integer counter tells) adds
// up all partial sums, so equal input gives equal bits.
#pragma once
#include "numbers.cuh"

template <class C>
__device__ __forceinline__ C warp_sum(C x) {
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}
template <class C>
__device__ __forceinline__ C warp_maximum(C x) {
  for (int distance = 16; distance; distance /= 2)
    x = maximum(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

__device__ __forceinline__ int thread_number() { return threadIdx.y * blockDim.x + threadIdx.x; }

// Returns the sum over the block's threads to every thread; their number is a multiple of 32.
template <class C>
__device__ C block_sum(C x) {
  __shared__ C of_warp[32];
  const int thread = thread_number(), warps = blockDim.x * blockDim.y / 32;
  x = warp_sum(x);
  __syncthreads();  // the last call's readers are done
  if (thread % 32 == 0) of_warp[thread / 32] = x;
  __syncthreads();
  C sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += of_warp[warp];
  return sum;
}

// Returns whether this block is the last of `blocks` to arrive; then everything that the others
// wrote before is visible.
__device__ bool last_block(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (thread_number() == 0) {
    last = atomicAdd(counter, 1u) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// x[n] = Σ x[n] over all threads of the grid, in the block that finishes last, where it returns
// true. `partials` holds N numbers for each block.
template <int N, class C>
__device__ bool grid_sums(C (&x)[N], C* partials, unsigned* counter) {
  const int blocks = gridDim.x * gridDim.y, threads = blockDim.x * blockDim.y,
            thread = thread_number();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = block_sum(x[n]);
    if (blocks > 1 && thread == 0)
      partials[n * blocks + blockIdx.y * gridDim.x + blockIdx.x] = x[n];
  }
  if (blocks == 1) return true;
  if (!last_block(counter, blocks)) return false;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    C sum = 0;
    for (int block = thread; block < blocks; block += threads)
      sum += load_fresh(partials + n * blocks + block);
    x[n] = block_sum(sum);
  }
  return true;
}

// total += Σ x over all threads of the grid. `partials` holds one number for each block.
template <class C>
__device__ void add_grid_sum(C x, C* total, C* partials, unsigned* counter) {
  C sum[1] = {x};
  if (grid_sums(sum, partials, counter) && thread_number() == 0) *total += sum[0];
}

// A block of (x, y) threads covers a tile of blockDim.x * V columns; each thread goes down its V
// columns with a stride.
template <int V>
struct Tile {
  int64 column, row, stride;
  __device__ Tile()
      : column((int64(blockIdx.x) * blockDim.x + threadIdx.x) * V),
        row(int64(blockIdx.y) * blockDim.y + threadIdx.y), stride(int64(gridDim.y) * blockDim.y) {}
};

// shared[0 … blockDim.x V) = Σ_threadIdx.y sum[v]; blockDim.y is a power of two.
template <int V, class C>
__device__ void add_down(const C (&sum)[V], C* shared) {
  const int width = blockDim.x * V, at = threadIdx.y * width + threadIdx.x * V;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) shared[at + v] = sum[v];
  for (int half = blockDim.y / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int v = 0; v < V; ++v) shared[at + v] += shared[at + v + half * width];
    }
  }
  __syncthreads();
}

// out[column + v] = Σ sum[v] over all rows of the grid, or += with `accumulate`. `partials`:
// (gridDim.y, n) if gridDim.y > 1; `counters`: one for each column of blocks; `shared`: threads * V
// numbers.
template <int V, class C>
__device__ void column_sums(C (&sum)[V], C* shared, C* out, C* partials, unsigned* counters,
                            int64 n, bool accumulate) {
  const Tile<V> tile;
  add_down(sum, shared);
  if (gridDim.y > 1) {
    if (threadIdx.y == 0 && tile.column < n) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        partials[blockIdx.y * n + tile.column + v] = shared[threadIdx.x * V + v];
    }
    if (!last_block(counters + blockIdx.x, gridDim.y)) return;
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = 0;
    if (tile.column < n) {
      for (int64 block = threadIdx.y; block < gridDim.y; block += blockDim.y) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += load_fresh(partials + block * n + tile.column + v);
      }
    }
    add_down(sum, shared);
  }
  if (threadIdx.y == 0 && tile.column < n) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      C* address = out + tile.column + v;
      *address = (accumulate ? *address : C(0)) + shared[threadIdx.x * V + v];
    }
  }
}
