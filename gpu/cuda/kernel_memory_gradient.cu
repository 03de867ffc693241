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
// summed in registers, so that dq and dk are written once. Eight warps have queries, 16 rows of each two: half the columns of dq each, and
// every second block of 16 keys of M and P. Eight have keys: half the columns of dk and of dv. M goes from the former to the latter
// through shared memory, made while the head before is at work. `memory_told` says first what the decays of a chunk make of its steps,
// `memory_decays` last puts the parts of dw together, each a warp for a chunk.
// What limits it: instructions, of which a third are addresses and what registers do not hold, and with 4 warps a scheduler their latency.
#include "block_memory.cuh"

constexpr int STAGES = 3;  // of memory_states
constexpr int OUT = 16 * 128;  // bytes of a warp's 16 rows on their way out

// 16 rows of 8 N numbers that a warp has as tiles of results, to `rows` rows of a matrix, in whole runs of 16 bytes.
// Piece p of row r stands in place p ^ r % 8, of 4 pieces in place p ^ r / 2 % 4.
template <int N>
__device__ __forceinline__ void store_rows(char* room, const float (&tiles)[N][4], __nv_bfloat16* to, i64 rows, int width, int column) {
    constexpr int ROW = 16 * N, STEP = 32 / N;  // bytes of a row, rows that a warp writes at once
    const int lane = fresh(threadIdx.x) % 32, g = lane / 4, r = lane / N, p = lane % N;
    const int own = g * ROW + ((N == 8 ? g : g / 2) << 4) + 4 * (lane % 4), out = r * ROW + ((N == 8 ? p ^ r : p ^ r / 2) << 4);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int x = 0; x < 2; ++x)
            *reinterpret_cast<unsigned*>(room + (own ^ 16 * j) + 8 * x * ROW) = pack(tiles[j][2 * x], tiles[j][2 * x + 1]);
    }
    __syncwarp();
    if (column + 8 * p < width) {
        to += i64(r) * width + column + 8 * p;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const int place = N == 8 ? out ^ i % 2 * 64 : out;
            if (r + STEP * i < rows) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(room + place + i * STEP * ROW);
            to += STEP * width;
        }
    }
}

// Of a chunk of a head: sums of its decays, their rests with a query's factor and without a key's, what fades a query's read of S (with c) and
// what a key leaves at the end, the keys' factors, what queries add to P, and the decay of all steps. Exponents are at most 127.
struct alignas(16) Told {
    float sums[L], rows[L], columns[L], since[L], left[L], gains[L], of_n[L], all[4];
};
// One warp for each chunk of each head. w and gain (G, w_heads, T), of_query (the f) and of_n (G, heads, T), or null; told (G heads, chunks).
__global__ void __launch_bounds__(THREADS)
memory_told(const float* w, const float* gain, const float* of_query, const float* of_n, Told* told, i64 T, i64 count, int chunks, int heads,
            int w_heads, float scale) {
    const i64 at = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (at >= count) return;
    const int lane = threadIdx.x % 32;
    const i64 of_head = at / chunks, t0 = at % chunks * L, of = (of_head / heads * w_heads + (w_heads > 1 ? of_head % heads : 0)) * T;
    const Decays x = load_decays(w ? w + of : nullptr, gain ? gain + of : nullptr, of_query ? of_query + of_head * T : nullptr, t0, T);
    const double first = max(x.w[0], -4096.0f), both = first + max(x.w[1], -4096.0f);
    double upto = both;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const double before = __shfl_up_sync(0xffffffffu, upto, away);
        upto += lane >= away ? before : 0.0;
    }
    const double unit = 1.44269504088896341, of_step[2] = {(upto - both + first) * unit, upto * unit};
    const double all = __shfl_sync(0xffffffffu, upto, 31) * unit;
    Told& to = told[at];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int s = 2 * lane + i;
        const float sum = float(of_step[i]), rest = float(of_step[i] - double(sum)), row = rest + x.of_query[i] * LOG2E;
        to.sums[s] = sum, to.rows[s] = row, to.columns[s] = rest;
        to.since[s] = power(min(sum + row, 127.0f), false) * scale;
        to.left[s] = power(min(float(all - of_step[i]), 127.0f), false);
        to.gains[s] = exp2_fast(x.of_key[i] * LOG2E);
        to.of_n[s] = of_n && t0 + s < T ? of_n[of_head * T + t0 + s] : 0.0f;
    }
    if (lane < 4) to.all[lane] = power(min(float(all), 127.0f), false);
}

// keys (G, key_heads, T, d), values (G, value_heads, T, e), backwards queries and dy; told (G heads, chunks); state and last (G, heads, d, e),
// norm and last_norm (G, heads, d), or null; states (G heads, chunks, d, e), norms (G heads, chunks, d). NORMALISED is backwards: of n too, where
// each query adds `of_n`. Grid: (G heads, tiles of 64 values).
template <int D, bool NORMALISED>
__global__ void __launch_bounds__(THREADS, 2)
memory_states(const __nv_bfloat16* keys, const __nv_bfloat16* values, const Told* all_told, const float* state, const float* norm,
              __nv_bfloat16* states, float* norms, float* last, float* last_norm, i64 T, int d, int e, int heads, int key_heads, int value_heads,
              int backwards) {
    constexpr int ROWS = L * D * 2, VALUES = L * E * 2, STAGE = ROWS + VALUES, COLUMNS = E * D / 128, TILES = COLUMNS / 8;
    extern __shared__ __align__(128) double memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    __shared__ Told told[STAGES];
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const i64 of_head = blockIdx.x, G = of_head / heads, h = of_head % heads;
    const int column = int(blockIdx.y) * E, row = warp % (D / 16) * 16, own = warp / (D / 16) * COLUMNS, chunks = int((T + L - 1) / L);
    char* const room = shared + STAGES * STAGE + warp * OUT;
    keys += (G * key_heads + (key_heads > 1 ? h : 0)) * T * d;
    values += (G * value_heads + (value_heads > 1 ? h : 0)) * T * e;

    const auto chunk = [&](int c) { return backwards ? chunks - 1 - c : c; };
    const auto fetch = [&](int c) {
        if (c < chunks) {
            char* const tiles = shared + c % STAGES * STAGE;
            const i64 t0 = i64(chunk(c)) * L;
            stage<D>(tiles, keys + t0 * d, T - t0, d, 0);
            stage<E>(tiles + ROWS, values + t0 * e, T - t0, e, column);
            if (threadIdx.x < sizeof(Told) / 16)
                copy16(reinterpret_cast<char*>(&told[c % STAGES]) + 16 * threadIdx.x,
                       reinterpret_cast<const char*>(all_told + of_head * chunks + chunk(c)) + 16 * threadIdx.x);
        }
        copies_end();
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
    for (int c = 0; c < chunks; ++c) {
        copies_wait<STAGES - 2>();
        meet_all();
        fetch(c + STAGES - 1);
        const i64 kept = (of_head * chunks + chunk(c)) * d + row;
        store_rows(room, S, states + kept * e, d - row, e, column + own);
        if (NORMALISED) {
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float whole = over_columns(n[x]);
                if (t4 == 0 && blockIdx.y == 0 && own == 0 && row + g + 8 * x < d) norms[kept + g + 8 * x] = whole;
            }
        }
        const Place K = (place(shared) + c % STAGES * STAGE + row / 64 * PANEL + along(lane)) ^ row % 64 * 2;
        const Place V = (place(shared) + c % STAGES * STAGE + ROWS + across(lane)) ^ own * 2;
        const Told& head = told[c % STAGES];
        const float fade[2] = {head.all[0], head.all[0]};
        times(S, fade);
        n[0] *= fade[0], n[1] *= fade[0];
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            unsigned a[4];
            load_tiles_turned(a, K + block * BLOCK);
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const int s = 16 * block + 8 * x + 2 * t4;
                float2 by = *reinterpret_cast<const float2*>((backwards ? head.since : head.left) + s);
                if (!backwards) by.x *= head.gains[s], by.y *= head.gains[s + 1];
#pragma unroll
                for (int y = 0; y < 2; ++y) {
                    const float k0 = low(a[2 * x + y]) * by.x, k1 = high(a[2 * x + y]) * by.y;
                    if (NORMALISED) n[y] += k0 * head.of_n[s] + k1 * head.of_n[s + 1];
                    a[2 * x + y] = pack(k0, k1);
                }
            }
#pragma unroll
            for (int j = 0; j < TILES / 2; ++j) {
                unsigned b[4];
                load_tiles_turned(b, (V ^ 32 * j) + block * BLOCK);
                multiply_tiles(S[2 * j], a, b[0], b[1]);
                multiply_tiles(S[2 * j + 1], a, b[2], b[3]);
            }
        }
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

// What its pairs and states are worth, in parts: column sums of z of 16 queries, what dw_r gets of 16 queries' own steps, and so on.
struct alignas(16) Found {
    float column[4][L], corner[8][16], from_state[2][L], to_state[2][L], kept[16], diagonal[8];
};
constexpr int WARPS = 16, CROWD = 32 * WARPS;

// One warp: sums of 64 numbers, two a lane, from each on, or of those before each.
__device__ __forceinline__ float2 sums_from(float2 x) {
    const int lane = threadIdx.x % 32;
    float from = x.x + x.y;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const float more = __shfl_sync(0xffffffffu, from, min(lane + away, 31));
        from += lane + away < 32 ? more : 0.0f;
    }
    const float later = __shfl_sync(0xffffffffu, from, min(lane + 1, 31)), second = x.y + (lane < 31 ? later : 0.0f);
    return float2{x.x + second, second};
}
__device__ __forceinline__ float2 sums_before(float2 x) {
    const int lane = threadIdx.x % 32;
    float upto = x.x + x.y;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const float more = __shfl_up_sync(0xffffffffu, upto, away);
        upto += lane >= away ? more : 0.0f;
    }
    const float last = __shfl_up_sync(0xffffffffu, upto, 1), before = lane > 0 ? last : 0.0f;
    return float2{before, before + x.x};
}

// One warp for each chunk of each head: what `memory_gradient` found, put together. dw, dgain (G heads, T), dskip (G heads, chunks) or null.
__global__ void __launch_bounds__(THREADS)
memory_decays(const Told* told, const Found* found, float* dw, float* dgain, float* dskip, i64 T, i64 count, int chunks, float scale) {
    const i64 at = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (at >= count) return;
    const Found& of = found[at];
    const float* const gains = told[at].gains;
    const int lane = threadIdx.x % 32, r = 2 * lane;
    const float2 gain = {gains[r], gains[r + 1]};
    float product = 0.0f;
#pragma unroll
    for (int x = 0; x < WARPS; ++x) product += of.kept[x];
    const float2 written = {of.to_state[0][r] + of.to_state[1][r], of.to_state[0][r + 1] + of.to_state[1][r + 1]};
    const float2 from = sums_from(float2{of.from_state[0][r] + of.from_state[1][r], of.from_state[0][r + 1] + of.from_state[1][r + 1]});
    const float2 before = sums_before(float2{written.x * gain.x, written.y * gain.y});
    float2 column = {of.column[0][r], of.column[0][r + 1]};
    float2 rectangle = {of.corner[r / 16][r % 16] + of.corner[r / 16 + 4][r % 16], of.corner[r / 16][r % 16 + 1] + of.corner[r / 16 + 4][r % 16 + 1]};
#pragma unroll
    for (int i = 1; i < 4; ++i) {  // queries of group i, where they are later than r by far
        const float2 of_group = {of.column[i][r], of.column[i][r + 1]};
        column.x += of_group.x, column.y += of_group.y;
        const float2 more = sums_before(float2{of_group.x * (gain.x * scale), of_group.y * (gain.y * scale)});
        if (r < 16 * i) rectangle.x += more.x, rectangle.y += more.y;
    }
    const i64 t = at % chunks * L + r, to = at / chunks * T + t;
    if (t < T) dw[to] = rectangle.x + (from.x + before.x) + product, dgain[to] = column.x * scale + written.x;
    if (t + 1 < T) dw[to + 1] = rectangle.y + (from.y + before.y) + product, dgain[to + 1] = column.y * scale + written.y;
    if (dskip && lane == 0) {
        float sum = 0.0f;
#pragma unroll
        for (int x = 0; x < 8; ++x) sum += of.diagonal[x];
        dskip[at] = sum;
    }
}

// Sums over the eight rows of a result's lanes, of two tiles' columns (2 t4 and 2 t4 + 1 of each): a lane gets that of tile lane / 16, column
// lane / 8 % 2.
__device__ __forceinline__ float over_rows_of_four(const float (&x)[4]) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[2], 16);
    const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(0xffffffffu, upper ? x[1] : x[3], 16);
    const float c = (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 8);
    return c + __shfl_xor_sync(0xffffffffu, c, 4);
}

// What a warp's share of S and R is worth together: of 16 of its rows at a time, the diagonals of products of the upper and the lower eight.
template <int D> __device__ __forceinline__ float product_of_states(Place S, Place R, int warp) {
    const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4;
    float x[2][4] = {};
#pragma unroll
    for (int i = 0; i < D / 64; ++i) {
        const int tile = warp * (D / 64) + i;
        unsigned a[4], b[4];
        load_tiles(a, (S + tile / 4 * BLOCK + across(lane)) ^ tile % 4 * 32);
        load_tiles(b, (R + tile / 4 * BLOCK + along(lane)) ^ tile % 4 * 32);
        multiply_tiles(x[0], a, b[0], b[1]);
        multiply_tiles(x[1], a, b[2], b[3]);
    }
    return g / 2 == t4 ? (g % 2 ? x[0][1] + x[1][3] : x[0][0] + x[1][2]) : 0.0f;
}

// 8 N columns of a state (64 of whose numbers a row has), of which `state` is the first's place, times 16 rows of 64 numbers, `a`; their
// products with the same columns of rows of q or k, which lie at `own`, are added to `dot`, and themselves, faded, to `sum`.
template <int N>
__device__ __forceinline__ void through(float (&sum)[N][4], float (&dot)[2], const unsigned (&a)[E / 16][4], Place state, Place own,
                                        const float (&faded)[2]) {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
        float x[2][4] = {};
        unsigned at_own[4];
#pragma unroll
        for (int i = 0; i < E / 16; ++i) {
            unsigned b[4];
            load_tiles(b, (state ^ 32 * i) + j * BLOCK);
            multiply_tiles(x[0], a[i], b[0], b[1]);
            multiply_tiles(x[1], a[i], b[2], b[3]);
        }
        load_tiles(at_own, own ^ 32 * j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                dot[r] = fmaf(x[i][2 * r], low(at_own[2 * i + r]), dot[r]);
                dot[r] = fmaf(x[i][2 * r + 1], high(at_own[2 * i + r]), dot[r]);
            }
#pragma unroll
            for (int y = 0; y < 4; ++y) sum[2 * j + i][y] = fmaf(x[i][y], faded[y / 2], sum[2 * j + i][y]);
        }
    }
}

// The same with n of each row, which `worth` multiplies.
template <int N>
__device__ __forceinline__ void through_norm(float (&sum)[N][4], float (&dot)[2], const float (&worth)[2], const float* n, int first, int d,
                                             char* X, int row, const float (&faded)[2]) {
    const int t4 = fresh(threadIdx.x) % 4;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const int at_n = first + 8 * j + 2 * t4;
        const float2 pair = at_n < d ? *reinterpret_cast<const float2*>(n + at_n) : float2{0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const unsigned own = *reinterpret_cast<const unsigned*>(at<L>(X, row + 8 * r, first / 8 + j) + 4 * t4);
            const float2 more = {worth[r] * pair.x, worth[r] * pair.y};
            dot[r] += more.x * low(own) + more.y * high(own);
            sum[j][2 * r] += more.x * faded[r], sum[j][2 * r + 1] += more.y * faded[r];
        }
    }
}

// q, k, v as above; dy (G, heads, T, e); what `memory_told` told; S, R (G heads, chunks, d, e), of n too, ns and rs (G heads, chunks, d);
// skip (G, heads). dq and dk (G, heads or 1, T, d), dv (G, heads, T, e); found (G heads, chunks).
// Grid: G chunks if heads are TOGETHER, which share q and k, else G heads chunks.
constexpr int ALONE = 0, TOGETHER = 1, WITH_NORM = 2;
template <int D, int KIND>
__global__ void __launch_bounds__(CROWD, 1)
memory_gradient(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* dy, const Told* all_told,
                const __nv_bfloat16* states, const __nv_bfloat16* adjoints, const float* ns, const float* rs, const float* skip, __nv_bfloat16* dq,
                __nv_bfloat16* dk, __nv_bfloat16* dv, Found* all_found, i64 T, int d, int e, int heads, int q_heads, int k_heads, int v_heads,
                float scale) {
    constexpr bool SHARED = KIND == TOGETHER, NORMALISED = KIND == WITH_NORM;
    constexpr int ROWS = L * D * 2, VALUES = L * E * 2, STATE = D * E * 2, STAGE = 2 * VALUES + 2 * STATE, PAIRS = L * L * 2;
    extern __shared__ __align__(128) double memory[];
    __shared__ Told told[3];
    __shared__ Found found[2];
    char* const Q = reinterpret_cast<char*>(memory);
    char* const K = Q + ROWS;
    const Place at_Q = place(Q), at_K = at_Q + ROWS, at_stages = at_K + ROWS, at_M = at_stages + 2 * STAGE;
    char* const stages = K + ROWS;
    char* const M_s = stages + 2 * STAGE;  // of two heads
    char* const dv_s = M_s + 2 * PAIRS;
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int chunks = int((T + L - 1) / L), c = blockIdx.x % chunks;
    const int tiles = (e + E - 1) / E, each = SHARED ? heads : 1, items = each * tiles;
    const i64 unit = blockIdx.x / chunks, G = SHARED ? unit : unit / heads, t0 = i64(c) * L;
    const int first_head = SHARED ? 0 : int(unit % heads);
    const auto of_head = [&](int number) { return G * heads + first_head + number; };

    stage<D, CROWD>(Q, q + ((G * q_heads + (q_heads > 1 ? first_head : 0)) * T + t0) * d, T - t0, d, 0);
    stage<D, CROWD>(K, k + ((G * k_heads + (k_heads > 1 ? first_head : 0)) * T + t0) * d, T - t0, d, 0);
    for (int i = threadIdx.x; i < 8 * L; i += CROWD) found[i / (4 * L)].column[i / L % 4][i % L] = 0.0f;  // past a group's triangle
    const int group = warp % 4, half = warp / 4 % 2, row = 16 * group + g, first = half * (D / 2);
    char* const P_s = stages + items % 2 * STAGE;  // once all items have been read
    const Place at_P = at_stages + items % 2 * STAGE;
    // The place of a half's columns of q and k.
    const auto of_half = [half](Place x) { return D == 128 ? x + half * PANEL : x ^ half * 64; };
    float sum[D / 16][4] = {};  // half the columns of dq or dk

    if (warp < 8) {
        copies_end();
        copies_wait<0>();
        meet_all();
        // Of the blocks of 16 keys that are not later than its queries a warp has every second one.
        float P[4][4] = {}, dP[4][4] = {}, read[2] = {0.0f, 0.0f}, product = 0.0f, diagonal = 0.0f;
        unsigned pairs[4][2], by[4][2];  // rounded: two neighbours in one
#pragma unroll
        for (int own = 0; own < 2; ++own) {
            const int block = 2 * own + half;
            if (block <= group) {
                const Place rows = at_Q + group * BLOCK + across(lane), columns = at_K + block * BLOCK + along(lane);
                float x[2][4] = {};
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    unsigned a[4], b[4];
                    load_tiles(a, (rows ^ i % 4 * 32) + i / 4 * PANEL);
                    load_tiles(b, (columns ^ i % 4 * 32) + i / 4 * PANEL);
                    multiply_tiles(x[0], a, b[0], b[1]);
                    multiply_tiles(x[1], a, b[2], b[3]);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) pairs[2 * own + i / 2][i % 2] = pack(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
            }
        }
        const auto fade = [&](int number) {  // how a head's pairs fade, and M
            const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4, row = 16 * group + g;
            const Told& head = told[number % 3];
            const float at_row[2] = {head.sums[row], head.sums[row + 8]}, rest[2] = {head.rows[row], head.rows[row + 8]};
            char* const M = M_s + number % 2 * PAIRS;
            const int own = (row * 128 + 4 * t4 + (g << 4)) ^ half * 32;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int block = j / 2 * 2 + half, s = 16 * block + j % 2 * 8 + 2 * t4;
                if (block <= group) {
                    const float2 to = *reinterpret_cast<const float2*>(head.sums + s), less = *reinterpret_cast<const float2*>(head.columns + s);
                    const float2 gain = *reinterpret_cast<const float2*>(head.gains + s);
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        float faded[2];
#pragma unroll
                        for (int y = 0; y < 2; ++y) {
                            faded[y] = exp2_fast(min((at_row[x] - (y ? to.y : to.x)) + (rest[x] - (y ? less.y : less.x)), 127.0f));
                            if (block == group && s + y > row + 8 * x) faded[y] = 0.0f;
                        }
                        by[j][x] = pack(faded[0], faded[1]);
                        const float m[2] = {low(pairs[j][x]) * faded[0] * (scale * gain.x), high(pairs[j][x]) * faded[1] * (scale * gain.y)};
                        *reinterpret_cast<unsigned*>(M + (own ^ (j / 2 * 64 + j % 2 * 16)) + x * (BLOCK / 2)) = pack(m[0], m[1]);
                    }
                }
            }
        };
        const auto look = [&](int item, const Told& head) {  // at a tile
            const Place V = at_stages + item % 2 * STAGE, Y = V + VALUES, S = Y + VALUES;
            const int lane = fresh(threadIdx.x) % 32, row = 16 * group + lane / 4, to_right = along(lane), to_left = across(lane);
            const Place rows = Y + group * BLOCK + to_left, columns = V + half * BLOCK + to_right;
            const float since[2] = {head.since[row], head.since[row + 8]};
            unsigned y[E / 16][4];
#pragma unroll
            for (int i = 0; i < E / 16; ++i) load_tiles(y[i], rows ^ 32 * i);
            through(sum, read, y, S + half * (STATE / 2) + to_right, of_half(at_Q + group * BLOCK + to_left), since);
#pragma unroll
            for (int own = 0; own < 2; ++own) {
                if (2 * own + half <= group) {
#pragma unroll
                    for (int i = 0; i < E / 16; ++i) {
                        unsigned b[4];
                        load_tiles(b, (columns ^ 32 * i) + 2 * own * BLOCK);
                        multiply_tiles(dP[2 * own], y[i], b[0], b[1]);
                        multiply_tiles(dP[2 * own + 1], y[i], b[2], b[3]);
                    }
                }
            }
            product += product_of_states<D>(S, S + STATE, warp);
        };
        // What the pairs are worth, z, and P of it; `more` than what was found before. `corner`: of r within this group's steps, sums over s < r <= t.
        const auto weigh = [&](int number, bool more) {
            const Told& head = told[number % 3];
            Found& of = found[number % 2];
            const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4, row = 16 * group + g;
            const float of_rows[2] = {NORMALISED ? head.of_n[row] : 0.0f, NORMALISED ? head.of_n[row + 8] : 0.0f};
            float corner[2][4] = {};
#pragma unroll
            for (int mine = 0; mine < 2; ++mine) {
                const int block = 2 * mine + half;
                if (block <= group) {
                    if (skip && block == group) {
#pragma unroll
                        for (int x = 0; x < 8; ++x) diagonal += x / 4 * 8 + 2 * t4 + x % 2 == g + x % 4 / 2 * 8 ? dP[2 * mine + x / 4][x % 4] : 0.0f;
                    }
                    unsigned z[4];
                    float columns[4];
#pragma unroll
                    for (int part = 0; part < 2; ++part) {
                        const int j = 2 * mine + part, s = 16 * block + 8 * part + 2 * t4;
                        const float2 gain = *reinterpret_cast<const float2*>(head.gains + s);
                        const float factor[2] = {gain.x * scale, gain.y * scale};
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            const float faded = x % 2 ? high(by[j][x / 2]) : low(by[j][x / 2]);
                            const float pair = x % 2 ? high(pairs[j][x / 2]) : low(pairs[j][x / 2]);
                            const float p = (NORMALISED ? dP[j][x] + of_rows[x / 2] : dP[j][x]) * faded;
                            P[j][x] = SHARED ? fmaf(p, factor[x % 2], P[j][x]) : p * factor[x % 2];
                            dP[j][x] = p * pair;
                        }
#pragma unroll
                        for (int x = 0; x < 2; ++x) {
                            columns[2 * part + x] = dP[j][x] + dP[j][x + 2];
                            z[2 * part + x] = pack(dP[j][2 * x] * factor[0], dP[j][2 * x + 1] * factor[1]);
                        }
                    }
                    const float whole_column = over_rows_of_four(columns);
                    float& to_column = of.column[group][16 * block + lane / 16 * 8 + 2 * t4 + lane / 8 % 2];
                    if (lane % 8 < 4) to_column = whole_column + (more ? to_column : 0.0f);
#pragma unroll
                    for (int part = 0; part < 2; ++part) {  // times ones where s < r
                        const int r = 16 * group + 8 * part + g, s = 16 * block + 2 * t4;
                        const auto ones = [r](int s) { return (s < r ? 0x3f80u : 0u) | (s + 1 < r ? 0x3f800000u : 0u); };
                        multiply_tiles(corner[part], z, ones(s), ones(s + 8));
                    }
                }
            }
            float later[4];
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                const int r = x / 2 * 8 + 2 * t4 + x % 2;
                later[x] = (g >= r ? corner[x / 2][x % 2] : 0.0f) + (g + 8 >= r ? corner[x / 2][x % 2 + 2] : 0.0f);
            }
            const float whole_corner = over_rows_of_four(later);
            float& to_corner = of.corner[warp][lane / 16 * 8 + 2 * t4 + lane / 8 % 2];
            if (lane % 8 < 4) to_corner = whole_corner + (more ? to_corner : 0.0f);
        };
        const auto conclude = [&](int number) {
            const Told& head = told[number % 3];
            Found& of = found[number % 2];
            const int lane = fresh(threadIdx.x) % 32, t4 = lane % 4, row = 16 * group + lane / 4;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float whole = over_columns(read[x]) * head.since[row + 8 * x];
                if (t4 == 0) of.from_state[half][row + 8 * x] = whole;
            }
            product = over_rows(over_columns(product)) * head.all[0];
            if (skip) diagonal = over_rows(over_columns(diagonal));
            if (lane == 0) of.kept[warp] = product, of.diagonal[warp] = diagonal;
        };
        fade(0);
        meet_all();
        if (SHARED) {
            for (int item = 0, number = 0, tile = 0; item < items; ++item) {
                if (item > 0) meet_all();
                look(item, told[number % 3]);
                weigh(number, tile > 0);  // each tile is worth something by itself
#pragma unroll
                for (int x = 0; x < 16; ++x) dP[x / 4][x % 4] = 0.0f;
                if (++tile < tiles) continue;
                conclude(number);
                read[0] = read[1] = product = diagonal = 0.0f;
                tile = 0;
                if (++number < each) fade(number);
            }
        } else {
            for (int item = 0; item < items; ++item) {
                if (item > 0) meet_all();
                look(item, told[0]);
            }
            if (NORMALISED) {
                const i64 at_norm = (of_head(0) * chunks + c) * d;
                const float of_rows[2] = {told[0].of_n[row], told[0].of_n[row + 8]}, since[2] = {told[0].since[row], told[0].since[row + 8]};
                through_norm(sum, read, of_rows, ns + at_norm, first, d, Q, row, since);
                for (int i = 16 * warp + lane; i < min(d, 16 * (warp + 1)); i += 32) product += ns[at_norm + i] * rs[at_norm + i];
            }
            weigh(0, false);
            conclude(0);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int block = j / 2 * 2 + half;
#pragma unroll
            for (int x = 0; x < 2; ++x)
                *reinterpret_cast<unsigned*>(at<L>(P_s, row + 8 * x, 2 * block + j % 2) + 4 * t4) = pack(P[j][2 * x], P[j][2 * x + 1]);
        }
        meet_all();
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            if (block <= group) {
                unsigned a[4];
                load_tiles(a, (at_P + group * BLOCK + across(lane)) ^ 32 * block);
#pragma unroll
                for (int i = 0; i < D / 32; ++i) {
                    unsigned b[4];
                    load_tiles_turned(b, (of_half(at_K + across(lane)) ^ 32 * i) + block * BLOCK);
                    multiply_tiles(sum[2 * i], a, b[0], b[1]);
                    multiply_tiles(sum[2 * i + 1], a, b[2], b[3]);
                }
            }
        }
    } else {
        // They also ask for what is next, and hand on what was found: a thread has 8 numbers of two rows of v and dy, of two or four of S and R.
        const int thread = threadIdx.x - CROWD / 2;
        const i64 own_values = (t0 + thread / 8) * e + thread % 8 * 8, own_state = ((of_head(0) * chunks + c) * d + thread / 8) * e + thread % 8 * 8;
        const i64 head_values = T * e, head_states = i64(chunks) * d * e;
        const __nv_bfloat16* next_v = v + (v_heads > 1 ? of_head(0) : G) * head_values + own_values;
        const __nv_bfloat16* next_y = dy + of_head(0) * head_values + own_values;
        const __nv_bfloat16 *next_S = states + own_state, *next_R = adjoints + own_state;
        char* const own_stage = stages + thread / 8 * 128 + ((thread ^ thread / 8) % 8 << 4);
        const auto tell = [&](int number) {
            constexpr int PIECES = sizeof(Told) / 16;
            if (number < each && thread < PIECES) {
                const char* const from = reinterpret_cast<const char*>(all_told + of_head(number) * chunks + c);
                copy16(reinterpret_cast<char*>(&told[number % 3]) + 16 * thread, from + 16 * thread);
            }
        };
        const auto fetch = [&](int item, int number, int tile) {  // the next item, if there is one
            if (item < items) {
                char* const to = own_stage + item % 2 * STAGE;
                if (t0 + L <= T && d == D && tile * E + E <= e) {
#pragma unroll
                    for (int i = 0; i < L; i += 32) copy16(to + i * 128, next_v + i * e), copy16(to + VALUES + i * 128, next_y + i * e);
#pragma unroll
                    for (int i = 0; i < D; i += 32) {
                        copy16(to + 2 * VALUES + i * 128, next_S + i * e);
                        copy16(to + 2 * VALUES + STATE + i * 128, next_R + i * e);
                    }
                } else {
                    const bool in_row = tile * E + thread % 8 * 8 < e;
#pragma unroll 1
                    for (int i = 0; i < D; i += 32) {
                        const int r = thread / 8 + i;
                        if (i < L) {
                            copy16(to + i * 128, next_v + i * e, in_row && t0 + r < T);
                            copy16(to + VALUES + i * 128, next_y + i * e, in_row && t0 + r < T);
                        }
                        copy16(to + 2 * VALUES + i * 128, next_S + i * e, in_row && r < d);
                        copy16(to + 2 * VALUES + STATE + i * 128, next_R + i * e, in_row && r < d);
                    }
                }
                if (tile == 0) tell(number + 1);
                const bool to_head = tile + 1 == tiles;
                const i64 back = i64(tiles - 1) * E;
                next_v += to_head ? (v_heads > 1 ? head_values : 0) - back : E;
                next_y += to_head ? head_values - back : E;
                next_S += to_head ? head_states - back : E, next_R += to_head ? head_states - back : E;
            }
            copies_end();
        };
        const auto turn = [&](int item, int number, int tile) {  // an item is there, the next one is asked for
            copies_wait<0>();
            meet_all();
            const bool to_head = tile + 1 == tiles;
            fetch(item + 1, number + to_head, to_head ? 0 : tile + 1);
        };
        const auto hand_on = [&](int number) {
            constexpr int PIECES = sizeof(Found) / 16;
            Found& to = all_found[of_head(number) * chunks + c];
            if (thread < PIECES) reinterpret_cast<uint4*>(&to)[thread] = reinterpret_cast<const uint4*>(&found[number % 2])[thread];
        };
        tell(0);
        fetch(0, 0, 0);
        turn(0, 0, 0);
        meet_all();  // M is there
        float written[2], product;
        for (int item = 0, number = 0, tile = 0; item < items; ++item) {
            if (item > 0) turn(item, number, tile);
            if (tile == 0) {
                if (number > 0) hand_on(number - 1);
                written[0] = written[1] = product = 0.0f;
            }
            const Told& head = told[number % 3];
            const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4, row = 16 * group + g;
            const float left[2] = {head.left[row], head.left[row + 8]};  // of a key at the end of the chunk, without its gain
            const float faded[2] = {left[0] * head.gains[row], left[1] * head.gains[row + 8]};
            {
                const Place V = at_stages + item % 2 * STAGE, Y = V + VALUES, R = Y + VALUES + STATE;
                const int to_right = along(lane), to_left = across(lane);
                const Place keys = at_K + group * BLOCK + to_left, rows = V + group * BLOCK + to_left;
                unsigned values[E / 16][4];
#pragma unroll
                for (int i = 0; i < E / 16; ++i) load_tiles(values[i], rows ^ 32 * i);
                through(sum, written, values, R + half * (STATE / 2) + to_right, of_half(keys), faded);
                float o[E / 16][4] = {};  // half the columns of dv
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    unsigned a[4];
                    load_tiles(a, (keys ^ i % 4 * 32) + i / 4 * PANEL);
#pragma unroll
                    for (int j = 0; j < E / 32; ++j) {
                        unsigned b[4];
                        load_tiles_turned(b, ((R + to_left) ^ (half * 64 + 32 * j)) + i * BLOCK);
                        multiply_tiles(o[2 * j], a, b[0], b[1]);
                        multiply_tiles(o[2 * j + 1], a, b[2], b[3]);
                    }
                }
                times(o, faded);
#pragma unroll
                for (int block = 0; block < L / 16; ++block) {
                    if (block >= group) {
                        unsigned a[4];
                        load_tiles_turned(a, ((at_M + number % 2 * PAIRS + to_right) ^ 32 * group) + block * BLOCK);
#pragma unroll
                        for (int j = 0; j < E / 32; ++j) {
                            unsigned b[4];
                            load_tiles_turned(b, ((Y + to_left) ^ (half * 64 + 32 * j)) + block * BLOCK);
                            multiply_tiles(o[2 * j], a, b[0], b[1]);
                            multiply_tiles(o[2 * j + 1], a, b[2], b[3]);
                        }
                    }
                }
                if (skip) {
                    const float skipped = skip[of_head(number)];
                    const int at_own = (row * 128 + 4 * t4 + (g << 4)) ^ half * 64;
                    const char* const dy_s = stages + item % 2 * STAGE + VALUES;
#pragma unroll
                    for (int j = 0; j < E / 16; ++j) {
#pragma unroll
                        for (int x = 0; x < 2; ++x) {
                            const unsigned own = *reinterpret_cast<const unsigned*>(dy_s + (at_own ^ 16 * j) + x * (BLOCK / 2));
                            o[j][2 * x] += skipped * low(own), o[j][2 * x + 1] += skipped * high(own);
                        }
                    }
                }
                const i64 t = t0 + 16 * group;
                store_rows(dv_s + (warp - 8) * (OUT / 2), o, dv + (of_head(number) * T + t) * e, T - t, e, tile * E + 32 * half);
                product += product_of_states<D>(R - STATE, R, warp);
            }
            if (++tile < tiles) continue;
            if (NORMALISED) {
                const i64 at_norm = (of_head(number) * chunks + c) * d;
                const float one[2] = {1.0f, 1.0f};
                through_norm(sum, written, one, rs + at_norm, first, d, K, row, faded);
            }
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float whole = over_columns(written[x]) * left[x];
                if (t4 == 0) found[number % 2].to_state[half][row + 8 * x] = whole;
            }
            product = over_rows(over_columns(product)) * head.all[0];
            if (lane == 0) found[number % 2].kept[warp] = product;
            tile = 0, ++number;
        }
        meet_all();
        hand_on(each - 1);
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            if (block >= group) {
                unsigned a[4];
                load_tiles_turned(a, ((at_P + along(lane)) ^ 32 * group) + block * BLOCK);
#pragma unroll
                for (int i = 0; i < D / 32; ++i) {
                    unsigned b[4];
                    load_tiles_turned(b, (of_half(at_Q + across(lane)) ^ 32 * i) + block * BLOCK);
                    multiply_tiles(sum[2 * i], a, b[0], b[1]);
                    multiply_tiles(sum[2 * i + 1], a, b[2], b[3]);
                }
            }
        }
    }
    const i64 t = t0 + 16 * group;
    char* const room = stages + (items + 1) % 2 * STAGE + warp * OUT;
    store_rows(room, sum, (warp < 8 ? dq : dk) + (unit * T + t) * d, T - t, d, first);
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
