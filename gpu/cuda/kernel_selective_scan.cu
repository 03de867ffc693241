// Selective scan, forward: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t·h_t + D u_t) silu(z_t).
//
// Idea. A block takes CH channels through time, LANES lanes to a channel, each with K of its states in registers: enough
// warps that one computes exponentials while another waits. The tile of the next TT steps is on its way in registers
// while this one is worked on. Step sizes are made once per (time, channel), all threads taking part, and reach the lanes
// through shared memory, as B and C do; so the inner loop of a state is two products, an exponential and two fused
// multiply-adds. Sums C·h over lanes are formed for several steps at once (sums_over_lanes).
//
// Long sequences of few channels: `segments` of time at once. A first run (STATES) finds the state that each segment would
// end with from zero, and its elapsed time; `carry_states` connects them; a second run has results. No array of T·n numbers.
//
// Limit: the special-function unit, n + 4 exponentials and reciprocals per (time, channel) at 16 a clock.
#include "block_selective.cuh"

enum { RESULTS = 0, STATES = 1, CHECKPOINTS = 2 };

// S, SX: storage of u, delta, z, y and of B, C. X: arithmetic of A and the states, real or complex; R that of the rest.
// CHECKPOINTS: no results, but the state before every tile, for the gradient to start from.
template <int MODE, class S, class SX, class X, int LANES, int K, int THREADS, int TT, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) selective_scan(
    const S* u, i64 u_batch, i64 u_time, const S* delta, i64 delta_batch, i64 delta_time, const S* z, i64 z_batch, i64 z_time, const SX* B,
    i64 B_batch, i64 B_time, i64 B_group, const SX* C, i64 C_batch, i64 C_time, i64 C_group, const X* A, const Arithmetic<S>* D,
    const Arithmetic<S>* bias, const X* state, X* last, S* y, Arithmetic<S>* elapsed, i64 T, int c, int n, int G, i64 segments, i64 length,
    int softplused, int packed) {
    using R = Arithmetic<S>;
    enum { CH = THREADS / LANES, NS = LANES * K, AT_ONCE = 4 };
    using Steps = Spread<S, THREADS, CH, TT>;
    using Map = Maps<SX, X, THREADS, NS, TT>;
    static_assert(TT % AT_ONCE == 0, "whole groups of steps");
    __shared__ alignas(16) Pack<R, 2> steps[TT][CH];  // dt, dt u
    __shared__ alignas(16) X into[TT][NS], out[MODE == RESULTS ? TT : 1][NS];
    __shared__ R read_out[MODE == RESULTS ? TT : 1][CH];  // C·h

    const Place at(blockIdx.x, c, G, segments, CH);
    const int mine = threadIdx.x / LANES, part = threadIdx.x % LANES, lane = threadIdx.x % 32;
    const bool live = mine < at.channels;
    const i64 start = at.segment * length, end = start + length < T ? start + length : T;
    const S* u_from = u + at.sequence * u_batch + at.channel;
    const S* delta_from = delta + at.sequence * delta_batch + at.channel;
    const S* z_from = z ? z + at.sequence * z_batch + at.channel : nullptr;
    const SX* B_from = B + at.sequence * B_batch + at.group * B_group;
    const SX* C_from = C + at.sequence * C_batch + at.group * C_group;

    X rate[K], h[K];
    const i64 states = ((at.sequence * segments + at.segment) * c + at.channel + mine) * n + part * K;  // of this segment
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const bool exists = live && part * K + k < n;
        rate[k] = exists ? rate_of(A[i64(at.channel + mine) * n + part * K + k]) : X(0);
        h[k] = MODE != STATES && state && exists ? state[states + k] : X(0);
    }
    R bias_of[Steps::WIDE], D_of[Steps::WIDE], time_of[Steps::WIDE];
#pragma unroll
    for (int i = 0; i < Steps::WIDE; ++i) {
        const bool exists = Steps::column() + i < at.channels;
        bias_of[i] = bias && exists ? bias[at.channel + Steps::column() + i] : R(0);
        D_of[i] = D && exists ? D[at.channel + Steps::column() + i] : R(0);
        time_of[i] = 0;
    }

    typename Steps::Packed u_now[Steps::PASSES], u_next[Steps::PASSES], delta_next[Steps::PASSES], z_now[Steps::PASSES], z_next[Steps::PASSES];
    SX B_next[Map::AHEAD ? Map::EACH : 1], C_next[Map::AHEAD ? Map::EACH : 1];
    const auto fetch = [&](i64 first) {
        Steps::load(u_next, u_from, u_time, first, end, at.channels, packed);
        Steps::load(delta_next, delta_from, delta_time, first, end, at.channels, packed);
        if constexpr (Map::AHEAD) Map::load(B_next, B_from, B_time, first, end, n);
        if (MODE == RESULTS) {
            if constexpr (Map::AHEAD) Map::load(C_next, C_from, C_time, first, end, n);
            if (z) Steps::load(z_next, z_from, z_time, first, end, at.channels, packed);
        }
    };
    fetch(start);
    for (i64 first = start; first < end; first += TT) {
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p)
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i) {
                R dt = widen<S>(delta_next[p].of[i]) + bias_of[i];
                if (softplused) dt = softplus(dt);
                if (first + Steps::row(p) >= end) dt = 0;  // no step: decay 1, nothing enters
                const Pack<R, 2> step = {dt, dt * widen<S>(u_next[p].of[i])};
                steps[Steps::row(p)][Steps::column() + i] = step;
                if (MODE == STATES) time_of[i] += dt;
            }
        if constexpr (Map::AHEAD) Map::put(B_next, into);
        else Map::copy(B_from, B_time, first, end, n, into);
        if (MODE == RESULTS) {
            if constexpr (Map::AHEAD) Map::put(C_next, out);
            else Map::copy(C_from, C_time, first, end, n, out);
#pragma unroll
            for (int p = 0; p < Steps::PASSES; ++p) u_now[p] = u_next[p], z_now[p] = z_next[p];
        }
        if (MODE == CHECKPOINTS && live) {
            X* before = last + (at.sequence * ((T + TT - 1) / TT) + first / TT) * c * n + i64(at.channel + mine) * n + part * K;
#pragma unroll
            for (int k = 0; k < K; ++k)
                if (part * K + k < n) before[k] = h[k];
        }
        __syncthreads();
        if (first + TT < end) fetch(first + TT);
#pragma unroll 1
        for (int t = 0; t < TT; t += AT_ONCE) {
            R sums[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const Pack<R, 2> step = steps[t + j][mine];
                const Pack<X, K> B_now = *reinterpret_cast<const Pack<X, K>*>(&into[t + j][part * K]);
                Pack<X, K> C_now;
                if (MODE == RESULTS) C_now = *reinterpret_cast<const Pack<X, K>*>(&out[t + j][part * K]);
                sums[j] = 0;
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    h[k] = multiply_add(decay(step.of[0], rate[k]), h[k], step.of[1] * B_now.of[k]);
                    if (MODE == RESULTS) sums[j] = real_product(C_now.of[k], h[k], sums[j]);
                }
            }
            if (MODE == RESULTS) {
                const int which = sums_over_lanes<LANES, 1>(sums, lane);
                if constexpr (LANES >= AT_ONCE) {
                    if (part % (LANES / AT_ONCE) == 0) read_out[t + which][mine] = sums[0];
                } else {
#pragma unroll
                    for (int j = 0; j < AT_ONCE / LANES; ++j) read_out[t + which + j][mine] = sums[j];
                }
            }
        }
        __syncthreads();
        if (MODE == RESULTS) {
            typename Steps::Packed result[Steps::PASSES];
#pragma unroll
            for (int p = 0; p < Steps::PASSES; ++p)
#pragma unroll
                for (int i = 0; i < Steps::WIDE; ++i) {
                    R value = R(PairOf<X>::COUNT) * read_out[Steps::row(p)][Steps::column() + i];
                    value = fma(D_of[i], widen<S>(u_now[p].of[i]), value);
                    if (z) value *= silu(R(widen<S>(z_now[p].of[i])));
                    result[p].of[i] = narrow<S>(value);
                }
            Steps::store(result, y + (at.sequence * T) * c + at.channel, c, first, end, at.channels, packed);
        }
    }
    if (MODE == STATES) {  // elapsed time: rows of a tile lie with different threads
        __syncthreads();
        R(*times)[CH] = reinterpret_cast<R(*)[CH]>(steps);
#pragma unroll
        for (int i = 0; i < Steps::WIDE; ++i) times[threadIdx.x * Steps::WIDE / CH][Steps::column() + i] = time_of[i];
        __syncthreads();
        if (threadIdx.x < at.channels) {
            R sum = 0;
            for (int r = 0; r < Steps::ROWS; ++r) sum += times[r][threadIdx.x];
            elapsed[(at.sequence * segments + at.segment) * c + at.channel + threadIdx.x] = sum;
        }
    }
    if (MODE != CHECKPOINTS && last && live && (MODE == STATES || at.segment == segments - 1)) {
        X* to = last + (MODE == STATES ? states : (at.sequence * c + at.channel + mine) * n + part * K);
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (part * K + k < n) to[k] = h[k];
    }
}

// From the states in which segments end when they begin with zero, those in which they begin: in place, one thread a state.
template <class R, class X>
__global__ void carry_states(X* ends, const R* elapsed, const X* A, const X* state, i64 sequences, i64 segments, int c, int n) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x, all = i64(c) * n;
    if (index >= sequences * all) return;
    const i64 sequence = index / all, own = index % all;
    const X rate = rate_of(A[own]);
    X h = state ? state[index] : X(0);
    for (i64 s = 0; s < segments; ++s) {
        const i64 where = sequence * segments + s;
        const X local = ends[where * all + own];
        ends[where * all + own] = h;
        h = multiply_add(decay(elapsed[where * c + own / n], rate), h, local);
    }
}
