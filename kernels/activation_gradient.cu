// D = G ⊙ σ'(S, Z) and db = Σ_rows D (or +=), over (m, n) row-major, in one pass. D may be G or Z;
// D or db may be null.
#include "parameter.cuh"
#include "reduce.cuh"

// Computes D in a thread's V columns, their share of db and, for a learned parameter, of da.
template <class T, class Formula, int V, class Sigma>
__device__ __forceinline__ void descend(const T* G, const T* S, const T* Z, T* D, int64 m, int64 n,
                                        const Tile<V>& tile, const Sigma& sigma,
                                        Compute<T> (&sum)[V], Compute<T> (&share)[V]) {
  using C = Compute<T>;
  constexpr int ROWS =
      sizeof(C) == 8 && Formula::reads_s && Formula::reads_z ? 2 : 4;  // rows in flight
  for (int64 first = tile.row; first < m; first += ROWS * tile.stride) {
    Pack<T, V> g[ROWS], s[ROWS], z[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64 row = first + i * tile.stride, at = row * n + tile.column;
      if (row >= m) break;
      g[i] = load<V>(G + at);
      if (Formula::reads_s) s[i] = load<V>(S + at);
      if (Formula::reads_z) z[i] = load<V>(Z + at);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64 row = first + i * tile.stride;
      if (row >= m) break;
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C gv = C(widen(g[i].at[v])), sv = Formula::reads_s ? C(widen(s[i].at[v])) : C(0),
                zv = Formula::reads_z ? C(widen(z[i].at[v])) : C(0);
        const C d = sigma.gradient(gv, sv, zv, v);
        pack.at[v] = Narrow<T>::from(d);
        sum[v] += d;
        if constexpr (Sigma::learned) share[v] += sigma.by_parameter(gv, sv, zv, v);
      }
      if (D) store<V>(D + row * n + tile.column, pack);
    }
  }
}

template <class T, class Formula, int V, int threads>
__global__ void activation_gradient(const T* G, const T* S, const T* Z, T* D, Compute<T>* db,
                                    Compute<T>* partials, unsigned* counters, int64 m, int64 n,
                                    int accumulate) {
  using C = Compute<T>;
  __shared__ C shared[threads * V];
  const Tile<V> tile;
  C sum[V] = {}, none[V];
  if (tile.column < n) descend<T, Formula>(G, S, Z, D, m, n, tile, Fixed<Formula>(), sum, none);
  if (db) column_sums<V>(sum, shared, db, partials, counters, n, accumulate);
}

// The same with a learned parameter: one for each column (each = 1) or one for all (each = 0). da =
// Σ G ⊙ ∂z/∂a (or +=) over the entries that share a; da may be null.
template <class T, class Formula, int V, int threads>
__global__ void activation_gradient_learned(const T* G, const T* S, const T* Z, T* D,
                                            Compute<T>* db, Compute<T>* partials,
                                            unsigned* counters, int64 m, int64 n, int accumulate,
                                            const Compute<T>* a, Compute<T>* da, int each) {
  using C = Compute<T>;
  __shared__ C shared[threads * V];
  const Tile<V> tile;
  C sum[V] = {}, share[V] = {};
  if (tile.column < n) {
    descend<T, Formula>(G, S, Z, D, m, n, tile, Learned<Formula, C, V>(a, each, tile.column), sum,
                        share);
  }
  if (db) column_sums<V>(sum, shared, db, partials, counters, n, accumulate);
  if (!da) return;
  partials += gridDim.y * n;  // those of db may still be read by another block
  counters += gridDim.x;
  if (each) {
    column_sums<V>(share, shared, da, partials, counters, n, accumulate);
    return;
  }
  C total[1] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) total[0] += share[v];
  if (grid_sums(total, partials, counters) && thread_number() == 0)
    *da = (accumulate ? *da : C(0)) + total[0];
}
