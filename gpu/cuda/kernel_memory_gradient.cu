// The gradient of a matrix memory with one decay per head (kernel_memory.cu), on tensor cores.
//
// The idea. With S the state that enters a chunk of 64 steps and R the cotangent of the one that leaves it, the gradient of the chunk needs
// no other chunk. So one kernel walks and keeps nothing but states, `memory_states`: forwards S, backwards R, in bfloat16,
//     S <- e^{A_end} S + sum of e^{A_end - A_s + g_s} k_s v_s^T,      R <- e^{A_end} R + c sum of e^{A_t + f_t} q_t dy_t^T
// (A: sums of w from the chunk's start; e^g factors of keys, e^f of queries, c of what is read), and another, `memory_gradient`, takes all
// chunks at once. With M the faded pairs of queries and keys, P the faded pairs of dy and v (+ p of each query, where a normaliser reads n):
//     dq_t = P K + e^{A_t + f_t} c (S dy_t),    dk_s = P^T Q + e^{A_end - A_s + g_s} R v_s,    dv_s = M^T dY + e^{A_end - A_s + g_s} R^T k_s
//     dw_r = sum over s < r <= t of z_ts + sum over t >= r of q_t . (S dy_t) + sum over s < r of k_s . (R v_s) + <S, R>,   each faded
// z the product of M and P without one of its fadings: what a pair is worth. w_r stands in every exponent that spans step r; no term is
// subtracted again.
//
// A block takes a chunk and walks over tiles of 64 values, and over heads that share queries and keys: their P and what S and R give are
// summed in registers, so that dq and dk are written once. Four warps own 16 queries each, dq and P; four own 16 keys each, dk and dv. What
// limits it: reading S and R, 32 KB for each tile, while one block a multiprocessor has 8 warps.
#include "block_memory.cuh"

constexpr int STAGES = 3;  // of memory_states
constexpr int OUT = 16 * 128;  // bytes of a warp's 16 rows on their way out

// 16 rows of 64 numbers that a warp has as tiles of results, to `rows` rows of a matrix, in whole runs of 16 bytes.
template <int N> __device__ __forceinline__ void store_rows(char* room, const float (&tiles)[N][4], __nv_bfloat16* to, i64 rows, int width, int column) {
    const int lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int x = 0; x < 2; ++x) *reinterpret_cast<unsigned*>(at<16>(room, g + 8 * x, j) + 4 * t4) = pack(tiles[j][2 * x], tiles[j][2 * x + 1]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int r = (32 * i + lane) / N, p = (32 * i + lane) % N;
        if (r < rows && column + 8 * p < width)
            *reinterpret_cast<uint4*>(to + i64(r) * width + column + 8 * p) = *reinterpret_cast<const uint4*>(at<16>(room, r, p));
    }
}

// keys (G, key_heads, T, d), values (G, value_heads, T, e); w and gain (G, w_heads, T), logarithms of factors of the keys forwards; backwards
// keys are the queries, gain (G, heads, T) theirs, and `scale` a factor of all; weights (G, heads, T): what the values' column of n is, 1 if
// null; state and last (G, heads, d, e), norm and last_norm (G, heads, d); states (G heads, chunks, d, e), norms (G heads, chunks, d).
// Grid: (G heads, tiles of 64 values).
template <int D, bool NORMALISED>
__global__ void __launch_bounds__(THREADS, 2)
memory_states(const __nv_bfloat16* keys, const __nv_bfloat16* values, const float* w, const float* gain, const float* weights, const float* state,
              const float* norm, __nv_bfloat16* states, float* norms, float* last, float* last_norm, i64 T, int d, int e, int heads, int key_heads,
              int value_heads, int w_heads, int gain_heads, float scale, int backwards) {
    constexpr int ROWS = L * D * 2, VALUES = L * E * 2, STAGE = ROWS + VALUES, COLUMNS = E * D / 128, TILES = COLUMNS / 8;
    extern __shared__ double memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    __shared__ float all_sums[SUMS], factors[2][L], through[2], twice[2], worth[2][L];
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const i64 of_head = blockIdx.x, G = of_head / heads, h = of_head % heads;
    const int column = int(blockIdx.y) * E, row = warp % (D / 16) * 16, own = warp / (D / 16) * COLUMNS, chunks = int((T + L - 1) / L);
    char* const room = shared + STAGES * STAGE + warp * OUT;
    keys += (G * key_heads + (key_heads > 1 ? h : 0)) * T * d;
    values += (G * value_heads + (value_heads > 1 ? h : 0)) * T * e;
    if (w) w += (G * w_heads + (w_heads > 1 ? h : 0)) * T;
    if (gain) gain += (G * gain_heads + (gain_heads > 1 ? h : 0)) * T;
    if (NORMALISED && weights) weights += of_head * T;

    const auto chunk = [&](int c) { return backwards ? chunks - 1 - c : c; };
    const auto fetch = [&](int c) {
        if (c < chunks) {
            char* const tiles = shared + c % STAGES * STAGE;
            const i64 t0 = i64(chunk(c)) * L;
            stage<D>(tiles, keys + t0 * d, T - t0, d, 0);
            stage<E>(tiles + ROWS, values + t0 * e, T - t0, e, column);
        }
        copies_end();
    };
    const auto load = [&](int c) {
        const i64 t0 = i64(chunk(c)) * L;
        return backwards ? load_decays(w, nullptr, gain, t0, T) : load_decays(w, gain, nullptr, t0, T);
    };
    const auto leave_factors = [&](int c, const Decays& x) {  // of one warp
        sum_decays(all_sums, x);
        __syncwarp();
        const bool halved = all_sums[3 * L] != 0.0f;
        const float all = all_sums[L - 1], all_rest = all_sums[3 * L + 1], once = backwards ? scale : 1.0f;
#pragma unroll
        for (int s = lane; s < L; s += 32) {
            const float a = backwards ? all_sums[s] + all_sums[L + s] : (all - all_sums[s]) + (all_rest - all_sums[2 * L + s]);
            factors[c % 2][s] = power(a, halved);
            const i64 t = i64(chunk(c)) * L + s;
            worth[c % 2][s] = (NORMALISED && weights ? (t < T ? weights[t] : 0.0f) : 1.0f) * once;
        }
        if (lane == 0) through[c % 2] = power(all + all_rest, halved), twice[c % 2] = halved ? 1.0f : 0.0f;
        __syncwarp();
    };

    float S[TILES][4], n[2] = {0.0f, 0.0f};  // n: a share of it, one of four lanes'
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const int r = row + g + 8 * x;
        if (NORMALISED && norm && r < d && t4 == 0) n[x] = norm[of_head * d + r];
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const int at_column = column + own + 8 * j + 2 * t4;
            const bool there = state && r < d && at_column < e;
            const float2 pair = there ? *reinterpret_cast<const float2*>(state + (of_head * d + r) * e + at_column) : float2{0.0f, 0.0f};
            S[j][2 * x] = pair.x, S[j][2 * x + 1] = pair.y;
        }
    }
#pragma unroll
    for (int c = 0; c < STAGES - 1; ++c) fetch(c);
    if (warp == 0 && chunks > 0) leave_factors(0, load(0));
    for (int c = 0; c < chunks; ++c) {
        copies_wait<STAGES - 2>();
        meet_all();
        fetch(c + STAGES - 1);
        Decays next;
        if (warp == 0 && c + 1 < chunks) next = load(c + 1);
        const i64 kept = (of_head * chunks + chunk(c)) * d + row;
        store_rows(room, S, states + kept * e, d - row, e, column + own);
        if (NORMALISED) {
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float whole = over_columns(n[x]);
                if (t4 == 0 && blockIdx.y == 0 && own == 0 && row + g + 8 * x < d) norms[kept + g + 8 * x] = whole;
            }
        }
        char* const K = shared + c % STAGES * STAGE;
        char* const V = K + ROWS;
        const float *const factor = factors[c % 2], *const value = worth[c % 2];
        const bool halved = twice[c % 2] != 0.0f;
        const float fade[2] = {through[c % 2], through[c % 2]};
        for (int again = 0; again <= halved; ++again) {
            times(S, fade);
            n[0] *= fade[0], n[1] *= fade[0];
        }
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            unsigned a[4];
            load_tiles_turned(a, at<L>(K, 16 * block + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const int s = 16 * block + 8 * x + 2 * t4;
                const float2 by = *reinterpret_cast<const float2*>(factor + s), of_n = *reinterpret_cast<const float2*>(value + s);
#pragma unroll
                for (int y = 0; y < 2; ++y) {
                    float k0 = low(a[2 * x + y]) * by.x, k1 = high(a[2 * x + y]) * by.y;
                    if (halved) k0 *= by.x, k1 *= by.y;
                    if (NORMALISED) n[y] += k0 * of_n.x + k1 * of_n.y;
                    if (backwards) k0 *= scale, k1 *= scale;
                    a[2 * x + y] = pack(k0, k1);
                }
            }
#pragma unroll
            for (int j = 0; j < TILES / 2; ++j) {
                unsigned b[4];
                load_tiles_turned(b, at<L>(V, 16 * block + lane % 16, own / 8 + 2 * j + lane / 16));
                multiply_tiles(S[2 * j], a, b[0], b[1]);
                multiply_tiles(S[2 * j + 1], a, b[2], b[3]);
            }
        }
        if (warp == 0 && c + 1 < chunks) leave_factors(c + 1, next);
    }
    if (!last) return;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const int r = row + g + 8 * x;
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const int at_column = column + own + 8 * j + 2 * t4;
            if (r < d && at_column < e) *reinterpret_cast<float2*>(last + (of_head * d + r) * e + at_column) = float2{S[j][2 * x], S[j][2 * x + 1]};
        }
        if (NORMALISED) {
            const float whole = over_columns(n[x]);
            if (t4 == 0 && blockIdx.y == 0 && own == 0 && r < d) last_norm[of_head * d + r] = whole;
        }
    }
}

// What the warps of a chunk tell each other of one head.
struct Head {
    float sums[SUMS], gains[L], of_n[L], rectangle[4][L], column[4][L], from_state[L], to_state[L], to_dgain[L], kept[8], diagonal[4];
};

// One warp: the sum of 64 numbers from each on, or of those before each; of places 2 lane and 2 lane + 1.
__device__ __forceinline__ void sums_from(const float* x, float (&y)[2]) {
    const int lane = threadIdx.x % 32;
    const float first = x[2 * lane], second = x[2 * lane + 1];
    float from = first + second;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const float more = __shfl_sync(0xffffffffu, from, min(lane + away, 31));
        from += lane + away < 32 ? more : 0.0f;
    }
    const float later = __shfl_sync(0xffffffffu, from, min(lane + 1, 31));
    y[1] = second + (lane < 31 ? later : 0.0f), y[0] = first + y[1];
}
__device__ __forceinline__ void sums_before(const float* x, float (&y)[2]) {
    const int lane = threadIdx.x % 32;
    const float first = x[2 * lane], second = x[2 * lane + 1];
    float upto = first + second;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const float more = __shfl_up_sync(0xffffffffu, upto, away);
        upto += lane >= away ? more : 0.0f;
    }
    const float before = __shfl_up_sync(0xffffffffu, upto, 1);
    y[0] = lane > 0 ? before : 0.0f, y[1] = y[0] + first;
}

// What a share of 16 (or, of 64 rows, 8) rows of S and R is worth together.
template <int D> __device__ __forceinline__ float product_of_states(const char* S, const char* R, int warp) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
        const int place = ((warp * (D / 32) + i) * 32 + threadIdx.x % 32) * 16;
        const uint4 s = *reinterpret_cast<const uint4*>(S + place), r = *reinterpret_cast<const uint4*>(R + place);
        const unsigned of_s[4] = {s.x, s.y, s.z, s.w}, of_r[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int x = 0; x < 4; ++x) sum += low(of_s[x]) * low(of_r[x]) + high(of_s[x]) * high(of_r[x]);
    }
    return sum;
}

// Rows 16 group ... of X with rows 16 block ... of Y, blocks up to the group or from it on.
template <int D, bool UPTO> __device__ __forceinline__ void multiply_pairs(float (&pairs)[L / 8][4], char* X, char* Y, int group) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < L / 16; ++block) {
#pragma unroll
        for (int x = 0; x < 8; ++x) pairs[2 * block + x / 4][x % 4] = 0.0f;
        if (UPTO ? block <= group : block >= group) {
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                unsigned a[4], b[4];
                load_tiles(a, at<L>(X, 16 * group + lane % 16, 2 * i + lane / 16));
                load_tiles(b, at<L>(Y, 16 * block + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                multiply_tiles(pairs[2 * block], a, b[0], b[1]);
                multiply_tiles(pairs[2 * block + 1], a, b[2], b[3]);
            }
        }
    }
}

// q, k, v, w, gain, of_query (the f) as above; dy (G, heads, T, e), of_n (G, heads, T): what each query adds to its row of P, null without a
// normaliser; S, R (G heads, chunks, d, e), of n too, ns and rs (G heads, chunks, d); skip (G, heads). dq and dk (G, heads or 1, T, d), dv (G,
// heads, T, e); dw and dgain (G heads, T): that of a gain without its factor e^g; dskip (G heads, chunks), dy_t . v_t, null without skip.
// Grid: G chunks if `together`, where heads share q and k, else G heads chunks.
template <int D, bool NORMALISED>
__global__ void __launch_bounds__(THREADS, 1)
memory_gradient(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* dy, const float* w, const float* gain,
                const float* of_query, const float* of_n, const __nv_bfloat16* states, const __nv_bfloat16* adjoints, const float* ns,
                const float* rs, const float* skip, __nv_bfloat16* dq, __nv_bfloat16* dk, __nv_bfloat16* dv, float* dw, float* dgain,
                float* dskip, i64 T, int d, int e, int heads, int q_heads, int k_heads, int v_heads, int w_heads, int together, float scale) {
    constexpr int ROWS = L * D * 2, VALUES = L * E * 2, STATE = D * E * 2, STAGE = 2 * VALUES + 2 * STATE;
    extern __shared__ double memory[];
    __shared__ Head shared_heads[2];
    __shared__ float n_s[2][NORMALISED ? D : 1], r_s[2][NORMALISED ? D : 1];
    char* const Q = reinterpret_cast<char*>(memory);
    char* const K = Q + ROWS;
    char* const stages = K + ROWS;
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int chunks = int((T + L - 1) / L), c = blockIdx.x % chunks, tiles = (e + E - 1) / E, each = together ? heads : 1;
    const i64 unit = blockIdx.x / chunks, G = together ? unit : unit / heads, t0 = i64(c) * L;
    const int first_head = together ? 0 : int(unit % heads), items = each * tiles;
    const auto of_head = [&](int number) { return G * heads + first_head + number; };

    const auto fetch = [&](int item) {
        const int h = first_head + item / tiles, column = item % tiles * E;
        char* const to = stages + item % 2 * STAGE;
        const i64 at_state = ((G * heads + h) * chunks + c) * d * e;
        stage<E>(to, v + ((G * v_heads + (v_heads > 1 ? h : 0)) * T + t0) * e, T - t0, e, column);
        stage<E>(to + VALUES, dy + ((G * heads + h) * T + t0) * e, T - t0, e, column);
#pragma unroll
        for (int i = 0; i < D; i += L) {
            stage<E>(to + 2 * VALUES + i * 128, states + at_state + i64(i) * e, d - i, e, column);
            stage<E>(to + 2 * VALUES + STATE + i * 128, adjoints + at_state + i64(i) * e, d - i, e, column);
        }
    };
    const auto turn = [&](int item) {  // this item is there, the next one is asked for
        copies_wait<0>();
        meet_all();
        if (item + 1 < items) fetch(item + 1);
        copies_end();
    };
    const auto prepare = [&](int number) {  // of one warp
        if (number >= each) return;
        Head& head = shared_heads[number % 2];
        const i64 of = (G * w_heads + (w_heads > 1 ? first_head + number : 0)) * T, row = of_head(number) * T;
        sum_decays(head.sums, load_decays(w ? w + of : nullptr, nullptr, NORMALISED ? of_query + row : nullptr, t0, T));
#pragma unroll
        for (int s = lane; s < L; s += 32) {
            head.gains[s] = gain && t0 + s < T ? exp2_fast(gain[of + s + t0] * LOG2E) : 1.0f;
            head.of_n[s] = NORMALISED && t0 + s < T ? of_n[row + t0 + s] : 0.0f;
        }
        if (NORMALISED) {
            const i64 at_norm = (of_head(number) * chunks + c) * d;
            for (int r = lane; r < D; r += 32) {
                n_s[number % 2][r] = r < d ? ns[at_norm + r] : 0.0f;
                r_s[number % 2][r] = r < d ? rs[at_norm + r] : 0.0f;
            }
        }
    };
    const auto faded = [](const float* sums, float product) {  // from the chunk's start to its end
        const bool halved = sums[3 * L] != 0.0f;
        const float by = power(min(sums[L - 1] + sums[3 * L + 1], 127.0f), halved);
        product *= by;
        return halved ? product * by : product;
    };
    const auto finish = [&](int number) {  // of one warp
        const Head& head = shared_heads[number % 2];
        float product = 0.0f;
#pragma unroll
        for (int x = 0; x < 8; ++x) product += head.kept[x];
        float from[2], before[2];
        sums_from(head.from_state, from);
        sums_before(head.to_state, before);
        const i64 to = of_head(number) * T + t0;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const int r = 2 * lane + x;
            float rectangle = 0.0f, column = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) rectangle += head.rectangle[i][r], column += head.column[i][r];
            if (t0 + r < T) {
                if (dw) dw[to + r] = rectangle + (from[x] + before[x]) + product;
                if (dgain) dgain[to + r] = column + head.to_dgain[r];
            }
        }
        if (dskip && lane == 0)
            dskip[of_head(number) * chunks + c] = head.diagonal[0] + head.diagonal[1] + head.diagonal[2] + head.diagonal[3];
    };

    stage<D>(Q, q + ((G * q_heads + (q_heads > 1 ? first_head : 0)) * T + t0) * d, T - t0, d, 0);
    stage<D>(K, k + ((G * k_heads + (k_heads > 1 ? first_head : 0)) * T + t0) * d, T - t0, d, 0);
    fetch(0);
    copies_end();
    if (warp == 0) prepare(0);
    // Rows and columns past a group's triangle are never written again.
    for (int i = threadIdx.x; i < 8 * L; i += THREADS) {
        Head& head = shared_heads[i / (4 * L)];
        head.rectangle[i / L % 4][i % L] = head.column[i / L % 4][i % L] = 0.0f;
    }
    turn(0);
    const int group = warp % 4, row = 16 * group + g;
    char* const P_s = stages + items % 2 * STAGE;  // once all items have been read
    char* const room = stages + (items + 1) % 2 * STAGE + warp * (2 * OUT);  // rows on their way out
    float sum[D / 8][4] = {};  // dq or dk
    if (warp < 4) {
        float pairs[L / 8][4], P[L / 8][4] = {};
        multiply_pairs<D, true>(pairs, Q, K, group);
        for (int number = 0, item = 0; number < each; ++number) {
            if (number > 0) turn(item);
            Head& head = shared_heads[number % 2];
            const float* const sums = head.sums;
            const bool halved = sums[3 * L] != 0.0f;
            const float at_row[2] = {sums[row], sums[row + 8]}, rest[2] = {sums[L + row], sums[L + row + 8]};
            const float since[2] = {power(at_row[0] + rest[0], halved), power(at_row[1] + rest[1], halved)};
            const float once[2] = {since[0] * scale, since[1] * scale};
            float dP[L / 8][4] = {}, read[2] = {0.0f, 0.0f}, product = 0.0f;
            for (int tile = 0; tile < tiles; ++tile, ++item) {
                if (tile > 0) turn(item);
                if (warp == 0 && tile == tiles - 1) prepare(number + 1);
                char* const V = stages + item % 2 * STAGE;
                char* const Y = V + VALUES;
                char* const S = Y + VALUES;
                unsigned y[E / 16][4];
#pragma unroll
                for (int i = 0; i < E / 16; ++i) {
                    load_tiles(y[i], at<L>(Y, 16 * group + lane % 16, 2 * i + lane / 16));
#pragma unroll
                    for (int block = 0; block < L / 16; ++block) {
                        if (block <= group) {
                            unsigned b[4];
                            load_tiles(b, at<L>(V, 16 * block + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                            multiply_tiles(dP[2 * block], y[i], b[0], b[1]);
                            multiply_tiles(dP[2 * block + 1], y[i], b[2], b[3]);
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < D / 16; ++j) {  // 16 columns of S dy
                    float x[2][4] = {};
#pragma unroll
                    for (int i = 0; i < E / 16; ++i) {
                        unsigned b[4];
                        load_tiles(b, at<D>(S, 16 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                        multiply_tiles(x[0], y[i], b[0], b[1]);
                        multiply_tiles(x[1], y[i], b[2], b[3]);
                    }
                    times(x, once);
                    if (halved) times(x, since);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            const unsigned own = *reinterpret_cast<const unsigned*>(at<L>(Q, row + 8 * r, 2 * j + i) + 4 * t4);
                            read[r] += x[i][2 * r] * low(own) + x[i][2 * r + 1] * high(own);
                        }
#pragma unroll
                        for (int y = 0; y < 4; ++y) sum[2 * j + i][y] += x[i][y];
                    }
                }
                product += product_of_states<D>(S, S + STATE, warp);
            }

            // the head's own pairs
            float diagonal = 0.0f;
            const float of_n[2] = {NORMALISED ? head.of_n[row] : 0.0f, NORMALISED ? head.of_n[row + 8] : 0.0f};
            if (NORMALISED) {
                const float *const n = n_s[number % 2], *const r = r_s[number % 2];
                float by[2] = {once[0] * of_n[0], once[1] * of_n[1]};
                if (halved) by[0] *= since[0], by[1] *= since[1];
#pragma unroll
                for (int j = 0; j < D / 8; ++j) {
                    const float2 pair = *reinterpret_cast<const float2*>(n + 8 * j + 2 * t4);
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const unsigned own = *reinterpret_cast<const unsigned*>(at<L>(Q, row + 8 * x, j) + 4 * t4);
                        const float2 more = {by[x] * pair.x, by[x] * pair.y};
                        read[x] += more.x * low(own) + more.y * high(own);
                        sum[j][2 * x] += more.x, sum[j][2 * x + 1] += more.y;
                    }
                }
                for (int i = warp * (D / 4) + lane; i < (warp + 1) * (D / 4); i += 32) product += n[i] * r[i];
            }
            unsigned z[L / 16][4];
#pragma unroll
            for (int block = 0; block < L / 16; ++block) {
                if (block <= group) {
#pragma unroll
                    for (int tile = 0; tile < 2; ++tile) {
                        const int j = 2 * block + tile, s = 8 * j + 2 * t4;
                        const float2 to = *reinterpret_cast<const float2*>(sums + s), less = *reinterpret_cast<const float2*>(sums + 2 * L + s);
                        const float2 factor = *reinterpret_cast<const float2*>(head.gains + s);
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            const float by = power((at_row[x / 2] - (x % 2 ? to.y : to.x)) + (rest[x / 2] - (x % 2 ? less.y : less.x)), halved);
                            const int ahead = s + x % 2 - (row + 8 * (x / 2));
                            if (ahead == 0) diagonal += dP[j][x];
                            float p = (dP[j][x] + of_n[x / 2]) * (by * scale);
                            if (halved) p *= by;
                            p = ahead > 0 ? 0.0f : p;
                            P[j][x] += p * (x % 2 ? factor.y : factor.x);
                            dP[j][x] = p * pairs[j][x];
                        }
#pragma unroll
                        for (int x = 0; x < 2; ++x) {
                            const float whole = over_rows(dP[j][x] + dP[j][x + 2]);
                            if (g == 0) head.column[group][s + x] = whole;
                            z[block][2 * tile + x] = pack(dP[j][2 * x] * factor.x, dP[j][2 * x + 1] * factor.y);
                        }
                    }
                }
            }
            // times ones where s < r: of rows g and g + 8, and each r, sums of z over s < r
#pragma unroll
            for (int j = 0; j < L / 8; ++j) {
                if (j <= 2 * group + 1) {
                    float below[4] = {};
#pragma unroll
                    for (int block = 0; block <= j / 2; ++block) {
                        const int r = 8 * j + g, s = 16 * block + 2 * t4;
                        const auto ones = [r](int s) { return (s < r ? 0x3f80u : 0u) | (s + 1 < r ? 0x3f800000u : 0u); };
                        multiply_tiles(below, z[block], ones(s), ones(s + 8));
                    }
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const int r = 8 * j + 2 * t4 + x;
                        const float whole = over_rows((row >= r ? below[x] : 0.0f) + (row + 8 >= r ? below[x + 2] : 0.0f));
                        if (g == 0) head.rectangle[group][r] = whole;
                    }
                }
            }
            read[0] = over_columns(read[0]), read[1] = over_columns(read[1]);
            if (t4 == 0) head.from_state[row] = read[0], head.from_state[row + 8] = read[1];
            product = over_rows(over_columns(product)), diagonal = over_rows(over_columns(diagonal));
            if (lane == 0) head.kept[warp] = faded(sums, product), head.diagonal[warp] = diagonal;
        }
#pragma unroll
        for (int j = 0; j < L / 8; ++j) {
#pragma unroll
            for (int x = 0; x < 2; ++x) *reinterpret_cast<unsigned*>(at<L>(P_s, row + 8 * x, j) + 4 * t4) = pack(P[j][2 * x], P[j][2 * x + 1]);
        }
        meet_all();
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            if (block <= group) {
                const int j = 2 * block;
                const unsigned weights[4] = {pack(P[j][0], P[j][1]), pack(P[j][2], P[j][3]), pack(P[j + 1][0], P[j + 1][1]), pack(P[j + 1][2], P[j + 1][3])};
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    unsigned b[4];
                    load_tiles_turned(b, at<L>(K, 16 * block + lane % 16, 2 * i + lane / 16));
                    multiply_tiles(sum[2 * i], weights, b[0], b[1]);
                    multiply_tiles(sum[2 * i + 1], weights, b[2], b[3]);
                }
            }
        }
    } else {
        float pairs[L / 8][4];  // of keys and queries
        multiply_pairs<D, false>(pairs, K, Q, group);
        for (int number = 0, item = 0; number < each; ++number) {
            if (number > 0) turn(item);
            Head& head = shared_heads[number % 2];
            const float* const sums = head.sums;
            const bool halved = sums[3 * L] != 0.0f;
            const float at_row[2] = {sums[row], sums[row + 8]}, rest[2] = {sums[2 * L + row], sums[2 * L + row + 8]};
            const float all = sums[L - 1], all_rest = sums[3 * L + 1], skipped = skip ? skip[of_head(number)] : 0.0f;
            const float gains[2] = {head.gains[row], head.gains[row + 8]};
            float left[2];  // of a key at the end of the chunk, without its gain
#pragma unroll
            for (int x = 0; x < 2; ++x) left[x] = power(min((all - at_row[x]) + (all_rest - rest[x]), 127.0f), halved);
            unsigned weights[L / 16][4];  // the faded pairs, transposed
#pragma unroll
            for (int block = 0; block < L / 16; ++block) {
                if (block >= group) {
#pragma unroll
                    for (int tile = 0; tile < 2; ++tile) {
                        const int j = 2 * block + tile, t = 8 * j + 2 * t4;
                        const float2 from = *reinterpret_cast<const float2*>(sums + t), more = *reinterpret_cast<const float2*>(sums + L + t);
                        float m[4];
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            const float by = power(((x % 2 ? from.y : from.x) - at_row[x / 2]) + ((x % 2 ? more.y : more.x) - rest[x / 2]), halved);
                            m[x] = pairs[j][x] * (by * scale);
                            if (halved) m[x] *= by;
                            m[x] = t + x % 2 < row + 8 * (x / 2) ? 0.0f : m[x] * gains[x / 2];
                        }
                        weights[block][2 * tile] = pack(m[0], m[1]), weights[block][2 * tile + 1] = pack(m[2], m[3]);
                    }
                }
            }
            float written[2] = {0.0f, 0.0f}, product = 0.0f;
            for (int tile = 0; tile < tiles; ++tile, ++item) {
                if (tile > 0) turn(item);
                if (warp == 7 && tile == 0 && number > 0) finish(number - 1);
                char* const V = stages + item % 2 * STAGE;
                char* const Y = V + VALUES;
                char* const R = Y + VALUES + STATE;
                unsigned values[E / 16][4];
#pragma unroll
                for (int i = 0; i < E / 16; ++i) load_tiles(values[i], at<L>(V, 16 * group + lane % 16, 2 * i + lane / 16));
#pragma unroll
                for (int j = 0; j < D / 16; ++j) {  // 16 columns of R v
                    float x[2][4] = {};
#pragma unroll
                    for (int i = 0; i < E / 16; ++i) {
                        unsigned b[4];
                        load_tiles(b, at<D>(R, 16 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                        multiply_tiles(x[0], values[i], b[0], b[1]);
                        multiply_tiles(x[1], values[i], b[2], b[3]);
                    }
                    times(x, left);
                    if (halved) times(x, left);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            const unsigned own = *reinterpret_cast<const unsigned*>(at<L>(K, row + 8 * r, 2 * j + i) + 4 * t4);
                            written[r] += x[i][2 * r] * low(own) + x[i][2 * r + 1] * high(own);
                        }
#pragma unroll
                        for (int y = 0; y < 4; ++y) sum[2 * j + i][y] += x[i][y] * gains[y / 2];
                    }
                }
                float o[E / 8][4] = {};  // dv
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    unsigned a[4];
                    load_tiles(a, at<L>(K, 16 * group + lane % 16, 2 * i + lane / 16));
#pragma unroll
                    for (int j = 0; j < E / 16; ++j) {
                        unsigned b[4];
                        load_tiles_turned(b, at<D>(R, 16 * i + lane % 16, 2 * j + lane / 16));
                        multiply_tiles(o[2 * j], a, b[0], b[1]);
                        multiply_tiles(o[2 * j + 1], a, b[2], b[3]);
                    }
                }
                times(o, left);
                if (halved) times(o, left);
                times(o, gains);
#pragma unroll
                for (int block = 0; block < L / 16; ++block) {
                    if (block >= group) {
#pragma unroll
                        for (int j = 0; j < E / 16; ++j) {
                            unsigned b[4];
                            load_tiles_turned(b, at<L>(Y, 16 * block + lane % 16, 2 * j + lane / 16));
                            multiply_tiles(o[2 * j], weights[block], b[0], b[1]);
                            multiply_tiles(o[2 * j + 1], weights[block], b[2], b[3]);
                        }
                    }
                }
                if (skip) {
#pragma unroll
                    for (int j = 0; j < E / 8; ++j) {
#pragma unroll
                        for (int x = 0; x < 2; ++x) {
                            const unsigned own = *reinterpret_cast<const unsigned*>(at<L>(Y, row + 8 * x, j) + 4 * t4);
                            o[j][2 * x] += skipped * low(own), o[j][2 * x + 1] += skipped * high(own);
                        }
                    }
                }
                const i64 t = t0 + 16 * group;
                store_rows(stages + 2 * STAGE + group * OUT, o, dv + (of_head(number) * T + t) * e, T - t, e, tile * E);
                product += product_of_states<D>(R - STATE, R, warp);
            }
            if (NORMALISED) {
                const float* const r = r_s[number % 2];
                float by[2] = {left[0], left[1]};
                if (halved) by[0] *= left[0], by[1] *= left[1];
#pragma unroll
                for (int j = 0; j < D / 8; ++j) {
                    const float2 pair = *reinterpret_cast<const float2*>(r + 8 * j + 2 * t4);
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const unsigned own = *reinterpret_cast<const unsigned*>(at<L>(K, row + 8 * x, j) + 4 * t4);
                        const float2 more = {by[x] * pair.x, by[x] * pair.y};
                        written[x] += more.x * low(own) + more.y * high(own);
                        sum[j][2 * x] += more.x * gains[x], sum[j][2 * x + 1] += more.y * gains[x];
                    }
                }
            }
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float whole = over_columns(written[x]);
                if (t4 == 0) head.to_dgain[row + 8 * x] = whole, head.to_state[row + 8 * x] = whole * gains[x];
            }
            product = over_rows(over_columns(product));
            if (lane == 0) head.kept[warp] = faded(sums, product);
        }
        meet_all();
        if (warp == 7) finish(each - 1);
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            if (block >= group) {
                unsigned weights[4];
                load_tiles_turned(weights, at<L>(P_s, 16 * block + lane / 16 * 8 + lane % 8, 2 * group + lane / 8 % 2));
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    unsigned b[4];
                    load_tiles_turned(b, at<L>(Q, 16 * block + lane % 16, 2 * i + lane / 16));
                    multiply_tiles(sum[2 * i], weights, b[0], b[1]);
                    multiply_tiles(sum[2 * i + 1], weights, b[2], b[3]);
                }
            }
        }
    }
    const i64 t = t0 + 16 * group;
    __nv_bfloat16* const to = (warp < 4 ? dq : dk) + (unit * T + t) * d;
#pragma unroll
    for (int half = 0; half < D / 64; ++half) {
        float tiles_of_half[8][4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int x = 0; x < 4; ++x) tiles_of_half[j][x] = sum[8 * half + j][x];
        }
        store_rows(room + half * OUT, tiles_of_half, to, T - t, d, 64 * half);
    }
}

// Rows of every head, (G, heads, size), summed over the heads: in float32, 8 neighbours a thread.
__global__ void __launch_bounds__(THREADS)
sum_heads(const __nv_bfloat16* x, float* y, i64 G, int heads, i64 size) {
    const i64 at = (i64(blockIdx.x) * THREADS + threadIdx.x) * 8;
    if (at >= G * size) return;
    const __nv_bfloat16* from = x + at / size * heads * size + at % size;
    float sums[8] = {};
    for (int h = 0; h < heads; ++h, from += size) {
        const uint4 word = *reinterpret_cast<const uint4*>(from);
        const unsigned pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[2 * i] += low(pairs[i]), sums[2 * i + 1] += high(pairs[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) *reinterpret_cast<float2*>(y + at + i) = float2{sums[i], sums[i + 1]};
}
