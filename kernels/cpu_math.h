// exp, expm1, log, log1p and tanh of a float or a double, without branches, tables and calls, so
// that loops that call them become vectors; sqrt, sin, cos and pow are the compiler's own. Every fused
// multiply-add is written out: with -ffp-contract=off an entry has the same bits whether it is part
// of a vector or of what remains of a loop. The errors in units in the last place are at most 1.1,
// of expm1 1.5 and of tanh 2, subnormal results included; tests/backends/compiled/test_math.py
// measures them and refits the coefficients.
//
// The reductions are in Muller, Elementary Functions, 3rd edition, 2016, chapter 11 (Cody and
// Waite, Tang). Intervals are not centred, so that no more than one bit cancels where a power of
// two joins in: e^r and log's 1 + f lie in [3/4, 3/2].
#pragma once

#define MLP_INLINE inline __attribute__((always_inline))

namespace mlp {
namespace cpu_math {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
MLP_INLINE float mul_add(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
MLP_INLINE double mul_add(double x, double y, double z) { return __builtin_fma(x, y, z); }
#else
template <class F>
MLP_INLINE F mul_add(F x, F y, F z) {
  return x * y + z;
}
#endif

// The format of F; log 2 in two parts, of which k times the first is exact; where e^x is infinite
// and e^-x 0; where tanh is 1; and three polynomials, the constant first:
// (e^r - 1 - r) / r^2, (log(1 + f) - f) / f^2 and, in r^2, (tanh(r) / r - 1) / r^2.
template <class F>
struct Of;
template <>
struct Of<float> {
  using Bits = unsigned;
  static constexpr Bits digits = 23, bias = 127;
  static constexpr float ln2[] = {0.693145751953125f, 1.42860682e-6f};
  static constexpr float exp_end = 104, tanh_end = 9.1f;
  static constexpr float exp[] = {0.500000367f, 0.166666581f, 0.0416515171f, 0.00834746906f,
                                  0.00152003805f};
  static constexpr float log[] = {-0.499999964f,  0.333333286f, -0.25000506f,  0.200010638f,
                                  -0.166479077f,  0.142302827f, -0.127239031f, 0.120809889f,
                                  -0.0992966159f, 0.0429205487f};
  static constexpr float tanh[] = {-0.333332159f, 0.133227336f, -0.0512310241f};
};
template <>
struct Of<double> {
  using Bits = unsigned long long;
  static constexpr Bits digits = 52, bias = 1023;
  static constexpr double ln2[] = {0.69314718055989033, 5.4979230187083712e-14};
  static constexpr double exp_end = 746, tanh_end = 19.1;
  static constexpr double exp[] = {0.5,
                                   0.16666666666666667,
                                   0.041666666666669022,
                                   0.0083333333333321975,
                                   0.0013888888887637359,
                                   0.00019841269851723671,
                                   2.4801590045740792e-5,
                                   2.7557287408374716e-6,
                                   2.7554649040740704e-7,
                                   2.5090611585637892e-8,
                                   2.1845076733236802e-9};
  static constexpr double log[] = {
      -0.49999999999999891,  0.33333333333333184,  -0.25000000000058481,  0.20000000000129261,
      -0.16666666657577131,  0.14285714257845919,  -0.12500000618293113,  0.11111113596563892,
      -0.099999792294946545, 0.090907980779684169, -0.083336518981086051, 0.076949626128913186,
      -0.071424732855099897, 0.066337744655719029, -0.061974187978671588, 0.060438732987158662,
      -0.061559500758175345, 0.055802921934735712, -0.03452720268966359,  0.010028885988197206};
  static constexpr double tanh[] = {
      -0.33333333333332421,   0.13333333332988442,   -0.053968253526691175, 0.02186946169603114,
      -0.0088623610090805424, 0.0035763993926567318, -0.0013076248201137564};
};
template <class F>
using Bits = typename Of<F>::Bits;

template <class To, class From>
MLP_INLINE To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
template <class F>
MLP_INLINE Bits<F> sign_of(F x) {
  return as<Bits<F>>(x) & ~(~Bits<F>(0) >> 1);
}
template <class F>
MLP_INLINE F with_sign(F x, Bits<F> sign) {
  return as<F>(as<Bits<F>>(x) | sign);
}
// 2^(biased - bias); bits above the exponent's are lost.
template <class F>
MLP_INLINE F power_of_two(Bits<F> biased) {
  return as<F>(biased << Of<F>::digits);
}
template <int I = 0, class F, int N>
MLP_INLINE F polynomial(const F (&c)[N], F x) {
  if constexpr (I == N - 1) {
    return c[I];
  } else {
    return mul_add(polynomial<I + 1>(c, x), x, c[I]);
  }
}
// min(|x|, end); NaN remains NaN.
template <class F>
MLP_INLINE F size_of(F x, F end) {
  x = as<F>(as<Bits<F>>(x) & (~Bits<F>(0) >> 1));
  return x > end ? end : x;
}

// -- e^x ------------------------------------------------------------------------------------------

template <class F>
struct Split {
  Bits<F> k;  // plus `added`, under some high bits
  F r;
};
// e^(N x) = 2^k e^(N r), with k = N x / log 2 - later rounded to an integer: adding a large number
// does that, and leaves k in the sum's lowest bits.
template <int N, class F>
MLP_INLINE Split<F> split(F x, F later, Bits<F> added) {
  const F large = F(Bits<F>(3) << (Of<F>::digits - 1)) + F(added);
  const F t = mul_add(x, F(N * 1.4426950408889634), -later) + large;
  const F k = t - large;
  return {as<Bits<F>>(t), mul_add(-k, Of<F>::ln2[1] / N, mul_add(-k, Of<F>::ln2[0] / N, x))};
}

// e^x = first second (1 + p), where first and second are powers of two that F can represent.
template <class F>
struct Exponential {
  F first, second, p;
};
template <class F>
MLP_INLINE Exponential<F> exponential(F x) {
  using O = Of<F>;
  x = with_sign(size_of(x, O::exp_end), sign_of(x));
  const Split<F> s = split<1>(x, F(0.08496250072115618), 2 * O::bias);
  const Bits<F> half = s.k >> 1;
  return {power_of_two<F>(half), power_of_two<F>(s.k - half),
          mul_add(s.r * s.r, polynomial(O::exp, s.r), s.r)};
}

// -- log ------------------------------------------------------------------------------------------

// log(x + One) = k log 2 + log(1 + f) with x + One = 2^k (1 + f). The rounded sum gives only k:
// f = 2^-k x + (2^-k One - 1) is rounded once. 2^-k can be subnormal, scale = 2^(2-k) is not.
// Infinity and NaN pass through f and the polynomial, whose last coefficient must be positive.
// `shift` is subtracted from k.
template <int One, class F>
MLP_INLINE F logarithm(F x, F shift) {
  using O = Of<F>;
  const F u = One ? x + 1 : x, large = F(Bits<F>(1) << O::digits);
  const Bits<F> k = (as<Bits<F>>(u) + (as<Bits<F>>(F(1)) - as<Bits<F>>(F(0.75)))) >> O::digits;
  const F scale = power_of_two<F>(2 * O::bias + 2 - k);
  const F f = mul_add(x * scale, F(0.25), One ? mul_add(scale, F(0.25), F(-1)) : F(-1));
  const F power = as<F>(as<Bits<F>>(large) | k) - (large + F(O::bias) + shift);
  const F tail = mul_add(f * f, polynomial(O::log, f), power * O::ln2[1]);
  const F y = mul_add(power, O::ln2[0], f + tail);
  return u <= 0 ? (u < 0 ? F(__builtin_nan("")) : -F(__builtin_inf())) : y;
}

}  // namespace cpu_math

// -- the functions of formulas --------------------------------------------------------------------

// The last product rounds to a subnormal number, 0 or infinity.
template <class F>
MLP_INLINE F exp(F x) {
  const cpu_math::Exponential<F> e = cpu_math::exponential(x);
  return cpu_math::mul_add(e.first, e.p, e.first) * e.second;
}

// e^x - 1 = second (first p + (first - 1 / second)); the sign is for -0.
template <class F>
MLP_INLINE F expm1(F x) {
  using namespace cpu_math;
  const Exponential<F> e = exponential(x);
  const F one = as<F>(as<Bits<F>>(F(1)) * 2 - as<Bits<F>>(e.second));
  return with_sign(mul_add(e.first, e.p, e.first - one) * e.second, sign_of(x));
}

// Numbers that are subnormal or almost are first multiplied by 2^64.
template <class F>
MLP_INLINE F log(F x) {
  using O = cpu_math::Of<F>;
  const F smallest = cpu_math::power_of_two<F>(2), up = cpu_math::power_of_two<F>(O::bias + 64);
  const bool small = x < smallest;
  return cpu_math::logarithm<0>(small ? x * up : x, small ? F(64) : F(0));
}

template <class F>
MLP_INLINE F log1p(F x) {
  using namespace cpu_math;
  return with_sign(logarithm<1>(x, F(0)), sign_of(x));
}

// tanh x = (e^2x - 1) / (e^2x + 1), and e^2x = s (1 + T) / (1 - T) with s = 2^k and T = tanh r. So
// tanh x = top / (top + 2 - 2 T) with top = s - 1 + (s + 1) T, which is 2 T / 2 for small x, and
// where top is large its error cancels.
template <class F>
MLP_INLINE F tanh(F x) {
  using namespace cpu_math;
  using O = Of<F>;
  const Split<F> e = split<2>(size_of(x, O::tanh_end), F(0.25), O::bias);
  const F s = power_of_two<F>(e.k), r2 = e.r * e.r;
  const F T = mul_add(e.r * r2, polynomial(O::tanh, r2), e.r);
  const F top = mul_add(s + 1, T, s - 1);
  return with_sign(top / (top + mul_add(T, F(-2), F(2))), sign_of(x));
}

// x is not negative.
template <class F>
MLP_INLINE F copysign(F x, F sign) {
  return cpu_math::with_sign(x, cpu_math::sign_of(sign));
}
MLP_INLINE double pow(double x, double y) { return __builtin_pow(x, y); }
MLP_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
MLP_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
MLP_INLINE float sin(float x) { return __builtin_sinf(x); }
MLP_INLINE double sin(double x) { return __builtin_sin(x); }
MLP_INLINE float cos(float x) { return __builtin_cosf(x); }
MLP_INLINE double cos(double x) { return __builtin_cos(x); }

}  // namespace mlp
