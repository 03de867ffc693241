// Queues: the number of each row in its group, in the order of the rows, and how many rows each group has.
//
// The idea. A block takes one group of one entry of the batch and reads that entry's rows from first to last, 256 at a time; those that
// are its own get the running count. Every row is read once for each group, from the cache; nothing is sorted, and nobody waits
// for the host. What limits it: for few groups latency, for many the reads.

using i64 = long long;

// group (entries, rows), place likewise, counts (entries, groups); grid (groups, entries), 256 threads.
__global__ void __launch_bounds__(256) places(const i64* group, i64* place, i64* counts, i64 rows, int groups) {
    __shared__ int totals[8];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 first = blockIdx.y * rows;
    i64 before = 0;
    for (i64 r0 = 0; r0 < rows; r0 += 256) {
        const i64 r = r0 + threadIdx.x;
        const bool mine = r < rows && group[first + r] == i64(blockIdx.x);
        const unsigned votes = __ballot_sync(0xffffffffu, mine);
        if (lane == 0) totals[warp] = __popc(votes);
        __syncthreads();
        i64 here = before + __popc(votes & ((1u << lane) - 1));
        for (int w = 0; w < 8; ++w) {
            if (w < warp) here += totals[w];
            before += totals[w];
        }
        if (mine) place[first + r] = here;
        __syncthreads();
    }
    if (threadIdx.x == 0) counts[blockIdx.y * i64(groups) + blockIdx.x] = before;
}
