// CUDA C++ on a CPU: under this header g++ compiles kernels, and `launch` runs a grid, block after
// block. Each thread of a block is a fiber that runs until it waits at a barrier. `order` decides
// which runs next; a warp runs as far as it can before another does. Shared memory is poisoned
// before each block, so a missing barrier changes the result.
//
// Every access of a kernel to memory calls `check`, inserted by g++ -fsanitize=kernel-address: the
// address must lie in an array that the kernel was given, in the block's shared memory or in the
// thread's own, and be aligned to its size.
#pragma once
#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <utility>

#define CUDA_ON_CPU
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ \
  static thread_local  // one block runs at a time; nothing else is thread_local here
#define DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(cuda_on_cpu::state.dynamic_shared)
#define UNCHECKED __attribute__((no_sanitize_address))

namespace cuda_on_cpu {
namespace {

constexpr unsigned WARP = 32, MOST_THREADS = 1024;

struct Index {
  unsigned x, y, z;
};

struct Barrier {
  unsigned size, arrived, passed;  // threads that must come, that have come, times it has opened
  int line;                        // where the first of them came from
};

struct Fiber {
  jmp_buf place;  // where it goes on
  bool born, done;
  Barrier* waits_for;  // null: nothing
  unsigned ticket;     // `passed` when it began to wait
  // to global memory: 1 + how often the block's barrier had opened by then; 0: never
  unsigned wrote;
  bool fenced;  // since
};

struct Warp {
  Barrier barrier;
  // values that lanes show each other, at even and odd meetings
  alignas(16) unsigned char slots[2][WARP][16];
};

struct Range {
  size_t begin, end;
};

struct Grid {  // as Python gives it
  unsigned grid_x, grid_y, block_x, block_y, shared, order, ranges;
};

struct State {
  Index thread, block, block_dim, grid_dim;
  unsigned current;  // number of the thread that runs
  alignas(4096) unsigned char stacks[MOST_THREADS][32 * 1024];
  alignas(256) unsigned char dynamic_shared[227 * 1024];
} state;

Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / WARP];
Barrier block_barrier;
jmp_buf scheduler;
void (*body)();  // the kernel, called with `arguments`
void** arguments;
Grid grid;
const Range* ranges;
Range shared;                   // all `__shared__` variables
unsigned published, publisher;  // when, counted as `wrote` is, and by whom
unsigned dice;
char fault[200];

template <class... Values>
UNCHECKED void fail(const char* text, Values... values) {
  if (*fault) return;
  const Index block = state.block, thread = state.thread;
  const int size = snprintf(fault, sizeof(fault), "block (%u, %u), thread (%u, %u): ", block.x,
                            block.y, thread.x, thread.y);
  snprintf(fault + size, sizeof(fault) - size, text, values...);
}

// -- threads --

UNCHECKED void turn_to(unsigned thread) {
  state.current = thread;
  state.thread = {thread % grid.block_x, thread / grid.block_x, 0};
}

UNCHECKED void pause() {
  if (!_setjmp(fibers[state.current].place)) _longjmp(scheduler, 1);
}

UNCHECKED void live() {
  for (;;) {
    body();
    fibers[state.current].done = true;
    pause();
  }
}

UNCHECKED void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  turn_to(thread);
  if (_setjmp(scheduler)) return;
  if (fiber.born) _longjmp(fiber.place, 1);
  fiber.born = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = state.stacks[thread];
  context.uc_stack.ss_size = sizeof(state.stacks[thread]);
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

UNCHECKED void wait(Barrier& barrier, int line) {
  if (!barrier.arrived) barrier.line = line;
  if (barrier.line != line)
    fail("comes to the barrier of line %d, where others wait at that of line %d", line,
         barrier.line);
  Fiber& me = fibers[state.current];
  me.ticket = barrier.passed;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  me.waits_for = &barrier;
  pause();
  me.waits_for = nullptr;
}

// The `value` of lane `source`; every lane of the warp must come.
template <class T>
UNCHECKED T exchange(T value, unsigned source, int line) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0][0]));
  Warp& warp = warps[state.current / WARP];
  auto* slots = warp.slots[warp.barrier.passed % 2];
  memcpy(slots[state.current % WARP], &value, sizeof(T));
  wait(warp.barrier, line);
  memcpy(&value, slots[source % WARP], sizeof(T));
  return value;
}

// -- memory --

// Where this library's thread_local variables are: the kernels' shared ones.
UNCHECKED int find_shared(dl_phdr_info* library, size_t, void*) {
  bool ours = false;
  Range found = {0, 0};
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& part = library->dlpi_phdr[i];
    const size_t begin = library->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD) ours |= size_t(&state) - begin < part.p_memsz;
    if (part.p_type == PT_TLS)
      found = {size_t(library->dlpi_tls_data), size_t(library->dlpi_tls_data) + part.p_memsz};
  }
  if (ours) shared = found;
  return ours;
}

UNCHECKED bool inside(size_t address, size_t size, Range range) {
  return address >= range.begin && address + size <= range.end;
}

UNCHECKED void check(bool writes, size_t address, size_t size) {
  if (inside(address, size, {size_t(&state), size_t(state.dynamic_shared + grid.shared)})) return;
  bool found = inside(address, size, shared);
  for (unsigned i = 0; i < grid.ranges && !found; ++i) found = inside(address, size, ranges[i]);
  const bool aligned = size > 16 || size & (size - 1) || address % size == 0;
  if (!found || !aligned) {
    fail("%s%s of %zu bytes at 0x%zx", found ? "a misaligned " : "out of bounds: a ",
         writes ? "write" : "read", size, address);
    _longjmp(scheduler, 1);
  }
  if (!writes || inside(address, size, shared)) return;
  const unsigned now = 1 + block_barrier.passed;
  if (published == now && publisher != state.current)
    fail("writes what thread %u has published already", publisher);
  fibers[state.current].wrote = now;
  fibers[state.current].fenced = false;
}

// Called where a thread tells other blocks, by an atomicAdd, that its block has written its share.
UNCHECKED void publish() {
  published = 1 + block_barrier.passed;
  publisher = state.current;
  for (unsigned thread = 0; thread < grid.block_x * grid.block_y; ++thread) {
    const Fiber& fiber = fibers[thread];
    if (fiber.wrote && !fiber.fenced)
      fail("publishes what thread %u wrote without a fence", thread);
    const bool unordered = fiber.wrote == published && thread != publisher;
    if (unordered) fail("publishes what thread %u wrote, with no barrier between", thread);
  }
}

// -- blocks and grids --

UNCHECKED unsigned roll() { return (dice = dice * 1664525u + 1013904223u) >> 16; }
UNCHECKED unsigned place(unsigned i, unsigned rolled) {
  return grid.order == 0 ? i : grid.order == 1 ? WARP - 1 - i : i ^ rolled % WARP;
}

// Runs a warp's threads until none can go on; says whether any did.
UNCHECKED bool run_warp(unsigned warp, unsigned threads) {
  bool any = false;
  for (bool again = true; again && !*fault;) {
    again = false;
    const unsigned rolled = roll();
    for (unsigned i = 0; i < WARP && !*fault; ++i) {
      const unsigned thread = warp * WARP + place(i, rolled);
      if (thread >= threads) continue;
      const Fiber& fiber = fibers[thread];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->passed == fiber.ticket)) continue;
      resume(thread);
      again = any = true;
    }
  }
  return any;
}

UNCHECKED void run_block(unsigned threads) {
  block_barrier = {threads, 0, 0, 0};
  published = 0;
  for (unsigned begin = 0; begin < threads; begin += WARP) {
    warps[begin / WARP].barrier = {threads - begin < WARP ? threads - begin : WARP, 0, 0, 0};
  }
  for (unsigned thread = 0; thread < threads; ++thread) {
    fibers[thread].done = false;
    fibers[thread].waits_for = nullptr;
    fibers[thread].wrote = 0;
  }
  memset(reinterpret_cast<void*>(shared.begin), 0xFF, shared.end - shared.begin);
  memset(state.dynamic_shared, 0xFF, grid.shared);
  for (bool any = true; any;) {
    any = false;
    const unsigned rolled = roll();
    for (unsigned i = 0; i < WARP; ++i) {
      if (place(i, rolled) * WARP < threads) any |= run_warp(place(i, rolled), threads);
    }
  }
  for (unsigned thread = 0; thread < threads; ++thread) {
    if (!fibers[thread].done) {
      turn_to(thread);
      fail("waits in vain at the barrier of line %d", fibers[thread].waits_for->line);
    }
  }
}

// Runs a grid; what went wrong, or null.
UNCHECKED const char* launch(void (*kernel)(), void** its_arguments, const Grid* its_grid,
                             const Range* its_ranges) {
  body = kernel, arguments = its_arguments, grid = *its_grid, ranges = its_ranges;
  dice = grid.order;
  *fault = 0;
  static thread_local volatile char first;
  static volatile char* known;
  first = 0;  // the library's thread_local variables come to be when one is touched
  if (known != &first) dl_iterate_phdr(find_shared, nullptr);
  known = &first;
  state.grid_dim = {grid.grid_x, grid.grid_y, 1};
  state.block_dim = {grid.block_x, grid.block_y, 1};
  const unsigned blocks = grid.grid_x * grid.grid_y, start = grid.order > 1 ? roll() % blocks : 0;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = grid.order == 1 ? blocks - 1 - i : (start + i) % blocks;
    state.block = {block % grid.grid_x, block / grid.grid_x, 0};
    run_block(grid.block_x * grid.block_y);
    if (*fault) {
      for (Fiber& fiber : fibers) fiber.born = false;  // they are left where they stand
      return fault;
    }
  }
  return nullptr;
}

// -- a kernel as Python calls it --

template <auto kernel>
struct Kernel;
template <class... Types, void (*kernel)(Types...)>
struct Kernel<kernel> {
  template <size_t... i>
  UNCHECKED static void call(std::index_sequence<i...>) {
    kernel(*static_cast<Types*>(arguments[i])...);
  }
  UNCHECKED static void thread() { call(std::index_sequence_for<Types...>()); }
  static const char* types() { return __PRETTY_FUNCTION__; }
  UNCHECKED static size_t size(size_t i) {
    constexpr size_t sizes[] = {sizeof(Types)...};
    return sizes[i];
  }
};

}  // namespace
}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default"))) const char*
#define CUDA_ON_CPU_KERNEL(number, ...)                                                            \
  CUDA_ON_CPU_EXPORT types_##number() { return cuda_on_cpu::Kernel<__VA_ARGS__>::types(); }        \
  extern "C" __attribute__((visibility("default"))) size_t size_##number(size_t i) {               \
    return cuda_on_cpu::Kernel<__VA_ARGS__>::size(i);                                              \
  }                                                                                                \
  CUDA_ON_CPU_EXPORT launch_##number(void** arguments, const cuda_on_cpu::Grid* grid,              \
                                     const cuda_on_cpu::Range* ranges) {                           \
    return cuda_on_cpu::launch(cuda_on_cpu::Kernel<__VA_ARGS__>::thread, arguments, grid, ranges); \
  }

#define CUDA_ON_CPU_CHECK(size)                                       \
  extern "C" UNCHECKED void __asan_load##size##_noabort(size_t at) {  \
    cuda_on_cpu::check(false, at, size);                              \
  }                                                                   \
  extern "C" UNCHECKED void __asan_store##size##_noabort(size_t at) { \
    cuda_on_cpu::check(true, at, size);                               \
  }
CUDA_ON_CPU_CHECK(1)
CUDA_ON_CPU_CHECK(2)
CUDA_ON_CPU_CHECK(4)
CUDA_ON_CPU_CHECK(8)
CUDA_ON_CPU_CHECK(16)
extern "C" UNCHECKED void __asan_loadN_noabort(size_t at, size_t size) {
  cuda_on_cpu::check(false, at, size);
}
extern "C" UNCHECKED void __asan_storeN_noabort(size_t at, size_t size) {
  cuda_on_cpu::check(true, at, size);
}
extern "C" UNCHECKED void __asan_handle_no_return() {}
extern "C" UNCHECKED void __ubsan_handle_type_mismatch_v1(void*, size_t at) {
  cuda_on_cpu::fail("a misaligned access at 0x%zx", at);
  _longjmp(cuda_on_cpu::scheduler, 1);
}

// -- what CUDA gives a kernel --

#define threadIdx cuda_on_cpu::state.thread
#define blockIdx cuda_on_cpu::state.block
#define blockDim cuda_on_cpu::state.block_dim
#define gridDim cuda_on_cpu::state.grid_dim

UNCHECKED inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_on_cpu::wait(cuda_on_cpu::block_barrier, line);
}
UNCHECKED inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
  cuda_on_cpu::wait(cuda_on_cpu::warps[cuda_on_cpu::state.current / 32].barrier, line);
}
UNCHECKED inline void __threadfence() {
  cuda_on_cpu::fibers[cuda_on_cpu::state.current].fenced = true;
}

template <class T>
UNCHECKED T __shfl_sync(unsigned, T value, int lane, int line = __builtin_LINE()) {
  return cuda_on_cpu::exchange(value, lane, line);
}
template <class T>
UNCHECKED T __shfl_xor_sync(unsigned, T value, int mask, int line = __builtin_LINE()) {
  return cuda_on_cpu::exchange(value, cuda_on_cpu::state.current ^ mask, line);
}
template <class T>
UNCHECKED T __shfl_down_sync(unsigned, T value, unsigned distance, int line = __builtin_LINE()) {
  const T other = cuda_on_cpu::exchange(value, cuda_on_cpu::state.current + distance, line);
  return cuda_on_cpu::state.current % 32 + distance < 32 ? other : value;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  cuda_on_cpu::publish();
  const unsigned before = *address;
  *address = before + value;
  return before;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address = before | value;
  return before;
}

inline double erfcx(double x) { return double(expl((long double)x * x) * erfcl(x)); }
inline float erfcx(float x) { return float(erfcx(double(x))); }

// -- conversions, as the instructions that numbers.cuh names --

inline float bits_to_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline float half_to_float(unsigned short bits) {
  return float(__builtin_bit_cast(_Float16, bits));
}
inline unsigned short float_to_half(float x) {
  return __builtin_bit_cast(unsigned short, _Float16(x));
}
inline unsigned short float_to_bfloat16(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
