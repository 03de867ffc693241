// Stabilised exponential gates: m_t = max(F_t + m_(t-1), i_t), log f'_t = F_t + m_(t-1) - m_t, log i'_t = i_t - m_t; and the adjoint.
//
// The idea. Both are scans. What steps do to m is a pair (f, i), m -> max(f + m, i), and so are two steps, one after the other: (f + f',
// max(i + f', i')). Backwards, what arrives at m goes on to the step before, or stays where i was larger: x -> x + b, or b. A block takes one
// sequence, a thread RUN steps in a row; warps scan by shuffles. What limits it: little of the device has something to do.
#include "stable.cuh"

using i64 = long long;
constexpr int TILE = 256, RUN = 4, WARPS = TILE / 32;

// m -> max(f + m, i)
template <class X> struct Gate {
    X f, i;
    static __device__ __forceinline__ Gate none() { return {X(0), -infinity<X>()}; }
    __device__ __forceinline__ X operator()(X m) const { return max(f + m, i); }
    __device__ __forceinline__ Gate then(Gate next) const { return {f + next.f, max(i + next.f, next.i)}; }
    __device__ __forceinline__ Gate of_lane(int away) const { return {__shfl_up_sync(0xffffffffu, f, away), __shfl_up_sync(0xffffffffu, i, away)}; }
};
// x -> x + b, or b if it is `closed`
template <class X> struct Arrival {
    X b;
    int closed;
    static __device__ __forceinline__ Arrival none() { return {X(0), 0}; }
    __device__ __forceinline__ X operator()(X x) const { return closed ? b : x + b; }
    __device__ __forceinline__ Arrival then(Arrival next) const { return {next(b), closed | next.closed}; }
    __device__ __forceinline__ Arrival of_lane(int away) const { return {__shfl_up_sync(0xffffffffu, b, away), __shfl_up_sync(0xffffffffu, closed, away)}; }
};

// x after all threads before this one, where it is `carry` at first; `carry` becomes what it is after all.
template <class Map, class X> __device__ __forceinline__ X before_thread(Map own, X& carry, Map* of_warps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Map upto = own;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const Map earlier = upto.of_lane(away);
        if (lane >= away) upto = earlier.then(upto);
    }
    if (lane == 31) of_warps[warp] = upto;
    const Map earlier = upto.of_lane(1);
    __syncthreads();
    X x = carry;
    for (int i = 0; i < WARPS; ++i) {
        if (i == warp) x = carry;
        carry = of_warps[i](carry);
    }
    __syncthreads();
    return lane ? earlier(x) : x;
}

template <class X>
__global__ void __launch_bounds__(TILE)
mlstm_gates(const X* F, const X* i, const X* before, X* log_f, X* i_prime, X* m, i64 T) {
    __shared__ Gate<X> of_warps[WARPS];
    const i64 row = blockIdx.x * T;
    X top = before[blockIdx.x];
    for (i64 t0 = threadIdx.x * RUN, first = 0; first < T; first += TILE * RUN, t0 += TILE * RUN) {
        Gate<X> steps[RUN], all = Gate<X>::none();
#pragma unroll
        for (int s = 0; s < RUN; ++s) {
            steps[s] = t0 + s < T ? Gate<X>{F[row + t0 + s], i[row + t0 + s]} : Gate<X>::none();
            all = all.then(steps[s]);
        }
        X was = before_thread(all, top, of_warps);
#pragma unroll
        for (int s = 0; s < RUN; ++s) {
            const X is = steps[s](was);
            if (t0 + s < T) {
                const X at_least = finite_or_zero(is);
                log_f[row + t0 + s] = steps[s].f + was - at_least;
                i_prime[row + t0 + s] = exp(steps[s].i - at_least);
                m[row + t0 + s] = is;
            }
            was = is;
        }
    }
}

// Cotangents of log f' (`d_old`) and log i' (`d_new`), and of m from what is read (`d_read`) and at the end (`d_last`), to those of
// F, i and the first m. m takes what its exponents give up, and hands it to the larger argument of the maximum, F + m at a tie.
template <class X>
__global__ void __launch_bounds__(TILE)
mlstm_gates_vjp(const X* F, const X* i, const X* before, const X* m, const X* d_old, const X* d_new, const X* d_read, const X* d_last,
                X* dF, X* di, X* d_before, i64 T) {
    __shared__ Arrival<X> of_warps[WARPS];
    const i64 row = blockIdx.x * T;
    X dm = d_last ? d_last[blockIdx.x] : X(0);
    for (i64 t0 = T - 1 - threadIdx.x * RUN, first = 0; first < T; first += TILE * RUN, t0 -= TILE * RUN) {  // the last step first
        Arrival<X> steps[RUN], all = Arrival<X>::none();
        X d_i[RUN];  // but for what arrives at m, where that is its
#pragma unroll
        for (int s = 0; s < RUN; ++s) {
            const i64 t = t0 - s;
            steps[s] = Arrival<X>::none(), d_i[s] = X(0);
            if (t >= 0) {
                const bool left = F[row + t] + (t ? m[row + t - 1] : before[blockIdx.x]) >= i[row + t];
                const X read = d_read[row + t], of_old = d_old[row + t], of_new = d_new[row + t];
                steps[s] = left ? Arrival<X>{read - of_new, 0} : Arrival<X>{of_old, 1};
                d_i[s] = left ? of_new : read - of_old;
            }
            all = all.then(steps[s]);
        }
        X arrives = before_thread(all, dm, of_warps);
#pragma unroll
        for (int s = 0; s < RUN; ++s) {
            const i64 t = t0 - s;
            const X on = steps[s](arrives);
            if (t >= 0) dF[row + t] = on, di[row + t] = steps[s].closed ? d_i[s] + arrives : d_i[s];
            arrives = on;
        }
    }
    if (threadIdx.x == 0) d_before[blockIdx.x] = dm;
}

// Of each step, with s = n . q, o what is read before it is divided by D = max(|s|, e^-m) + eps, and y = o / D: -log D, D times the cotangent
// of s, and that of m where e^-m is the larger. e^-m is the least normal number where it were less.
__global__ void __launch_bounds__(TILE)
mlstm_read_vjp(const float* s, const float* o_dy, const float* m, float* of_query, float* of_n, float* d_read, i64 size, float eps) {
    const i64 at = i64(blockIdx.x) * TILE + threadIdx.x;
    if (at >= size) return;
    const float bound = exp(-min(m[at], 87.336544f)), overlap = fabs(s[at]), D = max(overlap, bound) + eps, against = o_dy[at] / D;
    const bool enough = overlap >= bound;
    of_query[at] = -log(D);
    of_n[at] = !enough || overlap == 0.0f ? 0.0f : (s[at] > 0.0f ? -against : against);
    d_read[at] = enough ? 0.0f : against / (1.0f + eps / bound);
}
