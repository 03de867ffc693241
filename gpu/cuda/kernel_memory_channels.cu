// A matrix memory with a decay of each channel of the key, on tensor cores, in one pass over the data.
//
//     S_t = diag(e^{w_t}) S_(t-1) + k_t v_t^T,      y_t = c S_t^T q_t
//
// The idea. In blocks of 16 steps, one after the other. With F_t = e^{w_0 + ... + w_t} and K_s = e^{w_(s+1) + ... + w_15}, of each channel,
//     Y = (Q F) S + M V,      S_next = F_15 S + (K K_s)^T V,      M_ts = sum over i of q_ti k_si e^{w_(s+1)i + ... + w_ti}
// and no exponent is above 0 unless a decay is: nothing is divided by a decay, which may be 0.
//
// M, without exponents above 0 either. Cut the block in halves: for t in the second and s in the first, the exponent is a sum up to the
// middle and one from there, a factor of k_s and a factor of q_t: an 8 x 8 product. Each half is cut again, and so on; what is left are
// pairs of neighbours and the diagonal. The products of all pieces of a size are one, of which only the squares on the diagonal are
// wanted. Decays of a level are products of those of the one below.
//
// A block of threads takes one head of one sequence and 128 values. Eight of its warps, the readers, own 16 values each: S^T in float32
// in registers, as results of its products; rounded in pairs they are the right operand of Q S. So S stays where it is, and readers
// need nothing of each other. Eight warps prepare, in two groups that take turns: two warps of a group fade the queries, two the keys,
// two channels a thread, from global memory into registers; all four then multiply. They leave faded queries and keys, M and the whole
// decay in one of four stages of shared memory. Barriers by number say that a stage is full, and that it has been read.
//
// What limits it: docs/gpu/chunkwise.md.
#include "block_memory.cuh"

constexpr int STEPS = 16, VALUES = 128;  // of a block of steps; of a block of threads
constexpr int READERS = 8, GROUPS = 2, GROUP = 128, STAGES = 4;
constexpr int ALL = 32 * READERS + GROUP * GROUPS;
constexpr int READING = 32 * READERS + GROUP;  // who meets at a stage
constexpr int FULL = 1, EMPTY = FULL + STAGES, OWN = EMPTY + STAGES;  // barriers of the stages and of the groups
constexpr int KEPT = 64;  // steps between two states that are kept

template <int D> struct Stage {  // bytes from its start; Q and K first
    static constexpr int K = STEPS * D * 2, V = 2 * K, M = V + STEPS * VALUES * 2, DECAY = M + STEPS * STEPS * 2, BYTES = DECAY + 4 * D;
};
// Tiles of 8 rows: queries of second halves, keys of first halves, by what a half is; and queries and keys as they are.
enum Tile { Q8, Q4, Q2, Q1, K8, K4, K2, K_EVEN, Q_EVEN, Q_ODD, K_ODD, TILES };

// Where the weight of value s at step t lies.
__device__ __forceinline__ int weight(int M, int t, int s) { return M + 32 * t + ((s / 8 ^ t / 4 % 2) << 4) + s % 8 * 2; }

// d += left right^T over all channels, of tiles by number; rows 8 to 15 of the result are those of `below`, if there is one.
template <int D, int LEFT, int RIGHT, int BELOW = TILES> __device__ __forceinline__ void match(float (&d)[4], char* tiles) {
    const int lane = threadIdx.x % 32, place = at<8>(nullptr, lane % 8, lane / 8) - static_cast<char*>(nullptr);
    char* const from_even = tiles + place;
    char* const from_odd = from_even + (place & 64 ? -64 : 64);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
        char* const from = (i % 2 ? from_odd : from_even) + i / 2 * 1024;  // at<8>(tiles, lane % 8, 4 i + lane / 8)
        unsigned a[4], b[4], c[4] = {};
        load_tiles(a, from + LEFT * 16 * D);
        load_tiles(b, from + RIGHT * 16 * D);
        if (BELOW < TILES) load_tiles(c, from + BELOW * 16 * D);
        const unsigned first[4] = {a[0], c[0], a[1], c[1]}, second[4] = {a[2], c[2], a[3], c[3]};
        multiply_tiles(d, first, b[0], b[1]);
        multiply_tiles(d, second, b[2], b[3]);
    }
}

// Two channels of a block's steps: factors of each level, from neighbours to the whole block, and what they are factors of.
struct Two {
    float x, y;
};
__device__ __forceinline__ Two operator*(Two a, Two b) { return {a.x * b.x, a.y * b.y}; }
__device__ __forceinline__ Two both(unsigned x) { return {low(x), high(x)}; }
__device__ __forceinline__ Two fades(unsigned w) { return {exp2_fast(low(w) * LOG2E), exp2_fast(high(w) * LOG2E)}; }
__device__ __forceinline__ unsigned pack(Two x) { return pack(x.x, x.y); }

// Of two results side by side, each lane's neighbours in a row: of four neighbours of the first result (lanes of even number) or of the
// second, so that four lanes write whole sectors of 32 bytes.
__device__ __forceinline__ uint2 exchanged(unsigned first, unsigned second) {
    const bool odd = threadIdx.x % 2;
    const unsigned other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
    return odd ? uint2{other, second} : uint2{first, other};
}

// q (G, q_heads, T, d), k and w (G, k_heads, T, d), v (G, v_heads, T, e), all bfloat16; state and last (G, v_heads, d, e); y (G, heads, T, e);
// an array's heads are `heads` or 1. Without `state` it is 0. d and e are multiples of 8, rows start at multiples of 16 bytes.
// Grid: (G heads, tiles of 128 values).
// As GRADIENT also backwards in time (`back`), then the decays of a step are those of the one after it; state and last are (G heads, d, e),
// and the transposes of the states that enter each 64 steps are kept, (G heads, T / 64, e, d), where `states` is not null; y may be null.
template <int D, bool GRADIENT>
__global__ void __launch_bounds__(ALL, 1)
memory_channels(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* w, const float* state,
                __nv_bfloat16* y, float* last, __nv_bfloat16* states, i64 T, int d, int e, int heads, int q_heads, int k_heads, int v_heads,
                int w_heads, float scale, int backwards) {
    const bool back = GRADIENT && backwards, reads = !GRADIENT || y;
    constexpr int TILE = 8 * D * 2, ROOM = Stage<D>::BYTES;
    will_come(FULL, 2 * STAGES, READING), will_come(OWN, GROUPS, GROUP);
    extern __shared__ double memory[];
    char* const shared = reinterpret_cast<char*>(memory);

    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);  // the same for all lanes, and known to be
    const int lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const i64 of_head = blockIdx.x, G = of_head / heads, h = of_head % heads;
    const i64 of_values = G * v_heads + (v_heads > 1 ? h : 0);
    const int blocks = int((T + STEPS - 1) / STEPS);
    const auto taken = [&](int b) { return back ? blocks - 1 - b : b; };  // the b-th block that is taken

    if (warp >= READERS) {
        const int group = (warp - READERS) / 4, part = (warp - READERS) % 4, i = threadIdx.x % GROUP, channel = 2 * (i % 64);
        const bool of_keys = part >= 2, mine = channel < D, there = channel < d;
        char* const tiles = shared + STAGES * ROOM + group * TILES * TILE;
        w += (G * w_heads + (w_heads > 1 ? h : 0)) * T * d + (there ? channel : 0);
        const __nv_bfloat16* const all_queries = q + (G * q_heads + (q_heads > 1 ? h : 0)) * T * d;
        const __nv_bfloat16* const all_keys = k + (G * k_heads + (k_heads > 1 ? h : 0)) * T * d;
        const __nv_bfloat16* const x = (of_keys ? all_keys : all_queries) + (there ? channel : 0);
        const int row = i / 16, column = int(blockIdx.y) * VALUES + i % 16 * 8;  // of what this thread copies of V
        v += of_values * T * e + column;

        unsigned rows[STEPS], decays[STEPS];  // of queries or keys
        const auto fetch = [&](int b) {
            const i64 t0 = i64(taken(b)) * STEPS;
            const int end = int(min(T - 1 - t0, i64(STEPS)));  // the last step there is
            const __nv_bfloat16 *at_x = x + t0 * d, *at_w = w + t0 * d;
            const auto word = [](const __nv_bfloat16* from, int at) { return *reinterpret_cast<const unsigned*>(from + at); };
            if (end >= STEPS - 1 + back && d == D) {
#pragma unroll
                for (int r = 0; r < STEPS; ++r) {
                    const int step = back ? STEPS - 1 - r : r;
                    rows[r] = word(at_x, step * D), decays[r] = word(at_w, (step + back) * D);
                }
                return;
            }
#pragma unroll
            for (int r = 0; r < STEPS; ++r) {
                const int step = back ? STEPS - 1 - r : r;
                rows[r] = word(at_x, min(step, end) * d), decays[r] = word(at_w, min(step + back, end) * d);
            }
            if (end < STEPS - 1 + back || !there) {
#pragma unroll
                for (int r = 0; r < STEPS; ++r) {
                    const int step = back ? STEPS - 1 - r : r;
                    if (step > end || !there) rows[r] = 0u;
                    if (step + back > end || !there) decays[r] = 0u;
                }
            }
        };
        // Where this lane's part of M goes: two neighbours within a square on the diagonal, and what is at (2 g, 2 g), with the row below.
        const int size = 8 >> part, square = g / (size);
        const bool wanted = part < 3 && square == 2 * t4 / (size);
        const int to_square = weight(Stage<D>::M, 2 * size * square + size + g % (size), 2 * size * square + 2 * t4 % (size));
        const int to_diagonal = weight(Stage<D>::M, 2 * g, 2 * g);
        // Nobody writes to M above the diagonal.
        *reinterpret_cast<unsigned*>(shared + group * ROOM + Stage<D>::M + 4 * i) = 0u;
        *reinterpret_cast<unsigned*>(shared + (group + GROUPS) * ROOM + Stage<D>::M + 4 * i) = 0u;
        if (group < blocks) fetch(group);
        for (int b = group; b < blocks; b += GROUPS) {
            char* const stage = shared + b % STAGES * ROOM;
            meet(b < STAGES ? OWN + group : EMPTY + b % STAGES, b < STAGES ? GROUP : READING);
            const i64 t0 = i64(taken(b)) * STEPS;
#pragma unroll
            for (int r = row; r < STEPS; r += 8) {
                const i64 t = t0 + (back ? STEPS - 1 - r : r);
                const bool in = t < T && column < e;
                copy16(at<STEPS>(stage + Stage<D>::V, r, i % 16), in ? v + t * e : v, in);
            }
            copies_end();
            const int piece = channel / 8, within = channel % 8 * 2;
            const auto put = [&](int tile, int r, unsigned x) {
                if (reads) *reinterpret_cast<unsigned*>(at<8>(tiles + tile * TILE, r, piece) + within) = x;
            };
            const auto leave = [&](char* tile, int r, Two x) { *reinterpret_cast<unsigned*>(at<STEPS>(tile, r, piece) + within) = pack(x); };
            if (mine && !of_keys) {
                Two since[STEPS];  // from the start of a piece to the step
#pragma unroll
                for (int r = 0; r < STEPS; ++r) {
                    since[r] = fades(decays[r]);
                    put(r % 2 ? Q_ODD : Q_EVEN, r / 2, rows[r]);
                }
#pragma unroll
                for (int level = 0; level < 4; ++level) {
                    const int size = 1 << level;
#pragma unroll
                    for (int r = 0; r < STEPS; ++r) {
                        if (r / size % 2 == 0) continue;
                        put(Q1 - level, r / (2 * size) * size + r % size, pack(both(rows[r]) * since[r]));
                        since[r] = since[r] * since[r / size * size - 1];
                    }
                }
#pragma unroll
                for (int r = 0; r < STEPS; ++r) leave(stage, r, both(rows[r]) * since[r]);
                *reinterpret_cast<Two*>(stage + Stage<D>::DECAY + 4 * channel) = since[STEPS - 1];
            }
            if (mine && of_keys) {
                Two until[STEPS], whole[STEPS / 2];  // after the step, to the end of a piece; of each piece
#pragma unroll
                for (int r = 0; r < STEPS; r += 2) {
                    until[r] = fades(decays[r + 1]), until[r + 1] = {1.0f, 1.0f}, whole[r / 2] = fades(decays[r]) * until[r];
                    put(K_EVEN, r / 2, rows[r]), put(K_ODD, r / 2, rows[r + 1]);
                }
#pragma unroll
                for (int level = 1; level < 4; ++level) {
                    const int size = 1 << level;
#pragma unroll
                    for (int r = 0; r < STEPS; ++r) {
                        if (r / size % 2) continue;
                        put(K_EVEN - level, r / (2 * size) * size + r % size, pack(both(rows[r]) * until[r]));
                        until[r] = until[r] * whole[r / size + 1];
                    }
#pragma unroll
                    for (int i = 0; i < STEPS / 4; ++i) {
                        if (i < STEPS / size / 2) whole[i] = whole[2 * i] * whole[2 * i + 1];
                    }
                }
#pragma unroll
                for (int r = 0; r < STEPS; ++r) leave(stage + Stage<D>::K, r, both(rows[r]) * until[r]);
            }
            if (b + GROUPS < blocks) fetch(b + GROUPS);
            __syncwarp();
            meet(OWN + group, GROUP);
            float m[4] = {}, own[4] = {};
            if (reads) {
                if (part == 0) match<D, Q8, K8>(m, tiles);
                if (part == 1) match<D, Q4, K4>(m, tiles);
                if (part == 2) match<D, Q2, K2>(m, tiles), match<D, Q_ODD, K_ODD>(own, tiles);
                if (part == 3) match<D, Q1, K_EVEN, Q_EVEN>(m, tiles);
            }
            if (wanted) *reinterpret_cast<unsigned*>(stage + to_square) = pack(m[0], m[1]);
            if (part >= 2 && g / 2 == t4) {
                __nv_bfloat16* const diagonal = reinterpret_cast<__nv_bfloat16*>(stage + to_diagonal);
                if (part == 2) diagonal[STEPS + 1] = __float2bfloat16_rn(g % 2 ? own[1] : own[0]);
                if (part == 3) diagonal[STEPS] = __float2bfloat16_rn(g % 2 ? m[1] : m[0]), diagonal[0] = __float2bfloat16_rn(g % 2 ? m[3] : m[2]);
            }
            copies_wait<0>();
            __syncwarp();  // a barrier is for whole warps
            pass(FULL + b % STAGES, READING);
        }
        return;
    }

    // The readers: values first + g (+ 8) of S^T, channels 8 j + 2 t4 (+ 1).
    const i64 first = i64(blockIdx.y) * VALUES + 16 * warp;
    const i64 rows = (GRADIENT ? of_head : of_values) * d;
    float S[D / 8][4];
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const i64 channel = 8 * j + 2 * t4 + x % 2, value = first + g + x / 2 * 8;
            S[j][x] = state && channel < d && value < e ? state[(rows + channel) * e + value] : 0.0f;
        }
    }
    if (reads) y += of_head * T * e + first + 8 * (t4 % 2) + 2 * (t4 - t4 % 2);
    const int kept_chunks = int((T + KEPT - 1) / KEPT);
    for (int b = 0; b < blocks; ++b) {
        char* const stage = shared + b % STAGES * ROOM;
        if (GRADIENT && states && (back ? b == 0 || taken(b) % (KEPT / STEPS) == KEPT / STEPS - 1 : b % (KEPT / STEPS) == 0)) {
            __nv_bfloat16* const to = states + (of_head * kept_chunks + taken(b) / (KEPT / STEPS)) * d * e + 8 * (t4 % 2) + 2 * (t4 - t4 % 2);
#pragma unroll
            for (int j = 0; j < D / 8; j += 2) {
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    const i64 value = first + g + 8 * x;
                    const uint2 four = exchanged(pack(S[j][2 * x], S[j][2 * x + 1]), pack(S[j + 1][2 * x], S[j + 1][2 * x + 1]));
                    if (8 * (j + t4 % 2) < d && value < e) *reinterpret_cast<uint2*>(to + value * d + 8 * j) = four;
                }
            }
        }
        __syncwarp();
        meet(FULL + b % STAGES, READING);
        float o[4][4] = {};  // sums over odd and even i by themselves: shorter chains
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            if (!reads) break;
            unsigned queries[4];
            load_tiles(queries, at<STEPS>(stage, lane % 16, 2 * i + lane / 16));
            multiply_tiles(o[i % 2 * 2], queries, pack(S[2 * i][0], S[2 * i][1]), pack(S[2 * i + 1][0], S[2 * i + 1][1]));
            multiply_tiles(o[i % 2 * 2 + 1], queries, pack(S[2 * i][2], S[2 * i][3]), pack(S[2 * i + 1][2], S[2 * i + 1][3]));
        }
        unsigned weights[4], values[4];
        load_tiles(weights, stage + weight(Stage<D>::M, lane % 16, lane / 16 * 8));
        load_tiles_turned(values, at<STEPS>(stage + Stage<D>::V, lane % 16, 2 * warp + lane / 16));
        multiply_tiles(o[0], weights, values[0], values[1]);
        multiply_tiles(o[1], weights, values[2], values[3]);
        const unsigned turned[4] = {values[0], values[2], values[1], values[3]};
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            unsigned keys[4];
            load_tiles_turned(keys, at<STEPS>(stage + Stage<D>::K, lane % 16, 2 * i + lane / 16));
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const Two by = *reinterpret_cast<const Two*>(stage + Stage<D>::DECAY + 4 * (16 * i + 8 * x + 2 * t4));
                float (&tile)[4] = S[2 * i + x];
                tile[0] *= by.x, tile[1] *= by.y, tile[2] *= by.x, tile[3] *= by.y;
                multiply_tiles(tile, turned, keys[2 * x], keys[2 * x + 1]);
            }
        }
        if (b + STAGES < blocks) pass(EMPTY + b % STAGES, READING);
        if (!reads) continue;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const i64 t = i64(taken(b)) * STEPS + (back ? STEPS - 1 - g - 8 * x : g + 8 * x);
            const uint2 four = exchanged(pack((o[0][2 * x] + o[2][2 * x]) * scale, (o[0][2 * x + 1] + o[2][2 * x + 1]) * scale),
                                         pack((o[1][2 * x] + o[3][2 * x]) * scale, (o[1][2 * x + 1] + o[3][2 * x + 1]) * scale));
            if (t < T && first + 8 * (t4 % 2) < e) *reinterpret_cast<uint2*>(y + t * e) = four;
        }
    }
    if (!GRADIENT && v_heads == 1 && h > 0) return;  // heads that share a state have all computed it
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const i64 channel = 8 * j + 2 * t4 + x % 2, value = first + g + x / 2 * 8;
            if (channel < d && value < e) last[(rows + channel) * e + value] = S[j][x];
        }
    }
}
