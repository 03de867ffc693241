// A gradient of what heads share, of each head by itself, summed.
#include "block_memory.cuh"

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
