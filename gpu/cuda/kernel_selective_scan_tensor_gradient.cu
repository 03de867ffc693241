// Selective scan, gradient, for bfloat16 with 16 states and whole strips of 16 channels: what kernel_selective_scan_gradient.cu does, with
// every sum over states or channels by matrix instructions.
//
// Idea. A warp has 16 channels and 8 of their 16 states, 4 a lane, as the sums of a matrix instruction lie: of channels g and
// g + 8 the states 2q and 2q + 1, g = lane / 4, q = lane % 4. A checkpoint is the state before every tile of TT steps. The states
// before every 4 steps are found from it, and those 4 steps' states and decays are kept in registers, where
//
//     g_t = C_t dp_t + G,    G <- a_t g_t,    r_t = h_{t-1} G                                             a_t = exp(dt_t A)
//
// are run backwards. dp C is added to G as dt u B is to h. Sums over states, for d(dt), du and dz, are products of (channels by
// states) and (states by 8 times), of whose columns one is not zero, so that eight steps add up to one block. Sums over channels, for dB
// and dC, are products of (8 times by channels), of whose rows one is not zero, and (channels by states): the second factor must be
// transposed, which is an instruction. Over warps and blocks sums go through memory, each in one order, so the gradient is bit for bit
// the same in every run.
//
// Precision. States, G, decays and dA have 24 bits; dt u and dp lose all but 11 where they enter; what is summed over
// states or channels is rounded to bfloat16, its sums are not.
//
// Limit: issue slots and waits between products that need each other.
#include "block_selective_strip.cuh"

template <class S, int THREADS>
struct TensorGradientShared {
    enum { CH = THREADS / 4, NS = 16, TT = PIECE, ROW = TT + 4, SUM_ROW = CH + 4, PAIR_ROW = CH + 8, WARPS = THREADS / 32 };
    struct Raw {
        alignas(16) S inputs[4][TT][CH];  // dy, u, delta, z
        alignas(16) S maps[2][RawPiece<S>::SIZE];  // B, C
    } raw[2];  // of this tile and the next
    struct Source {
        const char* from;
        unsigned stride;
    };
    alignas(16) Source sources[6];                                     // of a block: dy, u, delta, z, B, C
    alignas(16) float dt[2][CH * ROW + CH / 2], x[CH * ROW + CH / 2], dp[CH * ROW + CH / 2];  // x = dt u, dp = dy silu(z)
    alignas(16) S x_by_time[TT][PAIR_ROW], dp_by_time[TT][PAIR_ROW];
    alignas(16) Pack<float, 4> before[TT / 4][THREADS];                // states before every 4 steps
    alignas(16) float sums[2][3][TT][SUM_ROW];                         // over 8 states: A r, B g, C·h
    alignas(16) float maps[WARPS / 2][TT][2][NS];                      // dB, dC of a warp's channels
    alignas(16) Pack<float, 4> totals[2][THREADS];                     // dD, dbias so far
    alignas(16) Pack<float, 2> checkpoint[2][THREADS];                 // of the next tile
    alignas(16) float bias[CH], D[CH];
    static __device__ __forceinline__ int row(int channel) { return Entering::row(channel); }
};

template <class S, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) selective_scan_tensor_gradient(
    const S* dy, i64 dy_batch, i64 dy_time, const S* u, i64 u_batch, i64 u_time, const S* delta, i64 delta_batch, i64 delta_time,
    const S* z, i64 z_batch, i64 z_time, const S* B, i64 B_batch, i64 B_time, i64 B_group, const S* C, i64 C_batch, i64 C_time, i64 C_group,
    const S* A, const S* D, const S* bias,
    const float* checkpoints, const float* dlast, S* du, S* ddelta, S* dz, float* dA, float* dD, float* dbias,
    float* dB, float* dC, float* dstate, int T, int c, int G, i64 sequences, int softplused) {
    using Shared = TensorGradientShared<S, THREADS>;
    enum { CH = Shared::CH, NS = Shared::NS, TT = Shared::TT, EACH = 2, K = 2 };
    static_assert(THREADS == 256, "a thread for four numbers of a tile, and for every number of dB and dC");
    extern __shared__ double memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);

    const Place at(blockIdx.x, c, G, 1, CH);
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, half = threadIdx.x / 32 % 2, mine = threadIdx.x / 64 * 16 + g;
    const bool there = int(threadIdx.x / 64 * 16) < at.channels;  // this warp's strip
    const int tiles = (T + TT - 1) / TT;
    if (threadIdx.x < 6) {
        const S* const from[] = {dy + at.sequence * dy_batch + at.channel, u + at.sequence * u_batch + at.channel, delta + at.sequence * delta_batch + at.channel,
                                 z + at.sequence * z_batch + at.channel, B + at.sequence * B_batch + at.group * B_group, C + at.sequence * C_batch + at.group * C_group};
        const i64 time[] = {dy_time, u_time, delta_time, z_time, B_time, C_time};
#pragma unroll
        for (int i = 0; i < 6; ++i)
            if (threadIdx.x == i) shared.sources[i] = {reinterpret_cast<const char*>(from[i]), unsigned(time[i]) * unsigned(sizeof(S))};
    }
    if (threadIdx.x < CH) {
        const bool exists = threadIdx.x < at.channels;
        shared.bias[threadIdx.x] = bias && exists ? widen<S>(bias[at.channel + threadIdx.x]) : 0.f;
        shared.D[threadIdx.x] = D && exists ? widen<S>(D[at.channel + threadIdx.x]) : 0.f;
    }
    float rate[EACH][K], adjoint[EACH][K], dA_mine[EACH][K];
    const auto place_of = [&](i64 row, int e) { return (row * c + at.channel + mine + 8 * e) * NS + 8 * half + 2 * q; };
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int k = 0; k < K; ++k) {
            rate[e][k] = there ? rate_of(widen<S>(A[place_of(0, e) + k])) : 0.f;
            adjoint[e][k] = dlast && there ? dlast[place_of(at.sequence, e) + k] : 0.f;
            dA_mine[e][k] = 0;
            shared.checkpoint[e][threadIdx.x].of[k] = 0;
        }
    shared.totals[0][threadIdx.x] = shared.totals[1][threadIdx.x] = {};
    __syncthreads();
    const float* checkpoint = checkpoints + place_of(at.sequence * tiles + tiles - 1, 0);
    const auto fetch = [&](int tile) {  // tiles one after the other, from the last
        auto& raw = shared.raw[tile & 1];
        const auto from = [&](int which, int row, int column) {
            const auto source = shared.sources[which];
            return source.from + (row + tile * TT) * static_cast<unsigned long long>(source.stride) + column * int(sizeof(S));
        };
        const int row = threadIdx.x % 128 / 8, column = threadIdx.x % 8 * 8, which = threadIdx.x / 128;
        const bool inside = tile * TT + row < T && column < at.channels;
        copy_async_or_zeros(&raw.inputs[which][row][column], from(which, row, column), inside);
        copy_async_or_zeros(&raw.inputs[which + 2][row][column], from(which + 2, row, column), inside && (which == 0 || z));
        if (threadIdx.x < 64)
            copy_async_or_zeros(&raw.maps[threadIdx.x / 32][RawPiece<S>::place(lane / 2, lane % 2 * 8)], from(4 + threadIdx.x / 32, lane / 2, lane % 2 * 8),
                                tile * TT + lane / 2 < T);
        if (there)
#pragma unroll
            for (int e = 0; e < EACH; ++e) copy_async<8>(&shared.checkpoint[e][threadIdx.x], checkpoint + 8 * e * NS);
        checkpoint -= i64(c) * NS;
    };
    const int sizes_at = kept(shared.row(mine)), map_at = kept(q * NS + 8 * half + g);
    const int pairs_at = kept(g * Shared::PAIR_ROW + threadIdx.x / 64 * 16 + 2 * q), map_pairs_at = kept(RawPiece<S>::place(g, 8 * half + 2 * q));
    const int sums_at = kept(half * 3 * TT * Shared::SUM_ROW + 2 * q * Shared::SUM_ROW + mine), maps_at = kept((threadIdx.x / 64 * TT + g) * 2 * NS + 8 * half + 2 * q);
    const int time = threadIdx.x / 16, column = threadIdx.x % 16 * 4;  // of results; and of dB and dC time and state
    const int block_of_group = blockIdx.x % ((c / G + CH - 1) / CH);
    const i64 to = at.sequence * T * c + at.channel + column;
    const i64 map_to = ((block_of_group * sequences + at.sequence) * T * G + at.group) * NS + threadIdx.x % NS;
    fetch(tiles - 1);
    close_copy_group();
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; --tile) {
        const int rows = T - tile * TT;
        const auto& raw = shared.raw[tile & 1];
        float h[EACH][K];
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
            for (int k = 0; k < K; ++k) h[e][k] = shared.checkpoint[e][threadIdx.x].of[k];
        float* const dt_now = shared.dt[tile & 1];
        {  // of two channels, two steps
            const int channel = lane * 2, first = threadIdx.x / 32 * 2;
            const auto bias_of = load_pack<Pack<float, 2>>(shared.bias + channel);
            Pack<float, 2> dt[2], x[2], dp[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const auto of = [&](int which) { return load_wide<S, 2>(&raw.inputs[which][first + i][channel]); };
                const auto dy_of = of(0), u_of = of(1), delta_of = of(2), z_of = of(3);
                Pack<float, 2> x_of, dp_of;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float given = delta_of.of[e] + bias_of.of[e], chosen = choose(softplused, step_size<S>(given), given);
                    dt[e].of[i] = first + i < rows ? chosen : 0.f;
                    x_of.of[e] = dt[e].of[i] * u_of.of[e];
                    dp_of.of[e] = dy_of.of[e] * choose(z != nullptr, silu(z_of.of[e]), 1.f);
                    x[e].of[i] = x_of.of[e] * MEAN_CUT;
                    dp[e].of[i] = dp_of.of[e] * MEAN_CUT;
                }
                store_pack(&shared.x_by_time[first + i][channel], narrowed<S>(x_of));
                store_pack(&shared.dp_by_time[first + i][channel], narrowed<S>(dp_of));
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                store_pack(dt_now + shared.row(channel + e) + first, dt[e]);
                store_pack(shared.x + shared.row(channel + e) + first, x[e]);
                store_pack(shared.dp + shared.row(channel + e) + first, dp[e]);
            }
        }
        __syncthreads();
        if (tile) fetch(tile - 1);  // nobody reads any more what was there
        close_copy_group();

        struct Four {  // steps: of channels g, g + 8, and x, dp, B and C of time q
            Pack<float, 4> dt[EACH];
            float x[EACH], dp[EACH], B, C;
        };
        const auto four_from = [&](int t) {
            Four now;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                now.dt[e] = load_pack<Pack<float, 4>>(dt_now + sizes_at + 8 * e * Shared::ROW + 4 * e + t);
                now.x[e] = shared.x[sizes_at + q + 8 * e * Shared::ROW + 4 * e + t];
                now.dp[e] = shared.dp[sizes_at + q + 8 * e * Shared::ROW + 4 * e + t];
            }
            const int map = map_at + t / 4 * 5 * NS;
            now.B = widen<S>(raw.maps[0][map]);
            now.C = widen<S>(raw.maps[1][map]);
            return now;
        };
#pragma unroll 1
        for (int t = 0; t < TT; t += 4) {  // forwards, for the states before every 4 steps
            shared.before[t / 4][threadIdx.x] = {h[0][0], h[0][1], h[1][0], h[1][1]};
            if (t + 4 == TT) break;
            const Four now = four_from(t);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int e = 0; e < EACH; ++e)
#pragma unroll
                    for (int k = 0; k < K; ++k) h[e][k] *= decay(now.dt[e].of[j], rate[e][k]);
                add_product(h[0][0], h[0][1], h[1][0], h[1][1], now.x[0], now.x[1], q == j ? now.B : 0.f);
            }
        }
#pragma unroll 1
        for (int eight = TT - 8; eight >= 0; eight -= 8) {
            const auto pair = [&](const S* from) { return *reinterpret_cast<const unsigned*>(from); };
            const int rows_at = pairs_at + eight * Shared::PAIR_ROW;  // of a strip's channels 2q, 2q + 1, and those 8 further, at time g
            const unsigned x_of[] = {pair(shared.x_by_time[0] + rows_at), pair(shared.x_by_time[0] + rows_at + 8)};
            const unsigned dp_of[] = {pair(shared.dp_by_time[0] + rows_at), pair(shared.dp_by_time[0] + rows_at + 8)};
            const int map = map_pairs_at + eight / 8 * (10 * NS);
            const unsigned B_of = pair(raw.maps[0] + map), C_of = pair(raw.maps[1] + map);
            float sums[3][4] = {};                 // over states, of channels g and g + 8 at times 2q and 2q + 1
            float dB_of[4] = {}, dC_of[4] = {};    // over channels, of states 2q and 2q + 1 at time g
#pragma unroll
            for (int t = 4; t >= 0; t -= 4) {
                const Four now = four_from(eight + t);
                const auto start = shared.before[(eight + t) / 4][threadIdx.x];
                float a[4][EACH][K], states[5][EACH][K];
#pragma unroll
                for (int e = 0; e < EACH; ++e)
#pragma unroll
                    for (int k = 0; k < K; ++k) states[0][e][k] = start.of[2 * e + k];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    auto& after = states[j + 1];
#pragma unroll
                    for (int e = 0; e < EACH; ++e)
#pragma unroll
                        for (int k = 0; k < K; ++k) {
                            a[j][e][k] = decay(now.dt[e].of[j], rate[e][k]);
                            after[e][k] = a[j][e][k] * states[j][e][k];
                        }
                    add_product(after[0][0], after[0][1], after[1][0], after[1][1], now.x[0], now.x[1], q == j ? now.B : 0.f);
                }
#pragma unroll
                for (int j = 3; j >= 0; --j) {
                    add_product(adjoint[0][0], adjoint[0][1], adjoint[1][0], adjoint[1][1], now.dp[0], now.dp[1], q == j ? now.C : 0.f);
                    unsigned of_adjoint[EACH], of_state[EACH], of_rates[EACH];
#pragma unroll
                    for (int e = 0; e < EACH; ++e) {
                        of_adjoint[e] = pair_of(adjoint[e][0], adjoint[e][1]);
                        of_state[e] = pair_of(states[j + 1][e][0], states[j + 1][e][1]);
                        float r[K];
#pragma unroll
                        for (int k = 0; k < K; ++k) {
                            adjoint[e][k] *= a[j][e][k];
                            r[k] = states[j][e][k] * adjoint[e][k];
                            dA_mine[e][k] = fmaf(now.dt[e].of[j], r[k], dA_mine[e][k]);
                            r[k] *= rate[e][k];
                        }
                        of_rates[e] = pair_of(r[0], r[1]);
                    }
                    constexpr unsigned ONES = 0x3f803f80;
                    const bool now_mine = g == t + j;
                    add_product(sums[0], of_rates[0], of_rates[1], now_mine ? ONES : 0);
                    add_product(sums[1], of_adjoint[0], of_adjoint[1], now_mine ? B_of : 0);
                    add_product(sums[2], of_state[0], of_state[1], now_mine ? C_of : 0);
                    add_product_of_8_rows(dB_of, now_mine ? x_of[0] : 0, now_mine ? x_of[1] : 0, transposed(of_adjoint[0]), transposed(of_adjoint[1]));
                    add_product_of_8_rows(dC_of, now_mine ? dp_of[0] : 0, now_mine ? dp_of[1] : 0, transposed(of_state[0]), transposed(of_state[1]));
                }
            }
#pragma unroll
            for (int i = 0; i < 3; ++i)
#pragma unroll
                for (int e = 0; e < EACH; ++e)
#pragma unroll
                    for (int j = 0; j < 2; ++j) shared.sums[0][i][0][sums_at + (eight + j) * Shared::SUM_ROW + 8 * e] = sums[i][2 * e + j];
            store_pack(shared.maps[0][0][0] + maps_at + eight * 2 * NS, Pack<float, 2>{dB_of[0], dB_of[1]});
            store_pack(shared.maps[0][0][1] + maps_at + eight * 2 * NS, Pack<float, 2>{dC_of[0], dC_of[1]});
        }
        wait_for_copies<0>();
        __syncthreads();

        const auto given = [&](int which) { return load_wide<S, 4>(&raw.inputs[which][time][column]); };
        const auto dy_of = given(0), u_of = given(1), delta_of = given(2), z_of = given(3);
        const auto bias_of = load_pack<Pack<float, 4>>(shared.bias + column), D_of = load_pack<Pack<float, 4>>(shared.D + column);
        Pack<float, 4> du_of, ddelta_of, dz_of, sum[3], of_D = shared.totals[0][threadIdx.x], of_bias = shared.totals[1][threadIdx.x];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            sum[i] = load_pack<Pack<float, 4>>(&shared.sums[0][i][time][column]);
            const auto more = load_pack<Pack<float, 4>>(&shared.sums[1][i][time][column]);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i].of[j] += more.of[j];
        }
        const bool inside = time < rows;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float s = sigmoid(z_of.of[i]), dp = dy_of.of[i] * choose(z != nullptr, z_of.of[i] * s, 1.f);
            const float slope = s * fmaf(z_of.of[i], 1 - s, 1.f), skip = D_of.of[i];
            float of_step = fmaf(u_of.of[i], sum[1].of[i], of_rate(sum[0].of[i]));
            of_step *= choose(softplused, sigmoid(delta_of.of[i] + bias_of.of[i]), 1.f);
            du_of.of[i] = fmaf(dt_now[shared.row(column) + i * Shared::ROW + time], sum[1].of[i], skip * dp);
            ddelta_of.of[i] = of_step;
            dz_of.of[i] = dy_of.of[i] * fmaf(skip, u_of.of[i], sum[2].of[i]) * (s == 0 ? 0.f : slope);
            of_D.of[i] = fmaf(dp, u_of.of[i], of_D.of[i]);  // beyond the end these are zeros
            of_bias.of[i] += inside ? of_step : 0.f;
        }
        shared.totals[0][threadIdx.x] = of_D, shared.totals[1][threadIdx.x] = of_bias;
        const unsigned row = tile * TT + time;
        if (inside && column < at.channels) {
            const i64 here = to + row * static_cast<unsigned long long>(unsigned(c));
            store_pack(du + here, narrowed<S>(du_of));
            store_pack(ddelta + here, narrowed<S>(ddelta_of));
            if (z) store_pack(dz + here, narrowed<S>(dz_of));
        }
        if (inside) {
            float of_B = 0, of_C = 0;
#pragma unroll
            for (int w = 0; w < THREADS / 64; ++w) {
                of_B += shared.maps[w][time][0][threadIdx.x % NS];
                of_C += shared.maps[w][time][1][threadIdx.x % NS];
            }
            const i64 here = map_to + row * static_cast<unsigned long long>(unsigned(G * NS));
            dB[here] = of_B;
            dC[here] = of_C;
        }
    }

    if (there)
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
            for (int k = 0; k < K; ++k) {
                dA[place_of(at.sequence, e) + k] = dA_mine[e][k];
                dstate[place_of(at.sequence, e) + k] = adjoint[e][k];
            }
    __syncthreads();
    if (threadIdx.x < at.channels) {  // rows of a tile lie with different threads
        float of_D = 0, of_bias = 0;
        for (int r = 0; r < TT; ++r) {
            of_D += shared.totals[0][r * 16 + threadIdx.x / 4].of[threadIdx.x % 4];
            of_bias += shared.totals[1][r * 16 + threadIdx.x / 4].of[threadIdx.x % 4];
        }
        dD[at.sequence * c + at.channel + threadIdx.x] = of_D;
        dbias[at.sequence * c + at.channel + threadIdx.x] = of_bias;
    }
}
