// The states of a matrix memory before each chunk of 64 steps, or backwards the cotangents of those after it: the walk of its gradient
// (kernel_memory_gradient.cu), which keeps nothing else.
//
// The idea. A block has 64 values of one head of one sequence; a warp has 16 rows of S in registers, all chunks long. Three chunks are under way to
// shared memory while one is at work. Keys fade in registers, between shared memory and tensor cores.
// What limits it: memory. ncu: 76% of its cycles with DRAM at work, 5.3 TB/s out of the cache, for heads read the keys they share one by one.
#include "block_memory_gradient.cuh"

constexpr int STAGES = 3;

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
            add_product(S, a, V, block * BLOCK);
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
