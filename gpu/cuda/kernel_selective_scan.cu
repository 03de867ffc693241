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
template <int MODE, class S, class SX, class X, int LANES, int K, int EACH, int THREADS, int TT, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) selective_scan(
    const S* u, i64 u_batch, i64 u_time, const S* delta, i64 delta_batch, i64 delta_time, const S* z, i64 z_batch, i64 z_time, const SX* B,
    i64 B_batch, i64 B_time, i64 B_group, const SX* C, i64 C_batch, i64 C_time, i64 C_group, const SX* A, const S* D, const S* bias, const X* state, X* last, S* y, Arithmetic<S>* elapsed, i64 T, int c, int n, int G, i64 segments, i64 length,
    int softplused, int packed) {
    using R = Arithmetic<S>;
    enum { CH = THREADS / LANES * EACH, NS = LANES * K, AT_ONCE = 4 };
    using Steps = Spread<S, THREADS, CH, TT>;
    using Map = Maps<SX, X, THREADS, NS, TT>;
    static_assert(TT % AT_ONCE == 0, "whole groups of steps");
    __shared__ alignas(16) Pack<R, 2> steps[TT][CH];  // dt, dt u
    __shared__ alignas(16) X into[TT][NS], out[MODE == RESULTS ? TT : 1][NS];
    __shared__ alignas(16) R read_out[MODE == RESULTS ? TT : 1][CH + 8];  // C·h; rows 8 apart in banks

    const Place at(blockIdx.x, c, G, segments, CH);
    const int mine = threadIdx.x / LANES * EACH, part = threadIdx.x % LANES, lane = threadIdx.x % 32;
    const i64 start = at.segment * length, end = start + length < T ? start + length : T;
    // Where this thread's next numbers are; they move a tile at a time.
    const S* u_from = u + at.sequence * u_batch + start * u_time + at.channel + Steps::place(u_time);
    const S* delta_from = delta + at.sequence * delta_batch + start * delta_time + at.channel + Steps::place(delta_time);
    const S* z_from = z + at.sequence * z_batch + start * z_time + at.channel + Steps::place(z_time);
    const SX* B_from = B + at.sequence * B_batch + at.group * B_group + start * B_time;
    const SX* C_from = C + at.sequence * C_batch + at.group * C_group + start * C_time;
    S* y_to = y + (at.sequence * T + start) * c + at.channel + Steps::place(c);
    const bool full = packed && at.channels == CH;

    X rate[EACH][K], h[EACH][K];
    const auto exists = [&](int e, int k) { return mine + e < at.channels && part * K + k < n; };
    const auto state_of = [&](i64 sequence, int e, int k) { return (sequence * c + at.channel + mine + e) * n + part * K + k; };
    const i64 own = at.sequence * segments + at.segment;  // this segment, among all
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int k = 0; k < K; ++k) {
            rate[e][k] = exists(e, k) ? rate_of(X(widen<SX>(A[state_of(0, e, k)]))) : X(0);
            h[e][k] = MODE != STATES && state && exists(e, k) ? state[state_of(own, e, k)] : X(0);
        }
    R bias_of[Steps::WIDE], D_of[Steps::WIDE], time_of[Steps::WIDE];
#pragma unroll
    for (int i = 0; i < Steps::WIDE; ++i) {
        const bool exists = Steps::column() + i < at.channels;
        bias_of[i] = bias && exists ? widen<S>(bias[at.channel + Steps::column() + i]) : R(0);
        D_of[i] = D && exists ? widen<S>(D[at.channel + Steps::column() + i]) : R(0);
        time_of[i] = 0;
    }

    Raw<typename Steps::Packed> u_now[Steps::PASSES], u_next[Steps::PASSES], delta_next[Steps::PASSES], z_now[Steps::PASSES], z_next[Steps::PASSES];
    Raw<Pack<SX, 1>> B_next[Map::EACH], C_next[Map::EACH];  // unused if there are too many of them
    const auto rows_from = [&](i64 first) { return end - first < TT ? int(end - first) : int(TT); };
    const auto fetch = [&](i64 first) {
        const int rows = rows_from(first);
        const bool whole = full && rows == TT;
        Steps::load(u_next, u_from, u_time, rows, at.channels, whole);
        Steps::load(delta_next, delta_from, delta_time, rows, at.channels, whole);
        u_from += TT * u_time;
        delta_from += TT * delta_time;
        if constexpr (Map::AHEAD) {
            Map::load(B_next, B_from, B_time, rows, n);
            B_from += TT * B_time;
        }
        if (MODE == RESULTS) {
            if constexpr (Map::AHEAD) {
                Map::load(C_next, C_from, C_time, rows, n);
                C_from += TT * C_time;
            }
            if (z) Steps::load(z_next, z_from, z_time, rows, at.channels, whole);
            z_from += TT * z_time;
        }
    };
    fetch(start);
    for (i64 first = start; first < end; first += TT) {
        const int rows = rows_from(first);
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p) {
            Pack<R, 2 * Steps::WIDE> pair;
            const auto u_of = u_next[p].get(), delta_of = delta_next[p].get();
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i) {
                R dt = widen<S>(delta_of.of[i]) + bias_of[i];
                if (softplused) dt = step_size<S>(dt);
                if (Steps::row(p) >= rows) dt = 0;  // no step: decay 1, nothing enters
                pair.of[2 * i] = dt;
                pair.of[2 * i + 1] = dt * widen<S>(u_of.of[i]);
                if (MODE == STATES) time_of[i] += dt;
            }
            store_pack(&steps[Steps::row(p)][Steps::column()], pair);
        }
        if constexpr (Map::AHEAD) Map::put(B_next, into);
        else Map::copy(B_from + (first - start) * B_time, B_time, rows, n, into);
        if (MODE == RESULTS) {
            if constexpr (Map::AHEAD) Map::put(C_next, out);
            else Map::copy(C_from + (first - start) * C_time, C_time, rows, n, out);
#pragma unroll
            for (int p = 0; p < Steps::PASSES; ++p) u_now[p] = u_next[p], z_now[p] = z_next[p];
        }
        if (MODE == CHECKPOINTS)
#pragma unroll
            for (int e = 0; e < EACH; ++e)
#pragma unroll
                for (int k = 0; k < K; ++k)
                    if (exists(e, k)) last[state_of(at.sequence * ((T + TT - 1) / TT) + first / TT, e, k)] = h[e][k];
        __syncthreads();
        if (first + TT < end) fetch(first + TT);
#pragma unroll 1
        for (int t = 0; t < TT; t += AT_ONCE) {
            R sums[EACH][AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const auto step = load_pack<Pack<R, 2 * EACH>>(&steps[t + j][mine]);
                const auto B_now = load_pack<Pack<X, K>>(&into[t + j][part * K]);
                Pack<X, K> C_now;
                if (MODE == RESULTS) C_now = load_pack<Pack<X, K>>(&out[t + j][part * K]);
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    sums[e][j] = 0;
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        h[e][k] = multiply_add(decay(step.of[2 * e], rate[e][k]), h[e][k], step.of[2 * e + 1] * B_now.of[k]);
                        if (MODE == RESULTS) sums[e][j] = real_product(C_now.of[k], h[e][k], sums[e][j]);
                    }
                }
            }
            if (MODE == RESULTS)
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const int which = sums_over_lanes<LANES, 1>(sums[e], lane);
                    if constexpr (LANES >= AT_ONCE) {
                        if (part % (LANES / AT_ONCE) == 0) read_out[t + which][mine + e] = sums[e][0];
                    } else {
#pragma unroll
                        for (int j = 0; j < AT_ONCE / LANES; ++j) read_out[t + which + j][mine + e] = sums[e][j];
                    }
                }
        }
        __syncthreads();
        if (MODE == RESULTS) {
            typename Steps::Packed result[Steps::PASSES];
#pragma unroll
            for (int p = 0; p < Steps::PASSES; ++p) {
                const auto sums = load_pack<Pack<R, Steps::WIDE>>(&read_out[Steps::row(p)][Steps::column()]);
                const auto u_of = u_now[p].get(), z_of = z_now[p].get();
#pragma unroll
                for (int i = 0; i < Steps::WIDE; ++i) {
                    R value = R(PairOf<X>::COUNT) * sums.of[i];
                    value = fma(D_of[i], widen<S>(u_of.of[i]), value);
                    if (z) value *= silu(R(widen<S>(z_of.of[i])));
                    result[p].of[i] = narrow<S>(value);
                }
            }
            Steps::store(result, y_to, c, rows, at.channels, full && rows == TT);
            y_to += TT * i64(c);
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
    if (MODE != CHECKPOINTS && last && (MODE == STATES || at.segment == segments - 1))
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
            for (int k = 0; k < K; ++k)
                if (exists(e, k)) last[state_of(MODE == STATES ? own : at.sequence, e, k)] = h[e][k];
}

// From the states in which segments end when they begin with zero, those in which they begin: in place, one thread a state.
template <class R, class SX, class X>
__global__ void carry_states(X* ends, const R* elapsed, const SX* A, const X* state, i64 sequences, i64 segments, int c, int n) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x, all = i64(c) * n;
    if (index >= sequences * all) return;
    const i64 sequence = index / all, own = index % all;
    const X rate = rate_of(X(widen<SX>(A[own])));
    X h = state ? state[index] : X(0);
    for (i64 s = 0; s < segments; ++s) {
        const i64 where = sequence * segments + s;
        const X local = ends[where * all + own];
        ends[where * all + own] = h;
        h = multiply_add(decay(elapsed[where * c + own / n], rate), h, local);
    }
}
