// The end of a step: norm and finite test, the scalars of the optimizer's formulas, one pass over the flat vectors.
// `Formula` is generated from the optimizer's row of updates.def with the penalties, unscaling and clipping put in front.
#include "reduce.cuh"
#include "step.cuh"

// 1 / Σ w, the loss scale, J, Σ gradient², the penalties, then the scalar parts of the formula: for weights, for biases
enum Scalar { SCALE, GAIN, LOSS, SQUARES, L1, L2, FIRST_OF_UPDATE };

// Writes the slot, and the scalars that a step begins with; the first two settings are l1 and l2. `weight`: Σ w of the batch if
// the host knows it, else 0.
template <class C>
__global__ void set_slot(Slot* slot, Control* control, C* scalars, const void* X, const void* Y, const void* weights,
                         int64 x_rows, int64 x_columns, int64 y_rows, int64 y_columns, int64 w_rows, const int64* rows,
                         int64 first, int64 batch_row, int64 source_rows, int64 step, int64 recast, double* answer,
                         double weight, int resume,
                         double s0, double s1, double s2, double s3, double s4, double s5, double s6, double s7, double s8,
                         double s9, double s10, double s11) {
  const double settings[SETTINGS] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11};
  *slot = {{X, Y, weights}, {x_rows, y_rows, w_rows}, {x_columns, y_columns, 1}, rows, first, batch_row, source_rows, step, recast,
           answer, {}};
  for (int i = 0; i < SETTINGS; ++i) slot->settings[i] = settings[i];
  if (resume) return;  // a further part of the same step: the sums go on
  scalars[LOSS] = scalars[SQUARES] = 0;
  scalars[GAIN] = C(control->loss_scale);
  scalars[L1] = C(s0), scalars[L2] = C(s1);
  if (weight > 0) scalars[SCALE] = C(1 / weight);
}

// squares += Σ (penalised gradient)², and J += l1 Σ|w| + ½ l2 Σ w² over the weights.
template <class C>
__global__ void gradient_norm(const C* w, const C* g, C* scalars, C* partials, unsigned* counters, int64 weights, int64 size) {
  const C l1 = scalars[L1], l2 = scalars[L2];
  const int64 threads = int64(gridDim.x) * blockDim.x;
  const bool penalised = l1 != C(0) || l2 != C(0);
  const C unscale = C(1) / scalars[GAIN];
  C sum = 0, penalty = 0;
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += threads) {
    C slope = g[i] * unscale;
    if (penalised && i < weights) {
      slope += l2 * w[i] + l1 * sign(w[i]);
      penalty += l1 * absolute(w[i]) + C(0.5) * l2 * w[i] * w[i];
    }
    sum += slope * slope;
  }
  add_grid_sum(sum, scalars + SQUARES, partials, counters);
  if (penalised) add_grid_sum(penalty, scalars + LOSS, partials + gridDim.x, counters + 1);
}

// Decides whether the update takes place, evaluates the scalar parts of its formulas in double, and writes the step's answer.
// A scaled gradient that overflows halves the loss scale and skips the update; so does, if `tolerant`, anything else that is not
// finite. Any other fault stays. One thread.
template <class C, class Formula>
__global__ void update_scalars(const Slot* slot, Control* control, C* scalars, double clip_norm, int scaled, int64 growth,
                               int tolerant) {
  const double J = scalars[LOSS], squares = scalars[SQUARES];
  bool skip = control->status != 0 || scalars[SCALE] == C(0);
  if (!skip && !(is_finite(J) && is_finite(squares))) {
    skip = true;
    if (scaled && is_finite(J) && control->loss_scale > 1) {
      control->loss_scale /= 2;
      control->good_steps = 0;
    } else if (tolerant) {
      control->skipped += 1;
    } else {
      control->status |= NOT_FINITE;
    }
  }
  if (control->status && !control->fault_step) control->fault_step = slot->step;
  control->skip = skip;
  if (!skip) {
    control->updates += 1;
    if (scaled && ++control->good_steps == growth) {
      control->loss_scale *= 2;
      control->good_steps = 0;
    }
    const double norm = sqrt(squares), clip = clip_norm > 0 && norm > clip_norm ? clip_norm / norm : 1;
    double k[Formula::scalars + 1];
    for (int part = 0; part < 2; ++part) {
      Formula::fold(slot->settings, double(control->updates), clip, 1 / double(scalars[GAIN]), part == 0, k);
      for (int i = 0; i < Formula::scalars; ++i) scalars[FIRST_OF_UPDATE + part * Formula::scalars + i] = C(k[i]);
    }
  }
  if (slot->answer) {
    slot->answer[0] = J;
    slot->answer[1] = control->status;
    slot->answer[2] = double(control->fault_step);
    slot->answer[3] = scalars[SCALE] == C(0) ? 0 : 1 / double(scalars[SCALE]);
  }
}

// The formula's statements on up to four vectors, entry by entry: the parameters, their gradient and the optimizer's state, or any
// others. `k`: scalars for the first `weights` entries, then those for the rest. `low`, which may be null, gets the first vector
// cast. With `control`, a step that is to be skipped changes nothing.
template <class C, class Low, class Formula, int V>
__global__ void update(C* a0, C* a1, C* a2, C* a3, Low* low, const C* k, const Control* control, int64 weights, int64 size) {
  if (control && control->skip) return;
  C* const arrays[4] = {a0, a1, a2, a3};
  const int64 first = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (first >= size) return;
  const bool whole = first + V <= size;
  Pack<C, V> a[4];
#pragma unroll
  for (int j = 0; j < Formula::arrays; ++j) {
    if (whole) {
      a[j] = load<V>(arrays[j] + first);
    } else {
      for (int v = 0; v < V; ++v) a[j].at[v] = first + v < size ? arrays[j][first + v] : C(0);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Formula::run(a[0].at[v], a[1].at[v], a[2].at[v], a[3].at[v], k + (first + v < weights ? 0 : Formula::scalars));
  }
#pragma unroll
  for (int j = 0; j < Formula::arrays; ++j) {
    if (!(Formula::writes >> j & 1)) continue;
    if (whole) {
      store<V>(arrays[j] + first, a[j]);
    } else {
      for (int v = 0; v < V && first + v < size; ++v) arrays[j][first + v] = a[j].at[v];
    }
  }
  if (!low) return;
  Pack<Low, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.at[v] = Narrow<Low>::from(a[0].at[v]);
  if (whole) {
    store<V>(low + first, pack);
  } else {
    for (int v = 0; v < V && first + v < size; ++v) low[first + v] = pack.at[v];
  }
}

// low = w cast, if the slot asks for it (or without a slot): what a user wrote into the weights counts from the next step on.
template <class C, class Low> __global__ void recast(const Slot* slot, const C* w, Low* low, int64 size) {
  if (slot && !slot->recast) return;
  const int64 threads = int64(gridDim.x) * blockDim.x;
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += threads) low[i] = Narrow<Low>::from(w[i]);
}

// Numbers in [-1, 1) for timing: GEMMs run faster on zeros than on data.
template <class T> __global__ void randomize(T* x, int64 size, unsigned seed) {
  const int64 threads = int64(gridDim.x) * blockDim.x;
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += threads) {
    unsigned h = (unsigned(i) + seed) * 2654435761u;
    h = (h ^ h >> 15) * 2246822519u;
    h ^= h >> 13;
    x[i] = Narrow<T>::from(Compute<T>(int(h)) * Compute<T>(1.0f / 2147483648.0f));
  }
}
