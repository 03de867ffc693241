// A CUDA kernel as a program of the host: blocks one after the other, the threads of a block as coroutines that take turns.
//
// A turn ends at a barrier or an exchange within a warp, and there only; every second block's threads take theirs from last to
// first. So wrong indices, sums, types and orders of arguments show, shared memory that nobody wrote, and most missing barriers.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
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
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using std::exp;
using std::max;
using std::min;

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
double memory[1 << 15];  // shared memory of a size that the launch says, for any kernel
static double exchanged[1024];

namespace host {
static ucontext_t scheduler;
static std::vector<ucontext_t> threads;
static std::vector<char> done;
static std::vector<std::vector<char>> stacks;
static void (*body)();

inline void pause() {
    const unsigned me = threadIdx.x;
    swapcontext(&threads[me], &scheduler);
    threadIdx.x = me;
}

static void run_thread() {
    body();
    done[threadIdx.x] = 1;
    swapcontext(&threads[threadIdx.x], &scheduler);
}

inline void run_block(unsigned count, bool last_first) {
    threads.assign(count, {}), done.assign(count, 0), stacks.resize(count);
    for (unsigned i = 0; i < count; ++i) {
        stacks[i].resize(1 << 16);
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = stacks[i].data(), threads[i].uc_stack.ss_size = stacks[i].size(), threads[i].uc_link = nullptr;
        makecontext(&threads[i], run_thread, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (unsigned turn = 0; turn < count; ++turn) {
            const unsigned i = last_first ? count - 1 - turn : turn;
            if (done[i]) continue;
            left = true, threadIdx = {i, 0, 0};
            swapcontext(&scheduler, &threads[i]);
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

inline void __syncthreads() { host::pause(); }
template <class X> X __shfl_xor_sync(unsigned, X x, int away) {
    std::memcpy(&exchanged[threadIdx.x], &x, sizeof x);
    host::pause();
    std::memcpy(&x, &exchanged[threadIdx.x ^ away], sizeof x);
    host::pause();
    return x;
}
template <class X> X __shfl_sync(unsigned, X x, int lane) {
    std::memcpy(&exchanged[threadIdx.x], &x, sizeof x);
    host::pause();
    std::memcpy(&x, &exchanged[threadIdx.x / 32 * 32 + lane], sizeof x);
    host::pause();
    return x;
}
template <class X> X __shfl_up_sync(unsigned, X x, int away) {
    std::memcpy(&exchanged[threadIdx.x], &x, sizeof x);
    host::pause();
    if (int(threadIdx.x % 32) >= away) std::memcpy(&x, &exchanged[threadIdx.x - away], sizeof x);
    host::pause();
    return x;
}
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
