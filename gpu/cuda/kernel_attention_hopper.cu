// Softmax attention in 16-bit numbers on Hopper's tensor cores: head sizes to 128, float32 sums.
//
// A block makes 64 W rows of the output, with W + 1 warpgroups. One is the producer: a single thread that has the copy
// engine bring the queries once and then the tiles of K and V, two of each under way, last keys first. The others are
// consumers of 64 rows each, with scores, weights and results in registers. What limits the kernel are the tensor cores and,
// almost as much, the special-function units (16 exponentials a clock against 2048 multiply-adds: per tile of 128 x 128
// and head size 128, 1024 clocks of exponentials beside 2048 of products). So both must run at once, in two ways:
//   within a warpgroup   S = Q K^T of the next tile is issued before O += P V of this one, and the softmax of the next
//                        works while P V is under way;
//   between warpgroups   they take turns in issuing products, so that one's softmax falls under the other's products.
// The maximum is kept in units of the raw product, so that a weight is one multiply-add and one 2^x; it is left as it is until a
// score exceeds it by a factor of 2^8 in weight, so that sums seldom have to be rescaled.
#include "block_hopper.cuh"

constexpr int STAGES = 2;  // tiles of K, and of V, in shared memory

// Blocks stay and take item after item from a common counter, so that the next one's copies fall under the end of this one and
// all blocks end together. The producer hands the items on through two places in shared memory. The engine's stages go round
// through all items: `round`, the count of tiles of keys so far, tells stage and phase.
template <class T, int D, int W, int KEYS, bool CAP, bool MAPS>
__global__ void __launch_bounds__(128 * (W + 1), 1)
attention_forward(const __grid_constant__ Call c, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, const unsigned char* mask, const T* bias, const float* sink, T* o, float* lse,
                  int* counter) {
    constexpr int ROWS = 64 * W, PANELS = D / 64, Q_PANEL = ROWS * 128, KV_PANEL = KEYS * 128, KV_TILE = PANELS * KV_PANEL;
    extern __shared__ unsigned char memory[];
    unsigned char* const base = memory + (1024 - shared_address(memory) % 1024) % 1024;
    unsigned char *const q_tile = base, *const k_tiles = base + PANELS * Q_PANEL, *const v_tiles = k_tiles + STAGES * KV_TILE;
    Barrier* const q_full = (Barrier*)(v_tiles + STAGES * KV_TILE);
    Barrier *const q_free = q_full + 1, *const k_full = q_free + 1, *const v_full = k_full + STAGES, *const k_free = v_full + STAGES,
                  *const v_free = k_free + STAGES, *const item_full = v_free + STAGES, *const item_free = item_full + 2;
    int* const places = (int*)(item_free + 2);

    const int tiles = (c.n + ROWS - 1) / ROWS, items = tiles * c.B * c.Hq;
    int b, h, row, until, count, round = 0, asked = 0;  // asked: items with queries so far
    auto take = [&](int item) {
        int tile, head;
        which(item, tiles, c.B * c.Hq, c.heads, tile, head);
        b = head / c.Hq, h = head % c.Hq, row = (tiles - 1 - tile) * ROWS;  // with a causal mask the longest work first
        const int last_row = min(row + ROWS, c.n) - 1;
        until = (min(c.m, last_row + c.above + 1) + KEYS - 1) / KEYS;  // tiles of keys from the last to the first
        count = max(0, until - max(0, row + c.below) / KEYS);
    };
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

    will_come(1, W, 256);
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1), barrier_init_for_warps(q_free, 4 * W);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(k_full + s, 1), barrier_init(v_full + s, 1);
            barrier_init_for_warps(k_free + s, 4 * W), barrier_init_for_warps(v_free + s, 4 * W);
        }
        for (int s = 0; s < 2; s++) barrier_init(item_full + s, 1), barrier_init_for_warps(item_free + s, 4 * W);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (warpgroup == 0) {
        keep_registers<(W == 2 ? 40 : 32)>();
        if (threadIdx.x == 0) {
            int item = blockIdx.x;
            for (int turn = 0;; turn++, item = gridDim.x + atomicAdd(counter, 1)) {
                barrier_wait(item_free + turn % 2, turn / 2 % 2 ^ 1);
                places[turn % 2] = item;
                barrier_arrive(item_full + turn % 2);
                if (item >= items) break;
                take(item);
                if (count == 0) continue;
                const int kv = h / (c.Hq / c.Hkv);
                barrier_wait(q_free, asked++ % 2 ^ 1);
                barrier_expect(q_full, PANELS * Q_PANEL);
                for (int p = 0; p < PANELS; p++) copy_box(q_tile + p * Q_PANEL, &q_map, q_full, 64 * p, row, h, b);
                for (int t = 0; t < count; t++, round++) {
                    const int stage = round % STAGES, phase = round / STAGES % 2, key = (until - 1 - t) * KEYS;
                    barrier_wait(k_free + stage, phase ^ 1);
                    barrier_expect(k_full + stage, KV_TILE);
                    for (int p = 0; p < PANELS; p++)
                        copy_box(k_tiles + stage * KV_TILE + p * KV_PANEL, &k_map, k_full + stage, 64 * p, key, kv, b);
                    barrier_wait(v_free + stage, phase ^ 1);
                    barrier_expect(v_full + stage, KV_TILE);
                    for (int p = 0; p < PANELS; p++)
                        copy_box(v_tiles + stage * KV_TILE + p * KV_PANEL, &v_map, v_full + stage, 64 * p, key, kv, b);
                }
            }
        }
    } else {
        take_registers<(W == 2 ? 232 : 160)>();
        const int me = warpgroup - 1, thread = threadIdx.x % 128, lane = thread % 32;
        const float unit = (float)LOG2E * (CAP || MAPS ? 1.0f : (float)c.scale);  // of the numbers in s, in powers of two
        if (me == W - 1) pass(1, 256);  // the first turn is the first one's
        for (int turn = 0;; turn++) {
            barrier_wait(item_full + turn % 2, turn / 2 % 2);
            const int item = places[turn % 2];
            barrier_arrive_as_warp(item_free + turn % 2);
            if (item >= items) break;
            take(item);
            const int row_0 = row + 64 * me, mine = row_0 + thread / 32 * 16 + lane / 4;  // this thread: rows mine, mine + 8
            const unsigned char* const mask_h = !MAPS || mask == nullptr ? nullptr : mask + b * c.mask[0] + h * c.mask[1];
            const T* const bias_h = !MAPS || bias == nullptr ? nullptr : bias + b * c.bias[0] + h * c.bias[1];
            const float logit = sink == nullptr ? NOTHING_SEEN : sink[h];
            const bool has_sink = logit > NOTHING_SEEN;

            float acc[D / 2], s[KEYS / 2], top[2], total[2];
            unsigned p[KEYS / 4];
            top[0] = top[1] = has_sink ? logit * ((float)LOG2E / unit) : NOTHING_SEEN;
            total[0] = total[1] = has_sink && lane % 4 == 0 ? 1.0f : 0.0f;
#pragma unroll
            for (int x = 0; x < D / 2; x++) acc[x] = 0;

            auto multiply_keys = [&](int stage) {
                const unsigned long long a = operand(shared_address(q_tile) + me * 64 * 128, 0);
                const unsigned long long k = operand(shared_address(k_tiles) + stage * KV_TILE, 0);
#pragma unroll
                for (int x = 0; x < D / 16; x++)
                    Product<T, KEYS, false>::add(s, a + ((x / 4 * Q_PANEL + x % 4 * 32) >> 4),
                                                 k + ((x / 4 * KV_PANEL + x % 4 * 32) >> 4), x > 0);
                products_commit();
            };
            auto multiply_values = [&](int stage) {
                const unsigned long long v = operand(shared_address(v_tiles) + stage * KV_TILE, KV_PANEL);
#pragma unroll
                for (int x = 0; x < KEYS / 16; x++) Product<T, D, true>::add(acc, p + 4 * x, v + (x * 2048 >> 4), 1);
                products_commit();
            };
            // s becomes weights; `keep` says by how much what was summed before shrinks, for the two rows.
            auto softmax = [&](int key, float (&keep)[2]) {
                const bool edge = !inside(c, row_0, 64, key, KEYS);
                if (CAP || MAPS) {
                    const float factor = (float)(CAP ? c.scale / c.softcap : c.scale);
#pragma unroll
                    for (int x = 0; x < KEYS / 2; x++) {
                        s[x] *= factor;
                        if (CAP) s[x] = (float)c.softcap * tanh_fast(s[x]);
                    }
                }
                if (edge) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {  // columns first ... last of this thread's are allowed
                        const int column = key + lane % 4 * 2, i = mine + 8 * r;
                        const int first = i + c.below - column, last = min(i + c.above, c.m - 1) - column;
#pragma unroll
                        for (int x = 0; x < KEYS / 4; x++) {
                            const int j = x / 2 * 8 + x % 2;
                            if (j < first || j > last) s[x / 2 * 4 + 2 * r + x % 2] = NOTHING_SEEN;
                        }
                    }
                }
                if (MAPS) {
#pragma unroll
                    for (int x = 0; x < KEYS / 2; x++) {
                        const int i = min(mine + x % 4 / 2 * 8, c.n - 1), j = min(key + x / 4 * 8 + lane % 4 * 2 + x % 2, c.m - 1);
                        const float y = bias_h == nullptr ? 0.0f : widen(bias_h[i * c.bias[2] + j * c.bias[3]]);
                        const bool seen = y != NOTHING_SEEN && (mask_h == nullptr || mask_h[i * c.mask[2] + j * c.mask[3]]);
                        s[x] = seen ? s[x] + y : NOTHING_SEEN;
                    }
                }
                float larger[2][2] = {{top[0], top[0]}, {top[1], top[1]}}, sum[2][2] = {}, shift[2];  // chains of operations, side by side
#pragma unroll
                for (int x = 0; x < KEYS / 2; x++) larger[x % 4 / 2][x % 2] = fmaxf(larger[x % 4 / 2][x % 2], s[x]);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float most = fmaxf(larger[r][0], larger[r][1]);
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
                    const bool far = (most - top[r]) * unit > 8.0f;  // weights to 2^8 are as good as those to 1: what was summed may stay
                    const float unit_of_row = far ? most : top[r];
                    shift[r] = unit_of_row == NOTHING_SEEN ? 0.0f : unit_of_row * unit;
                    keep[r] = far ? exp2_fast(top[r] * unit - shift[r]) : 1.0f;
                    top[r] = unit_of_row;
                }
#pragma unroll
                for (int x = 0; x < KEYS / 2; x++) {
                    s[x] = exp2_fast(fmaf(s[x], unit, -shift[x % 4 / 2]));
                    sum[x % 4 / 2][x % 2] += s[x];
                }
#pragma unroll
                for (int r = 0; r < 2; r++) total[r] = total[r] * keep[r] + (sum[r][0] + sum[r][1]);
            };
            auto round_weights = [&]() {
#pragma unroll
                for (int x = 0; x < KEYS / 4; x++) p[x] = pack<T>(s[2 * x], s[2 * x + 1]);
            };

            if (count > 0) {
                float keep[2];
                barrier_wait(q_full, asked++ % 2);
                barrier_wait(k_full + round % STAGES, round / STAGES % 2);
                products_begin();
                multiply_keys(round % STAGES);
                products_wait<0>();
                hold(s);
                barrier_arrive_as_warp(k_free + round % STAGES);
                softmax((until - 1) * KEYS, keep);
                round_weights();
                for (int t = 1; t < count; t++) {
                    const int now = round + t, stage = now % STAGES, before = (now - 1) % STAGES;
                    barrier_wait(k_full + stage, now / STAGES % 2);
                    meet(1 + me, 256);  // my turn
                    products_begin();
                    multiply_keys(stage);
                    barrier_wait(v_full + before, (now - 1) / STAGES % 2);
                    multiply_values(before);
                    pass(1 + (me + 1) % W, 256);  // the next one's
                    products_wait<1>();
                    hold(s);
                    barrier_arrive_as_warp(k_free + stage);
                    softmax((until - 1 - t) * KEYS, keep);
                    if (total[0] + total[1] < -1.0f) __trap();  // never; it keeps all of the softmax above the wait for P V
                    products_wait<0>();
                    hold(acc);
                    barrier_arrive_as_warp(v_free + before);
                    if (__any_sync(0xffffffff, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
                        for (int x = 0; x < D / 2; x++) acc[x] *= keep[x % 4 / 2];
                    }
                    round_weights();
                }
                barrier_arrive_as_warp(q_free);
                round += count;
                const int last = (round - 1) % STAGES;
                barrier_wait(v_full + last, (round - 1) / STAGES % 2);
                products_begin();
                multiply_values(last);
                products_wait<0>();
                hold(acc);
                barrier_arrive_as_warp(v_free + last);
            }
            float factor[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
                total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
                const int i = mine + 8 * r;
                if (lane % 4 == 0 && i < c.n)
                    lse[((long long)b * c.Hq + h) * c.n + i] =
                        (top[r] == NOTHING_SEEN ? 0.0f : top[r] * (unit / (float)LOG2E)) + logf(total[r]);
                factor[r] = total[r] == 0 ? 1.0f : 1.0f / total[r];
            }
            write_rows<T, D / 2>(acc, factor, o + ((long long)b * c.Hq + h) * c.n * c.e, mine, c.n, c.e);
        }
        if (me == 0) meet(1, 256);  // the last turn is nobody's
    }
}
