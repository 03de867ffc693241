// Sums of outer products by group: out[g] = sum over rows r of group g of a[r]^T b[r], a (rows, p), b (rows, q), out (groups, p, q).
//
// The idea. Rows lie sorted by group, and where a group begins is known on the device alone: a block takes a tile of 64 x 64 of
// one group's result and walks through that group's rows, 16 at a time, through shared memory; a thread has 4 x 4 results. So nobody on the
// host needs to know how long a group is. What limits it: multiply-adds on plain cores.

using i64 = long long;

template <class X>
__global__ void __launch_bounds__(256)
grouped_outer(const X* a, const X* b, const i64* starts, const i64* counts, X* out, int p, int q) {
    constexpr int TILE = 64, DEEP = 16;
    __shared__ X a_s[DEEP][TILE], b_s[DEEP][TILE];
    const int x = threadIdx.x % 16, y = threadIdx.x / 16, p0 = blockIdx.y * TILE, q0 = blockIdx.z * TILE;
    const i64 first = starts[blockIdx.x], count = counts[blockIdx.x];
    X sums[4][4] = {};
    for (i64 r0 = 0; r0 < count; r0 += DEEP) {
        for (int at = threadIdx.x; at < DEEP * TILE; at += 256) {
            const int r = at / TILE, i = at % TILE;
            const bool inside = r0 + r < count;
            a_s[r][i] = inside && p0 + i < p ? a[(first + r0 + r) * p + p0 + i] : X(0);
            b_s[r][i] = inside && q0 + i < q ? b[(first + r0 + r) * q + q0 + i] : X(0);
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < DEEP; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] += a_s[r][y * 4 + i] * b_s[r][x * 4 + j];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = p0 + y * 4 + i, column = q0 + x * 4 + j;
            if (row < p && column < q) out[(i64(blockIdx.x) * p + row) * q + column] = sums[i][j];
        }
    }
}
