// A CUDA kernel as a program of the host: blocks one after the other, the threads of a block as coroutines that take turns.
//
// A turn ends at a barrier or an exchange within a warp, and there only; every second block's threads take theirs from last to
// first; on request a third of the warps lags behind, with one turn of fifty, others in each block. So wrong indices, sums, types and
// orders of arguments show, shared memory that nobody wrote, and most missing barriers. Barriers count who came, so that warps may do
// different things between them.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <typeinfo>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using std::exp;
using std::max;
using std::min;

struct uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
alignas(128) double memory[1 << 15];  // shared memory of a size that the launch says, for any kernel

namespace host {
struct Thread {
    ucontext_t start;
    jmp_buf at;  // where its next turn begins
    bool begun, done;
    int exchanges;
};
static std::vector<Thread> threads;
static std::vector<std::vector<char>> stacks;
static jmp_buf scheduler;
static ucontext_t unused;
static void (*body)();
static long idle;  // turns in a row in which nobody came further

// The end of a turn. Stacks are changed by jumps, which, unlike swapcontext, do not call the system.
inline void pause() {
    const unsigned me = threadIdx.x;
    if (!_setjmp(threads[me].at)) _longjmp(scheduler, 1);
    threadIdx.x = me;
}

// Who meets: so many threads, or those that are still there. Some may pass without waiting.
struct Meeting {
    unsigned arrived, round;
};
static Meeting block_meetings[16], warp_meetings[32];

inline unsigned alive(unsigned from, unsigned to) {
    unsigned count = 0;
    for (unsigned i = from; i < std::min<size_t>(to, threads.size()); ++i) count += !threads[i].done;
    return count;
}
template <class Count> void come(Meeting& m, Count count, bool wait = true) {
    const unsigned round = m.round;
    ++m.arrived;
    for (;;) {
        if (m.round == round && m.arrived >= count()) m.arrived = 0, ++m.round, idle = 0;
        if (!wait || m.round != round) return;
        if (++idle > 1000 * long(threads.size())) std::fprintf(stderr, "a barrier at which not all meet\n"), std::abort();
        pause();
    }
}
inline void meet_block() {
    come(block_meetings[0], [] { return alive(0, blockDim.x); });
}
inline void meet_warp() {
    const unsigned first = threadIdx.x / 32 * 32;
    come(warp_meetings[first / 32], [first] { return alive(first, first + 32); });
}

// What a lane shows the others of its warp. Two places, in turn: nobody is two exchanges ahead of another.
struct alignas(16) Shown {
    char bytes[32];
};
static Shown shown[2][1024];
template <class X> const Shown* show(const X& x) {
    static_assert(sizeof x <= sizeof(Shown));
    const int place = threads[threadIdx.x].exchanges++ % 2;
    std::memcpy(&shown[place][threadIdx.x], &x, sizeof x);
    meet_warp();
    return shown[place];
}
template <class X> X of_lane(const Shown* all, unsigned lane) {
    X x;
    std::memcpy(&x, &all[threadIdx.x / 32 * 32 + lane], sizeof x);
    return x;
}

static void run_thread() {
    const unsigned me = threadIdx.x;
    body();
    threads[me].done = true;
    _longjmp(scheduler, 1);
}

inline void turn(unsigned i) {
    threadIdx = {i, 0, 0};
    if (_setjmp(scheduler)) return;
    if (threads[i].begun) _longjmp(threads[i].at, 1);
    threads[i].begun = true;
    swapcontext(&unused, &threads[i].start);
}

// A number for which warps lag, drawn anew for each block; 0: none does.
static std::uint64_t uneven;
inline std::uint64_t draw() {
    uneven ^= uneven << 13, uneven ^= uneven >> 7, uneven ^= uneven << 17;
    return uneven >> 16;
}

inline void run_block(unsigned count, bool last_first) {
    threads.assign(count, {}), stacks.resize(std::max<size_t>(stacks.size(), count)), idle = 0;
    std::fill_n(block_meetings, 16, Meeting{}), std::fill_n(warp_meetings, 32, Meeting{});
    for (unsigned i = 0; i < count; ++i) {
        stacks[i].resize(1 << 16);
        ucontext_t& start = threads[i].start;
        getcontext(&start);
        start.uc_stack.ss_sp = stacks[i].data(), start.uc_stack.ss_size = stacks[i].size(), start.uc_link = nullptr;
        makecontext(&start, run_thread, 0);
    }
    bool lags[32] = {}, rests[32] = {};
    for (bool& lag : lags) lag = uneven && draw() % 3 == 0;
    for (bool left = true; left;) {
        left = false;
        for (unsigned warp = 0; warp < 32; ++warp) rests[warp] = lags[warp] && draw() % 50;
        for (unsigned next = 0; next < count; ++next) {
            const unsigned i = last_first ? count - 1 - next : next;
            if (!threads[i].done) left = true;
            if (!threads[i].done && !rests[i / 32]) turn(i);
        }
    }
}

template <class F, class... A, size_t... I>
void call(F kernel, void** arguments, std::index_sequence<I...>, void (*)(A...)) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <class... A>
void launch(void (*kernel)(A...), unsigned grid_x, unsigned grid_y, unsigned block, unsigned shared, void** arguments) {
    static void (*k)(A...);
    static void** a;
    k = kernel, a = arguments;
    body = [] { call(k, a, std::index_sequence_for<A...>{}, k); };
    gridDim = {grid_x, grid_y, 1}, blockDim = {block, 1, 1};
    for (unsigned y = 0; y < grid_y; ++y) {
        for (unsigned x = 0; x < grid_x; ++x) {
            blockIdx = {x, y, 0};
            std::fill_n(memory, (shared + 7) / 8, std::nan(""));  // nobody wrote it yet
            run_block(block, (x + y) % 2);
        }
    }
}

// The types of a kernel's parameters, as the compiler names them.
template <class... A> const char* types(void (*)(A...)) {
    static std::string all;
    all.clear();
    ((all += typeid(A).name(), all += ' '), ...);
    return all.c_str();
}
}  // namespace host

inline void __syncthreads() { host::meet_block(); }
inline int __syncthreads_or(int x) {
    static int any;
    host::meet_block();
    any = 0;
    host::meet_block();
    any |= x;
    host::meet_block();
    return any;
}
inline void __syncwarp() { host::meet_warp(); }
template <class X> X __shfl_xor_sync(unsigned, X x, int away) { return host::of_lane<X>(host::show(x), threadIdx.x % 32 ^ away); }
template <class X> X __shfl_sync(unsigned, X x, int lane) { return host::of_lane<X>(host::show(x), lane); }
template <class X> X __shfl_up_sync(unsigned, X x, int away) {
    const host::Shown* const all = host::show(x);
    return int(threadIdx.x % 32) >= away ? host::of_lane<X>(all, threadIdx.x % 32 - away) : x;
}
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __fdividef(float x, float y) { return x / y; }
