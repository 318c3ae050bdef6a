// J += Σ k ℓ, D = gain k ∂ℓ/∂x and db = Σ_rows D (or +=), in one pass over (m, n) row-major. k is the row weight over the batch's
// weight: a number a row (per_row), or one for all. gain, the loss scale of half precision, may be null. D may be x. J's partial
// sums, one for each block, stand before those of db.
#include "reduce.cuh"
#include "step.cuh"

// ℓ = Σ_columns of a formula's value.
template <class T, class Formula, int V, int threads>
__global__ void elementwise_loss(const T* x, const Compute<T>* Y, const Compute<T>* k, int per_row, const Compute<T>* gain, T* D,
                                 Compute<T>* db, Compute<T>* J, Compute<T>* partials, unsigned* counters, int64 m, int64 n,
                                 int accumulate) {
  using C = Compute<T>;
  __shared__ C shared[threads * V];
  const Tile<V> tile;
  const C factor = gain ? *gain : C(1);
  C sum[V] = {}, value = 0;
  if (tile.column < n) {
    for (int64 row = tile.row; row < m; row += tile.stride) {
      const int64 at = row * n + tile.column;
      const C weight = k[per_row ? row : 0];
      const Pack<T, V> xs = load<V>(x + at);
      const Pack<C, V> ys = load<V>(Y + at);
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C output = widen(xs.at[v]), d = factor * Formula::slope(output, ys.at[v], weight);
        value += Formula::value(output, ys.at[v], weight);
        pack.at[v] = Narrow<T>::from(d);
        sum[v] += d;
      }
      store<V>(D + at, pack);
    }
  }
  add_grid_sum(value, J, partials, counters);
  if (db) column_sums<V>(sum, shared, db, partials + gridDim.x * gridDim.y, counters + 1, n, accumulate);
}

// ℓ = log Σ exp(s - max) - (s_y - max), D = gain k (softmax(s) - onehot(y)), a warp a row: blocks of (32, warps) threads, with
// warps * n numbers of shared memory where db is wanted. Targets: class numbers (labels), or else distributions (Y). A row
// adds `most` to J at most, infinity where there is no limit.
template <class T>
__global__ void softmax_cross_entropy(const T* S, const int64* labels, const Compute<T>* Y, const Compute<T>* k, int per_row,
                                      const Compute<T>* gain, T* D, Compute<T>* db, Compute<T>* J, Compute<T>* partials,
                                      unsigned* counters, Control* control, int64 m, int64 n, int accumulate,
                                      Compute<T> most) {
  using C = Compute<T>;
  DYNAMIC_SHARED(C, shared);
  const int lane = threadIdx.x, warps = blockDim.y;
  C* sums = shared + threadIdx.y * n;
  if (db) {
    for (int64 c = lane; c < n; c += 32) sums[c] = 0;
  }
  const C factor = gain ? *gain : C(1);
  C value = 0;
  for (int64 row = int64(blockIdx.x) * warps + threadIdx.y; row < m; row += int64(gridDim.x) * warps) {
    const T* s = S + row * n;
    C top = widen(s[0]), sum = 0, entry = 0, whole = 1;
    for (int64 c = lane; c < n; c += 32) top = maximum(top, C(widen(s[c])));
    top = warp_maximum(top);
    for (int64 c = lane; c < n; c += 32) sum += exp(C(widen(s[c])) - top);
    int64 label = -1;
    if (labels) {
      label = labels[row];
      if (label < 0 || label >= n) {
        report(control, BAD_LABEL);
        label = 0;
      }
      entry = C(widen(s[label])) - top;
    } else {
      whole = 0;
      for (int64 c = lane; c < n; c += 32) {
        entry += Y[row * n + c] * (C(widen(s[c])) - top);
        whole += Y[row * n + c];
      }
      entry = warp_sum(entry);
      whole = warp_sum(whole);
    }
    sum = warp_sum(sum);
    __syncwarp();  // D may be S: every lane has read the label's entry (a shuffle alone orders no memory)
    const C weight = k[per_row ? row : 0];
    if (lane == 0) value += weight * minimum(whole * log(sum) - entry, most);
    for (int64 c = lane; c < n; c += 32) {
      const C target = labels ? C(c == label) : Y[row * n + c];
      const C d = factor * weight * (whole * exp(C(widen(s[c])) - top) / sum - target);
      D[row * n + c] = Narrow<T>::from(d);
      if (db) sums[c] += d;
    }
  }
  add_grid_sum(value, J, partials, counters);
  if (!db) return;
  partials += gridDim.x;
  __syncthreads();
  const int thread = thread_number(), threads = 32 * warps;
  for (int64 c = thread; c < n; c += threads) {
    C sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += shared[warp * n + c];
    partials[blockIdx.x * n + c] = sum;
  }
  if (!last_block(counters + 1, gridDim.x)) return;
  for (int64 c = thread; c < n; c += threads) {
    C sum = accumulate ? db[c] : C(0);
    for (unsigned block = 0; block < gridDim.x; ++block) sum += load_fresh(partials + block * n + c);
    db[c] = sum;
  }
}
