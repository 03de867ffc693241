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

// 64 x WIDTH numbers from `column` on of rows of `width`, of which the first `rows` are there, the last first if `back`; zeros outside.
// A whole tile is copied without asking for each piece.
template <int WIDTH>
__device__ __forceinline__ void stage(char* tile, const __nv_bfloat16* from, i64 rows, int width, int column, bool back = false) {
    constexpr int STEP = THREADS / (WIDTH / 8);  // a multiple of 8, so that the pieces of a thread stand in one column of the tile
    const int first = threadIdx.x / (WIDTH / 8), p = threadIdx.x % (WIDTH / 8), at_column = column + 8 * p;
    char* const to = at<L>(tile, first, p);
    const int r = back ? L - 1 - first : first, step = back ? -STEP : STEP;
    if (rows >= L && column + WIDTH <= width) {
        from += r * width + at_column;
#pragma unroll
        for (int i = 0; i < L; i += STEP) {
            copy16(to + i * 128, from);
            from += step * width;
        }
    } else {
#pragma unroll 1
        for (int i = 0, x = r; i < L; i += STEP, x += step) {
            const bool there = x < rows && at_column < width;
            copy16(to + i * 128, there ? from + x * width + at_column : from, there);
        }
    }
}

// 2^a. Where exponents are halved numbers are multiplied by it twice: no infinity on the way to what is none.
__device__ __forceinline__ float power(float a, bool halved) { return exp2_fast(halved ? min(a, 127.0f) : a); }

// One warp: of the decays and gains of steps 2 lane and 2 lane + 1 of a chunk, what all others need.
// Backwards, a step's decay is that of the one after it.
__device__ __forceinline__ void sum_decays(float* sums, const float* w_of, const float* gain_of, i64 t0, i64 T, bool back = false,
                                           bool of_queries = false) {
    const int lane = threadIdx.x % 32;
    float w[2], gain[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const i64 t = t0 + (back ? L - 1 - 2 * lane - i : 2 * lane + i);
        w[i] = w_of && t + back < T ? w_of[t + back] : 0.0f;
        gain[i] = gain_of && t < T ? gain_of[t] : 0.0f;
    }
    double first = w[0] < -4096.0f ? -4096.0 : double(w[0]), both = first + (w[1] < -4096.0f ? -4096.0 : double(w[1]));
    float rise = max(w[0], 0.0f) + max(w[1], 0.0f) + max(max(gain[0], gain[1]), 0.0f);
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
        const float more = gain[i] * float(unit);
        sums[L + 2 * lane + i] = of_queries ? rest + more : rest;
        sums[2 * L + 2 * lane + i] = of_queries ? rest : rest - more;
    }
    if (lane == 31) sums[3 * L] = halved ? 1.0f : 0.0f, sums[3 * L + 1] = float(of[1] - double(float(of[1])));
}
