// Selective scan, gradient: the forward pass runs again from checkpoints, tile by tile backwards, and the adjoint with it.
//
// Idea. A checkpoint is the state before every tile of TT steps (the forward kernel's mode CHECKPOINTS). Within a tile the
// states before every 4 steps are kept in shared memory, and those 4 steps' states and decays in registers, where
//
//     g_t = conj(C_t) dp_t + G,    G <- conj(a_t) g_t,    r_t = conj(h_{t-1}) G                     a_t = exp(dt_t A)
//
// are run backwards. So three exponentials a state, and T/TT·n numbers in memory, never T·n.
//
// Sums. Over states, for d(dt), du and dz: by lanes, several steps at once. Over channels, for dB and dC: by lanes, then by
// warps, then each block writes its own sums, which are added up by another kernel. Over time, for dA, dD, dbias: in
// registers. Every sum has one order, so the gradient is bit for bit the same in every run; the cost is one (T, n) array
// of dB and dC for every CH channels, about 4/CH of the reads of u and delta in float32.
//
// Limit: issue slots, about 25 instructions a state and step, and shuffles.
#include "block_selective.cuh"

template <class S, class SX, class X, int LANES, int K, int THREADS, int TT>
struct GradientShared {
    using R = Arithmetic<S>;
    enum { CH = THREADS / LANES, NS = LANES * K, WARPS = THREADS / 32, AT_ONCE = 4 };
    alignas(16) Pack<R, 4> steps[TT][CH];             // dt, dt u, dp
    alignas(16) X into[TT][NS], out[TT][NS];          // B, C
    alignas(16) X before[TT / AT_ONCE][THREADS][K];   // states before every AT_ONCE steps
    alignas(16) X maps[WARPS][TT][2][NS];             // dB, dC of a warp's channels
    alignas(16) Pack<R, 4> sums[TT][CH];              // over states: Re conj(A) r, Re conj(B) g, C·h
    R totals[2][TT * CH / THREADS][THREADS];          // dD, dbias so far, by pack's place and thread
    using Steps = Spread<S, THREADS, CH, TT>;
    alignas(16) typename Steps::Packed raw[2][4][Steps::PASSES][THREADS];  // dy, u, delta, z of this tile and the next
    const S* from[4];                                 // where the block finds them: here pointers take no registers
    const SX* maps_from[2];
};

template <class S, class SX, class X, int LANES, int K, int THREADS, int TT, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) selective_scan_gradient(
    const S* dy, i64 dy_batch, i64 dy_time, const S* u, i64 u_batch, i64 u_time, const S* delta, i64 delta_batch, i64 delta_time, const S* z,
    i64 z_batch, i64 z_time, const SX* B, i64 B_batch, i64 B_time, i64 B_group, const SX* C, i64 C_batch, i64 C_time, i64 C_group, const SX* A,
    const S* D, const S* bias, const X* checkpoints, const X* dlast, S* du, S* ddelta, S* dz, X* dA,
    Arithmetic<S>* dD, Arithmetic<S>* dbias, X* dB, X* dC, X* dstate, i64 T, int c, int n, int G, i64 sequences, int softplused, int packed) {
    using R = Arithmetic<S>;
    using Shared = GradientShared<S, SX, X, LANES, K, THREADS, TT>;
    enum { CH = Shared::CH, NS = Shared::NS, WARPS = Shared::WARPS, AT_ONCE = Shared::AT_ONCE, CHANNEL_LANES = 32 / LANES, PAIR = PairOf<X>::COUNT };
    using Steps = Spread<S, THREADS, CH, TT>;
    using Map = Maps<SX, X, THREADS, NS, TT>;
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);

    const Place at(blockIdx.x, c, G, 1, CH);
    const int mine = threadIdx.x / LANES, part = threadIdx.x % LANES, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int channel = at.channel + mine, block_of_group = blockIdx.x % ((c / G + CH - 1) / CH);
    const bool live = mine < at.channels;
    const i64 tiles = (T + TT - 1) / TT, states = (at.sequence * c + channel) * n + part * K;
    if (threadIdx.x == 0) {
        shared.from[0] = dy + at.sequence * dy_batch + at.channel;
        shared.from[1] = u + at.sequence * u_batch + at.channel;
        shared.from[2] = delta + at.sequence * delta_batch + at.channel;
        shared.from[3] = z + at.sequence * z_batch + at.channel;
        shared.maps_from[0] = B + at.sequence * B_batch + at.group * B_group;
        shared.maps_from[1] = C + at.sequence * C_batch + at.group * C_group;
    }
    __syncthreads();

    X rate[K], G_next[K], dA_mine[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const bool exists = live && part * K + k < n;
        rate[k] = exists ? rate_of(X(widen<SX>(A[i64(channel) * n + part * K + k]))) : X(0);
        G_next[k] = dlast && exists ? dlast[states + k] : X(0);
        dA_mine[k] = X(0);
    }
#pragma unroll
    for (int i = 0; i < Steps::WIDE; ++i) shared.totals[0][i][threadIdx.x] = shared.totals[1][i][threadIdx.x] = 0;
    const auto of_channel = [&](const S* values, int column) { return values && column < at.channels ? R(widen<S>(values[at.channel + column])) : R(0); };

    typename Map::Bits B_next, C_next;  // unused if there are too many of them
    X h_next[K];
    const auto fetch = [&](i64 tile) {
        const i64 first = tile * TT;
        const int rows = T - first < TT ? int(T - first) : int(TT);
        const bool whole = packed && at.channels == CH && rows == TT;
        auto& raw = shared.raw[tile % 2];
        Steps::fetch(raw[0], shared.from[0] + first * dy_time + Steps::place(dy_time), dy_time, rows, at.channels, whole);
        Steps::fetch(raw[1], shared.from[1] + first * u_time + Steps::place(u_time), u_time, rows, at.channels, whole);
        Steps::fetch(raw[2], shared.from[2] + first * delta_time + Steps::place(delta_time), delta_time, rows, at.channels, whole);
        if (z) Steps::fetch(raw[3], shared.from[3] + first * z_time + Steps::place(z_time), z_time, rows, at.channels, whole);
        if constexpr (Map::AHEAD) {
            Map::load(B_next, shared.maps_from[0] + first * B_time, B_time, rows, n);
            Map::load(C_next, shared.maps_from[1] + first * C_time, C_time, rows, n);
        }
#pragma unroll
        for (int k = 0; k < K; ++k)
            h_next[k] = live && part * K + k < n ? checkpoints[((at.sequence * tiles + tile) * c + channel) * n + part * K + k] : X(0);
    };
    fetch(tiles - 1);
    close_copy_group();
    for (i64 tile = tiles - 1; tile >= 0; --tile) {
        const i64 first = tile * TT;
        const int rows = T - first < TT ? int(T - first) : int(TT);
        if constexpr (Map::AHEAD) {
            Map::put(B_next, shared.into);
            Map::put(C_next, shared.out);
        } else {
            Map::copy(shared.maps_from[0] + first * B_time, B_time, rows, n, shared.into);
            Map::copy(shared.maps_from[1] + first * C_time, C_time, rows, n, shared.out);
        }
        alignas(16) X h[K];
#pragma unroll
        for (int k = 0; k < K; ++k) h[k] = h_next[k];
        if (tile) fetch(tile - 1);
        close_copy_group();
        wait_for_copies<1>();
        const auto& raw = shared.raw[tile % 2];
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p) {
            using Packed = typename Steps::Packed;
            const auto dy_of = load_pack<Packed>(&raw[0][p][threadIdx.x]), u_of = load_pack<Packed>(&raw[1][p][threadIdx.x]);
            const auto delta_of = load_pack<Packed>(&raw[2][p][threadIdx.x]), z_of = load_pack<Packed>(&raw[3][p][threadIdx.x]);
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i) {
                R dt = widen<S>(delta_of.of[i]) + of_channel(bias, Steps::column() + i), dp = widen<S>(dy_of.of[i]);
                if (softplused) dt = step_size<S>(dt);
                if (Steps::row(p) >= rows) dt = 0;
                if (z) dp *= silu(R(widen<S>(z_of.of[i])));
                shared.steps[Steps::row(p)][Steps::column() + i] = {dt, dt * widen<S>(u_of.of[i]), dp, 0};
            }
        }
        __syncthreads();

#pragma unroll 1
        for (int t = 0; t < TT; t += AT_ONCE) {  // forwards, for the states before every AT_ONCE steps
            store_pack(shared.before[t / AT_ONCE][threadIdx.x], *reinterpret_cast<const Pack<X, K>*>(h));
            if (t + AT_ONCE == TT) break;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const Pack<R, 4> step = shared.steps[t + j][mine];
                const Pack<X, K> B_now = load_pack<Pack<X, K>>(&shared.into[t + j][part * K]);
#pragma unroll
                for (int k = 0; k < K; ++k) h[k] = multiply_add(decay(step.of[0], rate[k]), h[k], step.of[1] * B_now.of[k]);
            }
        }
#pragma unroll 1
        for (int t = TT - AT_ONCE; t >= 0; t -= AT_ONCE) {
            X decays[AT_ONCE][K], hs[AT_ONCE][K];
            const Pack<X, K> before = load_pack<Pack<X, K>>(shared.before[t / AT_ONCE][threadIdx.x]);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const Pack<R, 4> step = shared.steps[t + j][mine];
                const Pack<X, K> B_now = load_pack<Pack<X, K>>(&shared.into[t + j][part * K]);
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    decays[j][k] = decay(step.of[0], rate[k]);
                    hs[j][k] = multiply_add(decays[j][k], j ? hs[j - 1][k] : before.of[k], step.of[1] * B_now.of[k]);
                }
            }
            R of_time[AT_ONCE], of_entry[AT_ONCE], read_out[AT_ONCE];
#pragma unroll
            for (int j = AT_ONCE - 1; j >= 0; --j) {
                const Pack<R, 4> step = shared.steps[t + j][mine];
                const Pack<X, K> B_now = load_pack<Pack<X, K>>(&shared.into[t + j][part * K]);
                const Pack<X, K> C_now = load_pack<Pack<X, K>>(&shared.out[t + j][part * K]);
                const R dp = PAIR * step.of[2];
                X maps[2 * K];
                of_time[j] = of_entry[j] = read_out[j] = 0;
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    const X g = multiply_add(dp, conjugate(C_now.of[k]), G_next[k]);
                    G_next[k] = conjugate(decays[j][k]) * g;
                    const X r = conjugate(j ? hs[j - 1][k] : before.of[k]) * G_next[k];
                    dA_mine[k] = multiply_add(step.of[0], r, dA_mine[k]);
                    of_time[j] = real_product(conjugate(rate[k]), r, of_time[j]);
                    of_entry[j] = real_product(conjugate(B_now.of[k]), g, of_entry[j]);
                    read_out[j] = real_product(C_now.of[k], hs[j][k], read_out[j]);
                    maps[k] = step.of[1] * g;
                    maps[K + k] = dp * conjugate(hs[j][k]);
                }
                const int which = sums_over_lanes<CHANNEL_LANES, LANES>(maps, lane);
                constexpr int LEFT = 2 * K > CHANNEL_LANES ? 2 * K / CHANNEL_LANES : 1, SAME = CHANNEL_LANES > 2 * K ? CHANNEL_LANES / (2 * K) : 1;
                if (lane / LANES % SAME == 0)
#pragma unroll
                    for (int i = 0; i < LEFT; ++i) shared.maps[warp][t + j][(which + i) / K][part * K + (which + i) % K] = maps[i];
            }
            const int which = sums_over_lanes<LANES, 1>(of_time, lane);
            sums_over_lanes<LANES, 1>(of_entry, lane);
            sums_over_lanes<LANES, 1>(read_out, lane);
            static_assert(LANES >= AT_ONCE, "a lane for every step");
            if (part % (LANES / AT_ONCE) == 0) shared.sums[t + which][mine] = {from_rate(of_time[0], rate[0]), of_entry[0], PAIR * read_out[0], 0};
        }
        __syncthreads();

        typename Steps::Packed du_now[Steps::PASSES], ddelta_now[Steps::PASSES], dz_now[Steps::PASSES];
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p) {
            using Packed = typename Steps::Packed;
            const auto dy_of = load_pack<Packed>(&raw[0][p][threadIdx.x]), u_of = load_pack<Packed>(&raw[1][p][threadIdx.x]);
            const auto delta_of = load_pack<Packed>(&raw[2][p][threadIdx.x]), z_of = load_pack<Packed>(&raw[3][p][threadIdx.x]);
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i) {
                const int row = Steps::row(p), column = Steps::column() + i;
                const Pack<R, 4> step = shared.steps[row][column], sum = shared.sums[row][column];
                const R now = widen<S>(u_of.of[i]), raw = widen<S>(delta_of.of[i]) + of_channel(bias, column), skip = of_channel(D, column);
                R of_step = fma(now, sum.of[1], sum.of[0]);
                if (softplused) of_step *= sigmoid(raw);
                du_now[p].of[i] = narrow<S>(fma(step.of[0], sum.of[1], skip * step.of[2]));
                ddelta_now[p].of[i] = narrow<S>(of_step);
                if (z) {
                    const R whole = fma(skip, now, sum.of[2]);
                    dz_now[p].of[i] = narrow<S>(widen<S>(dy_of.of[i]) * whole * silu_slope(R(widen<S>(z_of.of[i]))));
                }
                if (row < rows) {
                    shared.totals[0][i][threadIdx.x] += step.of[2] * now;
                    shared.totals[1][i][threadIdx.x] += of_step;
                }
            }
        }
        const i64 to = (at.sequence * T + first) * c + at.channel + Steps::place(c);
        const bool whole = packed && at.channels == CH && rows == TT;
        Steps::store(du_now, du + to, c, rows, at.channels, whole);
        Steps::store(ddelta_now, ddelta + to, c, rows, at.channels, whole);
        if (z) Steps::store(dz_now, dz + to, c, rows, at.channels, whole);
        for (int index = threadIdx.x; index < TT * 2 * NS; index += THREADS) {
            const int state = index % NS, which = index / NS % 2, row = index / (2 * NS);
            if (state >= n || row >= rows) continue;
            X sum = shared.maps[0][row][which][state];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) sum = sum + shared.maps[w][row][which][state];
            X* parts = which ? dC : dB;
            parts[(((block_of_group * sequences + at.sequence) * T + first + row) * G + at.group) * n + state] = sum;
        }
    }

    if (live)
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (part * K + k < n) {
                dA[states + k] = dA_mine[k];
                dstate[states + k] = G_next[k];
            }
    __syncthreads();
    if (threadIdx.x < at.channels) {  // rows of a tile lie with different threads
        R of_D = 0, of_bias = 0;
        for (int r = 0; r < Steps::ROWS; ++r) {
            const int thread = (r * CH + threadIdx.x) / Steps::WIDE, i = threadIdx.x % Steps::WIDE;
            of_D += shared.totals[0][i][thread];
            of_bias += shared.totals[1][i][thread];
        }
        dD[at.sequence * c + at.channel + threadIdx.x] = of_D;
        dbias[at.sequence * c + at.channel + threadIdx.x] = of_bias;
    }
}
