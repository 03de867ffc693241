// Selective scan, gradient, for bfloat16 and at most 16 states: what kernel_selective_scan_gradient.cu does, with every sum over
// states or channels by matrix instructions.
//
// Idea. A warp has 16 channels and 8 of their 16 states, 4 a lane, as the sums of a matrix instruction lie: of channels g and
// g + 8 the states 2q and 2q + 1, g = lane / 4, q = lane % 4. A checkpoint is the state before every tile of TT steps. The states
// before every 4 steps are found from it, and those 4 steps' states and decays are kept in registers, where
//
//     g_t = C_t dp_t + G,    G <- a_t g_t,    r_t = h_{t-1} G                                             a_t = exp(dt_t A)
//
// are run backwards. dp C is added to G as dt u B is to h. Sums over states, for d(dt), du and dz, are products of (channels by
// states) and (states by 8 times), of whose columns one is sought. Sums over channels, for dB and dC, are products of (8 times by
// channels) and (channels by states), of whose rows one is sought: the second factor must be transposed, which is an instruction.
// Over warps and blocks sums go through memory, each in one order, so the gradient is bit for bit the same in every run.
//
// Precision. States, G, decays and dA have 24 bits; dt u and dp are rounded to 11 where they enter; what is summed over
// states or channels is rounded to bfloat16, its sums are not.
//
// Limit: issue slots and waits between products that need each other: 19 instructions a state and step in the inner loop, of
// which 7 are the recurrences, and half as many again around it.
#include "block_selective_tensor.cuh"

template <class S, int THREADS>
struct TensorGradientShared {
    enum { CH = THREADS / 4, NS = 16, TT = 16, ROW = TT + 4, MAP_ROW = NS + 8, SUM_ROW = CH + 4, WARPS = THREADS / 32 };
    using Steps = Spread<S, THREADS, CH, TT>;
    alignas(16) float dt[CH][ROW], x[CH][ROW], dp[CH][ROW];           // x = dt u, dp = dy silu(z)
    alignas(16) S x_by_time[TT][CH + 8], dp_by_time[TT][CH + 8];
    alignas(16) float into[TT][MAP_ROW], out[TT][MAP_ROW];            // B, C
    alignas(16) S into_pairs[TT][MAP_ROW], out_pairs[TT][MAP_ROW];
    alignas(16) Pack<float, 4> before[TT / 4][THREADS];               // states before every 4 steps
    alignas(16) float sums[2][3][TT][SUM_ROW];                        // over 8 states: A r, B g, C·h
    alignas(16) float maps[WARPS / 2][TT][2][NS];                     // dB, dC of a warp's channels
    float totals[2][Steps::WIDE][THREADS];                            // dD, dbias so far
    alignas(16) typename Steps::Packed raw[2][4][Steps::PASSES][THREADS];  // dy, u, delta, z of this tile and the next
    alignas(16) float checkpoint[4][THREADS];                         // of the next tile
    alignas(16) float bias[CH], D[CH];
    const S* from[4][THREADS];                                        // where threads find them: here pointers take no registers
};

template <class S, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) selective_scan_tensor_gradient(
    const S* dy, i64 dy_batch, i64 dy_time, const S* u, i64 u_batch, i64 u_time, const S* delta, i64 delta_batch, i64 delta_time,
    const S* z, i64 z_batch, i64 z_time, const S* B, i64 B_batch, i64 B_time, i64 B_group, const S* C, i64 C_batch, i64 C_time, i64 C_group,
    const S* A, const S* D, const S* bias,
    const float* checkpoints, const float* dlast, S* du, S* ddelta, S* dz, float* dA, float* dD, float* dbias,
    float* dB, float* dC, float* dstate, i64 T, int c, int n, int G, i64 sequences, int softplused, int packed) {
    using Shared = TensorGradientShared<S, THREADS>;
    enum { CH = Shared::CH, NS = Shared::NS, TT = Shared::TT, EACH = 2, K = 2 };
    using Steps = Spread<S, THREADS, CH, TT>;
    using Map = Maps<S, float, THREADS, Shared::MAP_ROW, TT, NS>;
    static_assert(TT * NS == THREADS, "a thread for every number of dB and dC");
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const auto slot = [](int channel) { return channel ^ (channel >> 3 & 3); };

    const Place at(blockIdx.x, c, G, 1, CH);
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, half = threadIdx.x / 32 % 2, mine = threadIdx.x / 64 * 16 + g;
    const int block_of_group = blockIdx.x % ((c / G + CH - 1) / CH);
    const int tiles = int((T + TT - 1) / TT);
    const i64 last_tile = i64(tiles - 1) * TT;
    shared.from[0][threadIdx.x] = dy + at.sequence * dy_batch + at.channel + last_tile * dy_time + Steps::place(dy_time);
    shared.from[1][threadIdx.x] = u + at.sequence * u_batch + at.channel + last_tile * u_time + Steps::place(u_time);
    shared.from[2][threadIdx.x] = delta + at.sequence * delta_batch + at.channel + last_tile * delta_time + Steps::place(delta_time);
    shared.from[3][threadIdx.x] = z + at.sequence * z_batch + at.channel + last_tile * z_time + Steps::place(z_time);
    const S* B_from = B + at.sequence * B_batch + at.group * B_group + last_tile * B_time;
    const S* C_from = C + at.sequence * C_batch + at.group * C_group + last_tile * C_time;
    if (threadIdx.x < CH) {
        const bool there = threadIdx.x < at.channels;
        shared.bias[threadIdx.x] = bias && there ? widen<S>(bias[at.channel + threadIdx.x]) : 0.f;
        shared.D[threadIdx.x] = D && there ? widen<S>(D[at.channel + threadIdx.x]) : 0.f;
    }
    float rate[EACH][K], adjoint[EACH][K], dA_mine[EACH][K];
    const auto exists = [&](int e, int k) { return mine + 8 * e < at.channels && 8 * half + 2 * q + k < n; };
    const auto place_of = [&](i64 row, int e, int k) { return (row * c + at.channel + mine + 8 * e) * n + 8 * half + 2 * q + k; };
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int k = 0; k < K; ++k) {
            rate[e][k] = exists(e, k) ? rate_of(widen<S>(A[place_of(0, e, k)])) : 0.f;
            adjoint[e][k] = dlast && exists(e, k) ? dlast[place_of(at.sequence, e, k)] : 0.f;
            dA_mine[e][k] = 0;
            shared.checkpoint[2 * e + k][threadIdx.x] = 0;
        }
#pragma unroll
    for (int i = 0; i < Steps::WIDE; ++i) shared.totals[0][i][threadIdx.x] = shared.totals[1][i][threadIdx.x] = 0;
    typename Map::Bits B_next, C_next;
    const auto rows_of = [&](int tile) { return tile < tiles - 1 ? int(TT) : int(T - i64(tiles - 1) * TT); };
    const float* checkpoint = checkpoints + place_of(at.sequence * tiles + tiles - 1, 0, 0);
    const auto fetch = [&](int tile) {  // and go on to the one before it
        const int rows = rows_of(tile);
        const bool whole = packed && at.channels == CH && rows == TT;
        const auto one = [&](int which, i64 stride) {
            const S*& from = shared.from[which][threadIdx.x];
            Steps::fetch(shared.raw[tile % 2][which], from, stride, rows, at.channels, whole);
            from -= TT * stride;
        };
        one(0, dy_time);
        one(1, u_time);
        one(2, delta_time);
        if (z) one(3, z_time);
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
            for (int k = 0; k < K; ++k)
                if (exists(e, k)) copy_async<4>(&shared.checkpoint[2 * e + k][threadIdx.x], checkpoint + 8 * e * n + k);
        checkpoint -= i64(c) * n;
        Map::load(B_next, B_from, B_time, rows, n);
        Map::load(C_next, C_from, C_time, rows, n);
        B_from -= TT * B_time, C_from -= TT * C_time;
    };
    // Where this thread's results go, of a tile that begins at time 0.
    const i64 to = at.sequence * T * c + at.channel + Steps::place(c);
    const int map_row = threadIdx.x / NS, map_state = threadIdx.x % NS;
    const i64 map_to = (((block_of_group * sequences + at.sequence) * T + map_row) * G + at.group) * n + map_state;
    fetch(tiles - 1);
    close_copy_group();
    __syncthreads();  // for bias and D
#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; --tile) {
        const i64 first = i64(tile) * TT;
        const int rows = rows_of(tile);
        Map::put(B_next, shared.into);
        Map::put(C_next, shared.out);
        Map::put_raw(B_next, shared.into_pairs);
        Map::put_raw(C_next, shared.out_pairs);
        wait_for_copies<0>();
        float h[EACH][K];
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
            for (int k = 0; k < K; ++k) h[e][k] = shared.checkpoint[2 * e + k][threadIdx.x];
        if (tile) fetch(tile - 1);
        close_copy_group();
        const auto& raw = shared.raw[tile % 2];
        const auto given = [&](int which, int p) {
            Raw<typename Steps::Packed> bits;
            bits.load(&raw[which][p][threadIdx.x]);
            return widened(bits);
        };
        const auto of_channels = [&](const float* values) { return load_pack<Pack<float, Steps::WIDE>>(values + Steps::column()); };
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p) {
            const auto dy_of = given(0, p), u_of = given(1, p), delta_of = given(2, p), z_of = given(3, p);
            const auto bias_of = of_channels(shared.bias);
            Pack<float, Steps::WIDE> x_of, dp_of;
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i) {
                const float delta_now = delta_of.of[i] + bias_of.of[i], chosen = choose(softplused, step_size<S>(delta_now), delta_now);
                const float dt = Steps::row(p) < rows ? chosen : 0.f;
                const int channel = slot(Steps::column() + i);
                x_of.of[i] = dt * u_of.of[i];
                dp_of.of[i] = dy_of.of[i] * choose(z != nullptr, silu(z_of.of[i]), 1.f);
                shared.dt[channel][Steps::row(p)] = dt;
                shared.x[channel][Steps::row(p)] = rounded_to_11_bits(x_of.of[i]);
                shared.dp[channel][Steps::row(p)] = rounded_to_11_bits(dp_of.of[i]);
            }
            store_pack(&shared.x_by_time[Steps::row(p)][Steps::column()], narrowed<S>(x_of));
            store_pack(&shared.dp_by_time[Steps::row(p)][Steps::column()], narrowed<S>(dp_of));
        }
        __syncthreads();

        struct Four {  // steps: of channels g, g + 8, and x, dp, B and C of time q
            Pack<float, 4> dt[EACH];
            float x[EACH], dp[EACH], B, C;
        };
        const auto four_from = [&](int t) {
            Four now;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                now.dt[e] = load_pack<Pack<float, 4>>(&shared.dt[slot(mine + 8 * e)][t]);
                now.x[e] = shared.x[slot(mine + 8 * e)][t + q];
                now.dp[e] = shared.dp[slot(mine + 8 * e)][t + q];
            }
            now.B = shared.into[t + q][8 * half + g];
            now.C = shared.out[t + q][8 * half + g];
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
            const int channels = threadIdx.x / 64 * 16 + 2 * q;  // and the next, and those 8 further, at time g
            const unsigned x_of[] = {*reinterpret_cast<const unsigned*>(&shared.x_by_time[eight + g][channels]),
                                     *reinterpret_cast<const unsigned*>(&shared.x_by_time[eight + g][channels + 8])};
            const unsigned dp_of[] = {*reinterpret_cast<const unsigned*>(&shared.dp_by_time[eight + g][channels]),
                                      *reinterpret_cast<const unsigned*>(&shared.dp_by_time[eight + g][channels + 8])};
            const unsigned B_of = *reinterpret_cast<const unsigned*>(&shared.into_pairs[eight + g][8 * half + 2 * q]);
            const unsigned C_of = *reinterpret_cast<const unsigned*>(&shared.out_pairs[eight + g][8 * half + 2 * q]);
            float kept[3][EACH][2] = {};  // sums over states, at times 2q and 2q + 1
            Pack<float, 2> dB_of = {}, dC_of = {};  // at time g
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
                    float sums[3][4];
                    product(sums[0], of_rates[0], of_rates[1], ONES);
                    product(sums[1], of_adjoint[0], of_adjoint[1], B_of);
                    product(sums[2], of_state[0], of_state[1], C_of);
#pragma unroll
                    for (int i = 0; i < 3; ++i)
#pragma unroll
                        for (int e = 0; e < EACH; ++e) kept[i][e][j % 2] = q == (t + j) / 2 ? sums[i][2 * e + j % 2] : kept[i][e][j % 2];
                    const unsigned adjoint_by_state[] = {transposed(of_adjoint[0]), transposed(of_adjoint[1])};
                    const unsigned state_by_state[] = {transposed(of_state[0]), transposed(of_state[1])};
                    Pack<float, 2> into, out;
                    product_of_8_rows(into.of[0], into.of[1], x_of, adjoint_by_state);
                    product_of_8_rows(out.of[0], out.of[1], dp_of, state_by_state);
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        dB_of.of[k] = g == t + j ? into.of[k] : dB_of.of[k];
                        dC_of.of[k] = g == t + j ? out.of[k] : dC_of.of[k];
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 3; ++i)
#pragma unroll
                for (int e = 0; e < EACH; ++e)
#pragma unroll
                    for (int j = 0; j < 2; ++j) shared.sums[half][i][eight + 2 * q + j][mine + 8 * e] = kept[i][e][j];
            store_pack(&shared.maps[threadIdx.x / 64][eight + g][0][8 * half + 2 * q], dB_of);
            store_pack(&shared.maps[threadIdx.x / 64][eight + g][1][8 * half + 2 * q], dC_of);
        }
        __syncthreads();

        typename Steps::Packed du_now[Steps::PASSES], ddelta_now[Steps::PASSES], dz_now[Steps::PASSES];
#pragma unroll
        for (int p = 0; p < Steps::PASSES; ++p) {
            const auto dy_of = given(0, p), u_of = given(1, p), delta_of = given(2, p), z_of = given(3, p);
            const auto bias_of = of_channels(shared.bias), D_of = of_channels(shared.D);
            Pack<float, Steps::WIDE> du_of, ddelta_of, dz_of;
            const int row = Steps::row(p);
            Pack<float, Steps::WIDE> sum[3];
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                sum[i] = load_pack<Pack<float, Steps::WIDE>>(&shared.sums[0][i][row][Steps::column()]);
                const auto more = load_pack<Pack<float, Steps::WIDE>>(&shared.sums[1][i][row][Steps::column()]);
#pragma unroll
                for (int j = 0; j < Steps::WIDE; ++j) sum[i].of[j] += more.of[j];
            }
#pragma unroll
            for (int i = 0; i < Steps::WIDE; ++i) {
                const float s = sigmoid(z_of.of[i]), dp = dy_of.of[i] * choose(z != nullptr, z_of.of[i] * s, 1.f);
                const float slope = s * fmaf(z_of.of[i], 1 - s, 1.f), skip = D_of.of[i];
                float of_step = fmaf(u_of.of[i], sum[1].of[i], of_rate(sum[0].of[i]));
                of_step *= choose(softplused, sigmoid(delta_of.of[i] + bias_of.of[i]), 1.f);
                du_of.of[i] = fmaf(shared.dt[slot(Steps::column() + i)][row], sum[1].of[i], skip * dp);
                ddelta_of.of[i] = of_step;
                dz_of.of[i] = dy_of.of[i] * fmaf(skip, u_of.of[i], sum[2].of[i]) * (s == 0 ? 0.f : slope);
                shared.totals[0][i][threadIdx.x] += row < rows ? dp * u_of.of[i] : 0.f;
                shared.totals[1][i][threadIdx.x] += row < rows ? of_step : 0.f;
            }
            du_now[p] = narrowed<S>(du_of), ddelta_now[p] = narrowed<S>(ddelta_of), dz_now[p] = narrowed<S>(dz_of);
        }
        const bool whole = packed && at.channels == CH && rows == TT;
        const i64 here = to + first * c;
        Steps::store(du_now, du + here, c, rows, at.channels, whole);
        Steps::store(ddelta_now, ddelta + here, c, rows, at.channels, whole);
        if (z) Steps::store(dz_now, dz + here, c, rows, at.channels, whole);
        if (map_state < n && map_row < rows) {
            float of_B = 0, of_C = 0;
#pragma unroll
            for (int w = 0; w < THREADS / 64; ++w) {
                of_B += shared.maps[w][map_row][0][map_state];
                of_C += shared.maps[w][map_row][1][map_state];
            }
            dB[map_to + first * G * n] = of_B;
            dC[map_to + first * G * n] = of_C;
        }
    }

#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (exists(e, k)) {
                dA[place_of(at.sequence, e, k)] = dA_mine[e][k];
                dstate[place_of(at.sequence, e, k)] = adjoint[e][k];
            }
    __syncthreads();
    if (threadIdx.x < at.channels) {  // rows of a tile lie with different threads
        float of_D = 0, of_bias = 0;
        for (int r = 0; r < Steps::ROWS; ++r) {
            const int thread = (r * CH + threadIdx.x) / Steps::WIDE, i = threadIdx.x % Steps::WIDE;
            of_D += shared.totals[0][i][thread];
            of_bias += shared.totals[1][i][thread];
        }
        dD[at.sequence * c + at.channel + threadIdx.x] = of_D;
        dbias[at.sequence * c + at.channel + threadIdx.x] = of_bias;
    }
}
