// WKV of RWKV-4: a weighted mean of values whose weights fade by exp(-w) a step; the current step counts exp(u + k).
//
//     y_t = (e^(m - M) N + e^(u + k_t - M) v_t) / (e^(m - M) D + e^(u + k_t - M)),   M = max(m, u + k_t)
//     m' = max(m - w, k_t),   N <- e^(m - w - m') N + e^(k_t - m') v_t,   likewise D
//
// The idea. A channel is three numbers: a thread takes one channel of one sequence through time; neighbouring threads have
// neighbouring channels, so that every access is coalesced, and AHEAD steps are loaded before they are used. Backwards from the states that
// the forward pass saved. What limits it: with batch times channels below some 10^5, latency.
#include "stable.cuh"

using i64 = long long;
constexpr int AHEAD = 8;

// Arrays (batch, T, c), w and u (c), states (batch, c); saved: three arrays (batch, T, c) of the state before each step, or null.
template <class X>
__global__ void __launch_bounds__(64)
wkv(const X* k, const X* v, const X* w, const X* u, const X* num0, const X* den0, const X* max0, X* y, X* num_last, X* den_last, X* max_last,
    X* saved_num, X* saved_den, X* saved_max, i64 batch, i64 T, i64 channels) {
    const i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x;
    if (at >= batch * channels) return;
    const i64 b = at / channels, c = at % channels, first = b * T * channels + c;
    const X fade = w[c], bonus = u[c];
    X N = num0 ? num0[at] : X(0), D = den0 ? den0[at] : X(0), m = max0 ? max0[at] : -infinity<X>();
    for (i64 t0 = 0; t0 < T; t0 += AHEAD) {
        X keys[AHEAD], values[AHEAD];
#pragma unroll
        for (int s = 0; s < AHEAD; ++s) {
            const bool inside = t0 + s < T;
            keys[s] = inside ? k[first + (t0 + s) * channels] : X(0);
            values[s] = inside ? v[first + (t0 + s) * channels] : X(0);
        }
#pragma unroll
        for (int s = 0; s < AHEAD; ++s) {
            if (t0 + s < T) {
                const i64 here = first + (t0 + s) * channels;
                if (saved_num) saved_num[here] = N, saved_den[here] = D, saved_max[here] = m;
                const X own = bonus + keys[s], top = finite_or_zero(max(m, own)), past = exp(m - top), present = exp(own - top);
                y[here] = (past * N + present * values[s]) / (past * D + present);
                const X faded = m - fade;
                m = max(faded, keys[s]);
                const X old = exp(faded - finite_or_zero(m)), now = exp(keys[s] - finite_or_zero(m));
                N = old * N + now * values[s];
                D = old * D + now;
            }
        }
    }
    if (num_last) num_last[at] = N, den_last[at] = D, max_last[at] = m;
}

// Cotangents of the last state in d_num, d_den, d_max (batch, c), of the first one out; dw, du (batch, c).
template <class X>
__global__ void __launch_bounds__(64)
wkv_vjp(const X* k, const X* v, const X* w, const X* u, const X* saved_num, const X* saved_den, const X* saved_max, const X* dy, X* dk, X* dv,
        X* dw, X* du, X* d_num, X* d_den, X* d_max, i64 batch, i64 T, i64 channels) {
    const i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x;
    if (at >= batch * channels) return;
    const i64 b = at / channels, c = at % channels, first = b * T * channels + c;
    const X fade = w[c], bonus = u[c];
    X dN = d_num[at], dD = d_den[at], dm = d_max[at], sum_w = X(0), sum_u = X(0);
    for (i64 t = T - 1; t >= 0; --t) {
        const i64 here = first + t * channels;
        const X key = k[here], value = v[here], N = saved_num[here], D = saved_den[here], before = saved_max[here];
        const X faded = before - fade, m = finite_or_zero(max(faded, key)), old = exp(faded - m), now = exp(key - m);
        X d_old = old * (N * dN + D * dD), d_new = now * (value * dN + dD);
        const X to_m = dm - d_old - d_new;
        if (faded >= key) {
            d_old += to_m;
        } else {
            d_new += to_m;
        }
        X d_value = now * dN;
        dN *= old, dD *= old, dm = d_old;
        sum_w -= d_old;

        const X own = bonus + key, top = finite_or_zero(max(before, own)), past = exp(before - top), present = exp(own - top);
        const X den = past * D + present, mean = (past * N + present * value) / den, g = dy[here] / den;
        const X d_own = past * present * g * (value * D - N) / den;
        dm -= d_own;
        dN += past * g;
        dD -= past * g * mean;
        sum_u += d_own;
        dk[here] = d_new + d_own;
        dv[here] = d_value + present * g;
    }
    dw[at] = sum_w, du[at] = sum_u, d_num[at] = dN, d_den[at] = dD, d_max[at] = dm;
}
