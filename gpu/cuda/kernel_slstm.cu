// sLSTM: one block walks one head of one sequence through all of time; no launch per step.
//
//     a = x_t + R h_(t-1)   (4 d numbers, the gates z, i, f, o);     m_t = max(log f + m, i),  f' = exp(log f + m - m_t),  i' = exp(i - m_t)
//     c <- f' c + i' tanh(z),   n <- f' n + i',   h = sigmoid(o) c / n
//
// The idea. A step must wait for the one before, so that its length is all that counts: the recurrent matrix (4 d x d) stays where
// it is read fastest - for d <= 64 a row in the registers of each of 4 d threads (D > 0), else transposed in shared memory if it
// fits, else in the L2 cache - h goes through shared memory, and the next input is on its way while this one is used. Backwards the same with
// columns: da from the saved pre-activations and states, then dh = R^T da, in four parts.
//
// What limits it. Latency: two barriers and d dependent multiply-adds a step.
#include "stable.cuh"

using i64 = long long;

template <class X> struct alignas(16) Four { X of[4]; };

// The dot product of a row (or column) of R, of this thread, with d numbers in shared memory. `at` is R's entry 0, `stride` the way to the next.
template <class X, int D>
__device__ __forceinline__ X dot(const X* kept, const X* at, int stride, const X* h, int d) {
    X sums[4] = {X(0), X(0), X(0), X(0)};
    if (D > 0) {
#pragma unroll
        for (int j = 0; j < D; j += 4) {
            const Four<X> part = *reinterpret_cast<const Four<X>*>(h + j);
#pragma unroll
            for (int l = 0; l < 4; ++l) sums[l] += kept[j + l] * part.of[l];
        }
    } else {
        int j = 0;
        for (; j + 4 <= d; j += 4) {
#pragma unroll
            for (int l = 0; l < 4; ++l) sums[l] += at[i64(j + l) * stride] * h[j + l];
        }
        for (; j < d; ++j) sums[0] += at[i64(j) * stride] * h[j];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// R: (heads, d, 4 d), entry [j, r] of row r = (gate, i). saved_a: (sequences, T, 4, d), saved_c, _n, _m: (sequences, T, d), or null.
template <class X, int D>
__global__ void __launch_bounds__(D > 0 ? 4 * D : 1024)
slstm(const X* z, const X* i, const X* f, const X* o, const X* R, const X* bias, const X* c0, const X* n0, const X* h0, const X* m0,
      X* h_out, X* c_last, X* n_last, X* h_last, X* m_last, X* saved_a, X* saved_c, X* saved_n, X* saved_m, i64 T, int heads, int d,
      int exponential, int staged) {
    extern __shared__ double memory[];
    const int padded = D > 0 ? D : (d + 3) / 4 * 4;  // whole accesses of four numbers
    X* h_s = reinterpret_cast<X*>(memory);            // d rounded up, then a (4 d), then R if staged
    X *a_s = h_s + padded, *R_s = a_s + 4 * d;
    const i64 s = blockIdx.x;
    const int head = int(s % heads), me = threadIdx.x, rows = 4 * d;
    R += i64(head) * d * rows;
    X kept[D > 0 ? D : 1];
    if (D > 0) {
#pragma unroll
        for (int j = 0; j < D; ++j) kept[j] = me < rows && j < d ? R[i64(j) * rows + me] : X(0);
    } else if (staged) {
        for (int at = me; at < d * rows; at += blockDim.x) R_s[at] = R[at];
        R = R_s;
    }
    for (int j = me; j < padded; j += blockDim.x) h_s[j] = j < d && h0 ? h0[s * d + j] : X(0);
    X c = X(0), n = X(0), m = -infinity<X>();
    if (me < d && c0) c = c0[s * d + me], n = n0[s * d + me], m = m0[s * d + me];
    const X* inputs[4] = {z, i, f, o};
    const X* mine = inputs[min(me / d, 3)] + s * T * d + me % d;  // of row `me`
    X next = me < rows && T > 0 ? mine[0] : X(0);
    __syncthreads();
    for (i64 t = 0; t < T; ++t) {
        for (int r = me; r < rows; r += blockDim.x) {
            X x = r == me ? next : inputs[r / d][(s * T + t) * d + r % d];
            if (bias) x += bias[(i64(r / d) * heads + head) * d + r % d];
            x += dot<X, D>(kept, R + r, rows, h_s, d);
            a_s[r] = x;
            if (saved_a) saved_a[(s * T + t) * rows + r] = x;
        }
        if (me < rows && t + 1 < T) next = mine[(t + 1) * d];
        __syncthreads();
        if (me < d) {
            const X log_f = exponential ? a_s[2 * d + me] : log_sigmoid(a_s[2 * d + me]), in = a_s[d + me], decayed = log_f + m;
            m = max(decayed, in);
            const X top = finite_or_zero(m), old = exp(decayed - top), now = exp(in - top);
            c = old * c + now * tanh(a_s[me]);
            n = old * n + now;
            const X h = sigmoid(a_s[3 * d + me]) * (c / n);
            h_s[me] = h;
            const i64 at = (s * T + t) * d + me;
            h_out[at] = h;
            if (saved_c) saved_c[at] = c, saved_n[at] = n, saved_m[at] = m;
        }
        __syncthreads();
    }
    if (me < d && c_last) c_last[s * d + me] = c, n_last[s * d + me] = n, h_last[s * d + me] = h_s[me], m_last[s * d + me] = m;
}

// What the backward pass reads of one unit and step; read a step before it is needed.
template <class X>
struct Saved {
    X a[4], c, n, m, h, dy;
    __device__ __forceinline__ void read(const X* saved_a, const X* saved_c, const X* saved_n, const X* saved_m, const X* all_h, const X* all_dy,
                                         i64 s, i64 t, i64 T, int d, int unit) {
        const i64 at = (s * T + t) * d + unit;
#pragma unroll
        for (int g = 0; g < 4; ++g) a[g] = saved_a[((s * T + t) * 4 + g) * d + unit];
        c = saved_c[at], n = saved_n[at], m = saved_m[at], h = all_h[at], dy = all_dy[at];
    }
};

// R here as given, (4, heads, d, d); da: (sequences, T, 4, d). Cotangents of the last state in dc ... dm, of the first one out.
template <class X, int D>
__global__ void __launch_bounds__(D > 0 ? 4 * D : 1024)
slstm_vjp(const X* R, const X* c0, const X* n0, const X* m0, const X* h, const X* saved_a, const X* saved_c, const X* saved_n,
          const X* saved_m, const X* dy, X* da, X* dc_io, X* dn_io, X* dh_io, X* dm_io, i64 T, int heads, int d, int exponential, int staged) {
    extern __shared__ double memory[];
    X* part_s = reinterpret_cast<X*>(memory);  // (4, d), then da (4, d rounded up), then R if staged
    const int padded = D > 0 ? D : (d + 3) / 4 * 4, rows = 4 * d;
    X *da_s = part_s + rows, *R_s = da_s + 4 * padded;
    const i64 s = blockIdx.x;
    const int head = int(s % heads), me = threadIdx.x;
    X kept[D > 0 ? D : 1];
    if (D > 0) {
#pragma unroll
        for (int j = 0; j < D; ++j) kept[j] = me < rows && j < d ? R[((i64(me / d) * heads + head) * d + j) * d + me % d] : X(0);
    } else if (staged) {
        for (int at = me; at < d * rows; at += blockDim.x) R_s[at] = R[(i64(at / (d * d)) * heads + head) * d * d + at % (d * d)];
    }
    for (int r = me; r < 4 * padded; r += blockDim.x) da_s[r] = X(0);
    X dc = X(0), dn = X(0), dh = X(0), dm = X(0);
    if (me < d) dc = dc_io[s * d + me], dn = dn_io[s * d + me], dh = dh_io[s * d + me], dm = dm_io[s * d + me];
    Saved<X> next;
    if (me < d && T > 0) next.read(saved_a, saved_c, saved_n, saved_m, h, dy, s, T - 1, T, d, me);
    __syncthreads();
    for (i64 t = T - 1; t >= 0; --t) {
        if (me < d) {
            const i64 a_at = (s * T + t) * rows + me;
            const Saved<X> step = next;
            if (t > 0) {
                next.read(saved_a, saved_c, saved_n, saved_m, h, dy, s, t - 1, T, d, me);
            } else {
                next.c = c0 ? c0[s * d + me] : X(0), next.n = n0 ? n0[s * d + me] : X(0), next.m = m0 ? m0[s * d + me] : -infinity<X>();
            }
            const X a_z = step.a[0], a_i = step.a[1], a_f = step.a[2], a_o = step.a[3], c = step.c, n = step.n, gate = sigmoid(a_o);
            const X top = finite_or_zero(step.m), decayed = (exponential ? a_f : log_sigmoid(a_f)) + next.m;
            const X old = exp(decayed - top), now = exp(a_i - top);
            dh += step.dy;
            dc += dh * gate / n;
            dn -= dh * step.h / n;
            X d_old = old * (dc * next.c + dn * next.n), d_new = now * (dc * tanh(a_z) + dn);
            dm -= d_old + d_new;
            if (decayed >= a_i) {
                d_old += dm;
            } else {
                d_new += dm;
            }
            da_s[me] = now * dc * tanh_derivative(a_z);
            da_s[padded + me] = d_new;
            da_s[2 * padded + me] = exponential ? d_old : d_old * sigmoid(-a_f);
            da_s[3 * padded + me] = dh * (c / n) * gate * sigmoid(-a_o);
#pragma unroll
            for (int g = 0; g < 4; ++g) da[a_at + g * d] = da_s[g * padded + me];
            dc *= old;
            dn *= old;
            dm = d_old;
        }
        __syncthreads();
        for (int r = me; r < rows; r += blockDim.x) {
            const int g = r / d;
            const X* column = D > 0 ? nullptr : staged ? R_s + i64(g) * d * d + r % d : R + (i64(g) * heads + head) * d * d + r % d;
            part_s[r] = dot<X, D>(kept, column, d, da_s + g * padded, d);
        }
        __syncthreads();
        if (me < d) dh = (part_s[me] + part_s[d + me]) + (part_s[2 * d + me] + part_s[3 * d + me]);
    }
    if (me < d) dc_io[s * d + me] = dc, dn_io[s * d + me] = dn, dh_io[s * d + me] = dh, dm_io[s * d + me] = dm;
}
