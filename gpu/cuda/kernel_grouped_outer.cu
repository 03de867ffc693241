// Sums of outer products by group: out[g] = sum over rows r of group g of a[r]^T b[r], a (rows, p), b (rows, q), out (groups, p, q).
//
// The idea. Rows lie sorted by group, and where a group begins is known on the device alone: a block takes a tile of one group's result and
// walks through that group's rows, 16 at a time, through shared memory. So nobody on the host needs to know how long a group is. The
// next 16 rows come into registers while these are multiplied. A thread has EACH x EACH results, in runs of 4 neighbours that lie 64
// apart, so that a warp reads shared memory without conflicts. What limits it: multiply-adds on plain cores.

using i64 = long long;

// Grid (groups x tiles of p, tiles of q), 256 threads; a tile is 16 EACH wide and high.
template <class X, int EACH>
__global__ void __launch_bounds__(256, 2)
grouped_outer(const X* a, const X* b, const i64* starts, const i64* counts, X* out, int p, int q) {
    constexpr int TILE = 16 * EACH, DEEP = 16, MINE = DEEP * TILE / 256, APART = 256 / TILE;  // rows between a thread's loads
    struct alignas(16) Run { X of[4]; };
    alignas(16) __shared__ X a_s[2][DEEP][TILE], b_s[2][DEEP][TILE];
    const int tiles = (p + TILE - 1) / TILE, group = blockIdx.x / tiles, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int p0 = blockIdx.x % tiles * TILE, q0 = blockIdx.y * TILE, across = threadIdx.x % TILE, down = threadIdx.x / TILE;
    const bool a_there = p0 + across < p, b_there = q0 + across < q;
    const X *a_at = a + (starts[group] + down) * p + p0 + across, *b_at = b + (starts[group] + down) * q + q0 + across;
    int left = int(counts[group]) - down;  // rows from the one that is loaded next
    X sums[EACH][EACH] = {}, a_next[MINE], b_next[MINE];

    auto load = [&]() {
#pragma unroll
        for (int m = 0; m < MINE; ++m) {
            a_next[m] = m * APART < left && a_there ? a_at[m * APART * p] : X(0);
            b_next[m] = m * APART < left && b_there ? b_at[m * APART * q] : X(0);
        }
        a_at += i64(DEEP) * p, b_at += i64(DEEP) * q, left -= DEEP;
    };
    auto keep = [&](int buffer) {
#pragma unroll
        for (int m = 0; m < MINE; ++m) {
            a_s[buffer][m * APART + down][across] = a_next[m];
            b_s[buffer][m * APART + down][across] = b_next[m];
        }
    };

    load();
    keep(0);
    __syncthreads();
    int buffer = 0;
    for (int steps = (int(counts[group]) + DEEP - 1) / DEEP; steps > 0; --steps, buffer ^= 1) {
        load();
#pragma unroll
        for (int r = 0; r < DEEP; ++r) {
            Run of_a[EACH / 4], of_b[EACH / 4];
#pragma unroll
            for (int i = 0; i < EACH / 4; ++i) {
                of_a[i] = *reinterpret_cast<const Run*>(&a_s[buffer][r][64 * i + 4 * y]);
                of_b[i] = *reinterpret_cast<const Run*>(&b_s[buffer][r][64 * i + 4 * x]);
            }
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
#pragma unroll
                for (int j = 0; j < EACH; ++j) sums[i][j] += of_a[i / 4].of[i % 4] * of_b[j / 4].of[j % 4];
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
