// How the threads of a block wait for one another: barriers by number, and barriers in shared memory that count who came.
//
// Two habits of the kernels are right, and more than compute-sanitizer's racecheck follows: one lane arrives for its warp, after
// __syncwarp, which orders what the others did before what it does; and threads pass a numbered barrier without waiting (bar.arrive).
// With EVERY_LANE_ARRIVES defined, which tests/gpu/sanitize.py does for racecheck alone, every lane arrives for itself, and numbered
// barriers are barriers that count; all else stays. What racecheck reports then is a race, or is not about these habits.
#pragma once

__device__ __forceinline__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// ---- barriers that count: a phase ends when so many have arrived, and so many bytes have come (sm_80 has them without bytes) ---------
struct Barrier { unsigned long long word; };

__device__ __forceinline__ void barrier_init(Barrier* b, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* b) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_wait(Barrier* b, int phase) {
#if __CUDA_ARCH__ >= 900
#define TEST_BARRIER "mbarrier.try_wait"
#else
#define TEST_BARRIER "mbarrier.test_wait"
#endif
    asm volatile("{\n.reg .pred done;\nagain:\n" TEST_BARRIER ".parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(b)),
                 "r"(phase)
                 : "memory");
}

#ifdef EVERY_LANE_ARRIVES
constexpr int ARRIVALS_OF_A_WARP = 32;
#else
constexpr int ARRIVALS_OF_A_WARP = 1;
#endif
// A barrier of warps, and the arrival of one: what all its lanes did so far comes before what follows the wait.
__device__ __forceinline__ void barrier_init_for_warps(Barrier* b, int warps) { barrier_init(b, warps * ARRIVALS_OF_A_WARP); }
__device__ __forceinline__ void barrier_arrive_as_warp(Barrier* b) {
    __syncwarp();
    if (threadIdx.x % 32 < ARRIVALS_OF_A_WARP) barrier_arrive(b);
}

// ---- barriers by number, of sixteen: `threads` of the block, whole warps, come to one, some of them to pass without waiting. What they
// ---- wrote before is seen after.
#ifndef EVERY_LANE_ARRIVES
// Said at a kernel's start, by all threads: so many come to each of `count` barriers from number `first` on.
__device__ __forceinline__ void will_come(int, int, int) {}
__device__ __forceinline__ void meet(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
__device__ __forceinline__ void pass(int number, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
#else
__device__ __forceinline__ Barrier* numbered(int number) {
    __shared__ Barrier all[16];
    return all + number;
}
__device__ __forceinline__ void will_come(int first, int count, int threads) {
    if (threadIdx.x == 0)
        for (int i = 0; i < count; i++) barrier_init(numbered(first + i), threads);
    __syncthreads();
}
__device__ __forceinline__ void meet(int number, int) {
    asm volatile(
        "{\n.reg .pred done;\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\nagain:\n" TEST_BARRIER
        ".shared.b64 done, [%0], state;\n@!done bra again;\n}" ::"r"(shared_address(numbered(number)))
        : "memory");
    __syncwarp();
}
__device__ __forceinline__ void pass(int number, int) { barrier_arrive(numbered(number)); }
#endif
