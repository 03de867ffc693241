// What the selective scan needs of the machine and C++ has no word for.
#pragma once
#include "barriers.cuh"

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// yes ? x : y, never a branch.
__device__ __forceinline__ float choose(bool yes, float x, float y) {
    float z;
    asm("{.reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p;}" : "=f"(z) : "f"(x), "f"(y), "r"(int(yes)));
    return z;
}
// A number that is not to be found again where it could be kept.
__device__ __forceinline__ int kept(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
