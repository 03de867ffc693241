// Softmax attention in float32 on the ordinary arithmetic units, near the rate of a good matrix product (no mask, bias, softcap).
//
// A block of 8 warps makes 128 rows x 16 E columns of the output; a warp has 16 rows to itself, so softmax is a matter of one warp.
// Both products are outer products, one feature (then one key) at a time: a thread takes 8 numbers of the left and 8 of the right
// out of shared memory, four reads of 16 bytes, and does 64 multiply-adds with them, while the numbers of the next step come. For
// that both operands of S = Q K^T lie by feature, not by row: they are turned as they are copied, 4 bytes a copy, and P is written by
// key. What limits the kernel is the rate of multiply-adds, 19 of 20 instructions; so what must be kept short is all else:
//   lanes    lane 2 c + r has the rows 4 r .. 4 r + 3 and 8 rows further, and the keys (columns) 4 c .. 4 c + 3 and 64 further.
//            Neighbours read the same numbers of the right, next but one the same of the left: then a warp's read of 16 bytes a lane
//            takes two turns of shared memory, not four, and reads take half the time of the multiply-adds, not all of it;
//   barriers slices of K (32 features) and V (32 keys) come through a ring, and each has two barriers that count: copies arrived,
//            readers done. No warp waits for another unless it is more than a slice ahead; so softmax of one falls under products of
//            the others;
//   sums     are rescaled only where the maximum has grown by more than 2^8.
#include "block_attention.cuh"

constexpr int ROWS = 128, KEYS = 128;  // of a block's tile of scores
constexpr int STRIDE = 132;            // from feature to feature, of Q and K: 4 more than 128, so that turned copies meet in no bank
constexpr int QUAD = 72;               // from 4 keys to 4 keys of P: 4 x 16 rows and 8 more, for the same reason
constexpr int HALF = KEYS / 2;

// Arrives when this thread's copies so far have.
__device__ inline void barrier_arrive_after_copies(Barrier* b) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}

// ---- copies: addresses go from copy to copy, since working them out anew would cost as many instructions as the copies ----------
__device__ inline void copy4(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ inline void copy16(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// SLICE features of 128 rows, turned. A warp's copy takes 8 features (32 bytes) of 4 rows: this thread's feature, and its first row.
__device__ inline int turned_feature() { return threadIdx.x / 32 % 4 * 8 + threadIdx.x % 8; }
__device__ inline int turned_row() { return threadIdx.x / 128 * 64 + threadIdx.x % 32 / 8; }
// `from`: where this thread's first number is; `rows`, `features`: how many there are from there on.
template <int SLICE>
__device__ inline void stage_turned(unsigned to, const float* from, long long stride, int rows, int features, bool whole) {
    if (whole) {
#pragma unroll
        for (int x = 0; x < 16; x++, from += 4 * stride)
#pragma unroll
            for (int f = 0; f < SLICE; f += 32) copy4(to + 16 * x + f * STRIDE * 4, from + f, true);
    } else {
#pragma unroll 1
        for (int x = 0; x < 16; x++, from += 4 * stride)
            for (int f = 0; f < SLICE; f += 32) copy4(to + 16 * x + f * STRIDE * 4, from + f, 4 * x < rows && f < features);
    }
}

// SLICE rows of 16 E columns, as they lie; `from` goes on to the next slice.
template <int E> __device__ inline int straight_column() { return threadIdx.x % (4 * E) * 4; }
template <int E> __device__ inline int straight_row() { return threadIdx.x / (4 * E); }
template <int E, int SLICE>
__device__ inline void stage_straight(unsigned to, const float*& from, long long stride, int rows, int columns, bool whole, bool vectors) {
    constexpr int STEP = 64 / E;  // rows that 256 threads copy
    if (whole) {
#pragma unroll
        for (int x = 0; x < SLICE / STEP; x++, from += STEP * stride) copy16(to + x * 4096, from, true);
    } else {
#pragma unroll 1
        for (int x = 0; x < SLICE / STEP; x++, from += STEP * stride)
            if (vectors) copy16(to + x * 4096, from, STEP * x < rows && columns > 0);
            else
                for (int u = 0; u < 4; u++) copy4(to + x * 4096 + 4 * u, from + u, STEP * x < rows && u < columns);
    }
}

// ---- products ----------------------------------------------------------------------------------------------------------
// N numbers, in groups of 4 that are `apart`.
template <int N, int APART> __device__ inline void take(float (&x)[N], const float* from) {
#pragma unroll
    for (int g = 0; g < N / 4; g++) {
        const float4 y = *(const float4*)(from + g * APART);
        x[4 * g] = y.x, x[4 * g + 1] = y.y, x[4 * g + 2] = y.z, x[4 * g + 3] = y.w;
    }
}
// To and fro: from one multiply-add to the next one number stays, so that each reads at most two registers that are not at hand
// (a third would come out of the same bank as one of them, and cost a clock).
template <int N> __device__ inline void multiply(float (&d)[8][N], const float (&a)[8], const float (&b)[N]) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int x = 0; x < N; x++) {
            const int j = i % 2 ? N - 1 - x : x;
            d[i][j] = fmaf(a[i], b[j], d[i][j]);
        }
}

// D += A B over SLICE steps. A: 8 numbers a step, the second four 8 further; `A_QUAD` from 4 steps to the next 4. The last step takes
// the first one's numbers once more, for nothing: one loop for all steps, and no reads beyond the slice.
template <int N, int SLICE, int A_STEP, int A_QUAD, int B_STEP>
__device__ inline void multiply_slice(float (&d)[8][N], const float* a, const float* b) {
    constexpr int UNROLL = 4;
    float x[2][8], y[2][N];
    take<8, 8>(x[0], a);
    take<N, 64>(y[0], b);
#pragma unroll 1
    for (int k = UNROLL; k <= SLICE; k += UNROLL) {
        const float *const a_next = a + (k < SLICE ? UNROLL / 4 * A_QUAD : 0), *const b_next = b + (k < SLICE ? UNROLL * B_STEP : 0);
#pragma unroll
        for (int z = 1; z <= UNROLL; z++) {
            take<8, 8>(x[z % 2], z < UNROLL ? a + z / 4 * A_QUAD + z % 4 * A_STEP : a_next);
            take<N, 64>(y[z % 2], z < UNROLL ? b + z * B_STEP : b_next);
            multiply(d, x[(z + 1) % 2], y[(z + 1) % 2]);
        }
        a = a_next, b = b_next;
    }
}

// Half of a thread's weights, by key, to where its warp reads them.
template <int HALF_OF_KEYS> __device__ inline void write_weights(float* p, const float (&s)[8][8]) {
    __syncwarp();
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int g = 0; g < 2; g++) {
            constexpr int J = 4 * HALF_OF_KEYS;
            *(float4*)(p + u * 16 + g * 8) = make_float4(s[4 * g][J + u], s[4 * g + 1][J + u], s[4 * g + 2][J + u], s[4 * g + 3][J + u]);
        }
    __syncwarp();
}

// Grid: tiles of rows and heads as `which` lists them times chunks of columns, the longest rows of a group of heads first.
// Shared memory: Q by feature, P of half a tile (each warp its own), the ring, its barriers.
template <int E, int SLICE, int RING>
__global__ void __launch_bounds__(256, 1)
attention_float(const Call c, const float* q, const float* k, const float* v, const float* sink, float* o, float* lse) {
    constexpr int COLUMNS = 16 * E, BUFFER = SLICE * STRIDE, AHEAD = RING / 2;
    extern __shared__ __align__(16) float memory[];
    float *const q_tile = memory, *const p_tiles = q_tile + 128 * STRIDE, *const buffers = p_tiles + 8 * HALF / 4 * QUAD;
    Barrier *const full = (Barrier*)(buffers + RING * BUFFER), *const free = full + RING;

    const int tiles = (c.n + ROWS - 1) / ROWS, chunks = (c.e + COLUMNS - 1) / COLUMNS, chunk = blockIdx.x % chunks;
    int tile, head;
    which(blockIdx.x / chunks, tiles, c.B * c.Hq, c.heads, tile, head);
    const int b = head / c.Hq, h = head % c.Hq, kv = h / (c.Hq / c.Hkv), row = (tiles - 1 - tile) * ROWS, column = chunk * COLUMNS;
    q += b * c.q[0] + h * c.q[1], k += b * c.k[0] + kv * c.k[1], v += b * c.v[0] + kv * c.v[1];
    const int last_row = min(row + ROWS, c.n) - 1;
    const int from = max(0, row + c.below) / KEYS, until = (min(c.m, last_row + c.above + 1) + KEYS - 1) / KEYS;  // tiles of keys

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, right = lane / 2, left = lane % 2;
    const int mine = 16 * warp + 4 * left;  // this thread's rows: mine ... mine + 3, mine + 8 ... mine + 11
    if (threadIdx.x == 0)
        for (int s = 0; s < RING; s++) barrier_init(full + s, 256), barrier_init(free + s, 256);
    __syncthreads();

    // Slices are copied AHEAD of their use; each side goes round the ring on its own.
    const int k_slices = (c.d + SLICE - 1) / SLICE;
    struct Place { int stage = 0, phase = 0; } copy, use;
    auto advance = [](Place& p) {
        if (++p.stage == RING) p.stage = 0, p.phase ^= 1;
    };
    const unsigned k_to = shared_address(buffers + turned_feature() * STRIDE + turned_row());
    const unsigned v_to = shared_address(buffers + straight_row<E>() * COLUMNS + straight_column<E>());
    const float* k_from = k + (from * KEYS + turned_row()) * c.k[2] + turned_feature();
    const float* v_from = v + (from * KEYS + straight_row<E>()) * c.v[2] + column + straight_column<E>();
    const long long k_back = KEYS * c.k[2] - k_slices * SLICE;
    int copy_key = from * KEYS, copy_slice = 0;
    bool used_before = false;  // the buffer that is to be filled
    auto fetch = [&]() {
        if (copy_key >= until * KEYS) return;
        const unsigned to = copy.stage * (BUFFER * 4);
        if (used_before) barrier_wait(free + copy.stage, copy.phase ^ 1);
        if (copy_slice < k_slices) {
            const int feature = copy_slice * SLICE;
            stage_turned<SLICE>(k_to + to, k_from, c.k[2], c.m - copy_key - turned_row(), c.d - feature - turned_feature(),
                         copy_key + KEYS <= c.m && feature + SLICE <= c.d);
            k_from += SLICE;
        } else {
            const int key = copy_key + (copy_slice - k_slices) * SLICE;
            stage_straight<E, SLICE>(v_to + to, v_from, c.v[2], c.m - key - straight_row<E>(), c.e - column - straight_column<E>(),
                              c.vectors && key + SLICE <= c.m && column + COLUMNS <= c.e, c.vectors);
        }
        barrier_arrive_after_copies(full + copy.stage);
        advance(copy);
        used_before |= copy.stage == 0;
        if (++copy_slice == k_slices + KEYS / SLICE) copy_slice = 0, copy_key += KEYS, k_from += k_back;
    };
    auto next = [&]() -> const float* {
        fetch();
        barrier_wait(full + use.stage, use.phase);
        __syncwarp();
        return buffers + use.stage * BUFFER;
    };
    auto release = [&]() {
        __syncwarp();
        barrier_arrive(free + use.stage);  // every lane for itself: here it costs nothing
        advance(use);
    };

    const float unit = (float)(c.scale * LOG2E);  // scores are taken in powers of two
    const float logit = sink == nullptr ? NOTHING_SEEN : sink[h] * (float)LOG2E;
    float acc[8][E], top[8], total[8];  // total: this lane's part
#pragma unroll
    for (int i = 0; i < 8; i++) {
        top[i] = logit;  // the sink is the first key: weight 1 and no value
        total[i] = right == 0 && logit > NOTHING_SEEN ? 1.0f : 0.0f;
#pragma unroll
        for (int x = 0; x < E; x++) acc[i][x] = 0;
    }
    if (from < until) {
        for (int x = 0; x < k_slices; x++)
            stage_turned<SLICE>(shared_address(q_tile + x * BUFFER + turned_feature() * STRIDE + turned_row()),
                         q + (row + turned_row()) * c.q[2] + x * SLICE + turned_feature(), c.q[2], c.n - row - turned_row(),
                         c.d - x * SLICE - turned_feature(), row + ROWS <= c.n && (x + 1) * SLICE <= c.d);
        for (int x = 0; x < AHEAD; x++) fetch();  // the first of them is there only when the queries are, too
    }
    float* const p = p_tiles + warp * (HALF / 4 * QUAD) + 4 * left;

    for (int key = from * KEYS; key < until * KEYS; key += KEYS) {
        float s[8][8];
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) s[i][j] = 0;
        for (int x = 0; x < k_slices; x++) {
            const float* const slice = next();
            multiply_slice<8, SLICE, STRIDE, 4 * STRIDE, STRIDE>(s, q_tile + x * BUFFER + mine, slice + 4 * right);
            release();
        }
        if (!inside(c, row, ROWS, key, KEYS)) {
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (!allowed(c, row + mine + i % 4 + i / 4 * 8, key + 4 * right + j % 4 + j / 4 * 64)) s[i][j] = NOTHING_SEEN;
        }
        float larger[8], keep[8];
        bool grown = false;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            larger[i] = s[i][0];
#pragma unroll
            for (int j = 1; j < 8; j++) larger[i] = fmaxf(larger[i], s[i][j]);
        }
#pragma unroll
        for (int step = 2; step < 32; step *= 2)
#pragma unroll
            for (int i = 0; i < 8; i++) larger[i] = fmaxf(larger[i], __shfl_xor_sync(0xffffffff, larger[i], step));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float most = larger[i] * unit;
            const bool far = most - top[i] > 8.0f;  // weights to 2^8 are as good as those to 1
            const float before = top[i];
            top[i] = far ? most : top[i];
            keep[i] = far ? exp2_fast(before - most) : 1.0f;
            grown |= far;
            const float shift = top[i] == NOTHING_SEEN ? 0.0f : top[i];
            float sum = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) s[i][j] = exp2_fast(fmaf(s[i][j], unit, -shift)), sum += s[i][j];
            total[i] = total[i] * keep[i] + sum;
        }
        if (__any_sync(0xffffffff, grown)) {
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int x = 0; x < E; x++) acc[i][x] *= keep[i];
        }
#pragma unroll 1
        for (int x = 0; x < KEYS / SLICE; x++) {
            if (x == 0) write_weights<0>(p + right * QUAD, s);
            if (x == HALF / SLICE) write_weights<1>(p + right * QUAD, s);
            const float* const slice = next();
            multiply_slice<E, SLICE, 16, QUAD, COLUMNS>(acc, p + x % (HALF / SLICE) * (SLICE / 4) * QUAD, slice + 4 * right);
            release();
        }
    }

#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int step = 2; step < 32; step *= 2) total[i] += __shfl_xor_sync(0xffffffff, total[i], step);
        const int r = row + mine + i % 4 + i / 4 * 8;
        if (r >= c.n) continue;
        const long long at = ((long long)b * c.Hq + h) * c.n + r;
        if (chunk == 0 && right == 0) lse[at] = ((top[i] == NOTHING_SEEN ? 0.0f : top[i]) + log2f(total[i])) * (float)(1 / LOG2E);
        const float factor = total[i] == 0 ? 1.0f : 1.0f / total[i];
#pragma unroll
        for (int g = 0; g < E / 4; g++) {
            const int col = column + 4 * right + 64 * g;
            float* const to = o + at * c.e + col;
            if (c.e % 4 == 0) {
                if (col < c.e)
                    *(float4*)to = make_float4(acc[i][4 * g] * factor, acc[i][4 * g + 1] * factor, acc[i][4 * g + 2] * factor,
                                               acc[i][4 * g + 3] * factor);
            } else {
#pragma unroll
                for (int u = 0; u < 4; u++)
                    if (col + u < c.e) to[u] = acc[i][4 * g + u] * factor;
            }
        }
    }
}
