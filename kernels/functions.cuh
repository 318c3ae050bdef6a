// The functions of formulas that C++ lacks, on a GPU and on the CPU.
#pragma once

template <class C>
__device__ __forceinline__ C maximum(C x, C y) {
  return x > y || x != x ? x : y;
}  // NaN passes, both sides
template <class C>
__device__ __forceinline__ C minimum(C x, C y) {
  return x < y || x != x ? x : y;
}
template <class C>
__device__ __forceinline__ C positive(C x) {
  return x > C(0) ? C(1) : C(0);
}
template <class C>
__device__ __forceinline__ C sign(C x) {
  return x != x ? x : C(x > C(0)) - C(x < C(0));
}
template <class C>
__device__ __forceinline__ C kept(C x) {
  return x == C(0) && copysign(C(1), x) < C(0) ? C(0) : C(1);
}
template <class C>
__device__ __forceinline__ C absolute(C x) {
  return x < C(0) ? -x : x;
}
template <class C>
__device__ __forceinline__ bool is_finite(C x) {
  return x - x == C(0);
}
