// Z = σ(S + b), over (m, n) row-major. S + b is written back where the slope reads it (keep); Z may be S, b may be null.
#include "reduce.cuh"

template <class T, class Formula, int V, bool keep>
__global__ void bias_activation(T* S, const Compute<T>* b, T* Z, int64 m, int64 n) {
  using C = Compute<T>;
  constexpr int ROWS = 4;  // rows in flight
  const Tile<V> tile;
  if (tile.column >= n) return;
  C bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = b ? b[tile.column + v] : C(0);
  for (int64 first = tile.row; first < m; first += ROWS * tile.stride) {
    Pack<T, V> packs[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64 row = first + i * tile.stride;
      if (row < m) packs[i] = load<V>(S + row * n + tile.column);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64 row = first + i * tile.stride;
      if (row >= m) break;
      Pack<T, V> kept, z;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C s = widen(packs[i].at[v]) + bias[v];
        kept.at[v] = Narrow<T>::from(s);
        z.at[v] = Narrow<T>::from(Formula::value(s));
      }
      if (keep) store<V>(S + row * n + tile.column, kept);
      store<V>(Z + row * n + tile.column, z);
    }
  }
}
