// A matrix memory with one decay per head, on tensor cores, in one pass over the data.
//
//     S_t = e^{w_t} S_(t-1) + e^{g_t} k_t v_t^T,      o_t = S_t^T q_t,      n_t = e^{w_t} n_(t-1) + e^{g_t} k_t
//     y_t = (c o_t / D_t + skip v_t) silu(z_t),       D_t = 1, or q_t . n_t, or max(|q_t . n_t|, lower_t) + eps
//
// The idea. In chunks of 64 steps (the equations are those of gpu/chunkwise.py), one after the other, everything between reading
// q, k, v and writing y on the chip. A block takes 64 features of the values of one head of one sequence. Four of its warps, the
// readers, own 16 steps each: a warp's rows of Q K^T are, faded in its registers, the left operand of their product with V. The
// other four, the writers, own the rows of S, in float32 in registers, and leave a bfloat16 copy in shared memory, which the
// readers multiply Q by. So a chunk needs one barrier of the block, and one that only the writers wait at: the copy has been read.
//
// Row groups take 1, 2, 3, 4 quarters of a chunk's keys; a warp has group r and 3 - r in turn, so that the four units of a
// multiprocessor have as much to do. Two blocks share a multiprocessor.
//
// Decays. The exponent between steps s and t is a difference of sums from the chunk's start: sums in double precision, kept as a
// float and the rest, so that the difference is as exact as a sum from s to t. Less than -4096 is -4096: 0, whatever follows. The
// exponents of columns have the gain in them. Where they might exceed 120 (decays above 1) each exponential is two of half of it.
//
// What limits it: latency. 4 warps a scheduler hide about half of what passes between loading operands, products, exponentials,
// products, and the barrier; an H100 takes twice what mma.sync alone would need (docs/gpu/chunkwise.md).
#include "block_memory.cuh"

constexpr int READERS = 4;

// x / (1 + e^-x)
__device__ __forceinline__ float silu(float x) {
    const float e = exp2_fast(-LOG2E * fabsf(x));
    return __fdividef(x < 0.0f ? x * e : x, 1.0f + e);
}

// q (G, q_heads, T, d), k (G, k_heads, T, d), v (G, v_heads, T, e); w and gain (G, w_heads, T), state and last (G, v_heads, d, e), norm and
// last_norm (G, v_heads, d); y and z (G, heads, T, e), lower (G, heads, T), skip (G, heads); an array's heads are `heads` or 1. What is
// null is 0, and `lower`, `skip`, `z` are left out. d and e are multiples of 8, rows start at multiples of 16 bytes.
// Grid: (G heads, tiles of 64 values).
// As WITNESS, of a gradient that goes through a normaliser, y and last are not written but what it asks: states (G heads, chunks, d, e) and
// norms (G heads, chunks, d) that enter each chunk, overlaps q_t . n_t (G heads, T), and z_t . o_t, z the cotangent of y, of each tile of
// values, `against` (tiles, G heads, T).
enum Kind { PLAIN, NORMALISED_BY_N, WITNESS };
template <int D, int KIND>
__global__ void __launch_bounds__(THREADS, 2)
memory_tensor(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const float* w, const float* gain, const float* state,
              const float* norm, const float* lower, const float* skip, const __nv_bfloat16* z, __nv_bfloat16* y, float* last, float* last_norm,
              __nv_bfloat16* states, float* all_norms, float* overlaps, float* against, i64 T, int d, int e, int heads, int q_heads, int k_heads,
              int v_heads, int w_heads, float scale, float eps) {
    constexpr bool NORMALISED = KIND != PLAIN;
    constexpr int ROWS = L * D * 2, VALUES = L * E * 2, STAGE = 2 * ROWS + VALUES;
    will_come(1, 1, THREADS);
    extern __shared__ double memory[];
    char* const shared = reinterpret_cast<char*>(memory);
    char* const copy = shared + 2 * STAGE;  // of S
    float* const decays = reinterpret_cast<float*>(copy + D * E * 2);
    float* const norms = decays + 2 * SUMS;

    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);  // the same for all lanes, and known to be
    const int lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const i64 G = blockIdx.x / heads, h = blockIdx.x % heads, column = i64(blockIdx.y) * E;
    const i64 of_values = G * v_heads + (v_heads > 1 ? h : 0), of_head = blockIdx.x;
    q += (G * q_heads + (q_heads > 1 ? h : 0)) * T * d;
    k += (G * k_heads + (k_heads > 1 ? h : 0)) * T * d;
    v += of_values * T * e;
    const i64 of_decays = G * w_heads + (w_heads > 1 ? h : 0);
    if (w) w += of_decays * T;
    if (gain) gain += of_decays * T;
    if (KIND != WITNESS) y += of_head * T * e;
    if (z) z += of_head * T * e;
    if (lower) lower += of_head * T;
    const float skipped = skip ? skip[of_head] : 0.0f;
    const int chunks = int((T + L - 1) / L);

    const auto start = [&](int c) { return i64(c) * L; };
    const auto fetch = [&](int c) {
        char* const tiles = shared + c % 2 * STAGE;
        const i64 t0 = start(c);
        stage<D>(tiles, q + t0 * d, T - t0, d, 0);
        stage<D>(tiles + ROWS, k + t0 * d, T - t0, d, 0);
        stage<E>(tiles + 2 * ROWS, v + t0 * e, T - t0, e, int(column));
    };

    if (warp < READERS) {
        if (chunks > 0) fetch(0);
        copies_end();
        for (int c = 0; c < chunks; ++c) {
            copies_wait<0>();
            meet_all();
            if (c + 1 < chunks) fetch(c + 1);
            copies_end();
            char* const Q = shared + c % 2 * STAGE;
            char* const K = Q + ROWS;
            char* const V = K + ROWS;
            const float* const sums = decays + c % 2 * SUMS;
            const int group = c % 2 ? READERS - 1 - warp : warp, row = 16 * group + g;
            const bool halved = sums[3 * L] != 0.0f;
            const float at_row[2] = {sums[row], sums[row + 8]}, rest[2] = {sums[L + row], sums[L + row + 8]};
            const i64 t = start(c) + row;
            // What the state that enters the chunk has to say.
            float o[E / 8][4] = {}, overlap[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                unsigned queries[4];
                load_tiles(queries, at<L>(Q, 16 * group + lane % 16, 2 * i + lane / 16));
#pragma unroll
                for (int j = 0; j < E / 16; ++j) {
                    unsigned b[4];
                    load_tiles_turned(b, at<D>(copy, 16 * i + lane % 16, 2 * j + lane / 16));
                    multiply_tiles(o[2 * j], queries, b[0], b[1]);
                    multiply_tiles(o[2 * j + 1], queries, b[2], b[3]);
                }
                if (NORMALISED) {
#pragma unroll
                    for (int x = 0; x < 4; ++x) {  // which row of the two, x % 2; which half of the columns, x / 2
                        const float2 n = *reinterpret_cast<const float2*>(norms + 16 * i + 8 * (x / 2) + 2 * t4);
                        overlap[x % 2] += low(queries[x]) * n.x + high(queries[x]) * n.y;
                    }
                }
            }
            if (c + 1 < chunks) pass(1, THREADS);
            unsigned dy[E / 8][2];  // asked for early
            if (KIND == WITNESS) {
#pragma unroll
                for (int j = 0; j < E / 8; ++j) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const bool there = t + 8 * x < T && column + 8 * j < e;
                        dy[j][x] = there ? *reinterpret_cast<const unsigned*>(z + (t + 8 * x) * e + column + 8 * j + 2 * t4) : 0;
                    }
                }
            }
            const float since[2] = {power(at_row[0] + rest[0], halved), power(at_row[1] + rest[1], halved)};
            for (int again = 0; again <= halved; ++again) {
                times(o, since);
                overlap[0] *= since[0], overlap[1] *= since[1];
            }

            // What the chunk's own steps have to say, 16 of them at a time.
            for (int block = 0; block <= group; ++block) {
                float p[4][4] = {};  // of two tiles, sums over odd and even i by themselves: shorter chains
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    unsigned queries[4], b[4];
                    load_tiles(queries, at<L>(Q, 16 * group + lane % 16, 2 * i + lane / 16));
                    load_tiles(b, at<L>(K, 16 * block + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                    multiply_tiles(p[i % 2 * 2], queries, b[0], b[1]);
                    multiply_tiles(p[i % 2 * 2 + 1], queries, b[2], b[3]);
                }
                float m[2][4];
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const int s = 16 * block + 8 * tile + 2 * t4;
                    const float2 sum = *reinterpret_cast<const float2*>(sums + s), less = *reinterpret_cast<const float2*>(sums + 2 * L + s);
                    float by[4];
#pragma unroll
                    for (int x = 0; x < 4; ++x)
                        by[x] = power((at_row[x / 2] - (x % 2 ? sum.y : sum.x)) + (rest[x / 2] - (x % 2 ? less.y : less.x)), halved);
#pragma unroll
                    for (int x = 0; x < 4; ++x) m[tile][x] = (p[tile][x] + p[tile + 2][x]) * by[x];
                    if (halved) {
#pragma unroll
                        for (int x = 0; x < 4; ++x) m[tile][x] *= by[x];
                    }
                }
                if (block == group) {  // some of these steps are later than the query's
#pragma unroll
                    for (int x = 0; x < 8; ++x) m[x / 4][x % 4] = 8 * (x / 4) + 2 * t4 + x % 2 > g + x % 4 / 2 * 8 ? 0.0f : m[x / 4][x % 4];
                }
                if (NORMALISED) {
#pragma unroll
                    for (int x = 0; x < 8; ++x) overlap[x % 4 / 2] += m[x / 4][x % 4];
                }
                const unsigned weights[4] = {pack(m[0][0], m[0][1]), pack(m[0][2], m[0][3]), pack(m[1][0], m[1][1]), pack(m[1][2], m[1][3])};
#pragma unroll
                for (int j = 0; j < E / 16; ++j) {
                    unsigned b[4];
                    load_tiles_turned(b, at<L>(V, 16 * block + lane % 16, 2 * j + lane / 16));
                    multiply_tiles(o[2 * j], weights, b[0], b[1]);
                    multiply_tiles(o[2 * j + 1], weights, b[2], b[3]);
                }
            }

            if (NORMALISED) overlap[0] = over_columns(overlap[0]), overlap[1] = over_columns(overlap[1]);
            if (KIND == WITNESS) {
                float product[2] = {0.0f, 0.0f};
#pragma unroll
                for (int j = 0; j < E / 8; ++j) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) product[x] += o[j][2 * x] * low(dy[j][x]) + o[j][2 * x + 1] * high(dy[j][x]);
                }
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    const float whole = over_columns(product[x]);
                    if (t4 == 0 && t + 8 * x < T) {
                        against[(i64(blockIdx.y) * gridDim.x + of_head) * T + t + 8 * x] = whole;
                        if (blockIdx.y == 0) overlaps[of_head * T + t + 8 * x] = overlap[x];
                    }
                }
                continue;
            }
            float least[2] = {0.0f, 0.0f};
            if (NORMALISED && lower) {
                least[0] = t < T ? lower[t] : 0.0f;
                least[1] = t + 8 < T ? lower[t + 8] : 0.0f;
            }
            float factor[2] = {scale, scale};
            if (NORMALISED) {
#pragma unroll
                for (int x = 0; x < 2; ++x) factor[x] = scale / (lower ? max(fabsf(overlap[x]), least[x]) + eps : overlap[x]);
            }
            // y through this warp's rows of Q, which nobody needs any more, so that whole rows are written.
            __syncwarp();
            times(o, factor);
            if (skip) {
#pragma unroll
                for (int j = 0; j < E / 8; ++j) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const unsigned own = *reinterpret_cast<const unsigned*>(at<L>(V, row + 8 * x, j) + 4 * t4);
                        o[j][2 * x] += skipped * low(own), o[j][2 * x + 1] += skipped * high(own);
                    }
                }
            }
            if (z) {
#pragma unroll
                for (int j = 0; j < E / 8; ++j) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        if (t + 8 * x < T && column + 8 * j < e) {
                            const unsigned gate = *reinterpret_cast<const unsigned*>(z + (t + 8 * x) * e + column + 8 * j + 2 * t4);
                            o[j][2 * x] *= silu(low(gate)), o[j][2 * x + 1] *= silu(high(gate));
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < E / 8; ++j) {
#pragma unroll
                for (int x = 0; x < 2; ++x)
                    *reinterpret_cast<unsigned*>(at<L>(Q, row + 8 * x, j) + 4 * t4) = pack(o[j][2 * x], o[j][2 * x + 1]);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = 16 * group + 4 * i + lane / 8, piece = lane % 8;
                const i64 at_t = start(c) + r;
                if (at_t < T && column + 8 * piece < e)
                    *reinterpret_cast<uint4*>(y + at_t * e + column + 8 * piece) = *reinterpret_cast<const uint4*>(at<L>(Q, r, piece));
            }
        }
        return;
    }

    // The writers: rows first + 16 tile + g (+ 8) of S, columns 8 j + 2 t4 (+ 1).
    constexpr int TILES = D / 64;
    const int first = (warp - READERS) * 16 * TILES;
    float S[TILES][E / 8][4], n[TILES][2];  // n: a share of it, one of four lanes'
    const i64 rows = of_values * d;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const int r = first + 16 * tile + g + 8 * x;
            n[tile][x] = NORMALISED && norm && r < d && t4 == 0 ? norm[rows + r] : 0.0f;
#pragma unroll
            for (int j = 0; j < E / 8; ++j) {
                const i64 at_column = column + 8 * j + 2 * t4;
                const bool there = state && r < d && at_column < e;
                const float2 pair = there ? *reinterpret_cast<const float2*>(state + (rows + r) * e + at_column) : float2{0.0f, 0.0f};
                S[tile][j][2 * x] = pair.x, S[tile][j][2 * x + 1] = pair.y;
            }
        }
    }
    const auto leave_copy = [&](int c) {
        const i64 kept = (of_head * chunks + c) * d;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const int r = first + 16 * tile + g + 8 * x;
#pragma unroll
                for (int j = 0; j < E / 8; ++j) {
                    *reinterpret_cast<unsigned*>(at<D>(copy, r, j) + 4 * t4) = pack(S[tile][j][2 * x], S[tile][j][2 * x + 1]);
                }
                if (NORMALISED) {
                    const float whole = over_columns(n[tile][x]);
                    if (t4 == 0) norms[r] = whole;
                    if (KIND == WITNESS && t4 == 0 && blockIdx.y == 0 && r < d) all_norms[kept + r] = whole;
                }
            }
        }
        if (KIND == WITNESS) {  // this warp's rows of the copy, whole runs of 16 bytes
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4 * TILES; ++i) {
                const int r = first + 4 * i + lane / 8, piece = lane % 8;
                if (r < d && column + 8 * piece < e)
                    *reinterpret_cast<uint4*>(states + (kept + r) * e + column + 8 * piece) = *reinterpret_cast<const uint4*>(at<D>(copy, r, piece));
            }
        }
    };
    if (warp == READERS) sum_decays(decays, load_decays(w, gain, nullptr, start(0), T));
    if (chunks > 0) fetch(0);
    copies_end();
    for (int c = 0; c < chunks; ++c) {
        if (c > 0) meet(1, THREADS);
        leave_copy(c);
        copies_wait<0>();
        meet_all();
        if (c + 1 < chunks) fetch(c + 1);
        copies_end();
        char* const K = shared + c % 2 * STAGE + ROWS;
        char* const V = K + ROWS;
        const float* const sums = decays + c % 2 * SUMS;
        const bool halved = sums[3 * L] != 0.0f;
        const float all = sums[L - 1], all_rest = sums[3 * L + 1];
        const float through[2] = {power(all + all_rest, halved), power(all + all_rest, halved)};
        for (int again = 0; again <= halved; ++again) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                times(S[tile], through);
                n[tile][0] *= through[0], n[tile][1] *= through[0];
            }
        }
#pragma unroll 1  // unrolled, its loads take more registers than there are
        for (int block = 0; block < L / 16; ++block) {
            float left[4];  // what is left at the end of the chunk, of steps 2 t4, 2 t4 + 1 and eight later
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const int s = 16 * block + 8 * x + 2 * t4;
                const float2 sum = *reinterpret_cast<const float2*>(sums + s), less = *reinterpret_cast<const float2*>(sums + 2 * L + s);
                left[2 * x] = power((all - sum.x) + (all_rest - less.x), halved);
                left[2 * x + 1] = power((all - sum.y) + (all_rest - less.y), halved);
            }
            unsigned keys[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                load_tiles_turned(keys[tile], at<L>(K, 16 * block + lane / 16 * 8 + lane % 8, (first + 16 * tile) / 8 + lane / 8 % 2));
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    float k0 = low(keys[tile][x]) * left[x / 2 * 2], k1 = high(keys[tile][x]) * left[x / 2 * 2 + 1];
                    if (halved) k0 *= left[x / 2 * 2], k1 *= left[x / 2 * 2 + 1];
                    if (NORMALISED) n[tile][x % 2] += k0 + k1;
                    keys[tile][x] = pack(k0, k1);
                }
            }
#pragma unroll
            for (int j = 0; j < E / 16; ++j) {
                unsigned b[4];
                load_tiles_turned(b, at<L>(V, 16 * block + lane % 16, 2 * j + lane / 16));
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    multiply_tiles(S[tile][2 * j], keys[tile], b[0], b[1]);
                    multiply_tiles(S[tile][2 * j + 1], keys[tile], b[2], b[3]);
                }
            }
        }
        if (warp == READERS && c + 1 < chunks) sum_decays(decays + (c + 1) % 2 * SUMS, load_decays(w, gain, nullptr, start(c + 1), T));
    }
    if (KIND == WITNESS || (v_heads == 1 && h > 0)) return;  // heads that share a state have all computed it
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const int r = first + 16 * tile + g + 8 * x;
#pragma unroll
            for (int j = 0; j < E / 8; ++j) {
                const i64 at_column = column + 8 * j + 2 * t4;
                if (r < d && at_column < e)
                    *reinterpret_cast<float2*>(last + (rows + r) * e + at_column) = float2{S[tile][j][2 * x], S[tile][j][2 * x + 1]};
            }
            if (NORMALISED) {
                const float whole = over_columns(n[tile][x]);
                if (t4 == 0 && r < d && blockIdx.y == 0) last_norm[rows + r] = whole;
            }
        }
    }
}
