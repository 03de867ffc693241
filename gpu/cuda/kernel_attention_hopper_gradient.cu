// The gradient of softmax attention in 16-bit numbers on Hopper's tensor cores.
//
// For head sizes to 64, with softcap, and for few queries or keys; `kernel_attention_hopper_ordered.cu` does the rest.
//
// Two kernels of the same build, one for the queries and one for the keys and values, each block with a tile of results that
// is its alone: nothing is added up between blocks, so the same call gives the same bits. Both make the weights again, P =
// 2^{S log2 e - lse}: seven products where five would do, against sums of dQ in memory, whose order would be anybody's.
//
//   queries   S = Q K^T, dP = dO V^T, dS = P (dP + across), dQ += dS K          rows are queries, keys pass by
//   keys      the transposes, dV += P^T dO, dK += dS^T Q                        rows are keys, queries pass by
//
// As in the forward kernel weights stay in registers: the result of S^T, rounded in pairs, is the left operand of dV. Two warpgroups of
// 64 rows each take turns in issuing products, those of the next tile right behind those of this one, and while one makes weights the
// other multiplies. What passes by comes in tiles of 64; with it come lse log2 e and across of each
// query, padded to whole tiles with rows of weight 0 (lse = +infinity).
#include "block_hopper_gradient.cuh"

// across = dlse - do.o of each query, and lse in powers of two; for queries beyond n the weight is 0. Half a warp a query, 8 numbers a
// lane and read; a warp takes 8 queries, so that enough reads are under way.
template <class T>
__global__ void __launch_bounds__(128)
attention_across(const Call c, const T* o, const T* dy, const float* lse, const float* dlse, float* across, float* lse2, int padded) {
    const int lane = threadIdx.x % 16;
    const long long first = ((long long)blockIdx.x * 8 + threadIdx.x / 16) * 4, all = (long long)c.B * c.Hq * padded;
#pragma unroll
    for (int x = 0; x < 4; x++) {
        const long long at = first + x, head = at / padded, row = head * c.n + at % padded;
        const int i = at % padded;
        const bool there = at < all && i < c.n;
        float sum = 0;
        if (there && 8 * lane < c.e) {  // e is a multiple of 8 and at most 128, rows start at multiples of 16 bytes
            const uint4 a = *(const uint4*)(o + row * c.e + 8 * lane);
            const uint4 b = *(const uint4*)(dy + head / c.Hq * c.dy[0] + head % c.Hq * c.dy[1] + i * c.dy[2] + 8 * lane);
            const T *p = (const T*)&a, *q = (const T*)&b;
#pragma unroll
            for (int z = 0; z < 8; z++) sum += widen(p[z]) * widen(q[z]);
        }
#pragma unroll
        for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
        if (lane != 0 || at >= all) continue;
        across[at] = there ? (dlse == nullptr ? 0.0f : dlse[row]) - sum : 0.0f;
        lse2[at] = !there ? -NOTHING_SEEN : lse[row] == NOTHING_SEEN ? 0.0f : lse[row] * (float)LOG2E;
    }
}

template <class T, int D, bool CAP>
__global__ void __launch_bounds__(384, 1)
attention_gradient_keys(const __grid_constant__ Call c, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                        const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dy_map, const float* lse2,
                        const float* across, int padded, T* dk, T* dv) {
    constexpr int PANELS = D / 64, OWN_PANEL = ROWS * 128, OWN = PANELS * OWN_PANEL, PANEL = PASSING * 128, TILE = PANELS * PANEL;
    constexpr int STAT = PASSING * 4, STAGE = 2 * TILE + 2 * STAT;
    extern __shared__ unsigned char memory[];
    unsigned char* const base = memory + (1024 - shared_address(memory) % 1024) % 1024;
    unsigned char *const k_tile = base, *const v_tile = base + OWN, *const tiles = base + 2 * OWN, *const stats = tiles + STAGES * 2 * TILE;
    Barrier *const own_full = (Barrier*)(stats + STAGES * 2 * STAT), *const full = own_full + 1, *const free = full + STAGES;

    const int count_tiles = (c.m + ROWS - 1) / ROWS, group = c.Hq / c.Hkv;
    int tile, head;
    which(blockIdx.x, count_tiles, c.B * c.Hkv, c.heads, tile, head);
    const int b = head / c.Hkv, kv = head % c.Hkv, row = tile * ROWS, last_row = min(row + ROWS, c.m) - 1;
    const int from = max(0, row - c.above) / PASSING, until = (min(c.n, last_row - c.below + 1) + PASSING - 1) / PASSING;
    const int each = max(0, until - from), count = each * group;
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

    will_come(1, 2, 256);
    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        for (int s = 0; s < STAGES; s++) barrier_init(full + s, 1), barrier_init_for_warps(free + s, 8);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (warpgroup == 0) {
        keep_registers<24>();
        if (threadIdx.x == 0 && count > 0) {
            barrier_expect(own_full, 2 * OWN);
            for (int p = 0; p < PANELS; p++) {
                copy_box(k_tile + p * OWN_PANEL, &k_map, own_full, 64 * p, row, kv, b);
                copy_box(v_tile + p * OWN_PANEL, &v_map, own_full, 64 * p, row, kv, b);
            }
            for (int t = 0; t < count; t++) {
                const int s = t % STAGES, h = kv * group + t / each, i = (from + t % each) * PASSING;
                barrier_wait(free + s, t / STAGES % 2 ^ 1);
                barrier_expect(full + s, STAGE);
                for (int p = 0; p < PANELS; p++) {
                    copy_box(tiles + s * 2 * TILE + p * PANEL, &q_map, full + s, 64 * p, i, h, b);
                    copy_box(tiles + s * 2 * TILE + TILE + p * PANEL, &dy_map, full + s, 64 * p, i, h, b);
                }
                const long long at = ((long long)b * c.Hq + h) * padded + i;
                copy_bytes(stats + s * 2 * STAT, lse2 + at, STAT, full + s);
                copy_bytes(stats + s * 2 * STAT + STAT, across + at, STAT, full + s);
            }
        }
    } else {
        take_registers<240>();
        const int me = warpgroup - 1, lane = threadIdx.x % 32, row_0 = row + 64 * me, mine = row_0 + threadIdx.x % 128 / 32 * 16 + lane / 4;
        const unsigned k = shared_address(k_tile) + me * 64 * 128, v = shared_address(v_tile) + me * 64 * 128;
        const float unit = (float)LOG2E * (CAP ? (float)c.softcap : (float)c.scale);
        float dk_acc[D / 2], dv_acc[D / 2], s[PASSING / 2], dp[PASSING / 2];
        unsigned w[PASSING / 4], ds[PASSING / 4];
#pragma unroll
        for (int x = 0; x < D / 2; x++) dk_acc[x] = dv_acc[x] = 0;
        if (count > 0) {
            barrier_wait(own_full, 0);
            barrier_wait(full, 0);
            hold(dk_acc);  // zero before any product is under way
            hold(dv_acc);
            products_begin();
            multiply_rows<T, D, PASSING>(s, k, OWN_PANEL, shared_address(tiles), PANEL);
            multiply_rows<T, D, PASSING>(dp, v, OWN_PANEL, shared_address(tiles) + TILE, PANEL);
            products_wait<0>();
            hold(s);
            hold(dp);
            auto step = [&](int t, auto more_to_come) {
                const int stage = t % STAGES, i0 = (from + t % each) * PASSING;
                const unsigned q = shared_address(tiles) + stage * 2 * TILE, dy = q + TILE;
                const float* const stat = (const float*)(stats + stage * 2 * STAT) + lane % 4 * 2;
                const bool edge = !(i0 + PASSING - 1 + c.below <= row_0 && row_0 + 63 <= i0 + c.above);
#pragma unroll
                for (int x = 0; x < PASSING / 2; x++) {
                    const int column = x / 4 * 8 + x % 2;
                    if (CAP) s[x] = tanh_fast(s[x] * (float)(c.scale / c.softcap));
                    const float slope = CAP ? 1.0f - s[x] * s[x] : 1.0f;
                    s[x] = exp2_fast(fmaf(s[x], unit, -stat[column]));
                    if (edge) {
                        const int i = i0 + column + lane % 4 * 2, j = mine + x % 4 / 2 * 8;
                        if (j < i + c.below || j > i + c.above) s[x] = 0;
                    }
                    dp[x] = s[x] * (dp[x] + stat[PASSING + column]);
                    if (CAP) dp[x] *= slope;
                }
#pragma unroll
                for (int x = 0; x < PASSING / 4; x++) w[x] = pack<T>(s[2 * x], s[2 * x + 1]), ds[x] = pack<T>(dp[2 * x], dp[2 * x + 1]);
                if (!(me == 0 && t == 0)) meet(1 + me, 256);  // my turn
                products_begin();
                multiply_columns<T, D>(dv_acc, w, dy, PANEL);
                multiply_columns<T, D>(dk_acc, ds, q, PANEL);
                if constexpr (decltype(more_to_come)::value) {
                    const int next = (t + 1) % STAGES;
                    barrier_wait(full + next, (t + 1) / STAGES % 2);
                    products_wait<1>();  // dV: the registers of P are free
                    multiply_rows<T, D, PASSING>(s, k, OWN_PANEL, shared_address(tiles) + next * 2 * TILE, PANEL);
                    multiply_rows<T, D, PASSING>(dp, v, OWN_PANEL, shared_address(tiles) + next * 2 * TILE + TILE, PANEL);
                }
                if (!(me == 1 && t == count - 1)) pass(2 - me, 256);  // the other's
                products_wait<0>();
                hold(s);
                hold(dp);
                hold(dk_acc);
                hold(dv_acc);
                barrier_arrive_as_warp(free + stage);
            };
            for (int t = 0; t + 1 < count; t++) step(t, Yes());
            step(count - 1, No());
        }
        const float one[2] = {1.0f, 1.0f}, scale[2] = {(float)c.scale, (float)c.scale};
        const long long at = ((long long)b * c.Hkv + kv) * c.m;
        write_rows<T, D / 2>(dv_acc, one, dv + at * c.e, mine, c.m, c.e);
        write_rows<T, D / 2>(dk_acc, scale, dk + at * c.d, mine, c.m, c.d);
    }
}

template <class T, int D, bool CAP>
__global__ void __launch_bounds__(384, 1)
attention_gradient_queries(const __grid_constant__ Call c, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dy_map, const float* lse2,
                           const float* across, int padded, T* dq) {
    constexpr int PANELS = D / 64, OWN_PANEL = ROWS * 128, OWN = PANELS * OWN_PANEL, PANEL = PASSING * 128, TILE = PANELS * PANEL;
    extern __shared__ unsigned char memory[];
    unsigned char* const base = memory + (1024 - shared_address(memory) % 1024) % 1024;
    unsigned char *const q_tile = base, *const dy_tile = base + OWN, *const tiles = base + 2 * OWN;
    Barrier *const own_full = (Barrier*)(tiles + STAGES * 2 * TILE), *const full = own_full + 1, *const free = full + STAGES;

    const int count_tiles = (c.n + ROWS - 1) / ROWS;
    int tile, head;
    which(blockIdx.x, count_tiles, c.B * c.Hq, c.heads, tile, head);
    tile = count_tiles - 1 - tile;
    const int b = head / c.Hq, h = head % c.Hq, row = tile * ROWS, last_row = min(row + ROWS, c.n) - 1;
    const int from = max(0, row + c.below) / PASSING, until = (min(c.m, last_row + c.above + 1) + PASSING - 1) / PASSING;
    const int count = max(0, until - from);
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

    will_come(1, 2, 256);
    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        for (int s = 0; s < STAGES; s++) barrier_init(full + s, 1), barrier_init_for_warps(free + s, 8);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (warpgroup == 0) {
        keep_registers<24>();
        if (threadIdx.x == 0 && count > 0) {
            const int kv = h / (c.Hq / c.Hkv);
            barrier_expect(own_full, 2 * OWN);
            for (int p = 0; p < PANELS; p++) {
                copy_box(q_tile + p * OWN_PANEL, &q_map, own_full, 64 * p, row, h, b);
                copy_box(dy_tile + p * OWN_PANEL, &dy_map, own_full, 64 * p, row, h, b);
            }
            for (int t = 0; t < count; t++) {
                const int s = t % STAGES, key = (until - 1 - t) * PASSING;
                barrier_wait(free + s, t / STAGES % 2 ^ 1);
                barrier_expect(full + s, 2 * TILE);
                for (int p = 0; p < PANELS; p++) {
                    copy_box(tiles + s * 2 * TILE + p * PANEL, &k_map, full + s, 64 * p, key, kv, b);
                    copy_box(tiles + s * 2 * TILE + TILE + p * PANEL, &v_map, full + s, 64 * p, key, kv, b);
                }
            }
        }
    } else {
        take_registers<240>();
        const int me = warpgroup - 1, lane = threadIdx.x % 32, row_0 = row + 64 * me, mine = row_0 + threadIdx.x % 128 / 32 * 16 + lane / 4;
        const float unit = (float)LOG2E * (CAP ? (float)c.softcap : (float)c.scale);
        const long long at = ((long long)b * c.Hq + h) * padded + mine;  // `padded` covers the whole tile
        const float shift[2] = {lse2[at], lse2[at + 8]}, more[2] = {across[at], across[at + 8]};
        float acc[D / 2], s[PASSING / 2], dp[PASSING / 2];
        unsigned ds[PASSING / 4];
#pragma unroll
        for (int x = 0; x < D / 2; x++) acc[x] = 0;
        if (count > 0) {
            unsigned q[D / 16][4], dy[D / 16][4];  // own rows, as left operands in registers: shared memory has enough to do with K and V
            barrier_wait(own_full, 0);
            read_operand<D>(q, shared_address(q_tile), OWN_PANEL, row_0 - row + threadIdx.x % 128 / 32 * 16);
            read_operand<D>(dy, shared_address(dy_tile), OWN_PANEL, row_0 - row + threadIdx.x % 128 / 32 * 16);
            barrier_wait(full, 0);
            hold(acc);  // zero before any product is under way
            products_begin();
            multiply_rows<T, D, PASSING>(s, q, shared_address(tiles), PANEL);
            multiply_rows<T, D, PASSING>(dp, dy, shared_address(tiles) + TILE, PANEL);
            products_wait<0>();
            hold(s);
            hold(dp);
            auto step = [&](int t, auto more_to_come) {
                const int stage = t % STAGES, key = (until - 1 - t) * PASSING;
                const bool edge = !inside(c, row_0, 64, key, PASSING);
#pragma unroll
                for (int x = 0; x < PASSING / 2; x++) {
                    if (CAP) s[x] = tanh_fast(s[x] * (float)(c.scale / c.softcap));
                    const float slope = CAP ? 1.0f - s[x] * s[x] : 1.0f;
                    s[x] = exp2_fast(fmaf(s[x], unit, -shift[x % 4 / 2]));
                    if (edge && !allowed(c, mine + x % 4 / 2 * 8, key + x / 4 * 8 + lane % 4 * 2 + x % 2)) s[x] = 0;
                    dp[x] = s[x] * (dp[x] + more[x % 4 / 2]);
                    if (CAP) dp[x] *= slope;
                }
#pragma unroll
                for (int x = 0; x < PASSING / 4; x++) ds[x] = pack<T>(dp[2 * x], dp[2 * x + 1]);
                if (!(me == 0 && t == 0)) meet(1 + me, 256);  // my turn
                products_begin();
                multiply_columns<T, D>(acc, ds, shared_address(tiles) + stage * 2 * TILE, PANEL);
                if constexpr (decltype(more_to_come)::value) {
                    const int next = (t + 1) % STAGES;
                    barrier_wait(full + next, (t + 1) / STAGES % 2);
                    multiply_rows<T, D, PASSING>(s, q, shared_address(tiles) + next * 2 * TILE, PANEL);
                    multiply_rows<T, D, PASSING>(dp, dy, shared_address(tiles) + next * 2 * TILE + TILE, PANEL);
                }
                if (!(me == 1 && t == count - 1)) pass(2 - me, 256);  // the other's
                products_wait<0>();
                hold(s);
                hold(dp);
                hold(acc);
                barrier_arrive_as_warp(free + stage);
            };
            for (int t = 0; t + 1 < count; t++) step(t, Yes());
            step(count - 1, No());
        }
        const float scale[2] = {(float)c.scale, (float)c.scale};
        write_rows<T, D / 2>(acc, scale, dq + ((long long)b * c.Hq + h) * c.n * c.d, mine, c.n, c.d);
    }
}
