// One pass over memory for each operation of a step between its products, on the CPU. All matrices
// are row-major and contiguous. A pass takes its arguments as one struct of arguments.h; arrays that
// its operation may alias are read before they are written, entry by entry.
//
// Loops are vectorised by the compiler and give each entry the same bits at any position. Sums have
// a fixed order, whatever the compiler, the processor and the arrays' alignment.
#include "arguments.h"
#include "hash.cuh"
#include "sums.h"

// Rows of n columns that stay in a core's first cache.
inline int64 cached_rows(int64 n) {
  const int64 rows = 4096 / n;
  return rows < 4 ? 4 : rows;
}

// Sets db = Σ_rows D, or adds to it, in these columns. Rows are added four at a time, and their sums
// in blocks.
template <class T>
void sum_rows(const T* D, int64 m, int64 n, Range columns, T* db, bool more) {
  constexpr int64 TILE = 512;
  T part[TILE];
  for (int64 first = columns.begin; first < columns.end; first += TILE) {
    const int64 width = columns.end - first < TILE ? columns.end - first : TILE;
    for (int64 j = 0; j < width; ++j) part[j] = 0;
    int64 i = 0;
    for (; i + 4 <= m; i += 4) {
      const T *p = D + i * n + first, *q = p + n, *r = q + n, *s = r + n;
#pragma omp simd
      for (int64 j = 0; j < width; ++j) part[j] += (p[j] + q[j]) + (r[j] + s[j]);
    }
    for (; i < m; ++i) {
      const T* p = D + i * n + first;
#pragma omp simd
      for (int64 j = 0; j < width; ++j) part[j] += p[j];
    }
    T* sum = db + first;
#pragma omp simd
    for (int64 j = 0; j < width; ++j) sum[j] = more ? sum[j] + part[j] : part[j];
  }
}

// db = Σ_rows D (or +=) and J += Σ sums, if they are not null: what `descend` and the losses do
// themselves unless threads share them.
template <class T>
void sum_up(const SumUp<T>& p, const Part& part) {
  const int64 rows = cached_rows(p.n);
  if (p.db) {
    const Range columns = part.of(p.n, 16);
    bool more = p.accumulate;
    for (int64 first = 0; first < p.m; first += rows, more = true) {
      const int64 count = p.m - first < rows ? p.m - first : rows;
      sum_rows(p.D + first * p.n, count, p.n, columns, p.db, more);
    }
  }
  if (p.sums && part.index == 0) {
    for (int64 i = 0; i * rows < p.m; ++i) *p.J += p.sums[i];
  }
}

// -- layers --

// S += b and Z = σ(S). `keeps`: S is not Z. A learned parameter is a[0], or a[j] if there are `each`.
template <class T, class Formula, bool biased, bool keeps, bool learned, bool each>
void activate(const Activate<T>& p, const Part& part) {
  const Range rows = part.of(p.m);
  for (int64 i = rows.begin; i < rows.end; ++i) {
    T *const s = p.S + i * p.n, *const z = p.Z + i * p.n;
#pragma omp simd
    for (int64 j = 0; j < p.n; ++j) {
      T x = s[j];
      if constexpr (biased) x += p.b[j];
      if constexpr (keeps) s[j] = x;
      if constexpr (learned) {
        z[j] = Formula::value(x, p.a[each ? j : 0]);
      } else {
        z[j] = Formula::value(x);
      }
    }
  }
}

// Sets dropped entries of these rows of Z to -0. place[0] is the number of the step, place[1] the
// first row's number in the batch.
template <class T>
void drop(const Activate<T>& p, Range rows) {
  constexpr int64 TILE = 1024;
  unsigned column[TILE];
  const unsigned base = mix(unsigned(p.key) + unsigned(p.place[0])),
                 columns = mix(base + 0x9e3779b9u), threshold = unsigned(p.threshold);
  for (int64 first = 0; first < p.n; first += TILE) {
    const int64 width = p.n - first < TILE ? p.n - first : TILE;
#pragma omp simd
    for (int64 j = 0; j < width; ++j) column[j] = mix(columns + unsigned(first + j));
    for (int64 i = rows.begin; i < rows.end; ++i) {
      T* const z = p.Z + i * p.n + first;
      const unsigned row = mix(base + unsigned(p.place[1] + i));
#pragma omp simd
      for (int64 j = 0; j < width; ++j) {
        z[j] = (scramble(row ^ column[j]) >> 1) < threshold ? T(-0.0) : z[j];
      }
    }
  }
}

template <class T, class Formula, bool biased, bool keeps, bool learned, bool each>
void activate_and_drop(const Activate<T>& p, const Part& part) {
  activate<T, Formula, biased, keeps, learned, each>(p, part);
  drop(p, part.of(p.m));
}

// D = G ⊙ σ'(S, Z) and db = Σ_rows D (or +=); db may be null.
template <class T, class Formula, bool learned, bool each>
void descend(const Descend<T>& p, const Part& part) {
  const int64 rows = cached_rows(p.n);
  const Range mine = part.of(p.m, rows);
  bool more = p.accumulate;
  for (int64 first = mine.begin; first < mine.end; first += rows, more = true) {
    const int64 count = mine.end - first < rows ? mine.end - first : rows;
    for (int64 i = first; i < first + (each ? count : 1); ++i) {
      const int64 at = i * p.n, width = each ? p.n : count * p.n;
      const T *const g = p.G + at, *const s = p.S + at, *const z = p.Z + at;
      T* const d = p.D + at;
#pragma omp simd
      for (int64 j = 0; j < width; ++j) {
        const T gj = g[j], sj = Formula::reads_s ? s[j] : T(0), zj = Formula::reads_z ? z[j] : T(0);
        if constexpr (learned) {
          d[j] = Formula::gradient(gj, sj, zj, p.a[each ? j : 0]);
        } else {
          d[j] = Formula::gradient(gj, sj, zj);
        }
      }
    }
    if (p.db) sum_rows(p.D + first * p.n, count, p.n, {0, p.n}, p.db, more);
  }
}

// -- losses: J += Σ k ℓ(x, Y), D = k ∂ℓ/∂x and db = Σ_rows D (or +=); db may be null. k is a number
// for each row (k_step = 1) or one for all (0). If threads share a loss, db is null and `sums` gets
// the parts of J, one for each block of rows --

template <class T, class Formula>
void elementwise_loss(const Loss<T>& p, const Part& part) {
  const int64 rows = cached_rows(p.n);
  const Range mine = part.of(p.m, rows);
  const bool flat = !Formula::reads_columns && p.k_step == 0;
  bool more = p.accumulate;
  for (int64 first = mine.begin; first < mine.end; first += rows, more = true) {
    const int64 count = mine.end - first < rows ? mine.end - first : rows;
    double J = 0;
    for (int64 i = first; i < first + (flat ? 1 : count); ++i) {
      const int64 at = i * p.n, width = flat ? count * p.n : p.n;
      const T *const x = p.x + at, *const y = static_cast<const T*>(p.Y) + at, k = p.k[i * p.k_step];
      T* const d = p.D + at;
      J += total<double>(width, [=](int64 j) {
        const T xj = x[j], yj = y[j], c = Formula::reads_columns ? p.columns[j] : T(0);
        d[j] = Formula::slope(xj, yj, k, c);
        return Formula::value(xj, yj, k, c);
      });
    }
    if (p.db) sum_rows(p.D + first * p.n, count, p.n, {0, p.n}, p.db, more);
    (p.sums ? p.sums[first / rows] = J : *p.J += J);
  }
}

template <class T>
T largest(const T* s, int64 n) {
  T top = s[0];
#pragma omp simd reduction(max : top)
  for (int64 j = 0; j < n; ++j) top = s[j] > top ? s[j] : top;
  return top;
}

template <class T>
int64 position(const T* s, int64 n, T top) {
  int64 j = 0;
  while (j < n - 1 && s[j] != top) ++j;
  return j;
}

// The target of a row of cross-entropy: a class number or a distribution, with label smoothing and
// class weights if `mixes`: t = c (kept y + spread) / Σ c y.
template <class T, bool labels, bool mixes>
struct Shares {
  const Loss<T>& p;
  const T* y;
  int64 label;
  T unit = 1;

  Shares(const Loss<T>& p, int64 row, int64 label)
      : p(p), y(labels ? nullptr : static_cast<const T*>(p.Y) + row * p.n), label(label) {
    if (!mixes || !p.columns) return;
    const T weight = total<T>(p.n, [this](int64 j) { return this->p.columns[j] * given(j); });
    unit = weight > 0 ? 1 / weight : T(1);
  }
  T given(int64 j) const { return labels ? T(j == label) : y[j]; }
  T at(int64 j) const {
    if constexpr (!mixes) return given(j);
    return unit * (p.columns ? p.columns[j] : T(1)) * (T(p.kept) * given(j) + T(p.spread));
  }
};

// ℓ = log Σ exp(s - max) Σ t - Σ t (s - max), D = k (softmax(s) Σ t - t). One exponential, the
// label's or the largest, is kept out of `rest`, the sum of the others, so that neither
// log(1 + rest) nor 1 - softmax loses digits.
template <class T, bool labels, bool mixes>
void cross_entropy(const Loss<T>& p, const Part& part) {
  const int64 rows = cached_rows(p.n), n = p.n;
  const Range mine = part.of(p.m, rows);
  bool more = p.accumulate;
  for (int64 first = mine.begin; first < mine.end; first += rows, more = true) {
    const int64 count = mine.end - first < rows ? mine.end - first : rows;
    double J = 0;
    for (int64 i = first; i < first + count; ++i) {
      const T *const s = p.x + i * n, top = largest(s, n), k = p.k[i * p.k_step];
      T* const d = p.D + i * n;
      int64 apart = labels ? static_cast<const int64*>(p.Y)[i] : position(s, n, top);
      apart = apart < 0 ? 0 : apart < n ? apart : n - 1;
      const Shares<T, labels, mixes> shares(p, i, apart);
      T entry = s[apart] - top, whole = 1;
      const T own = exp(entry);
      if constexpr (!labels || mixes) {
        entry = total<T>(n, [&](int64 j) { return shares.at(j) * (s[j] - top); });
        whole = total<T>(n, [&](int64 j) { return shares.at(j); });
      }
      const T rest = total<T>(n, [=](int64 j) {
        d[j] = exp(s[j] - top);
        return j == apart ? T(0) : d[j];
      });
      const T above = rest + (own - 1), sum = above + 1, value = whole * log1p(above) - entry,
              share = shares.at(apart);
      J += double(k * (value > T(p.most) ? T(p.most) : value));
      if constexpr (labels && !mixes) {
        const T factor = k / sum;
#pragma omp simd
        for (int64 j = 0; j < n; ++j) d[j] *= factor;
      } else {
        const T factor = whole / sum;
#pragma omp simd
        for (int64 j = 0; j < n; ++j) d[j] = k * (d[j] * factor - shares.at(j));
      }
      d[apart] = k * (((whole - share) * own - share * rest) / sum);
    }
    if (p.db) sum_rows(p.D + first * n, count, n, {0, n}, p.db, more);
    (p.sums ? p.sums[first / rows] = J : *p.J += J);
  }
}

// S += b and Z = exp(s) / Σ exp(s) or, `logarithmic`, s - log Σ exp(s), of s = S - max.
template <class T, bool biased, bool logarithmic>
void softmax(const Activate<T>& p, const Part& part) {
  const Range rows = part.of(p.m);
  for (int64 i = rows.begin; i < rows.end; ++i) {
    T *const s = p.S + i * p.n, *const z = p.Z + i * p.n;
    if constexpr (biased) {
#pragma omp simd
      for (int64 j = 0; j < p.n; ++j) s[j] += p.b[j];
    }
    const T top = largest(s, p.n);
    if constexpr (logarithmic) {
      const int64 apart = position(s, p.n, top);
      const T rest = total<T>(p.n, [=](int64 j) { return j == apart ? T(0) : exp(s[j] - top); }),
              sum = log1p(rest);
#pragma omp simd
      for (int64 j = 0; j < p.n; ++j) z[j] = (s[j] - top) - sum;
    } else {
      const T sum = total<T>(p.n, [=](int64 j) { return z[j] = exp(s[j] - top); });
#pragma omp simd
      for (int64 j = 0; j < p.n; ++j) z[j] /= sum;
    }
  }
}

// -- flat vectors --

// Runs statements on up to four vectors; `k` points to the statements' numbers.
template <class T, class Formula>
void update(const Update<T>& p, const Part& part) {
  const Range mine = part.of(p.n, 16);
  T k[Formula::scalars + 1] = {};
  for (int i = 0; i < Formula::scalars; ++i) k[i] = *p.k[i];
  T *const v0 = p.v0, *const v1 = p.v1, *const v2 = p.v2, *const v3 = p.v3;
#pragma omp simd
  for (int64 i = mine.begin; i < mine.end; ++i) {
    T x0 = v0[i], x1 = 0, x2 = 0, x3 = 0;
    if constexpr (Formula::arrays > 1) x1 = v1[i];
    if constexpr (Formula::arrays > 2) x2 = v2[i];
    if constexpr (Formula::arrays > 3) x3 = v3[i];
    Formula::run(x0, x1, x2, x3, k);
    if constexpr (Formula::writes & 1) v0[i] = x0;
    if constexpr (Formula::writes & 2) v1[i] = x1;
    if constexpr (Formula::writes & 4) v2[i] = x2;
    if constexpr (Formula::writes & 8) v3[i] = x3;
  }
}
