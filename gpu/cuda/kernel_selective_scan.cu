// Selective scan, forward: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t·h_t + D u_t) silu(z_t).
//
// Idea. A block takes CH channels through time, LANES lanes to a channel, each lane with K states of EACH channels in
// registers. Time goes in tiles of TT steps, and a thread's instructions for one tile are of three kinds that do not depend
// on each other and need no barrier between them:
//
//     enter   step sizes of the next tile, once per (time, channel); they reach the lanes through shared memory, as B and C do
//     main    the recurrence of this tile: of a state and step two products, an exponential, two fused multiply-adds
//     leave   skip and gate of the last tile, whose sums C·h every lane left in shared memory for its own states
//
// What the tile after the next needs is on its way from memory meanwhile. One barrier a tile; all of shared memory is double.
//
// Few channels: `segments` of time at once. A first run (STATES) finds the state that each segment would end with from zero, and
// its elapsed time; `carry_states` connects them; a second run has results. No array of T·n numbers.
//
// Limit: the special-function unit, n + 3 exponentials and reciprocals per (time, channel) at 16 a clock, and next to it shared
// memory, through which a lane reads B, C and its channel's step for every step.
#include "block_selective.cuh"

enum { RESULTS = 0, STATES = 1, CHECKPOINTS = 2 };

// What a block keeps of a tile in shared memory.
template <class R, class X, int CH, int NS, int PARTS, int TT, bool WITH_RESULTS>
struct ScanTile {
    alignas(16) Pack<R, 2> steps[TT][CH];                                   // dt, dt u
    alignas(16) X into[NS][TT + 4], out[WITH_RESULTS ? NS : 1][TT + 4];     // B, C; rows of states in different banks
    alignas(16) R read_out[WITH_RESULTS ? TT : 1][PARTS][CH + 32 / PARTS];  // C·h of a lane's states; the same
};

// S, SX: storage of u, delta, z, y and of B, C. X: arithmetic of A and the states, real or complex; R that of the rest.
// CHECKPOINTS: no results, but the state before every tile, for the gradient to start from.
template <int MODE, class S, class SX, class X, int LANES, int K, int EACH, int THREADS, int TT, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) selective_scan(
    const S* u, i64 u_batch, i64 u_time, const S* delta, i64 delta_batch, i64 delta_time, const S* z, i64 z_batch, i64 z_time, const SX* B,
    i64 B_batch, i64 B_time, i64 B_group, const SX* C, i64 C_batch, i64 C_time, i64 C_group, const SX* A, const S* D, const S* bias,
    const X* state, X* last, S* y, Arithmetic<S>* elapsed, i64 T, int c, int n, int G, i64 segments, i64 length, int softplused,
    int packed) {
    using R = Arithmetic<S>;
    enum { CH = THREADS / LANES * EACH, NS = LANES * K, AT_ONCE = 4, PARTS = LANES < 8 ? LANES : 8 };
    enum { KEPT = AT_ONCE * PARTS / LANES };  // of AT_ONCE sums over lanes, those that a lane keeps
    using Steps = Spread<S, THREADS, CH, TT>;
    using Map = Maps<SX, X, THREADS, NS, TT>;
    static_assert(TT % AT_ONCE == 0 && KEPT >= 1, "whole groups of steps");
    using Tile = ScanTile<R, X, CH, NS, PARTS, TT, MODE == RESULTS>;
    extern __shared__ __align__(16) unsigned char memory[];
    Tile* const tiles = reinterpret_cast<Tile*>(memory);  // two

    const Place at(blockIdx.x, c, G, segments, CH);
    const int mine = threadIdx.x / LANES * EACH, part = threadIdx.x % LANES, lane = threadIdx.x % 32;
    if (MODE == STATES && at.segment == segments - 1) return;  // nothing goes on from its end
    const i64 start = at.segment * length, steps = start + length < T ? length : T - start;
    const int count = int((steps + TT - 1) / TT), tail = int(steps - i64(count - 1) * TT);
    const auto rows_of = [&](int tile) { return tile < count - 1 ? int(TT) : tile < count ? tail : 0; };
    // Where this thread's next numbers are; they move a tile at a time.
    const S* u_from = u + at.sequence * u_batch + start * u_time + at.channel + Steps::place(u_time);
    const S* delta_from = delta + at.sequence * delta_batch + start * delta_time + at.channel + Steps::place(delta_time);
    const S* z_from = z + at.sequence * z_batch + start * z_time + at.channel + Steps::place(z_time);
    const SX* B_from = B + at.sequence * B_batch + at.group * B_group + start * B_time;
    const SX* C_from = C + at.sequence * C_batch + at.group * C_group + start * C_time;
    S* y_to = y + (at.sequence * T + start) * c + at.channel + Steps::place(c);
    const bool full = packed && at.channels == CH;

    X rate[EACH][K], h[EACH][K];
    const auto exists = [&](int e, int k) { return mine + e < at.channels && k * LANES + part < n; };
    const auto state_of = [&](i64 sequence, int e, int k) { return (sequence * c + at.channel + mine + e) * n + k * LANES + part; };
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

    // What is under way for the tile after the next, what has come for the next, and u and z of those that wait for results.
    typename Steps::Bits u_ahead, delta_ahead, z_ahead, u_next, delta_next, z_next, u_now, z_now, u_last, z_last;
    typename Map::Bits B_ahead, C_ahead, B_next, C_next;  // unused if there are too many
    const auto fetch = [&](int tile) {
        const int rows = rows_of(tile);
        if (full && rows == TT) {
            Steps::load(u_ahead, u_from, u_time);
            Steps::load(delta_ahead, delta_from, delta_time);
            if (MODE == RESULTS && z) Steps::load(z_ahead, z_from, z_time);
        } else {
            Steps::load(u_ahead, u_from, u_time, rows, at.channels);
            Steps::load(delta_ahead, delta_from, delta_time, rows, at.channels);
            if (MODE == RESULTS && z) Steps::load(z_ahead, z_from, z_time, rows, at.channels);
        }
        u_from += TT * u_time, delta_from += TT * delta_time, z_from += TT * z_time;
        if constexpr (Map::AHEAD) {
            Map::load(B_ahead, B_from, B_time, rows, n);
            if (MODE == RESULTS) Map::load(C_ahead, C_from, C_time, rows, n);
            B_from += TT * B_time, C_from += TT * C_time;
        }
    };
    const auto advance = [&] {
        u_last = u_now, z_last = z_now, u_now = u_next, z_now = z_next;
        u_next = u_ahead, delta_next = delta_ahead, z_next = z_ahead;
        B_next = B_ahead, C_next = C_ahead;
    };
    const auto enter = [&](Tile& tile, int number) {
        const int rows = rows_of(number);
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p) {
            Pack<R, 2 * Steps::WIDE> pair;
            const auto u_of = widened(u_next.of[p]), delta_of = widened(delta_next.of[p]);
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i) {
                const R raw = delta_of.of[i] + bias_of[i], chosen = choose(softplused, step_size<S>(raw), raw);
                const R dt = Steps::row(p) < rows ? chosen : R(0);  // no step: decay 1, nothing enters
                pair.of[2 * i] = dt;
                pair.of[2 * i + 1] = dt * u_of.of[i];
                if (MODE == STATES) time_of[i] += dt;
            }
            store_pack(&tile.steps[Steps::row(p)][Steps::column()], pair);
        }
        if constexpr (Map::AHEAD) {
            Map::put_across(B_next, tile.into);
            if (MODE == RESULTS) Map::put_across(C_next, tile.out);
        } else {
            Map::copy_across(B_from + number * TT * B_time, B_time, rows, n, tile.into);
            if (MODE == RESULTS) Map::copy_across(C_from + number * TT * C_time, C_time, rows, n, tile.out);
        }
    };
    const auto advance_states = [&](const Tile& tile, int t, R (&sums)[EACH][AT_ONCE]) {  // by AT_ONCE steps
        Pack<X, AT_ONCE> B_now[K], C_now[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            B_now[k] = load_pack<Pack<X, AT_ONCE>>(&tile.into[k * LANES + part][t]);
            if (MODE == RESULTS) C_now[k] = load_pack<Pack<X, AT_ONCE>>(&tile.out[k * LANES + part][t]);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const auto step = load_pack<Pack<R, 2 * EACH>>(&tile.steps[t + j][mine]);
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                sums[e][j] = 0;
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    const X a = decay(step.of[2 * e], rate[e][k]);
                    h[e][k] = multiply_add(a, h[e][k], step.of[2 * e + 1] * B_now[k].of[j]);
                    if (MODE == RESULTS) sums[e][j] = real_product(C_now[k].of[j], h[e][k], sums[e][j]);
                }
            }
        }
    };
    const auto keep = [&](Tile& tile, int t, R (&sums)[EACH][AT_ONCE]) {
        int which = 0;  // of these steps; sums over all but PARTS lanes, if there are more
#pragma unroll
        for (int e = 0; e < EACH; ++e) which = sums_over_lanes<LANES / PARTS, PARTS>(sums[e], lane);
#pragma unroll
        for (int j = 0; j < KEPT; ++j) {
            Pack<R, EACH> now;
#pragma unroll
            for (int e = 0; e < EACH; ++e) now.of[e] = sums[e][j];
            store_pack(&tile.read_out[t + which + j][part % PARTS][mine], now);
        }
    };
    Pack<S, Steps::WIDE> result[Steps::PASSES];
    const auto leave = [&](const Tile& tile) {
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p) {
            Pack<R, Steps::WIDE> sum = load_pack<Pack<R, Steps::WIDE>>(&tile.read_out[Steps::row(p)][0][Steps::column()]);
#pragma unroll
            for (int q = 1; q < PARTS; ++q) {
                const auto more = load_pack<Pack<R, Steps::WIDE>>(&tile.read_out[Steps::row(p)][q][Steps::column()]);
#pragma unroll
                for (int i = 0; i < Steps::WIDE; ++i) sum.of[i] += more.of[i];
            }
            const auto u_of = widened(u_last.of[p]), z_of = widened(z_last.of[p]);
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i)
                sum.of[i] = fma(D_of[i], u_of.of[i], R(PairOf<X>::COUNT) * sum.of[i]) * choose(z != nullptr, silu(z_of.of[i]), R(1));
            result[p] = narrowed<S>(sum);
        }
    };
    const auto put = [&](int tile) {
        const int rows = rows_of(tile);
        Steps::store(result, y_to, c, rows, at.channels, full && rows == TT);
        y_to += TT * i64(c);
    };

    fetch(0);
    advance();
    fetch(1);
    enter(tiles[0], 0);
    __syncthreads();
#pragma unroll 1
    for (int tile = 0; tile < count; ++tile) {
        Tile &now = tiles[tile % 2], &other = tiles[(tile + 1) % 2];
        if (MODE == CHECKPOINTS)
#pragma unroll
            for (int e = 0; e < EACH; ++e)
#pragma unroll
                for (int k = 0; k < K; ++k)
                    if (exists(e, k)) last[state_of(at.sequence * count + tile, e, k)] = h[e][k];
        advance();
        fetch(tile + 2);
        if (MODE == RESULTS) leave(other);  // shared memory is read before it is written: the compiler could not tell what is what
        if constexpr (sizeof(X) <= 4) {
            R sums[TT / AT_ONCE][EACH][AT_ONCE];
#pragma unroll
            for (int i = 0; i < TT / AT_ONCE; ++i) advance_states(now, i * AT_ONCE, sums[i]);
            enter(other, tile + 1);
            if (MODE == RESULTS)
#pragma unroll
                for (int i = 0; i < TT / AT_ONCE; ++i) keep(now, i * AT_ONCE, sums[i]);
        } else {  // too many registers for that
#pragma unroll 1
            for (int t = 0; t < TT; t += AT_ONCE) {
                R sums[EACH][AT_ONCE];
                advance_states(now, t, sums);
                if (MODE == RESULTS) keep(now, t, sums);
            }
            enter(other, tile + 1);
        }
        if (MODE == RESULTS && tile) put(tile - 1);
        __syncthreads();
    }
    if (MODE == RESULTS) {
        advance();
        leave(tiles[(count - 1) % 2]);
        put(count - 1);
    }
    if (MODE == STATES) {  // elapsed time: rows of a tile lie with different threads
        R(*times)[CH] = reinterpret_cast<R(*)[CH]>(tiles);
#pragma unroll
        for (int i = 0; i < Steps::WIDE; ++i) times[threadIdx.x * Steps::WIDE / CH][Steps::column() + i] = time_of[i];
        __syncthreads();
        if (threadIdx.x < at.channels) {
            R sum = 0;
            for (int r = 0; r < Steps::ROWS; ++r) sum += times[r][threadIdx.x];
            elapsed[own * c + at.channel + threadIdx.x] = sum;
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
        const X local = s + 1 < segments ? ends[where * all + own] : X(0);  // nobody found where the last one ends
        ends[where * all + own] = h;
        if (s + 1 < segments) h = multiply_add(decay(elapsed[where * c + own / n], rate), h, local);
    }
}
