// The gradient of softmax attention in 16-bit numbers on Hopper's tensor cores with five products: dQ is added up across blocks, in order.
//
// A block has 128 keys, and dK and dV of them in registers; tiles of 64 queries pass by, the last ones first, and are multiplied five
// times:   S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, and this block's part of dQ = dS K.
// (`kernel_attention_hopper_gradient.cu` makes seven products and adds up nothing between blocks.) Two warpgroups have 64 keys each; of
// dQ each makes half of the columns, over all 128 keys, so dS^T goes through shared memory, where K lies anyway.
//
// A step of a warpgroup, what is under way in brackets:
//   issue S, dP; P [dP], issue dV; dS [dV], into shared memory; issue dQ of the step before, dK; dQ into shared memory [dK]
// so that exponentials fall under dP, and dS under dV. dQ is a step late: a warpgroup needs what the other has made a whole step ago, and
// the two need not keep pace. 64 registers hold dK, 64 dV, 32 S, 32 dP and then dQ.
//
// Order. The parts of a tile of dQ come from blocks that run at the same time. The block with the first keys that count for the tile
// stores its part, the others have the copy engine add theirs, each when a counter in memory says that the one before is done: the same
// sum in every run. One thread for each half of the columns does the waiting, adding and counting; those who multiply have a step's time
// until they need the place in shared memory again. As all blocks start with the last queries, one must be a tile or two behind the one
// before it, so they had better not start together: `which_in_turn` lists the tiles of several heads in turn, one head a few tiles ahead
// of the next, which also mixes blocks that have much to do with others that have little. A block waits only for blocks that took their
// item before it: no deadlock. Parts are kept as registers have them, until `attention_gradient_sum` rounds the sums.
#include "block_hopper_gradient.cuh"

constexpr int D = 128;
constexpr int PLACES = 2;     // for Q and dO
constexpr int DS_PLACES = 4;  // for dS^T: a warpgroup may be a step ahead, and the other may still read those of the two steps before

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
// Contiguous numbers in shared memory to memory by the copy engine: stored, or added.
__device__ inline void store_numbers(void* to, const void* from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}
__device__ inline void add_numbers(void* to, const void* from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// The first tile of keys that counts for a tile of queries.
__device__ inline int first_keys(const Call& c, int tile) { return max(0, tile * PASSING + c.below) / ROWS; }

// Which tile of keys of which head the item is: tiles of `side` groups of heads in turn, a group `apart` tiles behind the one before.
// Where a group has not begun, or is done, the item is nobody's.
__device__ inline bool which_in_turn(int item, int tiles, int heads, int together, int apart, int& tile, int& head) {
    const int side = (tiles + apart - 1) / apart, at = item / together / side, later = side - 1 - item / together % side;
    const int group = at / apart - later;
    tile = at % apart + later * apart, head = group * together + item % together;
    return group >= 0 && tile < tiles && head < heads;
}

// `order`: a counter of items, then for each head, tile of queries and half of the columns how many parts there are.
template <class T>
__global__ void __launch_bounds__(384, 1)
attention_gradient_ordered(const __grid_constant__ Call c, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dy_map, const float* lse2,
                           const float* across, int padded, float4* parts, int* order, T* dk, T* dv) {
    constexpr int PANELS = D / 64, OWN_PANEL = ROWS * 128, OWN = PANELS * OWN_PANEL, PANEL = PASSING * 128, TILE = PANELS * PANEL;
    constexpr int STAT = PASSING * 4, STAGE = 2 * TILE + 2 * STAT, DS = ROWS * PASSING * 2, SUM = PASSING * D / 2 * 4;
    extern __shared__ unsigned char memory[];
    unsigned char* const base = memory + (1024 - shared_address(memory) % 1024) % 1024;
    unsigned char *const k_tile = base, *const v_tile = base + OWN, *const tiles = base + 2 * OWN, *const ds_tiles = tiles + PLACES * 2 * TILE;
    unsigned char *const sums = ds_tiles + DS_PLACES * DS, *const stats = sums + 2 * SUM;
    Barrier *const own_full = (Barrier*)(stats + PLACES * 2 * STAT), *const full = own_full + 1, *const free = full + PLACES;
    Barrier *const turn = free + PLACES, *const added = turn + 2, *const ds_full = added + 2;
    int* const place = (int*)(ds_full + DS_PLACES);

    if (threadIdx.x == 0) {
        barrier_init(own_full, 1);
        for (int s = 0; s < PLACES; s++) barrier_init(full + s, 1), barrier_init(free + s, 256);
        for (int s = 0; s < 2; s++) barrier_init(turn + s, 1), barrier_init(added + s, 128);
        for (int s = 0; s < DS_PLACES; s++) barrier_init(ds_full + s, 256);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
        *place = atomicAdd(order, 1);  // not blockIdx.x: nobody may wait for a block that has not started
    }
    __syncthreads();

    const int count_tiles = (c.m + ROWS - 1) / ROWS, group = c.Hq / c.Hkv, q_tiles = (c.n + PASSING - 1) / PASSING;
    int tile, head;
    if (!which_in_turn(*place, count_tiles, c.B * c.Hkv, c.heads, c.splits, tile, head)) return;
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
                const int s = t % PLACES, h = kv * group + t / each, i = (until - 1 - t % each) * PASSING;
                barrier_wait(free + s, t / PLACES % 2 ^ 1);
                barrier_expect(full + s, STAGE);
                for (int p = 0; p < PANELS; p++) {
                    copy_box(tiles + s * 2 * TILE + p * PANEL, &q_map, full + s, 64 * p, i, h, b);
                    copy_box(tiles + s * 2 * TILE + TILE + p * PANEL, &dy_map, full + s, 64 * p, i, h, b);
                }
                const long long at = ((long long)b * c.Hq + h) * padded + i;
                copy_bytes(stats + s * 2 * STAT, lse2 + at, STAT, full + s);
                copy_bytes(stats + s * 2 * STAT + STAT, across + at, STAT, full + s);
            }
        } else if (warp > 0 && warp < 3 && threadIdx.x % 32 == 0 && count > 0) {
            const int me = warp - 1;
            unsigned char* const sum = sums + me * SUM;
            int h = kv * group, i = until - 1, rank, there;  // which part of the tile ours is, and how many there are
            int* counter;
            auto look = [&]() {
                rank = tile - first_keys(c, i);
                counter = order + 1 + ((b * c.Hq + h) * q_tiles + i) * 2 + me;
                there = rank == 0 ? 0 : read_acquired(counter);
            };
            look();
            for (int t = 0; t < count; t++) {
                int* const now = counter;
                unsigned char* const to = (unsigned char*)parts + (now - order - 1) * (long long)SUM;
                const int done = rank + 1;
                barrier_wait(added + me, t % 2);
                while (there != rank) there = read_acquired(counter);
                if (rank == 0) store_numbers(to, sum, SUM);
                else add_numbers(to, sum, SUM);
                bulk_commit();
                if (i-- == from) i = until - 1, h++;
                if (t + 1 < count) look();  // while the copy engine works
                bulk_wait_read();
                barrier_arrive(turn + me);
                bulk_wait();
                write_released(now, done);
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
            // dQ of step t into dp, and on to where it is added up.
            auto multiply_queries = [&](int t) {
                const unsigned long long ds_columns = operand(shared_address(ds_tiles) + t % DS_PLACES * DS, 0);
#pragma unroll
                for (int x = 0; x < ROWS / 16; x++) ProductByColumns<T>::add(dp, ds_columns + (x * 2048 >> 4), k_columns + (x * 2048 >> 4), x > 0);
                products_commit();
            };
            auto add_up = [&](int t) {
                barrier_wait(turn + me, t % 2 ^ 1);
                float4* const to = (float4*)(sums + me * SUM) + thread;
#pragma unroll
                for (int x = 0; x < 8; x++) to[x * 128] = make_float4(dp[4 * x], dp[4 * x + 1], dp[4 * x + 2], dp[4 * x + 3]);
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                __syncwarp();
                barrier_arrive(added + me);
            };
            int i = until - 1, stage = 0, phase = 0;  // the tile of queries and its place
            for (int t = 0; t < count; t++) {
                const unsigned q = shared_address(tiles) + stage * 2 * TILE, dy = q + TILE;
                const float* const stat = (const float*)(stats + stage * 2 * STAT) + lane % 4 * 2;
                const int i0 = i * PASSING;
                const bool edge = !(i0 + PASSING - 1 + c.below <= row_0 && row_0 + 63 <= min(i0 + c.above, c.m - 1));
                barrier_wait(full + stage, phase);
                products_begin();
                multiply_rows<T, D, PASSING>(s, k, OWN_PANEL, q, PANEL);
                multiply_rows<T, D, PASSING>(dp, v, OWN_PANEL, dy, PANEL);
                products_wait<1>();
                hold(s);
#pragma unroll
                for (int x = 0; x < PASSING / 2; x += 4) {
                    const float2 shift = *(const float2*)(stat + 2 * x);
#pragma unroll
                    for (int z = 0; z < 4; z++) s[x + z] = exp2_fast(fmaf(s[x + z], unit, z % 2 ? -shift.y : -shift.x));
                }
                if (edge) {
#pragma unroll
                    for (int x = 0; x < PASSING / 2; x++) {
                        const int query = i0 + x / 4 * 8 + x % 2 + lane % 4 * 2, key = mine + x % 4 / 2 * 8;
                        if (key < query + c.below || key > query + c.above || key >= c.m) s[x] = 0;  // of no key: 0 in K, but 0 * infinity is not 0
                    }
                }
#pragma unroll
                for (int x = 0; x < PASSING / 4; x++) w[x] = pack<T>(s[2 * x], s[2 * x + 1]);
                products_begin();
                multiply_columns<T, D>(dv_acc, w, dy, PANEL);
                products_wait<1>();
                hold(dp);
#pragma unroll
                for (int x = 0; x < PASSING / 2; x += 4) {
                    const float2 more = *(const float2*)(stat + PASSING + 2 * x);
#pragma unroll
                    for (int z = 0; z < 4; z++) dp[x + z] = s[x + z] * (dp[x + z] + (z % 2 ? more.y : more.x));
                }
#pragma unroll
                for (int x = 0; x < PASSING / 4; x++) ds[x] = pack<T>(dp[2 * x], dp[2 * x + 1]);
                write_operand(ds, shared_address(ds_tiles) + t % DS_PLACES * DS, 64 * me + thread / 32 * 16);
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                __syncwarp();
                barrier_arrive(ds_full + t % DS_PLACES);
                if (t > 0) barrier_wait(ds_full + (t - 1) % DS_PLACES, (t - 1) / DS_PLACES % 2);
                products_begin();
                multiply_queries(t + DS_PLACES - 1);  // the step before; in the first one it is of nothing, and nothing becomes of it
                multiply_columns<T, D>(dk_acc, ds, q, PANEL);
                products_wait<1>();
                hold(dp);
                if (t > 0) add_up(t - 1);
                products_wait<0>();
                hold(dk_acc);
                hold(dv_acc);
                __syncwarp();
                barrier_arrive(free + stage);  // every lane for itself, here and above: it costs nothing
                if (++stage == PLACES) stage = 0, phase ^= 1;
                if (i-- == from) i = until - 1;  // on to the next head's
            }
            barrier_wait(ds_full + (count - 1) % DS_PLACES, (count - 1) / DS_PLACES % 2);
            products_begin();
            multiply_queries(count - 1);
            products_wait<0>();
            hold(dp);
            add_up(count - 1);
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
