// What the kernels of a matrix memory on tensor cores share: tiles of 64 steps, and exponents of decays (kernel_memory.cu says how).
#pragma once
#include <block_tensor.cuh>  // the host has another

constexpr int L = 64, E = 64, THREADS = 256;  // steps of a chunk, values of a tile, threads of a block
constexpr int SUMS = 200;  // floats of a chunk's decays: sums, rests at rows, rests at columns, whether exponentials are halved, the last rest
constexpr float LOG2E = 1.44269504088896341f;

// Where piece p of row r of a tile with so many rows lies.
template <int ROWS> __device__ __forceinline__ char* at(char* tile, int r, int p) {
    return tile + (p / 8 * ROWS + r) * 128 + ((p % 8 ^ r % 8) << 4);
}

// Where a lane's row of the first 16 x 16 numbers of a tile lies, from the tile's start on: for a left operand, or a right one that is turned;
// and for a right operand, or a left one turned. 16 columns more are ^ 32, 16 rows more + BLOCK, 64 columns more + PANEL.
constexpr int BLOCK = 16 * 128, PANEL = L * 128;
__device__ __forceinline__ int across(int lane) { return lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4); }
__device__ __forceinline__ int along(int lane) { return (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2 ^ lane % 8) << 4); }

// 64 x WIDTH numbers from `column` on of rows of `width`, of which the first `rows` are there; zeros outside.
// A whole tile is copied without asking for each piece.
template <int WIDTH, int COUNT = THREADS>
__device__ __forceinline__ void stage(char* tile, const __nv_bfloat16* from, i64 rows, int width, int column) {
    constexpr int STEP = COUNT / (WIDTH / 8);  // a multiple of 8, so that the pieces of a thread stand in one column of the tile
    const int first = threadIdx.x / (WIDTH / 8), p = threadIdx.x % (WIDTH / 8), at_column = column + 8 * p;
    char* const to = at<L>(tile, first, p);
    if (rows >= L && column + WIDTH <= width) {
        from += first * width + at_column;
#pragma unroll
        for (int i = 0; i < L; i += STEP) {
            copy16(to + i * 128, from);
            from += STEP * width;
        }
    } else {
#pragma unroll 1
        for (int i = 0, x = first; i < L; i += STEP, x += STEP) {
            const bool there = x < rows && at_column < width;
            copy16(to + i * 128, there ? from + x * width + at_column : from, there);
        }
    }
}

// 2^a. Where exponents are halved numbers are multiplied by it twice: no infinity on the way to what is none.
__device__ __forceinline__ float power(float a, bool halved) { return exp2_fast(halved ? min(a, 127.0f) : a); }

// A lane's two steps of a chunk: decays, and logarithms of factors of keys and of queries.
struct Decays {
    float w[2], of_key[2], of_query[2];
};
__device__ __forceinline__ Decays load_decays(const float* w, const float* of_key, const float* of_query, i64 t0, i64 T) {
    Decays x;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const i64 t = t0 + 2 * (threadIdx.x % 32) + i;
        x.w[i] = w && t < T ? w[t] : 0.0f;
        x.of_key[i] = of_key && t < T ? of_key[t] : 0.0f;
        x.of_query[i] = of_query && t < T ? of_query[t] : 0.0f;
    }
    return x;
}

// One warp: of the decays and factors of a chunk, what all others need.
__device__ __forceinline__ void sum_decays(float* sums, const Decays& x) {
    const int lane = threadIdx.x % 32;
    double first = x.w[0] < -4096.0f ? -4096.0 : double(x.w[0]), both = first + (x.w[1] < -4096.0f ? -4096.0 : double(x.w[1]));
    float rise = max(x.w[0], 0.0f) + max(x.w[1], 0.0f) + max(max(x.of_key[0], x.of_key[1]), 0.0f) + max(max(x.of_query[0], x.of_query[1]), 0.0f);
    double upto = both;
#pragma unroll
    for (int away = 1; away < 32; away *= 2) {
        const double before = __shfl_up_sync(0xffffffffu, upto, away);
        upto += lane >= away ? before : 0.0;
        rise += __shfl_xor_sync(0xffffffffu, rise, away);
    }
    const bool halved = rise * LOG2E > 120.0f;
    const double unit = halved ? 0.72134752044448170 : 1.44269504088896341;
    const double of[2] = {(upto - both + first) * unit, upto * unit};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float sum = float(of[i]), rest = float(of[i] - double(sum));
        sums[2 * lane + i] = sum;
        sums[L + 2 * lane + i] = rest + x.of_query[i] * float(unit);
        sums[2 * L + 2 * lane + i] = rest - x.of_key[i] * float(unit);
    }
    if (lane == 31) sums[3 * L] = halved ? 1.0f : 0.0f, sums[3 * L + 1] = float(of[1] - double(float(of[1])));
}

// Tiles of a result times a factor of each of the lane's two rows.
template <int N> __device__ __forceinline__ void times(float (&tiles)[N][4], const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) tiles[j][x] *= factor[x / 2];
    }
}

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
