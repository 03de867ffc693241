// Softmax attention in 16-bit numbers on Hopper's tensor cores: head sizes to 128, float32 sums.
//
// A block makes 64 W rows of the output, with W + 1 warpgroups. One is the producer: a single thread that has the copy
// engine bring the queries once and then the tiles of K and V, two of each under way, last keys first. The others are
// consumers of 64 rows each, with scores, weights and results in registers. What limits the kernel are the tensor cores and,
// almost as much, the special-function units (16 exponentials a clock against 4096 multiply-adds: per tile of 128 x 128
// and head size 128, 1024 clocks of exponentials beside 2048 of products). So both must run at once, in two ways:
//   within a warpgroup   S = Q K^T of the next tile is issued before O += P V of this one, and the softmax of the next
//                        works while P V is under way;
//   between warpgroups   they take turns in issuing products, so that one's softmax falls under the other's products.
// The maximum is kept in units of the raw product, so that a weight is one multiply-add and one 2^x.
#include "block_hopper.cuh"

constexpr int KEYS = 128;  // of a tile
constexpr int STAGES = 2;  // tiles of K, and of V, in shared memory

template <int D, int W> constexpr int SHARED = 1024 + (64 * W + 2 * STAGES * KEYS) * D * 2 + 128;

// Heads of one group are taken up together, each tile of rows for all of them, the longest rows first: their keys and values
// stay in the L2 cache, and the last blocks to finish are short ones.
__device__ inline void which(const Call& c, int tiles, int& tile, int& head) {
    const int all = c.B * c.Hq, group = blockIdx.x / (tiles * c.heads), within = blockIdx.x % (tiles * c.heads);
    const int heads = min(c.heads, all - group * c.heads);
    tile = tiles - 1 - within / heads;
    head = group * c.heads + within % heads;
}

template <class T, int D, int W, bool CAP, bool MAPS>
__global__ void __launch_bounds__(128 * (W + 1), 1)
attention_forward(const __grid_constant__ Call c, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, const unsigned char* mask, const T* bias, const float* sink, T* o, float* lse) {
    constexpr int ROWS = 64 * W, PANELS = D / 64, Q_PANEL = ROWS * 128, KV_PANEL = KEYS * 128, KV_TILE = PANELS * KV_PANEL;
    extern __shared__ unsigned char memory[];
    unsigned char* const base = memory + (1024 - shared_address(memory) % 1024) % 1024;
    unsigned char *const q_tile = base, *const k_tiles = base + PANELS * Q_PANEL, *const v_tiles = k_tiles + STAGES * KV_TILE;
    Barrier* const q_full = (Barrier*)(v_tiles + STAGES * KV_TILE);
    Barrier *const k_full = q_full + 1, *const v_full = k_full + STAGES, *const k_free = v_full + STAGES, *const v_free = k_free + STAGES;

    const int tiles = (c.n + ROWS - 1) / ROWS;
    int tile, head;
    which(c, tiles, tile, head);
    const int b = head / c.Hq, h = head % c.Hq, row = tile * ROWS, last_row = min(row + ROWS, c.n) - 1;
    const int from = max(0, row + c.below) / KEYS, until = (min(c.m, last_row + c.above + 1) + KEYS - 1) / KEYS;
    const int count = max(0, until - from);
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(k_full + s, 1), barrier_init(v_full + s, 1);
            barrier_init(k_free + s, 4 * W), barrier_init(v_free + s, 4 * W);  // one arrival a warp
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (warpgroup == 0) {
        keep_registers<(W == 2 ? 24 : 32)>();
        if (threadIdx.x == 0 && count > 0) {
            const int kv = h / (c.Hq / c.Hkv);
            barrier_expect(q_full, PANELS * Q_PANEL);
            for (int p = 0; p < PANELS; p++) copy_box(q_tile + p * Q_PANEL, &q_map, q_full, 64 * p, row, h, b);
            for (int t = 0; t < count; t++) {
                const int stage = t % STAGES, phase = t / STAGES % 2, key = (until - 1 - t) * KEYS;
                barrier_wait(k_free + stage, phase ^ 1);
                barrier_expect(k_full + stage, KV_TILE);
                for (int p = 0; p < PANELS; p++) copy_box(k_tiles + stage * KV_TILE + p * KV_PANEL, &k_map, k_full + stage, 64 * p, key, kv, b);
                barrier_wait(v_free + stage, phase ^ 1);
                barrier_expect(v_full + stage, KV_TILE);
                for (int p = 0; p < PANELS; p++) copy_box(v_tiles + stage * KV_TILE + p * KV_PANEL, &v_map, v_full + stage, 64 * p, key, kv, b);
            }
        }
    } else {
        take_registers<(W == 2 ? 240 : 160)>();
        const int me = warpgroup - 1, thread = threadIdx.x % 128, lane = thread % 32;
        const int row_0 = row + 64 * me, mine = row_0 + thread / 32 * 16 + lane / 4;  // this thread: rows mine, mine + 8
        if (MAPS && mask != nullptr) mask += b * c.mask[0] + h * c.mask[1];
        if (MAPS && bias != nullptr) bias += b * c.bias[0] + h * c.bias[1];
        const float unit = (float)LOG2E * (CAP || MAPS ? 1.0f : (float)c.scale);  // of the numbers in s, in powers of two
        const float logit = sink == nullptr ? NOTHING_SEEN : sink[h];
        const bool has_sink = logit > NOTHING_SEEN;

        float acc[D / 2], s[KEYS / 2], top[2], total[2];
        unsigned p[KEYS / 4];
        top[0] = top[1] = has_sink ? logit * ((float)LOG2E / unit) : NOTHING_SEEN;
        total[0] = total[1] = has_sink && lane % 4 == 0 ? 1.0f : 0.0f;
#pragma unroll
        for (int x = 0; x < D / 2; x++) acc[x] = 0;

        auto multiply_keys = [&](int stage) {
            const unsigned long long a = operand(shared_address(q_tile) + me * 64 * 128, 0), k = operand(shared_address(k_tiles) + stage * KV_TILE, 0);
#pragma unroll
            for (int x = 0; x < D / 16; x++)
                Product<T, KEYS, false>::add(s, a + ((x / 4 * Q_PANEL + x % 4 * 32) >> 4), k + ((x / 4 * KV_PANEL + x % 4 * 32) >> 4), x > 0);
        };
        auto multiply_values = [&](int stage) {
            const unsigned long long v = operand(shared_address(v_tiles) + stage * KV_TILE, KV_PANEL);
#pragma unroll
            for (int x = 0; x < KEYS / 16; x++) Product<T, D, true>::add(acc, p + 4 * x, v + (x * 2048 >> 4), 1);
        };
        // s becomes weights; returns by how much what was summed before shrinks, for the two rows.
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
            if (MAPS || edge) {
#pragma unroll
                for (int x = 0; x < KEYS / 2; x++) {
                    const int i = mine + x % 4 / 2 * 8, j = key + x / 4 * 8 + lane % 4 * 2 + x % 2;
                    bool seen = allowed(c, i, j);
                    if (MAPS && seen && bias != nullptr) {
                        const float y = widen(bias[i * c.bias[2] + j * c.bias[3]]);
                        s[x] += y;
                        seen = y != NOTHING_SEEN;
                    }
                    if (MAPS && seen && mask != nullptr) seen = mask[i * c.mask[2] + j * c.mask[3]];
                    if (!seen) s[x] = NOTHING_SEEN;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float larger = top[r];
#pragma unroll
                for (int x = 0; x < KEYS / 8; x++) larger = fmaxf(larger, fmaxf(s[4 * x + 2 * r], s[4 * x + 2 * r + 1]));
                larger = fmaxf(larger, __shfl_xor_sync(0xffffffff, larger, 1));
                larger = fmaxf(larger, __shfl_xor_sync(0xffffffff, larger, 2));
                const float shift = larger == NOTHING_SEEN ? 0.0f : larger * unit;
                keep[r] = exp2_fast(top[r] * unit - shift);
                top[r] = larger;
                float sum = 0;
#pragma unroll
                for (int x = 0; x < KEYS / 8; x++)
#pragma unroll
                    for (int y = 0; y < 2; y++) {
                        float& w = s[4 * x + 2 * r + y];
                        w = exp2_fast(fmaf(w, unit, -shift));
                        sum += w;
                    }
                total[r] = total[r] * keep[r] + sum;
            }
        };
        auto round_weights = [&]() {
#pragma unroll
            for (int x = 0; x < KEYS / 4; x++) p[x] = pack<T>(s[2 * x], s[2 * x + 1]);
        };
        auto release = [&](Barrier* free) {
            if (lane == 0) barrier_arrive(free);
        };

        if (count > 0) {
            float keep[2];
            barrier_wait(q_full, 0);
            barrier_wait(k_full, 0);
            products_begin();
            multiply_keys(0);
            products_commit();
            products_wait<0>();
            hold(s);
            release(k_free);
            softmax((until - 1) * KEYS, keep);
            round_weights();
            for (int t = 1; t < count; t++) {
                const int stage = t % STAGES, before = (t - 1) % STAGES;
                barrier_wait(k_full + stage, t / STAGES % 2);
                if (!(me == 0 && t == 1)) meet(1 + me, 256);  // my turn
                products_begin();
                multiply_keys(stage);
                products_commit();
                barrier_wait(v_full + before, (t - 1) / STAGES % 2);
                multiply_values(before);
                products_commit();
                if (!(me == W - 1 && t == count - 1)) pass(1 + (me + 1) % W, 256);  // the next one's
                products_wait<1>();
                hold(s);
                release(k_free + stage);
                softmax((until - 1 - t) * KEYS, keep);
                products_wait<0>();
                hold(acc);
                release(v_free + before);
#pragma unroll
                for (int x = 0; x < D / 2; x++) acc[x] *= keep[x % 4 / 2];
                round_weights();
            }
            const int last = (count - 1) % STAGES;
            barrier_wait(v_full + last, (count - 1) / STAGES % 2);
            products_begin();
            multiply_values(last);
            products_commit();
            products_wait<0>();
            hold(acc);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
            total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
            const int i = mine + 8 * r;
            const long long at = ((long long)b * c.Hq + h) * c.n + i;
            if (lse != nullptr && lane % 4 == 0 && i < c.n)
                lse[at] = (top[r] == NOTHING_SEEN ? 0.0f : top[r] * (unit / (float)LOG2E)) + logf(total[r]);
            const float factor = total[r] == 0 ? 1.0f : 1.0f / total[r];
            // Neighbouring lanes swap halves of two groups of 8 columns, and each writes 4 neighbouring numbers.
            const int odd = lane % 2;
#pragma unroll
            for (int x = 0; x < D / 8; x += 2) {
                const unsigned even_group = pack<T>(acc[4 * x + 2 * r] * factor, acc[4 * x + 2 * r + 1] * factor);
                const unsigned odd_group = pack<T>(acc[4 * x + 4 + 2 * r] * factor, acc[4 * x + 5 + 2 * r] * factor);
                const unsigned other = __shfl_xor_sync(0xffffffff, odd ? even_group : odd_group, 1);
                const int column = 8 * (x + odd) + 2 * (lane % 4 - odd);
                if (i < c.n && column < c.e) *(uint2*)(o + at * c.e + column) = odd ? make_uint2(other, odd_group) : make_uint2(even_group, other);
            }
        }
    }
}
