// Steps of `ssd` as the matrix memory takes them, dt = clip(softplus(x + bias)): decays dt A, and log dt, by which B is multiplied; and the adjoint.
//
// The idea. A thread has one step after the other; nothing of them is kept for the adjoint, which computes them again from x, and sums in a block,
// which has a head of a sequence, what A and the bias get. What limits it: bytes, 10 and 14 a step.
#include "numbers.cuh"
#include "stable.cuh"

constexpr int THREADS = 256;

// A step before and after the limits. What is no number stays none.
struct Step {
    float raw, unclipped, dt;
};
__device__ __forceinline__ Step step_of(float x, float bias, int soft, float low, float high) {
    const float raw = x + bias, unclipped = soft ? -log_sigmoid(-raw) : raw;
    return {raw, unclipped, unclipped < low ? low : unclipped > high ? high : unclipped};
}

// x, w, gain (rows, T); A and bias (heads), of row r those of head r % heads; bias may be null. Grid: (rows).
__global__ void __launch_bounds__(THREADS)
ssd_steps(const __nv_bfloat16* x, const float* A, const float* bias, float* w, float* gain, i64 T, int heads, int soft, float low, float high) {
    const i64 row = blockIdx.x * T;
    const int h = blockIdx.x % heads;
    const float rate = A[h], more = bias ? bias[h] : 0.0f;
#pragma unroll 4
    for (i64 t = threadIdx.x; t < T; t += THREADS) {
        const float dt = step_of(widen(x[row + t]), more, soft, low, high).dt;
        w[row + t] = dt * rate, gain[row + t] = log(dt);
    }
}

// Of cotangents of w, and of the gain times dt, (rows, T), that of x; and those of A and of the bias, summed over time, (rows).
__global__ void __launch_bounds__(THREADS)
ssd_steps_vjp(const __nv_bfloat16* x, const float* A, const float* bias, const float* dw, const float* dgain, float* dx, float* dA, float* dbias,
              i64 T, int heads, int soft, float low, float high) {
    __shared__ float of_warps[2][THREADS / 32];
    const i64 row = blockIdx.x * T;
    const int h = blockIdx.x % heads, warp = threadIdx.x / 32;
    const float rate = A[h], more = bias ? bias[h] : 0.0f;
    float sums[2] = {0.0f, 0.0f};
#pragma unroll 4
    for (i64 t = threadIdx.x; t < T; t += THREADS) {
        const Step step = step_of(widen(x[row + t]), more, soft, low, high);
        const float decay = dw[row + t];
        float d = rate * decay + dgain[row + t];
        if (step.unclipped < low || step.unclipped > high) d = 0.0f;
        if (soft) d *= sigmoid(step.raw);
        dx[row + t] = d;
        sums[0] += step.dt * decay, sums[1] += d;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int away = 16; away > 0; away /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], away);
        if (threadIdx.x % 32 == 0) of_warps[i][warp] = sums[i];
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < THREADS / 32; ++i) sum += of_warps[threadIdx.x][i];
        (threadIdx.x ? dbias : dA)[blockIdx.x] = sum;
    }
}
