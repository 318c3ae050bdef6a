// Number types and 16-byte accesses. Half types are for storage only: formulas run in Compute<T>,
// float or double.
#pragma once
#include "functions.cuh"

using int64 = long long;

struct half_t {
  unsigned short bits;
};
struct bfloat16_t {
  unsigned short bits;
};

template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<half_t> {
  using type = float;
};
template <>
struct ComputeOf<bfloat16_t> {
  using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// -- conversions; tests/backends/cuda/emulator gives the three instructions below in plain C++ --

#ifndef CUDA_ON_CPU
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ unsigned short float_to_bfloat16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
#define DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char bytes[]; \
  type* name = reinterpret_cast<type*>(bytes)
#endif

template <class T>
__device__ __forceinline__ T widen(T x) {
  return x;
}
__device__ __forceinline__ float widen(half_t x) { return half_to_float(x.bits); }
__device__ __forceinline__ float widen(bfloat16_t x) {
  return bits_to_float(unsigned(x.bits) << 16);
}

template <class To>
struct Narrow {
  template <class C>
  static __device__ __forceinline__ To from(C x) {
    return To(x);
  }
};
template <>
struct Narrow<half_t> {
  template <class C>
  static __device__ __forceinline__ half_t from(C x) {
    return {float_to_half(float(x))};
  }
};
template <>
struct Narrow<bfloat16_t> {
  template <class C>
  static __device__ __forceinline__ bfloat16_t from(C x) {
    return {float_to_bfloat16(float(x))};
  }
};

// -- V neighbours in one access: 16 bytes where V fills them --

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T at[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* address) {
  return *reinterpret_cast<const Pack<T, V>*>(address);
}
template <int V, class T>
__device__ __forceinline__ void store(T* address, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(address) = pack;
}
// Loads V entries that are `stride` apart.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> collect(const T* address, int64 stride) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.at[v] = address[v * stride];
  return pack;
}
// Returns whether every V-th entry of rows that are `stride` entries apart may be loaded as a pack.
template <int V, class T>
__device__ __forceinline__ bool is_aligned(const T* address, int64 stride) {
  return stride % V == 0 &&
         reinterpret_cast<unsigned long long>(address) % alignof(Pack<T, V>) == 0;
}
template <class T>
__device__ __forceinline__ T load_fresh(const T* address) {  // what another block has just written
  return *reinterpret_cast<const volatile T*>(address);
}

// -- the normal distribution --

// exp(-u²/2), with u²/2 in two parts, because rounding it would cost u²/2 units in the last place;
// u is limited to 40, where the result is 0
template <class C>
__device__ __forceinline__ C bell(C u) {
  const C square = u * u;
  return exp(C(-0.5) * square) * (C(1) - C(0.5) * fma(u, u, -square));
}
template <class C>
__device__ __forceinline__ C normpdf(C x) {
  return C(0.3989422804014327) * bell(minimum(absolute(x), C(40)));
}
template <class C>
__device__ __forceinline__ C normal_cdf(C x) {  // in fewer registers than CUDA's own
  const C u = minimum(absolute(x), C(40)),
          tail = C(0.5) * erfcx(C(0.7071067811865476) * u) * bell(u);
  return x > C(0) ? C(1) - tail : tail;
}
