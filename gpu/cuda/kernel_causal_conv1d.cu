// Short causal convolution, z_t = bias + Σ_j w_j x_{t-(W-1)+j}, y = z or silu(z), and its gradient.
//
// Idea. A thread follows one channel through L steps with the last W inputs in registers, so that every number is
// read once; neighbouring threads have neighbouring channels, or neighbouring pieces of time where time is contiguous.
// The gradient runs the same window, and another one of dz = dy silu'(z), over W - 1 more steps: what it needs of them it
// computes again. Weights' gradients are summed over a thread's steps and then over threads, by another kernel.
//
// W = 0 stands for any number of taps (`taps`): the window is read again at every step, and dz is an argument.
// Limit: memory, two numbers a step.
#include "block_selective.cuh"

template <class S>
struct Rows {  // x after the state's rows: row -1 is the newest of the state
    const S* x;
    const Arithmetic<S>* state;  // (taps-1, c) of this sequence, or none
    i64 time, T, c;
    int taps;
    __device__ __forceinline__ Arithmetic<S> operator()(i64 t) const {
        if (t >= T || t <= -taps) return Arithmetic<S>(0);
        return t >= 0 ? widen<S>(x[t * time]) : state ? state[(t + taps - 1) * c] : Arithmetic<S>(0);
    }
};

struct Thread {  // the piece of work of a thread
    i64 sequence, chunk, channel;
    bool exists;
    __device__ Thread(i64 sequences, i64 chunks, i64 c, bool time_first) {
        i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
        exists = index < sequences * chunks * c;
        const i64 inner = time_first ? chunks : c, low = index % inner;
        index /= inner;
        const i64 outer = time_first ? c : chunks, high = index % outer;
        sequence = index / outer;
        chunk = time_first ? low : high;
        channel = time_first ? high : low;
    }
};

template <class R> __device__ __forceinline__ R active(R z, bool silu_too) { return silu_too ? silu(z) : z; }
template <class R> __device__ __forceinline__ Complex<R> active(Complex<R> z, bool) { return z; }
template <class R> __device__ __forceinline__ R activity(R dy, R z, bool silu_too) { return silu_too ? dy * silu_slope(z) : dy; }
template <class R> __device__ __forceinline__ Complex<R> activity(Complex<R> dy, Complex<R>, bool) { return dy; }

template <class S, int W, int L>
__global__ void causal_conv1d(const S* x, i64 x_batch, i64 x_time, i64 x_channel, const Arithmetic<S>* weight, const Arithmetic<S>* bias,
                              const Arithmetic<S>* state, S* y, i64 y_batch, i64 y_time, i64 y_channel, i64 sequences, i64 T, i64 c, int taps,
                              int silu_too, int time_first) {
    using X = Arithmetic<S>;
    const i64 chunks = (T + L - 1) / L;
    const Thread at(sequences, chunks, c, time_first);
    if (!at.exists) return;
    const Rows<S> row = {x + at.sequence * x_batch + at.channel * x_channel, state ? state + at.sequence * (taps - 1) * c + at.channel : nullptr, x_time, T, c, taps};
    const X* w_from = weight + at.channel * taps;
    const X b = bias ? bias[at.channel] : X(0);
    S* to = y + at.sequence * y_batch + at.channel * y_channel;
    const i64 start = at.chunk * L, end = start + L < T ? start + L : T;
    if constexpr (W > 0) {
        X w[W], seen[W];
#pragma unroll
        for (int j = 0; j < W; ++j) {
            w[j] = w_from[j];
            if (j) seen[j] = row(start - W + j);
        }
#pragma unroll 8
        for (i64 t = start; t < end; ++t) {
            X z = b;
#pragma unroll
            for (int j = 0; j + 1 < W; ++j) seen[j] = seen[j + 1];
            seen[W - 1] = widen<S>(row.x[t * x_time]);
#pragma unroll
            for (int j = 0; j < W; ++j) z = multiply_add(w[j], seen[j], z);
            to[t * y_time] = narrow<S>(active(z, silu_too));
        }
    } else {
        for (i64 t = start; t < end; ++t) {
            X z = b;
            for (int j = 0; j < taps; ++j) z = multiply_add(w_from[j], row(t - taps + 1 + j), z);
            to[t * y_time] = narrow<S>(active(z, silu_too));
        }
    }
}

// dx, dstate, and for each thread its part of dweight and dbias: parts (sequence, chunk, taps + 1, channel).
template <class S, int W, int L>
__global__ void causal_conv1d_gradient(const S* dy, i64 dy_batch, i64 dy_time, i64 dy_channel, const S* x, i64 x_batch, i64 x_time, i64 x_channel,
                                       const Arithmetic<S>* weight, const Arithmetic<S>* bias, const Arithmetic<S>* state, const Arithmetic<S>* dlast,
                                       S* dx, i64 dx_batch, i64 dx_time, i64 dx_channel, Arithmetic<S>* dstate, Arithmetic<S>* parts, i64 sequences,
                                       i64 T, i64 c, int taps, int silu_too, int time_first) {
    using X = Arithmetic<S>;
    const i64 chunks = (T + L - 1) / L;
    const Thread at(sequences, chunks, c, time_first);
    if (!at.exists) return;
    const i64 own = at.sequence * (taps - 1) * c + at.channel;
    const Rows<S> row = {x + at.sequence * x_batch + at.channel * x_channel, state ? state + own : nullptr, x_time, T, c, taps};
    const S* dy_from = dy + at.sequence * dy_batch + at.channel * dy_channel;
    const X* w_from = weight + at.channel * taps;
    const X b = bias ? bias[at.channel] : X(0);
    const i64 start = at.chunk * L, end = start + L < T ? start + L : T;
    const i64 first = at.chunk ? start : 1 - taps;  // the first chunk answers for the state's rows too
    X* part = parts + ((at.sequence * chunks + at.chunk) * (taps + 1)) * c + at.channel;
    const auto store = [&](i64 s, X value) {
        if (dlast && s >= T - taps + 1) value = value + dlast[own + (s - (T - taps + 1)) * c];
        if (s >= 0) dx[at.sequence * dx_batch + s * dx_time + at.channel * dx_channel] = narrow<S>(value);
        else if (dstate) dstate[own + (s + taps - 1) * c] = value;
    };
    const auto cotangent = [&](i64 t) { return t >= 0 && t < T ? widen<S>(dy_from[t * dy_time]) : X(0); };
    if constexpr (W > 0) {
        X w[W], seen[W], dz[W], dw[W], db = X(0);
#pragma unroll
        for (int j = 0; j < W; ++j) {
            w[j] = conjugate(w_from[j]);
            dw[j] = dz[j] = X(0);
            seen[j] = j ? row(first - W + j) : X(0);
        }
#pragma unroll 4
        for (i64 t = first; t < end + W - 1; ++t) {
            X z = b;
#pragma unroll
            for (int j = 0; j + 1 < W; ++j) seen[j] = seen[j + 1], dz[j] = dz[j + 1];
            seen[W - 1] = row(t);
#pragma unroll
            for (int j = 0; j < W; ++j) z = multiply_add(w[j], seen[j], z);
            dz[W - 1] = activity(cotangent(t), z, silu_too);
            if (t >= start && t < end) {
                db = db + dz[W - 1];
#pragma unroll
                for (int j = 0; j < W; ++j) dw[j] = multiply_add(conjugate(seen[j]), dz[W - 1], dw[j]);
            }
            if (t - W + 1 >= first) {
                X sum = X(0);
#pragma unroll
                for (int j = 0; j < W; ++j) sum = multiply_add(w[j], dz[W - 1 - j], sum);
                store(t - W + 1, sum);
            }
        }
#pragma unroll
        for (int j = 0; j < W; ++j) part[j * c] = dw[j];
        part[W * c] = db;
    } else {  // dy is dz already
        for (i64 s = first; s < end; ++s) {
            X sum = X(0);
            for (int j = 0; j < taps; ++j) sum = multiply_add(conjugate(w_from[j]), cotangent(s + taps - 1 - j), sum);
            store(s, sum);
        }
        X db = X(0);
        for (i64 t = start; t < end; ++t) db = db + cotangent(t);
        for (int j = 0; j < taps; ++j) {
            X dw = X(0);
            for (i64 t = start; t < end; ++t) dw = multiply_add(conjugate(row(t - taps + 1 + j)), cotangent(t), dw);
            part[j * c] = dw;
        }
        part[taps * c] = db;
    }
}
