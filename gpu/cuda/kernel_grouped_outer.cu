// Sums of outer products by group: out[g] = sum over rows r of group g of a[r]^T b[r], a (rows, p), b (rows, q), out (groups, p, q).
//
// The idea. Rows lie sorted by group, and where a group begins is known on the device alone: a block takes a tile of one group's result and
// walks through that group's rows, 16 at a time, through shared memory. So nobody on the host needs to know how long a group is. The next 16
// rows come into registers while these are multiplied. A thread has EACH x EACH results, in runs of 4 neighbours that lie 64 apart, so that
// a warp reads shared memory without conflicts. What limits it: multiply-adds on plain cores.

using i64 = long long;

// Grid (groups x tiles of p, tiles of q), 256 threads; a tile is 16 EACH wide and high.
template <class X, int EACH>
__global__ void __launch_bounds__(256, 2)
grouped_outer(const X* a, const X* b, const i64* starts, const i64* counts, X* out, int p, int q) {
    constexpr int TILE = 16 * EACH, DEEP = 16, MINE = DEEP * TILE / 256;
    struct alignas(16) Run { X of[4]; };
    alignas(16) __shared__ X a_s[2][DEEP][TILE], b_s[2][DEEP][TILE];
    const int tiles = (p + TILE - 1) / TILE, group = blockIdx.x / tiles, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int p0 = blockIdx.x % tiles * TILE, q0 = blockIdx.y * TILE;
    const i64 first = starts[group], count = counts[group];
    X sums[EACH][EACH] = {}, a_next[MINE], b_next[MINE];

    auto load = [&](i64 r0) {
#pragma unroll
        for (int m = 0; m < MINE; ++m) {
            const int at = m * 256 + threadIdx.x, i = at % TILE;
            const i64 r = r0 + at / TILE;
            a_next[m] = r < count && p0 + i < p ? a[(first + r) * p + p0 + i] : X(0);
            b_next[m] = r < count && q0 + i < q ? b[(first + r) * q + q0 + i] : X(0);
        }
    };
    auto keep = [&](int buffer) {
#pragma unroll
        for (int m = 0; m < MINE; ++m) {
            const int at = m * 256 + threadIdx.x;
            a_s[buffer][at / TILE][at % TILE] = a_next[m];
            b_s[buffer][at / TILE][at % TILE] = b_next[m];
        }
    };

    load(0);
    keep(0);
    __syncthreads();
    int buffer = 0;
    for (i64 r0 = 0; r0 < count; r0 += DEEP, buffer ^= 1) {
        load(r0 + DEEP);
#pragma unroll
        for (int r = 0; r < DEEP; ++r) {
            Run left[EACH / 4], right[EACH / 4];
#pragma unroll
            for (int i = 0; i < EACH / 4; ++i) {
                left[i] = *reinterpret_cast<const Run*>(&a_s[buffer][r][64 * i + 4 * y]);
                right[i] = *reinterpret_cast<const Run*>(&b_s[buffer][r][64 * i + 4 * x]);
            }
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
#pragma unroll
                for (int j = 0; j < EACH; ++j) sums[i][j] += left[i / 4].of[i % 4] * right[j / 4].of[j % 4];
            }
        }
        keep(buffer ^ 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int row = p0 + i / 4 * 64 + 4 * y + i % 4, column = q0 + j / 4 * 64 + 4 * x + j % 4;
            if (row < p && column < q) out[(i64(group) * p + row) * q + column] = sums[i][j];
        }
    }
}
