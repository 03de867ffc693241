// Gradients of queries, keys and decays of a matrix memory with a decay of each channel (kernel_memory_channels.cu), of all its chunks at once.
//
// With P_ts = dy_t . v_s, S the state that enters a chunk of 64 steps, R the cotangent of the first state after it, and <s..t> the
// product of the decays of steps s+1, ..., t, of each channel i,
//     dq_ti = sum over s <= t of P_ts <s..t>_i k_si + F_ti (S dy_t)_i
//     dk_si = sum over t >= s of P_ts <s..t>_i q_ti + K_si (R v_s)_i
//     dw_ri = sum over s < r <= t of P_ts <s..t>_i q_ti k_si + sum over t >= r of q_ti F_ti (S dy_t)_i
//             + sum over s < r of k_si K_si (R v_s)_i + <the chunk>_i (S R)_ii
// in which nothing is divided by a decay, and no term is subtracted again.
//
// The idea. Cut the chunk in halves, these in halves, and so on. A pair of steps that a cut parts, s in the first piece and t in the
// second, has a factor of k_s, up to the cut, and one of q_t, from the cut on. Let G hold both, of every step as it is in the second
// piece of its level or in the first, and P be reflected: then one product C = G^T P has in columns t what dq_t gets of this level,
// but for the factor, and in columns s the same of dk_s; and a decay gets sums of C G along each piece, up to its end or from its
// start: a product with zeros and ones. Whatever passes the edges of the chunk is one level more.
//
// A warp owns 16 channels, their 64 steps in registers: lanes hold two channels of two neighbouring steps, as results of products have
// them, so that a level's factors are products with what a neighbouring lane or register holds. What limits it: docs/gpu/chunkwise.md.
#include "block_memory.cuh"

constexpr int VALUES = 128;
constexpr float LARGE = 3e38f;  // no infinity, which would make something of a 0

__device__ __forceinline__ float bounded(float x) { return min(x, LARGE); }

// Right operands of two pairs of columns: ones where `first` or its neighbour in the next row is wanted.
template <class Wanted> __device__ __forceinline__ unsigned ones(int k, int n, Wanted wanted) {
    return (wanted(k, n) ? 0x3f80u : 0u) | (wanted(k + 1, n) ? 0x3f800000u : 0u);
}

// result += left right, of 16 columns
__device__ __forceinline__ void multiply_both(float (*d)[4], const unsigned (&a)[4], const unsigned (&b)[4]) {
    multiply_tiles(d[0], a, b[0], b[1]);
    multiply_tiles(d[1], a, b[2], b[3]);
}

// Channels as rows, steps as columns, turned and left in a tile of 64 steps: neighbouring channels of one step are a word.
__device__ __forceinline__ void leave(char* tile, const float (&x)[L / 8][4], float scale, int first_piece) {
    const int lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
#pragma unroll
    for (int j = 0; j < L / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float even = x[j][2 * i] * scale, odd = x[j][2 * i + 1] * scale;
            const float other = __shfl_xor_sync(0xffffffffu, g % 2 ? even : odd, 4);
            const unsigned pair = g % 2 ? pack(other, odd) : pack(even, other);
            *reinterpret_cast<unsigned*>(at<L>(tile, 8 * j + 2 * t4 + g % 2, first_piece + i) + g / 2 * 4) = pair;
        }
    }
}

// q (G, q_heads, T, d), k (G, k_heads, T, d), v (G, v_heads, T, e), w (G, w_heads, T, d), dy (G, heads, T, e); states (G, s_heads, chunks, e, d) and
// adjoints (G, heads, chunks, e, d): transposes of S and R, R with the chunk before it; dq, dk, dw (G, heads, T, d); all bfloat16. An array's heads
// are `heads` or 1. Up to 128 values. Grid: G heads chunks.
template <int D>
__global__ void __launch_bounds__(THREADS, 1)
memory_channels_gradient(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* w, const __nv_bfloat16* dy,
                         const __nv_bfloat16* states, const __nv_bfloat16* adjoints, __nv_bfloat16* dq, __nv_bfloat16* dk, __nv_bfloat16* dw,
                         i64 T, int d, int e, int heads, int q_heads, int k_heads, int v_heads, int w_heads, int s_heads, float scale) {
    will_come(1, 1, THREADS);
    extern __shared__ double memory[];
    __shared__ float2 diagonal[L / 2];  // P_tt
    constexpr int ROWS = L * D * 2, OF_VALUES = L * VALUES * 2;
    char* const Q = reinterpret_cast<char*>(memory);
    char* const K = Q + ROWS;
    char* const W = K + ROWS;
    char* const Y = W + ROWS;
    char* const V = Y + OF_VALUES;
    char* const S = V + OF_VALUES;
    char* const R = S + 2 * ROWS;
    char* const P = R + 2 * ROWS;
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const i64 chunks = (T + L - 1) / L, c = blockIdx.x % chunks, of_head = blockIdx.x / chunks, G = of_head / heads, h = of_head % heads;
    const i64 t0 = c * L, left = T - t0;
    const auto head = [&](int count) { return G * count + (count > 1 ? h : 0); };
    w += (head(w_heads) * T + t0) * d;
    stage<VALUES>(Y, dy + (of_head * T + t0) * e, left, e, 0);
    stage<VALUES>(V, v + (head(v_heads) * T + t0) * e, left, e, 0);
    copies_end();
    stage<D>(Q, q + (head(q_heads) * T + t0) * d, left, d, 0);
    stage<D>(K, k + (head(k_heads) * T + t0) * d, left, d, 0);
    stage<D>(W, w, left, d, 0);
    copies_end();
#pragma unroll
    for (int i = 0; i < VALUES; i += L) {
        stage<D>(S + i / L * ROWS, states + ((head(s_heads) * chunks + c) * e + i) * d, e - i, d, 0);
        stage<D>(R + i / L * ROWS, adjoints + ((of_head * chunks + c) * e + i) * d, e - i, d, 0);
    }
    copies_end();

    // P, in ten squares.
    copies_wait<2>();
    __syncthreads();
#pragma unroll 1
    for (int n = warp; n < 10; n += THREADS / 32) {
        const int row = (n >= 1) + (n >= 3) + (n >= 6), column = n - row * (row + 1) / 2;
        float p[2][4] = {};
#pragma unroll
        for (int i = 0; i < VALUES / 16; ++i) {
            unsigned a[4], b[4];
            load_tiles(a, at<L>(Y, 16 * row + lane % 16, 2 * i + lane / 16));
            load_tiles(b, at<L>(V, 16 * column + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
            multiply_both(p, a, b);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                *reinterpret_cast<unsigned*>(at<L>(P, 16 * row + g + 8 * x, 2 * column + i) + 4 * t4) = pack(p[i][2 * x], p[i][2 * x + 1]);
                if (row == column && x == i && g / 2 == t4) reinterpret_cast<float*>(diagonal)[16 * row + 8 * x + g] = g % 2 ? p[i][2 * x + 1] : p[i][2 * x];
            }
        }
    }
    copies_wait<1>();
    __syncthreads();

    const bool mine = 16 * warp < D;
    float to_q[L / 8][4], to_k[L / 8][4], to_w[L / 8][4];  // of channels g, g + 8; of steps 8 j + 2 t4, and the next
    if (mine) {
        const int place = lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
        const auto load = [&](unsigned (&x)[4], char* tile, int b) { load_tiles_turned(x, at<L>(tile, 16 * b + place, piece)); };
        float since[L / 8][4], until[L / 8][4];  // from the start of the step's piece to it; after it, to the end of its piece
        float whole[4][2];  // of 16 steps
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            unsigned of_q[4], of_k[4], decays[4];
            load(of_q, Q, b), load(of_k, K, b), load(decays, W, b);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int j = 2 * b + i / 2, x = i % 2 * 2;
                const float2 own = diagonal[4 * j + t4];
                since[j][x] = bounded(exp2_fast(low(decays[i]) * LOG2E)), since[j][x + 1] = bounded(exp2_fast(high(decays[i]) * LOG2E));
                until[j][x] = until[j][x + 1] = 1.0f;
                to_q[j][x] = own.x * low(of_k[i]), to_q[j][x + 1] = own.y * high(of_k[i]);
                to_k[j][x] = own.x * low(of_q[i]), to_k[j][x + 1] = own.y * high(of_q[i]);
                to_w[j][x] = to_w[j][x + 1] = 0.0f;
            }
        }
        // Pieces of 1, 2, 4, 8 steps.
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            unsigned of_q[4], of_k[4];
            load(of_q, Q, b), load(of_k, K, b);
            unsigned above[4], reflected[4];  // what is to stand above the diagonal's squares, and below
            load_tiles(reflected, at<L>(P, 16 * b + place, 2 * b + lane / 8 % 2));
            load_tiles_turned(above, at<L>(P, 16 * b + lane % 16, 2 * b + lane / 16));
            float total[2][2];  // of the pieces that hold this lane's two steps, as soon as that is one piece
#pragma unroll
            for (int level = 0; level < 4; ++level) {
                const int size = 1 << level;
                const bool second = level == 1 ? t4 % 2 : t4 / 2;  // for levels 1 and 2
                const auto later = [&](int i, int y) { return level == 0 ? y == 1 : level == 3 ? i / 2 == 1 : second; };
                unsigned pairs[4] = {}, sums[4] = {};
                if (level == 3) {
                    pairs[1] = above[1], pairs[2] = reflected[2];
                } else {
                    const int k0 = 2 * t4;
                    const unsigned low_of = (k0 ^ g) >> level == 1 ? 0xffffu : 0u, high_of = ((k0 + 1) ^ g) >> level == 1 ? 0xffff0000u : 0u;
                    const unsigned wanted = low_of | high_of;
                    const bool before = k0 / size * size < g / size * size;  // which of the two pieces the row is in
                    pairs[0] = (before ? reflected[0] : above[0]) & wanted, pairs[3] = (before ? reflected[3] : above[3]) & wanted;
                }
                const auto along = [&](int k, int n) { return k >> level == n >> level && ((k >> level) % 2 ? k >= n : k < n); };
                sums[0] = ones(2 * t4, g, along), sums[3] = ones(2 * t4 + 8, g + 8, along);
                float faded[4][2], by[4][2];
                unsigned G[4], X[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int y = 0; y < 2; ++y) {
                        const int j = 2 * b + i / 2, x = i % 2 * 2 + y;
                        const unsigned raw = later(i, y) ? of_q[i] : of_k[i];
                        by[i][y] = later(i, y) ? since[j][x] : until[j][x];
                        faded[i][y] = (y ? high(raw) : low(raw)) * by[i][y];
                    }
                    G[i] = pack(faded[i][0], faded[i][1]);
                }
                float C[2][4] = {};
                multiply_both(C, G, pairs);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int y = 0; y < 2; ++y) {
                        const int j = 2 * b + i / 2, x = i % 2 * 2 + y;
                        const float more = C[i / 2][x] * by[i][y];
                        to_q[j][x] += later(i, y) ? more : 0.0f, to_k[j][x] += later(i, y) ? 0.0f : more;
                        faded[i][y] *= C[i / 2][x];
                    }
                    X[i] = pack(faded[i][0], faded[i][1]);
                }
                multiply_both(to_w + 2 * b, X, sums);
                // Twice as large: what the other piece is as a whole.
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int j = 2 * b + i / 2, x = i % 2 * 2;
                    float& all = total[i / 2][i % 2];
                    if (level == 0) {
                        const float first = since[j][x];
                        until[j][x] = since[j][x + 1], all = bounded(first * since[j][x + 1]), since[j][x + 1] = all;
                    } else if (level < 3) {
                        const float other = __shfl_xor_sync(0xffffffffu, all, level), of_first = second ? 1.0f : other, of_second = second ? other : 1.0f;
#pragma unroll
                        for (int y = x; y < x + 2; ++y) {
                            since[j][y] = bounded(since[j][y] * of_second), until[j][y] = bounded(until[j][y] * of_first);
                        }
                        all = bounded(all * other);
                    } else {
                        const float other = total[1 - i / 2][i % 2];
#pragma unroll
                        for (int y = x; y < x + 2; ++y) {
                            if (i / 2) {
                                since[j][y] = bounded(since[j][y] * other);
                            } else {
                                until[j][y] = bounded(until[j][y] * other);
                            }
                        }
                    }
                }
            }
            whole[b][0] = bounded(total[0][0] * total[1][0]), whole[b][1] = bounded(total[0][1] * total[1][1]);
        }

        // Ones where a step's share goes: to decays up to it, or to those after it; within 16 steps.
        const auto upto = [](int k, int n) { return k >= n; };
        const auto after = [](int k, int n) { return k < n; };
        const unsigned one = 0x3f803f80u, all_ones[4] = {one, one, one, one};
        const unsigned ones_upto[4] = {ones(2 * t4, g, upto), one, 0u, ones(2 * t4, g, upto)};
        const unsigned ones_after[4] = {ones(2 * t4, g, after), 0u, one, ones(2 * t4, g, after)};

        // Pieces of 16 and 32 steps.
#pragma unroll
        for (int size = 1; size <= 2; ++size) {
            unsigned G[4][4];
            const auto factor = [&](int b, int i, int y) -> float& {
                return b / size % 2 ? since[2 * b + i / 2][i % 2 * 2 + y] : until[2 * b + i / 2][i % 2 * 2 + y];
            };
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                unsigned raw[4];
                load(raw, b / size % 2 ? Q : K, b);
#pragma unroll
                for (int i = 0; i < 4; ++i) G[b][i] = pack(low(raw[i]) * factor(b, i, 0), high(raw[i]) * factor(b, i, 1));
            }
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const bool later = b / size % 2;
                float C[2][4] = {};
#pragma unroll
                for (int other = 0; other < 4; ++other) {
                    if (other / size != (b / size ^ 1)) continue;
                    unsigned pairs[4];
                    if (later) {
                        load_tiles(pairs, at<L>(P, 16 * b + place, 2 * other + lane / 8 % 2));
                    } else {
                        load_tiles_turned(pairs, at<L>(P, 16 * other + lane % 16, 2 * b + lane / 16));
                    }
                    multiply_both(C, G[other], pairs);
                }
                unsigned raw[4], X[4];
                load(raw, later ? Q : K, b);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float (&to)[4] = later ? to_q[2 * b + i / 2] : to_k[2 * b + i / 2];
                    const int x = i % 2 * 2;
                    const float first = C[i / 2][x] * factor(b, i, 0), second = C[i / 2][x + 1] * factor(b, i, 1);
                    to[x] += first, to[x + 1] += second;
                    X[i] = pack(low(raw[i]) * first, high(raw[i]) * second);
                }
                multiply_both(to_w + 2 * b, X, later ? ones_upto : ones_after);
                if (size == 2 && b % 2 == later) multiply_both(to_w + 2 * (later ? b - 1 : b + 1), X, all_ones);
            }
#pragma unroll
            for (int b = 0; b < 4; ++b) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float other = size == 1 ? whole[b ^ 1][i % 2] : bounded(whole[b / 2 * 2 ^ 2][i % 2] * whole[b / 2 * 2 ^ 3][i % 2]);
                    factor(b, i, 0) = bounded(factor(b, i, 0) * other), factor(b, i, 1) = bounded(factor(b, i, 1) * other);
                }
            }
        }

        // What enters the chunk, and what leaves it.
        copies_wait<0>();
        __syncwarp();
        meet(1, THREADS);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of the steps
            float C[4][4] = {};
#pragma unroll 2
            for (int i = 0; i < VALUES / 16; ++i) {
                unsigned a[4], y[4];
                load_tiles_turned(a, at<L>(S + i / 4 * ROWS, 16 * (i % 4) + place, piece));
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    load_tiles(y, at<L>(Y, 32 * half + 16 * n + place, 2 * i + lane / 8 % 2));
                    multiply_both(C + 2 * n, a, y);
                }
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int b = 2 * half + n;
                unsigned raw[4], X[4];
                load(raw, Q, b);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int j = 2 * b + i / 2, x = i % 2 * 2;
                    const float first = C[2 * n + i / 2][x] * since[j][x], second = C[2 * n + i / 2][x + 1] * since[j][x + 1];
                    to_q[j][x] += first, to_q[j][x + 1] += second;
                    X[i] = pack(low(raw[i]) * first, high(raw[i]) * second);
                }
                multiply_both(to_w + 2 * b, X, ones_upto);
#pragma unroll
                for (int before = 0; before < b; ++before) multiply_both(to_w + 2 * before, X, all_ones);
            }
        }
        leave(Q, to_q, scale, 2 * warp);  // through this warp's own columns, which nobody else reads
        float next[2], both[2] = {0.0f, 0.0f};  // the decay of the step after the chunk; S R
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const int channel = 16 * warp + g + 8 * x;
            next[x] = left > L && channel < d ? bounded(exp2_fast(__bfloat162float(w[i64(L) * d + channel]) * LOG2E)) : 1.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float C[4][4] = {};
#pragma unroll 2
            for (int i = 0; i < VALUES / 16; ++i) {
                unsigned a[4], v[4], s[4];
                load_tiles_turned(a, at<L>(R + i / 4 * ROWS, 16 * (i % 4) + place, piece));
                if (half == 0) {
                    load_tiles_turned(s, at<L>(S + i / 4 * ROWS, 16 * (i % 4) + place, piece));
#pragma unroll
                    for (int x = 0; x < 4; ++x) both[x % 2] += low(a[x]) * low(s[x]) + high(a[x]) * high(s[x]);
                }
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    load_tiles(v, at<L>(V, 32 * half + 16 * n + place, 2 * i + lane / 8 % 2));
                    multiply_both(C + 2 * n, a, v);
                }
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int b = 2 * half + n;
                unsigned raw[4], X[4];
                load(raw, K, b);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int j = 2 * b + i / 2, x = i % 2 * 2;
                    const float first = C[2 * n + i / 2][x] * bounded(until[j][x] * next[i % 2]);
                    const float second = C[2 * n + i / 2][x + 1] * bounded(until[j][x + 1] * next[i % 2]);
                    to_k[j][x] += first, to_k[j][x + 1] += second;
                    X[i] = pack(low(raw[i]) * first, high(raw[i]) * second);
                }
                multiply_both(to_w + 2 * b, X, ones_after);
#pragma unroll
                for (int later = b + 1; later < 4; ++later) multiply_both(to_w + 2 * later, X, all_ones);
            }
        }
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            both[x] += __shfl_xor_sync(0xffffffffu, both[x], 1);
            both[x] += __shfl_xor_sync(0xffffffffu, both[x], 2);
            const float first = bounded(whole[0][x] * whole[1][x]), second = bounded(whole[2][x] * whole[3][x]);
            both[x] *= bounded(bounded(first * second) * next[x]);
        }
#pragma unroll
        for (int j = 0; j < L / 8; ++j) {
#pragma unroll
            for (int x = 0; x < 4; ++x) to_w[j][x] += both[x / 2];
        }
        leave(K, to_k, scale, 2 * warp), leave(W, to_w, scale, 2 * warp);
    } else {
        copies_wait<0>();
        pass(1, THREADS);
    }
    __syncthreads();
    const i64 to = (of_head * T + t0) * d;
    for (int i = threadIdx.x; i < L * (D / 8); i += THREADS) {
        const int r = i / (D / 8), piece = i % (D / 8);
        if (r < left && 8 * piece < d) {
            *reinterpret_cast<uint4*>(dq + to + i64(r) * d + 8 * piece) = *reinterpret_cast<const uint4*>(at<L>(Q, r, piece));
            *reinterpret_cast<uint4*>(dk + to + i64(r) * d + 8 * piece) = *reinterpret_cast<const uint4*>(at<L>(K, r, piece));
            *reinterpret_cast<uint4*>(dw + to + i64(r) * d + 8 * piece) = *reinterpret_cast<const uint4*>(at<L>(W, r, piece));
        }
    }
}
