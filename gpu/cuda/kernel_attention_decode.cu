// Attention of few queries to many keys (decoding), 16-bit numbers: at the rate at which memory gives the keys and values.
//
// The queries of all heads that share a key head are the rows of one 16-row tile (up to 16 of them), so that keys and values
// are read once. The keys are cut into portions, one block each, four warps taking 16 keys in turn; what the portions found
// is merged by lse in a second, small kernel: rule (4) of the chapter.
//
// K and V go from memory to registers and from there to the tensor cores, past shared memory. mma.m16n8k16 wants of K, in
// thread (g, t) = (lane / 4, lane % 4), the numbers 2t, 2t+1, 2t+8, 2t+9 of key g; but the order of features is free as long as
// Q has the same: let thread t have features 8t ... 8t+7 of every 32, one read of 16 bytes, for two steps. Of V it wants keys 2t,
// 2t+1, 2t+8, 2t+9 at feature g; the order of the result's columns is free too: thread g reads features 8g ... 8g+7 of every 64, and
// pairs of keys are put together by byte permutations; column (x, g) of the result is feature 8g + x.
#include "block_attention.cuh"

template <class T> __device__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
#define MULTIPLY(T, TYPE)                                                                                                              \
    template <> __device__ inline void multiply<T>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {                  \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"        \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                           \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                           \
    }
MULTIPLY(bfloat16, "bf16")
MULTIPLY(float16, "f16")

__device__ inline uint4 read_once(const void* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

constexpr int WARPS = 4, KEYS = 16;  // a block's warps; the keys of one step of a warp

// Grid: (portion, key head, batch). part_o: (batch, head, query, portion, D), part_lse: the same without D.
// R = 1: at most 8 rows, the lower half of the tile is empty and costs no registers but the accumulators'.
template <class T, int D, int R>
__global__ void __launch_bounds__(32 * WARPS, 2)
attention_portions(const Call c, const T* q, const T* k, const T* v, float* part_o, float* part_lse) {
    const int portion = blockIdx.x, kv = blockIdx.y, b = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = c.Hq / c.Hkv, rows = group * c.n;
    k += b * c.k[0] + kv * c.k[1], v += b * c.v[0] + kv * c.v[1];
    const int first = max(0, c.below), end = min(c.m, c.n + c.above);  // what some query sees
    const int step = WARPS * KEYS, size = ((max(0, end - first) + c.splits - 1) / c.splits + step - 1) / step * step;
    const int from = first + portion * size, until = min(end, from + size);

    unsigned a[D / 16][4];  // Q, two steps of 16 features from each 16 bytes
#pragma unroll
    for (int x = 0; x < D / 32; x++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = g + 8 * r;
            uint4 y = make_uint4(0, 0, 0, 0);
            if (r < R && row < rows)
                y = *(const uint4*)(q + b * c.q[0] + (kv * group + row / c.n) * c.q[1] + row % c.n * c.q[2] + 32 * x + 8 * t);
            a[2 * x][r] = y.x, a[2 * x][r + 2] = y.y, a[2 * x + 1][r] = y.z, a[2 * x + 1][r + 2] = y.w;
        }
    const float unit = (float)(LOG2E * (c.softcap > 0 ? 1.0 : c.scale));
    float acc[D / 8][4], top[2] = {NOTHING_SEEN, NOTHING_SEEN}, total[2] = {0, 0};
#pragma unroll
    for (int x = 0; x < D / 8; x++) acc[x][0] = acc[x][1] = acc[x][2] = acc[x][3] = 0;

    uint4 keys[2][D / 32], values[4][D / 64];
    auto read_keys = [&](int key) {
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int x = 0; x < D / 32; x++) keys[s][x] = read_once(k + min(key + 8 * s + g, c.m - 1) * c.k[2] + 32 * x + 8 * t);
    };
    int key = from + warp * KEYS;
    if (key < until) read_keys(key);
    for (; key < until; key += step) {
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int x = 0; x < D / 64; x++)
                values[s][x] = read_once(v + min(key + 2 * t + s % 2 + s / 2 * 8, c.m - 1) * c.v[2] + 64 * x + 8 * g);
        float s[2][4] = {};
#pragma unroll
        for (int x = 0; x < D / 32; x++)
#pragma unroll
            for (int y = 0; y < 2; y++) {
                multiply<T>(s[y], a[2 * x], keys[y][x].x, keys[y][x].y);
                multiply<T>(s[y], a[2 * x + 1], keys[y][x].z, keys[y][x].w);
            }
        if (key + step < until) read_keys(key + step);
        float keep[2] = {1, 1};
        unsigned p[4] = {0, 0, 0, 0};
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int i = (g + 8 * r) % c.n;
            float larger = top[r];
#pragma unroll
            for (int y = 0; y < 2; y++)
#pragma unroll
                for (int z = 0; z < 2; z++) {
                    float& x = s[y][2 * r + z];
                    const int j = key + 8 * y + 2 * t + z;
                    if (c.softcap > 0) x = (float)c.softcap * tanh_fast(x * (float)(c.scale / c.softcap));
                    if (j >= until || !allowed(c, i, j)) x = NOTHING_SEEN;
                    larger = fmaxf(larger, x);
                }
            larger = fmaxf(larger, __shfl_xor_sync(0xffffffff, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(0xffffffff, larger, 2));
            const float shift = larger == NOTHING_SEEN ? 0.0f : larger * unit;
            keep[r] = exp2_fast(top[r] * unit - shift);
            top[r] = larger;
            total[r] *= keep[r];
#pragma unroll
            for (int y = 0; y < 2; y++) {
                const float w0 = exp2_fast(fmaf(s[y][2 * r], unit, -shift)), w1 = exp2_fast(fmaf(s[y][2 * r + 1], unit, -shift));
                total[r] += w0 + w1;
                p[2 * y + r] = pack<T>(w0, w1);
            }
        }
        if (__any_sync(0xffffffff, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
            for (int x = 0; x < D / 8; x++) acc[x][0] *= keep[0], acc[x][1] *= keep[0];
#pragma unroll
            for (int x = 0; R == 2 && x < D / 8; x++) acc[x][2] *= keep[1], acc[x][3] *= keep[1];
        }
#pragma unroll
        for (int x = 0; x < D / 64; x++) {
            const unsigned* rows_[4] = {&values[0][x].x, &values[1][x].x, &values[2][x].x, &values[3][x].x};
#pragma unroll
            for (int y = 0; y < 8; y++) {
                const int selector = y % 2 ? 0x7632 : 0x5410;  // the upper or the lower halves of two words
                multiply<T>(acc[8 * x + y], p, __byte_perm(rows_[0][y / 2], rows_[1][y / 2], selector),
                            __byte_perm(rows_[2][y / 2], rows_[3][y / 2], selector));
            }
        }
    }

    // The four warps' parts become one: relative to the largest maximum, added in the order of the warps.
    __shared__ float parts[WARPS][8 * R][D + 2], tops[WARPS][8 * R], totals[WARPS][8 * R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
        if (t == 0) tops[warp][g + 8 * r] = top[r] * unit, totals[warp][g + 8 * r] = total[r];
#pragma unroll
        for (int x = 0; x < D / 8; x++)  // column z of tile x is feature 64 (x / 8) + 8 z + x % 8
#pragma unroll
            for (int z = 0; z < 2; z++) parts[warp][g + 8 * r][x / 8 * 64 + 8 * (2 * t + z) + x % 8] = acc[x][2 * r + z];
    }
    __syncthreads();
    for (int row = warp; row < rows; row += WARPS) {
        float largest = NOTHING_SEEN, sum = 0, weight[WARPS];
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, tops[w][row]);
        const float shift = largest == NOTHING_SEEN ? 0.0f : largest;
        for (int w = 0; w < WARPS; w++) weight[w] = exp2_fast(tops[w][row] - shift), sum += weight[w] * totals[w][row];
        const long long at = (((long long)b * c.Hq + kv * group + row / c.n) * c.n + row % c.n) * c.splits + portion;
        if (lane == 0) part_lse[at] = shift / (float)LOG2E + logf(sum);
        const float factor = sum == 0 ? 1.0f : 1.0f / sum;
        for (int x = lane; x < D; x += 32) {
            float y = 0;
            for (int w = 0; w < WARPS; w++) y += weight[w] * parts[w][row][x];
            part_o[at * D + x] = y * factor;
        }
    }
}

// One warp for each row (batch, head, query): lse = log(sum of e^lse of the parts and the sink), o = sum of e^(part - lse) o.
template <class T>
__global__ void __launch_bounds__(128)
attention_merge(const Call c, const float* part_o, const float* part_lse, const float* sink, T* o, float* lse) {
    const long long row = (long long)blockIdx.x * 4 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= (long long)c.B * c.Hq * c.n) return;
    const float logit = sink == nullptr ? NOTHING_SEEN : sink[row / c.n % c.Hq];
    part_lse += row * c.splits, part_o += row * c.splits * c.e;
    float largest = logit;
    for (int s = 0; s < c.splits; s++) largest = fmaxf(largest, part_lse[s]);
    const float shift = largest == NOTHING_SEEN ? 0.0f : largest;
    float sum = exp_(logit - shift);
    for (int s = 0; s < c.splits; s++) sum += exp_(part_lse[s] - shift);
    if (lane == 0) lse[row] = shift + logf(sum);
    const float factor = sum == 0 ? 1.0f : 1.0f / sum;
    for (int x = lane; x < c.e; x += 32) {
        float y = 0;
        for (int s = 0; s < c.splits; s++) y += exp_(part_lse[s] - shift) * part_o[(long long)s * c.e + x];
        o[row * c.e + x] = narrow<T>(y * factor);
    }
}
