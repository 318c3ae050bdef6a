// Z = σ(S + b), over (m, n) row-major. S + b is written back if the slope reads it (keep). Z may be
// S, b may be null.
#include "dropout.cuh"
#include "parameter.cuh"
#include "reduce.cuh"

template <class T, int V, bool keep, class Sigma, class Drop>
__device__ __forceinline__ void activate(T* S, const Compute<T>* b, T* Z, int64 m, int64 n,
                                         const Tile<V>& tile, const Sigma& sigma,
                                         const Drop& drop) {
  using C = Compute<T>;
  constexpr int ROWS = 4;  // rows in flight
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
        z.at[v] = drop(Narrow<T>::from(sigma.value(s, v)), row, v);
      }
      if (keep) store<V>(S + row * n + tile.column, kept);
      store<V>(Z + row * n + tile.column, z);
    }
  }
}

template <class T, class Formula, int V, bool keep>
__global__ void bias_activation(T* S, const Compute<T>* b, T* Z, int64 m, int64 n) {
  const Tile<V> tile;
  if (tile.column < n) activate<T, V, keep>(S, b, Z, m, n, tile, Fixed<Formula>(), NoMask());
}

// The same with a learned parameter: one for each column (each = 1) or one for all (each = 0).
template <class T, class Formula, int V, bool keep>
__global__ void bias_activation_learned(T* S, const Compute<T>* b, T* Z, int64 m, int64 n,
                                        const Compute<T>* a, int each) {
  const Tile<V> tile;
  if (tile.column < n) {
    activate<T, V, keep>(S, b, Z, m, n, tile, Learned<Formula, Compute<T>, V>(a, each, tile.column),
                         NoMask());
  }
}

// The same followed by dropout: Formula::value gives σ / (1 - p), and a draw below `threshold`
// drops an entry. `first` is the first row of S within the batch, counted from the slot's first
// row.
template <class T, class Formula, int V, bool keep>
__global__ void bias_activation_dropout(T* S, const Compute<T>* b, T* Z, int64 m, int64 n,
                                        const Slot* slot, int64 first, unsigned key,
                                        unsigned threshold) {
  const Tile<V> tile;
  if (tile.column < n) {
    activate<T, V, keep>(S, b, Z, m, n, tile, Fixed<Formula>(),
                         Mask<V>(slot, first, key, threshold, tile.column));
  }
}

template <class T, class Formula, int V, bool keep>
__global__ void bias_activation_learned_dropout(T* S, const Compute<T>* b, T* Z, int64 m, int64 n,
                                                const Compute<T>* a, int each, const Slot* slot,
                                                int64 first, unsigned key, unsigned threshold) {
  const Tile<V> tile;
  if (tile.column < n) {
    activate<T, V, keep>(S, b, Z, m, n, tile, Learned<Formula, Compute<T>, V>(a, each, tile.column),
                         Mask<V>(slot, first, key, threshold, tile.column));
  }
}
