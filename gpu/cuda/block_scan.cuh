// Steps of a linear recurrence, h -> a h + b, and what threads and blocks do with them.
//
// Step<X> is the pair (a, b); `then` composes two of them in order of time, which is associative and not commutative.
// A scan by blocks needs of every block only its composition, and of everything before it only the h that arrives.
#pragma once
#include "numbers.cuh"

template <class X>
struct Step {
    X a, b;
    __device__ __forceinline__ X operator()(X h) const { return multiply_add(a, h, b); }
};
template <class X> __device__ __forceinline__ Step<X> no_step() { return {X(1), X(0)}; }
template <class X> __device__ __forceinline__ Step<X> then(Step<X> first, Step<X> second) {
    return {second.a * first.a, multiply_add(second.a, first.b, second.b)};
}

// The composition of the steps of all lanes below this one, and in `all` that of the warp: log2(32) rounds of doubling.
template <class X>
__device__ __forceinline__ Step<X> steps_below(Step<X> mine, int lane, Step<X>& all) {
#pragma unroll
    for (int reach = 1; reach < 32; reach *= 2) {
        const Step<X> before = {from_below(mine.a, reach), from_below(mine.b, reach)};
        if (lane >= reach) mine = then(before, mine);
    }
    all = {from_lane(mine.a, 31), from_lane(mine.b, 31)};
    const Step<X> below = {from_below(mine.a, 1), from_below(mine.b, 1)};
    return lane ? below : no_step<X>();
}

// -- chunks of one sequence in many blocks -----------------------------------------------------------------------------
//
// Chunks are handed out by a counter, so that all earlier chunks of a sequence have begun (no block waits for one that
// cannot run). Every chunk publishes its composition; the last of each group of GROUP chunks also the h that leaves it. A
// chunk waits for the compositions of the chunks before it in its group and for the h of the group before: what is added
// to what is then the same in every run, where a look-back that takes whatever is ready first rounds differently each time.
enum { GROUP = 64 };

template <class X> __device__ __forceinline__ X fresh_load(const X* from) { return __ldcg(from); }  // past the first cache
template <class R> __device__ __forceinline__ Complex<R> fresh_load(const Complex<R>* from) { return {__ldcg(&from->re), __ldcg(&from->im)}; }

__device__ __forceinline__ void publish(unsigned* flag, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void await(const unsigned* flag) {
    unsigned seen;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    while (seen == 0);
}
