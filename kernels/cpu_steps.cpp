// Many training steps in one call: the passes and products of a step are called in turn, so nothing
// but their arithmetic takes time. Rows come from the order of the epoch, rates from a table; the
// loop ends before the first update that is not certain to be finite.
#include "arguments.h"
#include "sums.h"

// Copies and casts rows of a matrix: those whose numbers begin at place[2] or, if that is 0, the
// first ones.
template <class T, class Source>
void gather(const Gather<T>& p) {
  const int64* const rows = reinterpret_cast<const int64*>(p.place[2]);
  const Source* const source = static_cast<const Source*>(p.source);
  for (int64 i = 0; i < p.m; ++i) {
    const Source* const from = source + (rows ? rows[i] : i) * p.row;
    T* const to = p.to + i * p.n;
    if (p.column == 1) {
#pragma omp simd
      for (int64 j = 0; j < p.n; ++j) to[j] = T(from[j]);
    } else {
      for (int64 j = 0; j < p.n; ++j) to[j] = T(from[j * p.column]);
    }
  }
}

// J += l1 Σ|w| + ½ l2 Σ w².
template <class T>
void penalize(const Penalize<T>& p) {
  const T* const w = p.w;
  if (p.l1 != 0) *p.J += p.l1 * total<double>(p.n, [=](int64 i) { return absolute(w[i]); });
  if (p.l2 != 0) {
    *p.J += 0.5 * p.l2 * total<double>(p.n, [=](int64 i) { return double(w[i]) * double(w[i]); });
  }
}

// Returns the norm of a vector. Unless it must be `exact`, its squares may underflow.
template <class T>
double norm_of(const T* g, int64 n, bool exact) {
  constexpr int64 BLOCK = 1024;
  double squares = 0;
  for (int64 first = 0; first < n && !exact; first += BLOCK) {
    const int64 width = n - first < BLOCK ? n - first : BLOCK;
    const T* const part = g + first;
    squares += double(total<T>(width, [=](int64 i) { return part[i] * part[i]; }));
  }
  if (exact || !is_finite(squares)) {
    squares = total<double>(n, [=](int64 i) { return double(g[i]) * double(g[i]); });
  }
  return __builtin_sqrt(squares);
}

struct Call {
  void (*run)(const void*);
  const void* arguments;
};

// Runs up to p.steps steps; p.done counts them. place[0] is the number of the first step, place[2]
// the address of its row numbers. A segment is a part of the flat vectors with its own update:
// `settings` has the numbers of its formulas, `factors` the factor of its rate and its missed
// updates, and `numbers` the addresses of the scalars that its update reads. The bounds are as in
// engine/lanes.py.
template <class T, class Formula>
void run_steps(const Steps<T>& p) {
  const Call* const calls = static_cast<const Call*>(p.calls);
  for (int64 step = 0; step < p.steps; ++step) {
    *p.J = 0;
    for (int64 i = 0; i < p.gradient_calls; ++i) calls[i].run(calls[i].arguments);
    const double J = *p.J, norm = norm_of(p.g, p.n, p.clip_norm < __builtin_inf());
    if (!is_finite(J) || !is_finite(norm)) return;
    const double clip = p.clip_norm < norm ? p.clip_norm / norm : 1.0,
                 largest = 2 * (clip * norm) + p.floor;
    double reach = *p.reach;
    for (int64 i = 0; i < p.segments; ++i) {
      double* const settings = p.settings + i * p.settings_each;
      settings[0] = p.rates[step] * p.factors[2 * i];
      const double t = p.updates + step + 1 - p.factors[2 * i + 1];
      double k[Formula::scalars + 1], after, change;
      Formula::fold(settings, t < 1 ? 1 : t, clip, 1, true, k);
      for (int j = 0; j < Formula::scalars; ++j) *p.numbers[i * Formula::scalars + j] = T(k[j]);
      Formula::bounds(settings, largest, *p.reach, after, change);
      if (!(largest < p.roots && change < p.halves)) return;
      reach = maximum(reach, after);
    }
    for (int64 i = 0; i < p.segments; ++i) {
      const Call& update = calls[p.gradient_calls + i];
      update.run(update.arguments);
    }
    *p.reach = reach;
    p.losses[step] = J;
    p.place[0] += 1;
    p.place[2] += p.rows * int64(sizeof(int64));
    *p.done = step + 1;
  }
}
