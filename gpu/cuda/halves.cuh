// What attention needs of the machine and C++ has no word for: numbers of 16 bits, copies in the background.
// A second file of this name, tests/gpu/host/halves.cuh, has the same functions for the host.
#pragma once
#include "barriers.cuh"

// ---- numbers ---------------------------------------------------------------------------------------------------------
// 16-bit numbers are stored, never computed with: they become float on the way in and are rounded once on the way out.
struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

__device__ inline float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float widen(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T> __device__ inline T narrow(double x) { return (T)x; }
template <class T> __device__ inline T narrow(float x) { return (T)x; }
template <> __device__ inline bfloat16 narrow<bfloat16>(float x) {
    bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> __device__ inline float16 narrow<float16>(float x) {
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two numbers in one register, the first in the lower half.
template <class T> __device__ inline unsigned pack(float low, float high);
template <> __device__ inline unsigned pack<bfloat16>(float low, float high) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <> __device__ inline unsigned pack<float16>(float low, float high) {
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// 2^x on the special-function unit: 2 units in the last place.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- copies into shared memory -----------------------------------------------------------------------------------------
// 16 bytes, in the background; zeros where there is nothing to copy.
__device__ inline void copy16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
