// Sums in a fixed order, for the CPU.
#pragma once

// Returns Σ f(j) over 0 ≤ j < n, in sixteen interleaved sums.
template <class Sum, class F>
inline Sum total(int64 n, const F& f) {
  Sum lane[16] = {};
  int64 first = 0;
  for (; first + 16 <= n; first += 16) {
#pragma omp simd
    for (int64 j = 0; j < 16; ++j) lane[j] += Sum(f(first + j));
  }
#pragma omp simd
  for (int64 j = 0; j < n - first; ++j) lane[j] += Sum(f(first + j));
  for (int64 half = 8; half; half /= 2) {
    for (int64 j = 0; j < half; ++j) lane[j] += lane[j + half];
  }
  return lane[0];
}
