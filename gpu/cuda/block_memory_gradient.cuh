// What the kernels of a matrix memory's gradient share (kernel_memory_gradient.cu says how): what they tell each other, and what a warp does.
#pragma once
#include "block_memory.cuh"

constexpr int WARPS = 16, CROWD = 32 * WARPS;  // of `memory_gradient`
constexpr int OUT = 16 * 128;  // bytes of a warp's 16 rows on their way out

// Of a chunk of a head: sums of its decays, their rests with a query's factor and without a key's, what fades a query's read of S (with c) and
// what a key leaves at the end, the keys' factors, what queries add to P, and the decay of all steps. Exponents are at most 127.
struct alignas(16) Told {
    float sums[L], rows[L], columns[L], since[L], left[L], gains[L], of_n[L], all[4];
};

// What its pairs and states are worth, in parts: column sums of z of 16 queries, what dw_r gets of 16 queries' own steps, and so on.
struct alignas(16) Found {
    float column[4][L], corner[8][16], from_state[2][L], to_state[2][L], kept[16], diagonal[8];
};

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

// Products of 16 rows, `a`, with 16 rows of which `right` is the place: two tiles of what they have in common.
__device__ __forceinline__ void add_overlaps(float (&x)[4], float (&y)[4], const unsigned (&a)[4], Place right) {
    unsigned b[4];
    load_tiles(b, right);
    multiply_tiles(x, a, b[0], b[1]);
    multiply_tiles(y, a, b[2], b[3]);
}
// 16 columns of weights, `a`, times 8 N numbers of each of 16 rows, `away` from where `rows` is the place.
template <int N> __device__ __forceinline__ void add_product(float (&sum)[N][4], const unsigned (&a)[4], Place rows, int away) {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
        unsigned b[4];
        load_tiles_turned(b, (rows ^ 32 * j) + away);
        multiply_tiles(sum[2 * j], a, b[0], b[1]);
        multiply_tiles(sum[2 * j + 1], a, b[2], b[3]);
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
        for (int i = 0; i < E / 16; ++i) add_overlaps(x[0], x[1], a[i], (state ^ 32 * i) + j * BLOCK);
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
