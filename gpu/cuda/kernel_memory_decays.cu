// Decays of a matrix memory's chunks, for its gradient (kernel_memory_gradient.cu): what they make of each step is told before, and what was found
// of their own gradient is put together after. A warp has a chunk of a head, two steps a lane, and sums by scans. What limits them: bytes.
#include "block_memory_gradient.cuh"

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
