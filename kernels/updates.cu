// The slot before a step; after its chunks norm and finite test, the scalars of the optimizer's formulas
// and one pass over the flat vectors. `Formula` is generated from the optimizer's row of the sheet with
// the penalties, unscaling and clipping put in front.
#include "reduce.cuh"
#include "step.cuh"

// The sums of a step begin at 0.
template <class C> __device__ void begin_step(const Control& control, C* scalars) {
  scalars[LOSS] = 0;
  scalars[GAIN] = C(control.loss_scale);
}

// Puts the slot where the graph reads it, and the scalars that a step begins with. One block.
template <class C>
__global__ void set_slot(const __grid_constant__ Slot given, Slot* slot, const Control* control, C* scalars) {
  const int64* from = reinterpret_cast<const int64*>(&given);
  int64* to = reinterpret_cast<int64*>(slot);
  for (int i = threadIdx.x; i < int(sizeof(Slot) / sizeof(int64)); i += blockDim.x) to[i] = from[i];
  if (threadIdx.x != 0 || given.resume == 1) return;
  begin_step(*control, scalars);
  if (given.resume == APPLIED) scalars[GAIN] = 1;  // the gradient is the caller's
  scalars[L1] = C(given.settings[1]), scalars[L2] = C(given.settings[2]);
  if (given.weight > 0) scalars[SCALE] = C(1 / given.weight);
}

// The number of the part of the flat vectors that entry i lies in: 0 weights, 1 biases; or that of its segment.
__device__ __forceinline__ int part_of(int64 i, int64 weights, const Segment* segments) {
  if (!segments) return i < weights ? 0 : 1;
  int part = 0;
  while (i >= segments[part].stop) ++part;
  return part;
}
__device__ __forceinline__ bool is_frozen(int part, const Segment* segments) { return segments && segments[part].frozen; }

// The slope that an update sees: the gradient, unscaled, with those of the penalties; 0 where a layer is frozen.
template <class C> struct Slope {
  const C *w, *g;
  C unscale, l1, l2;
  int64 penalised;  // entries
  const Segment* segments;
  __device__ __forceinline__ C operator()(int64 i) const {
    if (segments && segments[part_of(i, 0, segments)].frozen) return C(0);
    const C slope = g[i] * unscale;
    return i < penalised ? slope + l2 * w[i] + l1 * sign(w[i]) : slope;
  }
};

// Numbers of a type that bound what can be added without overflow: what half a unit in the last place of the largest number
// is, 128 times over; half the root of that number; and a slope whose square is lost.
template <class C> struct Bounds;
template <> struct Bounds<float> { static constexpr double swallowed = 0x1p96, root = 0x1p63, lost = 0x1p-62, unit = 0x1p-80; };
template <> struct Bounds<double> { static constexpr double swallowed = 0x1p963, root = 0x1p511, lost = 0x1p-510, unit = 0x1p-600; };

// The norm of slopes whose squares overflow, for every thread of the block, which goes over all of them; NaN or infinity if
// one of them is.
template <class C> __device__ double large_norm(const Slope<C>& slope, int64 size) {
  C sum = 0;
  for (int64 i = thread_number(); i < size; i += blockDim.x * blockDim.y) {
    const C part = slope(i) * C(Bounds<C>::unit);
    sum += part * part;
  }
  return sqrt(double(block_sum(sum))) / Bounds<C>::unit;
}

// Whether a number that the update would write is not finite, for every thread of the block, which goes over all entries.
template <class C, class Formula>
__device__ bool overflows(const C* a0, const C* a1, const C* a2, const C* a3, const C* k, const Segment* segments,
                          int64 weights, int64 size) {
  const C* const arrays[4] = {a0, a1, a2, a3};
  C found = 0;
  for (int64 i = thread_number(); i < size; i += blockDim.x * blockDim.y) {
    const int part = part_of(i, weights, segments);
    if (is_frozen(part, segments)) continue;
    C a[4] = {};
#pragma unroll
    for (int j = 0; j < Formula::arrays; ++j) a[j] = arrays[j][i];
    Formula::run(a[0], a[1], a[2], a[3], k + part * Formula::scalars);
#pragma unroll
    for (int j = 0; j < Formula::arrays; ++j) {
      if ((Formula::writes >> j & 1) && !is_finite(a[j])) found = 1;
    }
  }
  return block_sum(found) != C(0);
}

// Evaluates the scalar parts of the update's formulas in double, for each part of the vectors, and the bounds. Whether an entry
// may overflow. One thread.
template <class C, class Formula>
__device__ bool begin_update(const Slot& slot, const Control& control, C* scalars, double norm, double clip_norm,
                             const Segment* segments, int count, double& reach) {
  const double clip = clip_norm > 0 && norm > clip_norm ? clip_norm / norm : 1, largest = 2 * clip * norm + Bounds<C>::lost;
  double change = 0;
  C* to = scalars + FIRST_OF_UPDATE;
  for (int part = 0; part < (segments ? count : 2); ++part, to += Formula::scalars) {
    if (is_frozen(part, segments)) continue;
    double settings[SETTINGS], k[Formula::scalars + 1], after, moved;
    for (int i = 0; i < SETTINGS; ++i) settings[i] = slot.settings[i];
    if (segments) {
      settings[0] *= segments[part].rate;
      if (Formula::decay >= 0 && segments[part].decay >= 0) settings[Formula::decay] = segments[part].decay;
    }
    const bool weights = segments ? segments[part].weights : part == 0;
    const double t = double(control.updates + 1 - (segments ? segments[part].missed : 0));
    Formula::fold(settings, maximum(t, 1.0), clip, 1 / double(scalars[GAIN]), weights, k);
    for (int i = 0; i < Formula::scalars; ++i) to[i] = C(k[i]);
    Formula::bounds(settings, largest, control.reach, after, moved);
    reach = maximum(reach, after);
    change = maximum(change, moved);
  }
  return !(largest < Bounds<C>::root && change < Bounds<C>::swallowed);
}

// Decides whether the update takes place, writes the step's answer, and moves the slot on where a launch holds several steps.
// A scaled gradient that overflows halves the loss scale and skips the update; so does, if `tolerant`, anything else that is
// not finite. Any other fault stays. One thread.
template <class C>
__device__ void end_step(Slot* slot, Control* control, C* scalars, double norm, bool overflow, double reach, bool scaled,
                         int64 growth, bool tolerant) {
  const double J = scalars[LOSS];
  const bool by_scale = scaled && slot->resume != APPLIED;
  bool skip = control->status != 0 || scalars[SCALE] == C(0);
  if (!skip && !(is_finite(J) && is_finite(norm) && !overflow)) {
    skip = true;
    if (by_scale && is_finite(J) && !is_finite(norm) && control->loss_scale > 1) {
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
    control->reach = reach;
    if (by_scale && ++control->good_steps == growth) {
      control->loss_scale *= 2;
      control->good_steps = 0;
    }
  }
  if (slot->answer) {
    slot->answer[0] = J;
    slot->answer[1] = control->status;
    slot->answer[2] = double(control->fault_step);
    slot->answer[3] = scalars[SCALE] == C(0) ? 0 : 1 / double(scalars[SCALE]);
  }
  begin_step(*control, scalars);
  if (!slot->batch_rows) return;  // one step alone, whose graph may be replayed
  slot->first += slot->batch_rows;
  slot->step += 1;
  if (slot->answer) slot->answer += 4;
  if (++slot->turn < TOGETHER) slot->settings[0] = slot->rates[slot->turn];
}

// J += l1 Σ|w| + ½ l2 Σ w² over the weights, and Σ (penalised gradient)²; then, in the block that finishes last, the end of
// the step but for the pass over the vectors. Where their bounds do not exclude that an entry overflows, that block tries the
// update on every one. `partials`: two numbers for each block.
template <class C, class Formula>
__global__ void prepare_update(Slot* slot, Control* control, C* scalars, const C* w, const C* g, const C* a2, const C* a3,
                               C* partials, unsigned* counter, double clip_norm, int scaled, int64 growth, int tolerant,
                               const Segment* segments, int count, int64 weights, int64 size) {
  const C l1 = scalars[L1], l2 = scalars[L2];
  const int64 threads = int64(gridDim.x) * blockDim.x;
  const Slope<C> slope = {w, g, C(1) / scalars[GAIN], l1, l2, l1 != C(0) || l2 != C(0) ? weights : 0, segments};
  C sums[2] = {};  // of squares, of penalties
  for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += threads) {
    const C x = slope(i);
    sums[0] += x * x;
    if (i < slope.penalised) sums[1] += l1 * absolute(w[i]) + C(0.5) * l2 * w[i] * w[i];
  }
  if (!grid_sums(sums, partials, counter)) return;
  const double norm = is_finite(sums[0]) ? sqrt(double(sums[0])) : large_norm(slope, size);
  const bool first = thread_number() == 0;
  double reach = 0;
  __shared__ bool doubtful;
  if (first) {
    scalars[LOSS] += sums[1];
    const bool open = control->status == 0 && is_finite(scalars[LOSS]) && is_finite(norm);
    doubtful = open && begin_update<C, Formula>(*slot, *control, scalars, norm, clip_norm, segments, count, reach);
  }
  __syncthreads();
  const bool overflow =
      doubtful && overflows<C, Formula>(w, g, a2, a3, scalars + FIRST_OF_UPDATE, segments, weights, size);
  if (first) end_step(slot, control, scalars, norm, overflow, reach, scaled, growth, tolerant);
}

// The formula's statements on up to four vectors, entry by entry: the parameters, their gradient and the optimizer's state, or any
// others. `k`: scalars for the first `weights` entries, then those for the rest; with `segments`, which may be null, for each
// segment. `low`, which may be null, gets the first vector cast. With `control`, a step that is to be skipped changes nothing.
template <class C, class Low, class Formula, int V>
__global__ void update(C* a0, C* a1, C* a2, C* a3, Low* low, const C* k, const Control* control, const Segment* segments,
                       int64 weights, int64 size) {
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
    const int part = part_of(first + v < size ? first + v : size - 1, weights, segments);
    if (is_frozen(part, segments)) continue;
    Formula::run(a[0].at[v], a[1].at[v], a[2].at[v], a[3].at[v], k + part * Formula::scalars);
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

// low = w cast.
template <class C, class Low> __global__ void recast(const C* w, Low* low, int64 size) {
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
