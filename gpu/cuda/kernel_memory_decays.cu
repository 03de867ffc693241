// Gradients of the decays and gains of a matrix memory (kernel_memory.cu), of all its chunks at once.
//
// The idea. w_r stands in every exponent that spans step r. With z_ts what the pair s <= t of a chunk is worth, S the state that enters
// the chunk, R the cotangent of what leaves it, the cotangent of w_r is a sum over a rectangle of pairs and over what passes its edges:
//     dw_r = sum over s < r <= t of z_ts + sum over t >= r of q_t (S dy_t) + sum over s < r of k_s (R v_s) + <S, R>,   each faded
// No term is subtracted again. A step's gain is worth the sum of its column of z and k_s (R v_s).
//
// Four warps own 16 queries each: products Q K^T and dY V^T give z in registers, a product with a triangle of ones gives the sums over
// s < r of each row. Four warps own 16 keys each. S and R were kept by the adjoints of q and v. A block takes one chunk of one head and
// 64 values; what limits it is reading all that.
#include "block_memory.cuh"

// The sum of x over the lanes of a column of a result, or of its row.
__device__ __forceinline__ float over_rows(float x) {
#pragma unroll
    for (int away = 4; away < 32; away *= 2) x += __shfl_xor_sync(0xffffffffu, x, away);
    return x;
}
__device__ __forceinline__ float over_columns(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Rows 16 group ... of X (64 x D) times a matrix, and the sums of products with the same rows of Y (64 x 64): of rows g and g + 8.
// TURNED: the matrix is (D x 64), else its transpose (64 x D).
template <int D, bool TURNED> __device__ __forceinline__ void through(float (&sum)[2], char* X, char* matrix, char* Y, int group) {
    const int lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    float x[E / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        unsigned a[4];
        load_tiles(a, at<L>(X, 16 * group + lane % 16, 2 * i + lane / 16));
#pragma unroll
        for (int j = 0; j < E / 16; ++j) {
            unsigned b[4];
            if (TURNED) {
                load_tiles_turned(b, at<D>(matrix, 16 * i + lane % 16, 2 * j + lane / 16));
            } else {
                load_tiles(b, at<E>(matrix, 16 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
            }
            multiply_tiles(x[2 * j], a, b[0], b[1]);
            multiply_tiles(x[2 * j + 1], a, b[2], b[3]);
        }
    }
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int j = 0; j < E / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned y = *reinterpret_cast<const unsigned*>(at<L>(Y, 16 * group + g + 8 * i, j) + 4 * t4);
            sum[i] += x[j][2 * i] * low(y) + x[j][2 * i + 1] * high(y);
        }
    }
    sum[0] = over_columns(sum[0]), sum[1] = over_columns(sum[1]);
}

// One warp: sums of 64 numbers up to each, from behind if `back`; without the number itself if `strict`.
__device__ __forceinline__ void sums_upto(float* x, bool back, bool strict) {
    const int lane = threadIdx.x % 32, i = back ? L - 1 - 2 * lane : 2 * lane, j = back ? i - 1 : i + 1;
    const float first = x[i], second = x[j], both = first + second;
    float upto = both;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const float before = __shfl_up_sync(0xffffffffu, upto, away);
        upto += lane >= away ? before : 0.0f;
    }
    float before = __shfl_up_sync(0xffffffffu, upto, 1);
    before = lane > 0 ? before : 0.0f;
    x[i] = strict ? before : before + first;
    x[j] = strict ? before + first : upto;
}

// Arrays as kernel_memory.cu has them; dy (G, heads, T, e); states (G heads, chunks, e, d), the transposes of those that enter a chunk, and
// adjoints (G heads, chunks, d, e), cotangents of what its last step leaves; dw and dgain (tiles, G heads, T), a share of each tile of
// values. The gain of a step is left out of dgain (its cotangent over its e^g). Grid: (G heads chunks, tiles of 64 values).
template <int D>
__global__ void __launch_bounds__(THREADS, 2)
memory_decays(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* dy, const float* w, const float* gain,
              const __nv_bfloat16* states, const __nv_bfloat16* adjoints, float* dw, float* dgain, i64 T, int d, int e, int heads, int q_heads,
              int k_heads, int v_heads, int w_heads, int all_heads) {
    extern __shared__ double memory[];
    __shared__ float sums[SUMS], gains[L], rectangle[4][L], column[4][L], from_state[L], to_state[L], to_dgain[L], kept[4];
    char* const Q = reinterpret_cast<char*>(memory);
    char* const K = Q + L * D * 2;
    char* const V = K + L * D * 2;
    char* const Y = V + L * E * 2;
    char* const S = Y + L * E * 2;
    char* const R = S + E * D * 2;
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int chunks = int((T + L - 1) / L), c = blockIdx.x % chunks, first = int(blockIdx.y) * E;
    const i64 of_head = blockIdx.x / chunks, G = of_head / heads, h = of_head % heads, t0 = i64(c) * L, at_state = (of_head * chunks + c) * d * e;
    const i64 of_decays = (G * w_heads + (w_heads > 1 ? h : 0)) * T;
    stage<D>(Q, q + ((G * q_heads + (q_heads > 1 ? h : 0)) * T + t0) * d, T - t0, d, 0);
    stage<D>(K, k + ((G * k_heads + (k_heads > 1 ? h : 0)) * T + t0) * d, T - t0, d, 0);
    stage<E>(V, v + ((G * v_heads + (v_heads > 1 ? h : 0)) * T + t0) * e, T - t0, e, first);
    stage<E>(Y, dy + (of_head * T + t0) * e, T - t0, e, first);
    stage<D>(S, states + at_state + i64(first) * d, e - first, d, 0);
#pragma unroll
    for (int i = 0; i < D; i += L) stage<E>(R + i * 128, adjoints + at_state + i64(i) * e, d - i, e, first);
    copies_end();
    if (w) w += of_decays;
    if (warp == 0) sum_decays(sums, w, nullptr, t0, T);
    if (threadIdx.x < L) {
        const i64 t = t0 + threadIdx.x;
        gains[threadIdx.x] = gain && t < T ? exp2_fast(gain[of_decays + t] * LOG2E) : 1.0f;
    }
    for (int i = threadIdx.x; i < 4 * L; i += THREADS) rectangle[i / L][i % L] = column[i / L][i % L] = 0.0f;
    copies_wait<0>();
    __syncthreads();

    const bool halved = sums[3 * L] != 0.0f;
    const int group = warp % 4, row = 16 * group + g;
    if (warp < 4) {
        const float at_row[2] = {sums[row], sums[row + 8]}, rest[2] = {sums[L + row], sums[L + row + 8]};
        float below[L / 8][4] = {};  // of rows g and g + 8, and r: sums of z over s < r
        for (int block = 0; block <= group; ++block) {
            float p[2][4] = {}, dp[2][4] = {};
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                unsigned a[4], b[4];
                load_tiles(a, at<L>(Q, 16 * group + lane % 16, 2 * i + lane / 16));
                load_tiles(b, at<L>(K, 16 * block + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                multiply_tiles(p[0], a, b[0], b[1]);
                multiply_tiles(p[1], a, b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < E / 16; ++i) {
                unsigned a[4], b[4];
                load_tiles(a, at<L>(Y, 16 * group + lane % 16, 2 * i + lane / 16));
                load_tiles(b, at<L>(V, 16 * block + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                multiply_tiles(dp[0], a, b[0], b[1]);
                multiply_tiles(dp[1], a, b[2], b[3]);
            }
            unsigned z[4];
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const int s = 16 * block + 8 * tile + 2 * t4;
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    const int at_s = s + x % 2;
                    const float by = power((at_row[x / 2] - sums[at_s]) + (rest[x / 2] - sums[2 * L + at_s]), halved);
                    float m = p[tile][x] * by;
                    if (halved) m *= by;
                    p[tile][x] = at_s > row + 8 * (x / 2) ? 0.0f : m * dp[tile][x];
                }
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    const float whole = over_rows(p[tile][x] + p[tile][x + 2]);
                    if (g == 0) column[group][s + x] = whole;
                    z[2 * tile + x] = pack(p[tile][2 * x] * gains[s], p[tile][2 * x + 1] * gains[s + 1]);
                }
            }
            // times ones where s < r
#pragma unroll
            for (int j = 0; j < L / 8; ++j) {
                if (j >= 2 * block && j <= 2 * group + 1) {
                    const int r = 8 * j + g, s = 16 * block + 2 * t4;
                    const auto ones = [r](int s) { return (s < r ? 0x3f80u : 0u) | (s + 1 < r ? 0x3f800000u : 0u); };
                    multiply_tiles(below[j], z, ones(s), ones(s + 8));
                }
            }
        }
#pragma unroll
        for (int j = 0; j < L / 8; ++j) {
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const int r = 8 * j + 2 * t4 + x;
                const float whole = over_rows((row >= r ? below[j][x] : 0.0f) + (row + 8 >= r ? below[j][x + 2] : 0.0f));
                if (g == 0) rectangle[group][r] = whole;
            }
        }
        float read[2];
        through<D, false>(read, Q, S, Y, group);
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const float by = power(at_row[x] + rest[x], halved);
            if (t4 == 0) from_state[row + 8 * x] = halved ? read[x] * by * by : read[x] * by;
        }
    } else {
        const float later = w && t0 + L < T ? (halved ? 0.5f : 1.0f) * LOG2E * max(w[t0 + L], -4096.0f) : 0.0f;  // R is that of the next step
        const float all = sums[L - 1], all_rest = sums[3 * L + 1] + later;
        float written[2];
        through<D, true>(written, K, R, V, group);
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const int s = row + 8 * x;
            const float by = power(min((all - sums[s]) + (all_rest - sums[2 * L + s]), 127.0f), halved);
            const float worth = halved ? written[x] * by * by : written[x] * by;
            if (t4 == 0) to_dgain[s] = worth, to_state[s] = worth * gains[s];
        }
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            unsigned of_S[4], of_R[4];
            load_tiles(of_S, at<E>(S, 16 * group + lane % 16, 2 * i + lane / 16));
            load_tiles_turned(of_R, at<D>(R, 16 * i + lane / 16 * 8 + lane % 8, 2 * group + lane / 8 % 2));
#pragma unroll
            for (int x = 0; x < 4; ++x) product += low(of_S[x]) * low(of_R[x]) + high(of_S[x]) * high(of_R[x]);
        }
        product = over_rows(over_columns(product));
        const float by = power(min(all + all_rest, 127.0f), halved);
        if (lane == 0) kept[group] = halved ? product * by * by : product * by;
    }
    __syncthreads();
    if (warp == 0) sums_upto(from_state, true, false);
    if (warp == 1) sums_upto(to_state, false, true);
    __syncthreads();
    const int r = threadIdx.x;
    if (r < L && t0 + r < T) {
        const i64 to = (i64(blockIdx.y) * all_heads + of_head) * T + t0 + r;
        dw[to] = (rectangle[0][r] + rectangle[1][r] + rectangle[2][r] + rectangle[3][r]) + (from_state[r] + to_state[r]) +
                 (kept[0] + kept[1] + kept[2] + kept[3]);
        if (dgain) dgain[to] = (column[0][r] + column[1][r] + column[2][r] + column[3][r]) + to_dgain[r];
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
