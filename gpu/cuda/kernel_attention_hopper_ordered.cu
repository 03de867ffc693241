// The gradient of softmax attention in 16-bit numbers on Hopper's tensor cores with five products: dQ is added up across blocks, in order.
//
// A block has 128 keys, and dK and dV of them in registers; tiles of 64 queries pass by, the last ones first, and are multiplied five
// times:   S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, and this block's part of dQ = dS K.
// (`kernel_attention_hopper_gradient.cu` makes seven products and adds up nothing between blocks.) Two warpgroups have 64 keys each; for
// dQ each takes half of the columns and all 128 keys, so dS^T goes through shared memory, and the right half of K lies there anyway.
//
// Order. The parts of a tile of dQ come from blocks that run at the same time. The block with the first keys that count for the tile
// stores its part, the others add theirs, each when a counter in memory says that the one before is done: the same sum in every run. As
// all start with the last queries, a block must be a tile behind the one before it; blocks start in that order anyway (tiles of keys of
// several heads in turn), so after the first ones nobody waits. A block waits only for blocks that took their item before it: no
// deadlock. With a causal mask this order has the longest work first. One thread for each warpgroup does the waiting and the
// counting, so that those who multiply see no more of it than a barrier.
// Parts are kept as the registers have them, 16 bytes a thread side by side, until `attention_gradient_sum` rounds them.
//
// A step of a warpgroup, what is under way in brackets:
//   P [dP], issue dV; dS [dV], dS to shared memory, both meet; issue dQ, dK, S of the next tile; add dQ [dK, S]; issue dP of the next
// so that exponentials fall under dP, and the sum under dK. 64 registers hold dK, 64 dV, 32 S, 32 dP and then dQ.
#include "block_hopper_gradient.cuh"

constexpr int D = 128;

// D (64 x 64) = A (64 x 16) B (16 x 64) + (add ? D : 0), both in shared memory, by columns.
template <class T> struct ProductByColumns;
#define PRODUCT_BY_COLUMNS(T, TYPE)                                                                                             \
    template <> struct ProductByColumns<T> {                                                                                    \
        static __device__ inline void add(float (&d)[32], unsigned long long a, unsigned long long b, int add) {                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                          \
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" LIST_64 "}, %32, %33, p, 1, 1, 1, 1;\n}" \
                         : REGISTERS_64 : "l"(a), "l"(b), "r"(add));                                                            \
        }                                                                                                                       \
    };
PRODUCT_BY_COLUMNS(bfloat16, "bf16")
PRODUCT_BY_COLUMNS(float16, "f16")

// 64 x 64 of a warpgroup, rounded in pairs, into shared memory: rows of 128 bytes, swizzled; this warp's rows from `row`.
__device__ inline void write_operand(const unsigned (&a)[16], unsigned address, int row) {
    const int lane = threadIdx.x % 32, r = row + lane % 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const unsigned to = address + r * 128 + ((j + lane / 16 ^ r % 8) << 4);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[2 * j]), "r"(a[2 * j + 1]),
                     "r"(a[2 * j + 2]), "r"(a[2 * j + 3])
                     : "memory");
    }
}

__device__ inline int read_acquired(const int* p) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ inline void write_released(int* p, int x) { asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
__device__ inline void add_to_memory(float4* p, float4 x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// The first tile of keys that counts for a tile of queries.
__device__ inline int first_keys(const Call& c, int tile) { return max(0, tile * PASSING + c.below) / ROWS; }

// `order`: a counter of items, then for each head, tile of queries and half of the columns how many parts there are.
template <class T>
__global__ void __launch_bounds__(384, 1)
attention_gradient_ordered(const __grid_constant__ Call c, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dy_map, const float* lse2,
                           const float* across, int padded, float4* parts, int* order, T* dk, T* dv) {
    constexpr int PANELS = D / 64, OWN_PANEL = ROWS * 128, OWN = PANELS * OWN_PANEL, PANEL = PASSING * 128, TILE = PANELS * PANEL;
    constexpr int STAT = PASSING * 4, STAGE = 2 * TILE + 2 * STAT, DS = ROWS * PASSING * 2;
    extern __shared__ unsigned char memory[];
    unsigned char* const base = memory + (1024 - shared_address(memory) % 1024) % 1024;
    unsigned char *const k_tile = base, *const v_tile = base + OWN, *const tiles = base + 2 * OWN, *const ds_tiles = tiles + STAGES * 2 * TILE;
    unsigned char* const stats = ds_tiles + 2 * DS;
    Barrier *const own_full = (Barrier*)(stats + STAGES * 2 * STAT), *const full = own_full + 1, *const free = full + STAGES;
    Barrier *const turn = free + STAGES, *const added = turn + 2;
    int* const place = (int*)(added + 2);

    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        for (int s = 0; s < STAGES; s++) barrier_init(full + s, 1), barrier_init(free + s, 8);
        for (int s = 0; s < 2; s++) barrier_init(turn + s, 1), barrier_init(added + s, 4);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
        *place = atomicAdd(order, 1);  // not blockIdx.x: nobody may wait for a block that has not started
    }
    __syncthreads();

    const int count_tiles = (c.m + ROWS - 1) / ROWS, group = c.Hq / c.Hkv, q_tiles = (c.n + PASSING - 1) / PASSING;
    int tile, head;
    which(*place, count_tiles, c.B * c.Hkv, c.heads, tile, head);
    const int b = head / c.Hkv, kv = head % c.Hkv, row = tile * ROWS, last_row = min(row + ROWS, c.m) - 1;
    const int from = max(0, row - c.above) / PASSING, until = (min(c.n, last_row - c.below + 1) + PASSING - 1) / PASSING;
    const int each = max(0, until - from), count = each * group;
    // Step t: of query head kv * group + t / each the tile until - 1 - t % each.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

    if (warpgroup == 0) {
        keep_registers<24>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x == 0 && count > 0) {
            barrier_expect(own_full, 2 * OWN);
            for (int p = 0; p < PANELS; p++) {
                copy_box(k_tile + p * OWN_PANEL, &k_map, own_full, 64 * p, row, kv, b);
                copy_box(v_tile + p * OWN_PANEL, &v_map, own_full, 64 * p, row, kv, b);
            }
            for (int t = 0; t < count; t++) {
                const int s = t % STAGES, h = kv * group + t / each, i = (until - 1 - t % each) * PASSING;
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
        } else if (warp > 0 && warp < 3 && threadIdx.x % 32 == 0) {
            const int me = warp - 1;
            for (int t = 0; t < count; t++) {
                const int h = kv * group + t / each, i = until - 1 - t % each, rank = tile - first_keys(c, i);
                int* const parts_there = order + 1 + ((b * c.Hq + h) * q_tiles + i) * 2 + me;
                if (rank > 0)
                    while (read_acquired(parts_there) != rank) {}
                barrier_arrive(turn + me);
                barrier_wait(added + me, t % 2);
                write_released(parts_there, rank + 1);
            }
        }
    } else {
        take_registers<240>();
        const int me = warpgroup - 1, thread = threadIdx.x % 128, lane = thread % 32, row_0 = row + 64 * me;
        const int mine = row_0 + thread / 32 * 16 + lane / 4;
        const unsigned k = shared_address(k_tile) + me * 64 * 128, v = shared_address(v_tile) + me * 64 * 128;
        const unsigned long long k_columns = operand(shared_address(k_tile) + me * OWN_PANEL, 0);
        const float unit = (float)LOG2E * (float)c.scale;
        float dk_acc[D / 2], dv_acc[D / 2], s[PASSING / 2], dp[PASSING / 2];  // dp: dP, then dQ
        unsigned w[PASSING / 4], ds[PASSING / 4];
#pragma unroll
        for (int x = 0; x < D / 2; x++) dk_acc[x] = dv_acc[x] = 0;
        if (count > 0) {
            barrier_wait(own_full, 0);
            hold(dk_acc);  // zero before any product is under way
            hold(dv_acc);
            int i = until - 1, stage = 0, phase = 0, turns = 0;  // the tile of queries and its place
            float4* part = parts + (((long long)(b * c.Hq + kv * group) * q_tiles + i) * 2 + me) * 1024 + thread;
            for (int left = count; left > 0; left--) {
                const unsigned q = shared_address(tiles) + stage * 2 * TILE, dy = q + TILE, ds_tile = shared_address(ds_tiles) + turns * DS;
                const float* const stat = (const float*)(stats + stage * 2 * STAT) + lane % 4 * 2;
                const int i0 = i * PASSING;
                const bool edge = !(i0 + PASSING - 1 + c.below <= row_0 && row_0 + 63 <= i0 + c.above);
                barrier_wait(full + stage, phase);
                products_begin();
                multiply_rows<T, D, PASSING>(s, k, OWN_PANEL, q, PANEL);
                multiply_rows<T, D, PASSING>(dp, v, OWN_PANEL, dy, PANEL);
                products_wait<1>();
                hold(s);
#pragma unroll
                for (int x = 0; x < PASSING / 2; x++) {
                    const int column = x / 4 * 8 + x % 2;
                    s[x] = exp2_fast(fmaf(s[x], unit, -stat[column]));
                    if (edge) {
                        const int query = i0 + column + lane % 4 * 2, key = mine + x % 4 / 2 * 8;
                        if (key < query + c.below || key > query + c.above) s[x] = 0;
                    }
                }
#pragma unroll
                for (int x = 0; x < PASSING / 4; x++) w[x] = pack<T>(s[2 * x], s[2 * x + 1]);
                products_begin();
                multiply_columns<T, D>(dv_acc, w, dy, PANEL);
                products_wait<1>();
                hold(dp);
#pragma unroll
                for (int x = 0; x < PASSING / 2; x++) dp[x] = s[x] * (dp[x] + stat[PASSING + x / 4 * 8 + x % 2]);
#pragma unroll
                for (int x = 0; x < PASSING / 4; x++) ds[x] = pack<T>(dp[2 * x], dp[2 * x + 1]);
                write_operand(ds, ds_tile, 64 * me + thread / 32 * 16);
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                meet(1, 256);  // all of dS is there; it has two places, so that nobody still reads what is written next
                products_begin();
                const unsigned long long ds_columns = operand(ds_tile, 0);
#pragma unroll
                for (int x = 0; x < ROWS / 16; x++) ProductByColumns<T>::add(dp, ds_columns + (x * 2048 >> 4), k_columns + (x * 2048 >> 4), x > 0);
                products_commit();
                multiply_columns<T, D>(dk_acc, ds, q, PANEL);
                products_wait<1>();
                hold(dp);
                const bool first = tile == first_keys(c, i);
                barrier_wait(turn + me, turns);
#pragma unroll
                for (int x = 0; x < 8; x++) {
                    const float4 mine_of_it = make_float4(dp[4 * x], dp[4 * x + 1], dp[4 * x + 2], dp[4 * x + 3]);
                    if (first) part[x * 128] = mine_of_it;
                    else add_to_memory(part + x * 128, mine_of_it);
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(added + me);
                products_wait<0>();
                hold(dk_acc);
                hold(dv_acc);
                __syncwarp();
                if (lane == 0) barrier_arrive(free + stage);
                turns ^= 1;
                if (++stage == STAGES) stage = 0, phase ^= 1;
                if (i == from) part += (q_tiles + until - from) * 2048LL, i = until;  // on to the next head's
                i--, part -= 2048;
            }
        }
        const float one[2] = {1.0f, 1.0f}, scale[2] = {(float)c.scale, (float)c.scale};
        const long long at = ((long long)b * c.Hkv + kv) * c.m;
        write_rows<T, D / 2>(dv_acc, one, dv + at * c.e, mine, c.m, c.e);
        write_rows<T, D / 2>(dk_acc, scale, dk + at * c.d, mine, c.m, c.d);
    }
}

// The parts of a tile of dQ, added up, as rows: 256 threads a tile, those of a half of the columns as the warpgroup that made it.
template <class T>
__global__ void __launch_bounds__(256)
attention_gradient_sum(const __grid_constant__ Call c, const float4* parts, const int* order, T* dq) {
    const int q_tiles = (c.n + PASSING - 1) / PASSING, me = threadIdx.x / 128, thread = threadIdx.x % 128;
    const long long head = blockIdx.x / q_tiles;
    const int i = blockIdx.x % q_tiles;
    const bool there = order[1 + blockIdx.x * 2 + me] > 0;  // no keys count for queries that none may see
    float d[32];
#pragma unroll
    for (int x = 0; x < 8; x++) {
        const float4 y = there ? parts[(blockIdx.x * 2LL + me) * 1024 + x * 128 + thread] : make_float4(0, 0, 0, 0);
        d[4 * x] = y.x, d[4 * x + 1] = y.y, d[4 * x + 2] = y.z, d[4 * x + 3] = y.w;
    }
    const float scale[2] = {(float)c.scale, (float)c.scale};
    write_rows<T, 32>(d, scale, dq + head * c.n * c.d, i * PASSING + thread / 32 * 16 + thread % 32 / 4, c.n, c.d, D / 2 * me);
}
