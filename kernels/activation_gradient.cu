// D = G ⊙ σ'(S, Z) and db = Σ_rows D (or +=), over (m, n) row-major, in one pass. D may be G or Z, or null where only db is
// wanted; db may be null.
#include "reduce.cuh"

template <class T, class Formula, int V, int threads>
__global__ void activation_gradient(const T* G, const T* S, const T* Z, T* D, Compute<T>* db, Compute<T>* partials,
                                    unsigned* counters, int64 m, int64 n, int accumulate) {
  using C = Compute<T>;
  constexpr int ROWS = 4;  // rows in flight
  __shared__ C shared[threads * V];
  const Tile<V> tile;
  C sum[V] = {};
  if (tile.column < n) {
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
          const C d = Formula::gradient(C(widen(g[i].at[v])), Formula::reads_s ? C(widen(s[i].at[v])) : C(0),
                                        Formula::reads_z ? C(widen(z[i].at[v])) : C(0));
          pack.at[v] = Narrow<T>::from(d);
          sum[v] += d;
        }
        if (D) store<V>(D + row * n + tile.column, pack);
      }
    }
  }
  if (db) column_sums<V>(sum, shared, db, partials, counters, n, accumulate);
}
