// Sums in a fixed order, and the parts of a pass that threads share, for the CPU.
#pragma once

struct Range {
  int64 begin, end;
};

// The part of a pass that a thread does. It determines no bits of the results.
struct Part {
  int64 index, count;
  // Returns its share of n entries, whose ends are multiples of `unit`, but for n.
  Range of(int64 n, int64 unit = 1) const {
    if (count == 1) return {0, n};
    const int64 units = (n + unit - 1) / unit, end = units * (index + 1) / count * unit;
    return {units * index / count * unit, end < n ? end : n};
  }
};

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
