// The parameter of a formula: none, or the learned parameter a of its column.
#pragma once
#include "numbers.cuh"

template <class Formula>
struct Fixed {
  static constexpr bool learned = false;
  template <class C>
  __device__ C value(C s, int) const {
    return Formula::value(s);
  }
  template <class C>
  __device__ C gradient(C g, C s, C z, int) const {
    return Formula::gradient(g, s, z);
  }
};

// The parameters of V columns from `column` on; `each` is 1 if every column has its own a, 0 if the
// layer has one.
template <class Formula, class C, int V>
struct Learned {
  static constexpr bool learned = true;
  C a[V];
  __device__ Learned(const C* from, int each, int64 column) {
#pragma unroll
    for (int v = 0; v < V; ++v) a[v] = from[each * (column + v)];
  }
  __device__ C value(C s, int v) const { return Formula::value(s, a[v]); }
  __device__ C gradient(C g, C s, C z, int v) const { return Formula::gradient(g, s, z, a[v]); }
  __device__ C by_parameter(C g, C s, C z, int v) const {
    return Formula::by_parameter(g, s, z, a[v]);
  }
};
