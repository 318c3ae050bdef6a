// Many training steps in one call: the passes and products of a step are called in turn, so nothing
// but their arithmetic takes time. Rows come from the order of the epoch, rates from a table; the
// loop ends before the first update that is not certain to be finite.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "arguments.h"
#include "sums.h"

// A number whose bytes are in the other order.
template <class T>
struct Swapped {
  unsigned char bytes[sizeof(T)];
  operator T() const {
    unsigned char turned[sizeof(T)];
    for (unsigned i = 0; i < sizeof(T); ++i) turned[i] = bytes[sizeof(T) - 1 - i];
    T x;
    __builtin_memcpy(&x, turned, sizeof x);
    return x;
  }
};

// Copies and casts rows of a matrix: those whose numbers begin at place[2] or, if that is 0, those
// from place[1] on.
template <class T, class Source>
void gather(const Gather<T>& p, const Part& part) {
  const int64* const rows = reinterpret_cast<const int64*>(p.place[2]);
  const Source* const source = static_cast<const Source*>(p.source);
  const Range mine = part.of(p.m);
  for (int64 i = mine.begin; i < mine.end; ++i) {
    const Source* const from = source + (rows ? rows[i] : p.place[1] + i) * p.row;
    T* const to = p.to + i * p.n;
    if (p.column == 1) {
#pragma omp simd
      for (int64 j = 0; j < p.n; ++j) to[j] = T(from[j]);
    } else {
      for (int64 j = 0; j < p.n; ++j) to[j] = T(from[j * p.column]);
    }
  }
}

// Moves on to the next chunk of a batch.
template <class T>
void advance(const Advance<T>& p, const Part& part) {
  if (part.index != 0) return;
  p.place[1] += p.rows;
  if (p.place[2]) p.place[2] += p.rows * int64(sizeof(int64));
}

// J += l1 Σ|w| + ½ l2 Σ w².
template <class T>
void penalize(const Penalize<T>& p, const Part& part) {
  if (part.index != 0) return;
  const T* const w = p.w;
  if (p.l1 != 0) *p.J += p.l1 * total<double>(p.n, [=](int64 i) { return absolute(w[i]); });
  if (p.l2 != 0) {
    *p.J += 0.5 * p.l2 * total<double>(p.n, [=](int64 i) { return double(w[i]) * double(w[i]); });
  }
}

// A number that threads wait to see change. A thread that waits long sleeps, since others may need
// the core.
class Signal {
 public:
  int read() const { return __atomic_load_n(&number, __ATOMIC_SEQ_CST); }

  void change() {
    __atomic_add_fetch(&number, 1, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
  }

  void wait(int before) {
    const long long end = now() + SPIN;
    do {
      for (int i = 0; i < 64; ++i) {
        if (read() != before) return;
        pause();
      }
    } while (now() < end);
    pthread_mutex_lock(&mutex);
    __atomic_add_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
    while (read() == before) pthread_cond_wait(&changed, &mutex);
    __atomic_sub_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&mutex);
  }

 private:
  // nanoseconds before a thread sleeps: longer than waking one takes, or all would sleep each time
  static constexpr long long SPIN = 200'000;
  int number = 0, sleeping = 0;
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

  static long long now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
  }
#if defined(__x86_64__)
  static void pause() { __builtin_ia32_pause(); }
#else
  static void pause() { asm volatile("" ::: "memory"); }
#endif
};

// A point that all threads reach before any goes on.
class Barrier {
 public:
  explicit Barrier(int count) : count(count) {}

  void wait() {
    if (count == 1) return;
    const int before = passed.read();
    if (__atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST) < count) return passed.wait(before);
    __atomic_store_n(&waiting, 0, __ATOMIC_SEQ_CST);
    passed.change();
  }

 private:
  const int count;
  int waiting = 0;
  Signal passed;
};

struct Call {
  void (*run)(const void*, int64, int64);
  const void* arguments;
};

// The steps, on several threads. Workers have rows, arrays and gradients of their own, and a thread
// makes all calls of a worker; a call of a single worker, and those after the workers', are shared
// by all threads, which wait for each other's end.
template <class T, class Formula>
class Loop {
 public:
  Loop(const Steps<T>& p, int threads) : p(p), threads(threads), barrier(threads) { begin(0); }

  void work(int64 index) {
    if (index >= threads) return;
    const Part part = {index, threads};
    for (int64 step = 0; step < p.steps; ++step) {
      if (p.workers == 1) {
        for (int64 i = 0; i < p.ends[0]; ++i) share(i, index), barrier.wait();
      } else {
        for (int64 worker = index; worker < p.workers; worker += threads) {
          for (int64 i = worker ? p.ends[worker - 1] : 0; i < p.ends[worker]; ++i) run(i, 0, 1);
        }
        barrier.wait();
      }
      for (int64 i = p.ends[p.workers - 1]; i < p.updates; ++i) share(i, index), barrier.wait();
      sum_squares(part.of(p.n, BLOCK));
      barrier.wait();
      if (index == 0) certain = prepare(step);
      barrier.wait();
      if (!certain) return;
      for (int64 i = p.updates; i < p.calls_end; ++i) share(i, index);
      barrier.wait();
    }
  }

 private:
  static constexpr int64 BLOCK = 1024;
  const Steps<T>& p;
  const int threads;
  Barrier barrier;
  bool certain = false;

  void run(int64 call, int64 index, int64 count) {
    const Call& it = static_cast<const Call*>(p.calls)[call];
    it.run(it.arguments, index, count);
  }
  void share(int64 call, int64 index) { run(call, index, threads); }

  // Sets the losses to 0, and the workers' places to their first rows in a step.
  void begin(int64 step) {
    for (int64 worker = 0; worker < p.workers; ++worker) {
      int64* const place = p.places[worker];
      const int64 first = step * p.rows + p.starts[worker];
      place[0] = p.number + step;
      place[1] = p.starts[worker];
      place[2] = p.row_numbers ? reinterpret_cast<int64>(p.row_numbers + first) : 0;
      *p.J[worker] = 0;
    }
  }

  // Sums the squares of g in blocks; without clipping they may underflow.
  void sum_squares(Range mine) {
    for (int64 first = mine.begin; first < mine.end; first += BLOCK) {
      const int64 width = mine.end - first < BLOCK ? mine.end - first : BLOCK;
      const T* const g = p.g + first;
      p.squares[first / BLOCK] =
          p.clip_norm < __builtin_inf()
              ? total<double>(
                    width, [=](int64 i) { return double(g[i]) * double(g[i]); })
              : double(total<T>(width, [=](int64 i) { return g[i] * g[i]; }));
    }
  }

  double norm() const {
    double squares = 0;
    for (int64 i = 0; i * BLOCK < p.n; ++i) squares += p.squares[i];
    if (!is_finite(squares)) {
      const T* const g = p.g;
      squares = total<double>(p.n, [=](int64 i) { return double(g[i]) * double(g[i]); });
    }
    return __builtin_sqrt(squares);
  }

  // Sets the scalars of the updates and counts the step; returns false if it may not be finite.
  bool prepare(int64 step) {
    double J = 0;
    for (int64 worker = 0; worker < p.workers; ++worker) J += *p.J[worker];
    const double norm = this->norm();
    if (!is_finite(J) || !is_finite(norm)) return false;
    const double clip = p.clip_norm < norm ? p.clip_norm / norm : 1.0,
                 largest = 2 * (clip * norm) + p.floor;
    double reach = *p.reach;
    for (int64 i = 0; i < p.segments; ++i) {
      double* const settings = p.settings + i * p.settings_each;
      settings[0] = p.rates[step] * p.factors[2 * i];
      const double t = p.done_before + step + 1 - p.factors[2 * i + 1];
      double k[Formula::scalars + 1], after, change;
      Formula::fold(settings, t < 1 ? 1 : t, clip, 1, true, k);
      for (int j = 0; j < Formula::scalars; ++j) *p.numbers[i * Formula::scalars + j] = T(k[j]);
      Formula::bounds(settings, largest, *p.reach, after, change);
      if (!(largest < p.roots && change < p.halves)) return false;
      reach = maximum(reach, after);
    }
    *p.reach = reach;
    p.losses[step] = J;
    *p.done = step + 1;
    begin(step + 1);
    return true;
  }
};

// Places new threads on other processors than their creator's: left to itself, Linux may keep two
// on one for milliseconds, while each waits for the other.
class Placement {
#if defined(__GLIBC__)
 public:
  // From the calling thread's processor on.
  void begin() { known = !sched_getaffinity(0, sizeof allowed, &allowed), last = sched_getcpu(); }

  // Makes threads with these attributes begin on the next processor.
  void next(pthread_attr_t* attributes) {
    if (!known) return;
    do last = (last + 1) % CPU_SETSIZE;
    while (!CPU_ISSET(last, &allowed));
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(last, &one);
    pthread_attr_setaffinity_np(attributes, sizeof one, &one);
  }

  // Lets the calling thread, which has begun, move again.
  void release() const {
    if (known) pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
  }

 private:
  cpu_set_t allowed;
  bool known = false;
  int last = 0;
#else
 public:
  void begin() {}
  void next(pthread_attr_t*) {}
  void release() const {}
#endif
};

// Threads that help in the loops of one call at a time. They wait for the next call, awake for
// a while, since steps often follow one another. A forked process has none of its parent's.
class Helpers {
 public:
  // Returns false if another call has them.
  bool take() {
    const int process = getpid();
    int before = __atomic_load_n(&holder, __ATOMIC_SEQ_CST);
    if (before == process || !__atomic_compare_exchange_n(&holder, &before, process, false,
                                                          __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
      return false;
    }
    if (owner != process) owner = process, count = 0, begun = Signal(), ended = Signal();
    return true;
  }
  void give_back() { __atomic_store_n(&holder, 0, __ATOMIC_SEQ_CST); }

  // Starts threads, which take no signals, until there are as many; returns their number.
  int64 start(int64 wanted) {
    if (count >= wanted) return count;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (placement.begin(); count < wanted; ++count) {
      placement.next(&attributes);
      pthread_t thread;
      calls[count] = begun.read();
      if (pthread_create(&thread, &attributes, help, reinterpret_cast<void*>(count))) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return count;
  }

  // Calls work(loop, index) on each, and here with index 0.
  void run(void (*work)(void*, int64), void* loop) {
    this->work = work, this->loop = loop, working = count;
    const int before = ended.read();
    begun.change();
    work(loop, 0);
    ended.wait(before);
  }

  static constexpr int MOST = 63;

 private:
  static constexpr size_t STACK = 1 << 21;  // bytes, for packed blocks; some systems give 128 KiB
  int holder = 0, owner = 0;                // processes
  int64 count = 0, working = 0;
  int calls[MOST];  // that were begun before each thread
  Signal begun, ended;
  void (*work)(void*, int64);
  void* loop;
  Placement placement;

  static void* help(void* index);
};

Helpers helpers;

void* Helpers::help(void* index) {
  const int64 own = reinterpret_cast<int64>(index);
  helpers.placement.release();
  for (int call = helpers.calls[own];; ++call) {
    helpers.begun.wait(call);
    helpers.work(helpers.loop, own + 1);
    if (!__atomic_sub_fetch(&helpers.working, 1, __ATOMIC_SEQ_CST)) helpers.ended.change();
  }
}

// Runs up to p.steps steps from p.number on; p.done counts them. Of the calls, the first are those
// of the workers, up to p.ends; those from p.updates on write the parameters. A segment is a part of
// the flat vectors with its own update: `settings` has the numbers of its formulas, `factors` the
// factor of its rate and its missed updates, and `numbers` the addresses of the scalars that its
// update reads. The bounds are as in engine/lanes.py. Fewer threads than p.threads do if no more
// can be started, and one if another call has them.
template <class T, class Formula>
void run_steps(const Steps<T>& p, const Part&) {
  using L = Loop<T, Formula>;
  const int64 wanted = minimum(p.threads - 1, int64(Helpers::MOST));
  int64 others = 0;
  if (wanted > 0 && helpers.take()) {
    others = minimum(wanted, helpers.start(wanted));
    if (!others) helpers.give_back();
  }
  L loop(p, 1 + int(others));
  if (!others) return loop.work(0);
  helpers.run([](void* it, int64 index) { static_cast<L*>(it)->work(index); }, &loop);
  helpers.give_back();
}
