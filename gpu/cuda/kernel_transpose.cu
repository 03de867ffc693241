// Matrices transposed, and their numbers converted on the way: to[b, c, r] = from[b, r, c].
//
// The idea. A block of 256 threads moves a tile of 64 by 64 through shared memory, so that both sides are read and written along
// their contiguous axis, 64 neighbours at a time; rows of 65 words keep the columns in different banks. Sixteen loads of a thread
// are in flight. What limits it: device memory.
#include "numbers.cuh"

template <class From, class To>
__global__ void __launch_bounds__(256)
transpose(const From* from, To* to, i64 batch, i64 rows, i64 columns, i64 batch_stride, i64 row_stride) {
    constexpr int TILE = 64;
    __shared__ Arithmetic<To> tile[TILE][TILE + 1];
    const int x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const i64 r0 = blockIdx.x * i64(TILE), across = (columns + TILE - 1) / TILE;
    for (i64 at = blockIdx.y; at < across * batch; at += gridDim.y) {
        const i64 b = at / across, c0 = at % across * TILE;
        const From* in = from + b * batch_stride;
        To* out = to + b * rows * columns;
#pragma unroll
        for (int i = 0; i < TILE; i += 4) {
            if (r0 + y + i < rows && c0 + x < columns) tile[y + i][x] = widen(in[(r0 + y + i) * row_stride + c0 + x]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE; i += 4) {
            if (c0 + y + i < columns && r0 + x < rows) out[(c0 + y + i) * rows + r0 + x] = narrow<To>(tile[x][y + i]);
        }
        __syncthreads();
    }
}
