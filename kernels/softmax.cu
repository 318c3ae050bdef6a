// Softmax over the rows of (m, n), its logarithm, and their gradients, one warp per row: blocks of
// (32, warps) threads.
#include "reduce.cuh"

// Z = exp(S + b - max) / Σ exp(S + b - max); Z may be S, b may be null.
template <class T>
__global__ void softmax(const T* S, const Compute<T>* b, T* Z, int64 m, int64 n) {
  using C = Compute<T>;
  for (int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y; row < m;
       row += int64(gridDim.x) * blockDim.y) {
    const T* s = S + row * n;
    C top = C(widen(s[0])) + (b ? b[0] : C(0)), sum = 0;
    for (int64 c = threadIdx.x; c < n; c += 32)
      top = maximum(top, C(widen(s[c])) + (b ? b[c] : C(0)));
    top = warp_maximum(top);
    for (int64 c = threadIdx.x; c < n; c += 32)
      sum += exp(C(widen(s[c])) + (b ? b[c] : C(0)) - top);
    sum = warp_sum(sum);
    for (int64 c = threadIdx.x; c < n; c += 32) {
      Z[row * n + c] = Narrow<T>::from(exp(C(widen(s[c])) + (b ? b[c] : C(0)) - top) / sum);
    }
  }
}

// D = Z ⊙ (G - Σ_columns G ⊙ Z), the Jacobian applied; D may be G or Z.
template <class T>
__global__ void softmax_gradient(const T* G, const T* Z, T* D, int64 m, int64 n) {
  using C = Compute<T>;
  for (int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y; row < m;
       row += int64(gridDim.x) * blockDim.y) {
    const T *g = G + row * n, *z = Z + row * n;
    C dot = 0;
    for (int64 c = threadIdx.x; c < n; c += 32) dot += C(widen(g[c])) * C(widen(z[c]));
    dot = warp_sum(dot);
    for (int64 c = threadIdx.x; c < n; c += 32) {
      D[row * n + c] = Narrow<T>::from(C(widen(z[c])) * (C(widen(g[c])) - dot));
    }
  }
}

// Z = s - log Σ exp(s), s = S + b - max; the 1 of the largest entry is left to log1p.
template <class T>
__global__ void log_softmax(const T* S, const Compute<T>* b, T* Z, int64 m, int64 n) {
  using C = Compute<T>;
  for (int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y; row < m;
       row += int64(gridDim.x) * blockDim.y) {
    const T* s = S + row * n;
    C top = C(widen(s[0])) + (b ? b[0] : C(0)), sum = 0, largest = 0;
    for (int64 c = threadIdx.x; c < n; c += 32)
      top = maximum(top, C(widen(s[c])) + (b ? b[c] : C(0)));
    top = warp_maximum(top);
    for (int64 c = threadIdx.x; c < n; c += 32) {
      const C below = C(widen(s[c])) + (b ? b[c] : C(0)) - top;
      if (below == C(0)) largest += C(1);
      else sum += exp(below);
    }
    const C others = warp_sum(largest) - C(1), log_sum = log1p(warp_sum(sum) + others);
    for (int64 c = threadIdx.x; c < n; c += 32) {
      Z[row * n + c] = Narrow<T>::from(C(widen(s[c])) + (b ? b[c] : C(0)) - top - log_sum);
    }
  }
}

// D = G - exp(Z) Σ_columns G, the Jacobian's transpose applied; D may be G or Z.
template <class T>
__global__ void log_softmax_gradient(const T* G, const T* Z, T* D, int64 m, int64 n) {
  using C = Compute<T>;
  for (int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y; row < m;
       row += int64(gridDim.x) * blockDim.y) {
    const T *g = G + row * n, *z = Z + row * n;
    C sum = 0;
    for (int64 c = threadIdx.x; c < n; c += 32) sum += C(widen(g[c]));
    sum = warp_sum(sum);
    for (int64 c = threadIdx.x; c < n; c += 32) {
      D[row * n + c] = Narrow<T>::from(C(widen(g[c])) - exp(C(widen(z[c]))) * sum);
    }
  }
}
