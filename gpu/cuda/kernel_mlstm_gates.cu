// Stabilised exponential gates: m_t = max(F_t + m_(t-1), i_t), log f'_t = F_t + m_(t-1) - m_t, log i'_t = i_t - m_t; and the adjoint.
//
// The idea. The maximum goes from step to step, all else does not: a block takes one sequence, stages a tile of steps in shared
// memory, lets one thread walk through it, and the others do the rest. What limits it: the walk, some 10 cycles a step.
#include "stable.cuh"

using i64 = long long;
constexpr int TILE = 256;

template <class X>
__global__ void __launch_bounds__(TILE)
mlstm_gates(const X* F, const X* i, const X* before, X* log_f, X* i_prime, X* m, i64 T) {
    __shared__ X F_s[TILE], i_s[TILE], m_s[TILE + 1];
    const i64 row = blockIdx.x * T;
    if (threadIdx.x == 0) m_s[0] = before[blockIdx.x];
    for (i64 t0 = 0; t0 < T; t0 += TILE) {
        const i64 t = t0 + threadIdx.x;
        if (t < T) F_s[threadIdx.x] = F[row + t], i_s[threadIdx.x] = i[row + t];
        __syncthreads();
        const int n = int(min(i64(TILE), T - t0));
        if (threadIdx.x == 0) {
            X top = m_s[0];
            for (int s = 0; s < n; ++s) {
                top = max(F_s[s] + top, i_s[s]);
                m_s[s + 1] = top;
            }
        }
        __syncthreads();
        if (t < T) {
            const X top = finite_or_zero(m_s[threadIdx.x + 1]);
            log_f[row + t] = F_s[threadIdx.x] + m_s[threadIdx.x] - top;
            i_prime[row + t] = exp(i_s[threadIdx.x] - top);
            m[row + t] = m_s[threadIdx.x + 1];
        }
        __syncthreads();
        if (threadIdx.x == 0) m_s[0] = m_s[n];
        __syncthreads();
    }
}

// Cotangents of log f' (`d_old`) and log i' (`d_new`), and of m from what is read (`d_read`) and at the end (`d_last`), to those of
// F, i and the first m. m takes what its exponents give up, and hands it to the larger argument of the maximum, F + m at a tie.
template <class X>
__global__ void __launch_bounds__(TILE)
mlstm_gates_vjp(const X* F, const X* i, const X* before, const X* m, const X* d_old, const X* d_new, const X* d_read, const X* d_last,
                X* dF, X* di, X* d_before, i64 T) {
    __shared__ X old_s[TILE], new_s[TILE], read_s[TILE];
    __shared__ bool left[TILE];
    const i64 row = blockIdx.x * T;
    X dm = d_last ? d_last[blockIdx.x] : X(0);
    for (i64 tile = (T + TILE - 1) / TILE - 1; tile >= 0; --tile) {
        const i64 t0 = tile * TILE, t = t0 + threadIdx.x;
        if (t < T) {
            old_s[threadIdx.x] = d_old[row + t], new_s[threadIdx.x] = d_new[row + t], read_s[threadIdx.x] = d_read[row + t];
            left[threadIdx.x] = F[row + t] + (t ? m[row + t - 1] : before[blockIdx.x]) >= i[row + t];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int s = int(min(i64(TILE), T - t0)) - 1; s >= 0; --s) {
                dm += read_s[s] - old_s[s] - new_s[s];
                if (left[s]) {
                    old_s[s] += dm;
                } else {
                    new_s[s] += dm;
                }
                dm = old_s[s];
            }
        }
        __syncthreads();
        if (t < T) dF[row + t] = old_s[threadIdx.x], di[row + t] = new_s[threadIdx.x];
        __syncthreads();
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
