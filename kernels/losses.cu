// J += Σ k ℓ, D = gain k ∂ℓ/∂x and db = Σ_rows D (or +=), in one pass over (m, n) row-major. k is the
// row weight over the batch's weight. gain, the loss scale of half precision, may be null. D may be x.
// J's partial sums, one for each block, precede those of db.
#include "reduce.cuh"
#include "step.cuh"

// The targets and weights of the rows. With a slot: the caller's arrays, at the batch's rows from
// `first` on. Without: (m, n) row-major arrays and one weight per row. k = weight · scale, where
// null weights or a null scale count as 1.
template <class Y, class W, class C>
struct Targets {
  const Slot* slot;
  Control* control;
  const Y* targets;
  const W* weights;
  int64 first, y_row, y_column, w_row;
  C scale;

  __device__ Targets(const Slot* slot, Control* control, const Y* y, const W* w, bool weighted,
                     const C* scale, int64 first, int64 n)
      : slot(slot), control(control), targets(y), weights(w), first(first), y_row(n), y_column(1),
        w_row(1), scale(scale ? *scale : C(1)) {
    if (!slot) return;
    targets = static_cast<const Y*>(slot->source[1]);
    weights = weighted ? static_cast<const W*>(slot->source[2]) : nullptr;
    y_row = slot->row_stride[1], y_column = slot->column_stride[1], w_row = slot->row_stride[2];
  }
  __device__ int64 row(int64 i) const {
    return slot ? row_of(*slot, slot->first + first + i, control) : i;
  }
  __device__ C weight(int64 row) const {
    return weights ? C(widen(weights[row * w_row])) * scale : scale;
  }
  __device__ const Y* at(int64 row, int64 column) const {
    return targets + row * y_row + column * y_column;
  }
};

// ℓ = Σ_columns of a formula's value, which may read p, a number of its column.
template <class T, class Y, class W, class Formula, int V, int threads>
__global__ void elementwise_loss(const T* x, const Slot* slot, Control* control, const Y* y,
                                 const W* w, int weighted, const Compute<T>* scale,
                                 const Compute<T>* gain, T* D, Compute<T>* db, Compute<T>* J,
                                 Compute<T>* partials, unsigned* counters, int64 first, int64 m,
                                 int64 n, int accumulate, const Compute<T>* columns) {
  using C = Compute<T>;
  __shared__ C shared[threads * V];
  const Tile<V> tile;
  const Targets<Y, W, C> given(slot, control, y, w, weighted, scale, first, n);
  const bool packed = given.y_column == 1 && is_aligned<V>(given.targets, given.y_row);
  const C factor = gain ? *gain : C(1);
  C sum[V] = {}, p[V] = {}, value = 0;
  if (tile.column < n) {
    if constexpr (Formula::reads_columns) {
      for (int v = 0; v < V; ++v) p[v] = columns[tile.column + v];
    }
    for (int64 i = tile.row; i < m; i += tile.stride) {
      const int64 at = i * n + tile.column, row = given.row(i);
      const C weight = given.weight(row);
      const Y* address = given.at(row, tile.column);
      const Pack<T, V> xs = load<V>(x + at);
      const Pack<Y, V> ys = packed ? load<V>(address) : collect<V>(address, given.y_column);
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C output = widen(xs.at[v]), target = C(widen(ys.at[v]));
        const C d = factor * Formula::slope(output, target, weight, p[v]);
        value += Formula::value(output, target, weight, p[v]);
        pack.at[v] = Narrow<T>::from(d);
        sum[v] += d;
      }
      store<V>(D + at, pack);
    }
  }
  add_grid_sum(value, J, partials, counters);
  if (db)
    column_sums<V>(sum, shared, db, partials + gridDim.x * gridDim.y, counters + 1, n, accumulate);
}

// ℓ = log Σ exp(s - max) - (s_y - max), D = gain k (softmax(s) - onehot(y)), one warp per row:
// blocks of (32, warps) threads, with warps * n numbers of shared memory if db is computed. Targets
// are class numbers (labels) or distributions. A row adds at most `most` to J (infinity: no limit).
// One exponential, the label's or the largest, is kept out of `rest`, the sum of the others, so
// that neither log(1 + rest) nor 1 - softmax loses digits. With label smoothing or class weights
// the target y becomes t = c (kept y + spread) / Σ c y, with c from `columns`, or 1 without them.
template <class T, class Y, class W, bool mixes = false>
__global__ void softmax_cross_entropy(const T* S, const Slot* slot, Control* control, const Y* y,
                                      const W* w, int weighted, int labels, const Compute<T>* scale,
                                      const Compute<T>* gain, T* D, Compute<T>* db, Compute<T>* J,
                                      Compute<T>* partials, unsigned* counters, int64 first,
                                      int64 m, int64 n, int accumulate, Compute<T> most,
                                      Compute<T> kept, Compute<T> spread,
                                      const Compute<T>* columns) {
  using C = Compute<T>;
  const Targets<Y, W, C> given(slot, control, y, w, weighted, scale, first, labels ? 1 : n);
  DYNAMIC_SHARED(C, shared);
  const int lane = threadIdx.x, warps = blockDim.y;
  C* sums = shared + threadIdx.y * n;
  if (db) {
    for (int64 c = lane; c < n; c += 32) sums[c] = 0;
  }
  const C factor = gain ? *gain : C(1);
  C value = 0;
  for (int64 i = int64(blockIdx.x) * warps + threadIdx.y; i < m; i += int64(gridDim.x) * warps) {
    const T* s = S + i * n;
    const int64 row = given.row(i);
    const Y* target = given.at(row, 0);
    C top = widen(s[0]), rest = 0, entry = 0, whole = 1;
    int64 apart = 0;
    for (int64 c = lane; c < n; c += 32) {
      const C x = widen(s[c]);
      if (x > top) apart = c;
      top = maximum(top, x);
    }
    const C largest = warp_maximum(top);
    if (labels) {
      apart = int64(widen(*target));
      if (apart < 0 || apart >= n) {
        report(control, BAD_LABEL);
        apart = 0;
      }
      if (!mixes) entry = C(widen(s[apart])) - largest;
    } else {
      apart = -warp_maximum(top == largest ? -apart : -n);
    }
    if (!labels && !mixes) {
      whole = 0;
      for (int64 c = lane; c < n; c += 32) {
        const C share = C(widen(target[c * given.y_column]));
        entry += share * (C(widen(s[c])) - largest);
        whole += share;
      }
      entry = warp_sum(entry);
      whole = warp_sum(whole);
    }
    C unit = 1;
    const auto share_of = [&](int64 c) {
      const C share = labels ? C(c == apart) : C(widen(target[c * given.y_column]));
      if constexpr (mixes) return unit * (columns ? columns[c] : C(1)) * (kept * share + spread);
      return share;
    };
    if constexpr (mixes) {
      if (columns) {
        C weight = 0;
#pragma unroll 1  // registers: two blocks are to fit a multiprocessor
        for (int64 c = lane; c < n; c += 32)
          weight += columns[c] * (labels ? C(c == apart) : C(widen(target[c * given.y_column])));
        weight = warp_sum(weight);
        unit = weight > C(0) ? C(1) / weight : C(1);
      }
      whole = entry = 0;
#pragma unroll 1
      for (int64 c = lane; c < n; c += 32) {
        const C share = share_of(c);
        entry += share * (C(widen(s[c])) - largest);
        whole += share;
      }
      entry = warp_sum(entry);
      whole = warp_sum(whole);
    }
    for (int64 c = lane; c < n; c += 32) {
      if (c != apart) rest += exp(C(widen(s[c])) - largest);
    }
    rest = warp_sum(rest);
    const C own = labels ? exp(C(widen(s[apart])) - largest) : C(1), more = rest + (own - C(1)),
            sum = more + C(1);
    // D may be S: every lane has read the label's entry (a shuffle alone orders no memory)
    __syncwarp();
    const C weight = given.weight(row);
    if (lane == 0) value += weight * minimum(whole * log1p(more) - entry, most);
    for (int64 c = lane; c < n; c += 32) {
      const C share = share_of(c);
      const C numerator =
          c == apart ? (whole - share) * own - share * rest : whole * exp(C(widen(s[c])) - largest);
      const C d = factor * weight * (numerator / sum - (c == apart ? C(0) : share));
      D[i * n + c] = Narrow<T>::from(d);
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
    for (unsigned block = 0; block < gridDim.x; ++block)
      sum += load_fresh(partials + block * n + c);
    db[c] = sum;
  }
}
