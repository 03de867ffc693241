// Queues: the number of each row in its group, in the order of the rows, and how many rows each group has.
//
// The idea. A block takes one group of one entry of the batch and reads that entry's rows from first to last, 4096 at a time, 4 neighbours a
// thread; those that are its own get the running count. Every row is read once for each group, from the cache; nothing is sorted, and
// nobody waits for the host. What limits it: for few groups latency, for many the reads.

using i64 = long long;

constexpr int EACH = 4, WARPS = 32;

// group (entries, rows), place likewise, counts (entries, groups); grid (groups, entries), 1024 threads.
__global__ void __launch_bounds__(32 * WARPS) places(const i64* group, i64* place, i64* counts, i64 rows, int groups) {
    __shared__ int totals[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 first = blockIdx.y * rows;
    i64 before = 0;
    for (i64 r0 = 0; r0 < rows; r0 += 32 * WARPS * EACH) {
        const i64 r = r0 + threadIdx.x * EACH;
        bool mine[EACH];
        int own = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            mine[i] = r + i < rows && group[first + r + i] == i64(blockIdx.x);
            own += mine[i];
        }
        int upto = own;  // of the warp's rows, to the end of this thread's
#pragma unroll
        for (int away = 1; away < 32; away *= 2) {
            const int earlier = __shfl_up_sync(0xffffffffu, upto, away);
            if (lane >= away) upto += earlier;
        }
        if (lane == 31) totals[warp] = upto;
        __syncthreads();
        const int of_lane = totals[lane];
        int earlier_warps = lane < warp ? of_lane : 0, all = of_lane;
#pragma unroll
        for (int away = 16; away > 0; away /= 2) {
            earlier_warps += __shfl_xor_sync(0xffffffffu, earlier_warps, away);
            all += __shfl_xor_sync(0xffffffffu, all, away);
        }
        i64 here = before + earlier_warps + upto - own;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (mine[i]) place[first + r + i] = here++;
        }
        before += all;
        __syncthreads();
    }
    if (threadIdx.x == 0) counts[blockIdx.y * i64(groups) + blockIdx.x] = before;
}
