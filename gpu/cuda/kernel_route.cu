// Routing: the k largest of E logits of every token, the lower index first among equals, NaN last; and their weights.
//
// The idea. A warp takes a token, with its logits in shared memory. The next one chosen is the first, in the order of the choice, that
// comes after the last one chosen: k searches, and nothing to mark. What limits it: latency; it is small beside the experts.
#include "stable.cuh"

using i64 = long long;

enum Order { TOPK_SOFTMAX, SOFTMAX_TOPK, SIGMOID };

// Whether (x, i) is chosen before (y, j).
template <class X>
__device__ __forceinline__ bool before(X x, int i, X y, int j) {
    const bool x_nan = x != x, y_nan = y != y;
    if (x_nan != y_nan) return y_nan;
    if (x == y || x_nan) return i < j;
    return x > y;
}

template <class X>
__device__ __forceinline__ X sum_of_warp(X x) {
#pragma unroll
    for (int away = 16; away > 0; away /= 2) x += __shfl_xor_sync(0xffffffffu, x, away);
    return x;
}

// logits (rows, E); weights and experts (rows, k); shared memory for (E + k) numbers a warp.
template <class X>
__global__ void __launch_bounds__(128)
route(const X* logits, X* weights, i64* experts, i64 rows, int E, int k, int order, int renormalize) {
    extern __shared__ double memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    X *mine = reinterpret_cast<X*>(memory) + warp * (E + k), *chosen = mine + E;
    const i64 row = blockIdx.x * i64(blockDim.x / 32) + warp;
    if (row >= rows) return;
    for (int e = lane; e < E; e += 32) mine[e] = logits[row * E + e];
    __syncwarp();
    X last = infinity<X>();
    int last_index = -1;
    for (int j = 0; j < k; ++j) {
        int best = E;
        X value = X(0);
        for (int e = lane; e < E; e += 32) {
            const X x = mine[e];
            const bool open = last_index < 0 || before(last, last_index, x, e);
            if (open && (best == E || before(x, e, value, best))) best = e, value = x;
        }
#pragma unroll
        for (int away = 16; away > 0; away /= 2) {
            const int other = __shfl_xor_sync(0xffffffffu, best, away);
            const X theirs = __shfl_xor_sync(0xffffffffu, value, away);
            if (other < E && (best == E || before(theirs, other, value, best))) best = other, value = theirs;
        }
        last = value, last_index = best;
        if (lane == 0) {
            experts[row * k + j] = best;
            chosen[j] = value;
        }
    }
    __syncwarp();
    const bool all = order == SOFTMAX_TOPK && !renormalize, logs = order == SIGMOID && renormalize;
    X total = X(1), top = X(0);
    if (order != SIGMOID || renormalize) {
        const X* terms = all ? mine : chosen;
        X sum = X(0);
        top = logs ? log_sigmoid(chosen[0]) : chosen[0];
        for (int j = lane; j < (all ? E : k); j += 32) {
            const X x = logs ? log_sigmoid(terms[j]) : terms[j];
            sum += x == -infinity<X>() ? X(0) : exp(x - top);
        }
        total = sum_of_warp(sum);
    }
    for (int j = lane; j < k; j += 32) {
        const X x = logs ? log_sigmoid(chosen[j]) : chosen[j];
        X weight = order == SIGMOID && !renormalize ? sigmoid(x) : x == -infinity<X>() ? X(0) : exp(x - top);
        weights[row * k + j] = weight / total;
    }
}
