// What all attention kernels share: a call's sizes, who may attend to whom, tiles into shared memory.
#pragma once
#include <halves.cuh>  // the host has another

#define NOTHING_SEEN __int_as_float(0xff800000)  // -infinity, the score of a pair that is not allowed
#define LOG2E 1.4426950408889634

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float exp_(float x) { return exp2f(x * (float)LOG2E); }
__device__ inline double exp_(double x) { return exp(x); }
__device__ inline float log_(float x) { return logf(x); }
__device__ inline double log_(double x) { return log(x); }
__device__ inline float tanh_(float x) { return tanhf(x); }
__device__ inline double tanh_(double x) { return tanh(x); }

// tanh x = 1 - 2 / (1 + e^{2x}), by two special functions; the absolute error is about 2^-23.
__device__ inline float tanh_fast(float x) { return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(2.0f * (float)LOG2E * x, 126.0f))); }

// 1 - tanh^2 x = 4 e^{-2|x|} / (1 + e^{-2|x|})^2, without cancellation where tanh is nearly 1.
template <class A> __device__ inline A tanh_slope(A x) {
    A t = exp_(-2 * (x < 0 ? -x : x));
    return 4 * t / ((1 + t) * (1 + t));
}

// ---- a call ----------------------------------------------------------------------------------------------------------
// Strides count elements: batch, head, row (the last axis is contiguous), and for maps of pairs the column too.
// Position allows the pair (i, j) where i + below <= j <= i + above.
struct Call {
    long long q[3], k[3], v[3], dy[3], mask[4], bias[4];
    double scale, softcap;  // softcap 0: none
    int B, Hq, Hkv, n, m, d, e, below, above;
    int vectors;  // rows of q, k, v, dy start at multiples of 16 bytes and hold whole ones
    int splits;   // portions of the keys (decoding); tiles of keys that a head is behind the one before it (gradient)
    int heads;    // heads taken up together, whose keys and values the L2 cache holds
};

__device__ inline bool allowed(const Call& c, int i, int j) { return j < c.m && i < c.n && j >= i + c.below && j <= i + c.above; }

// Where position allows every pair of rows [i, i + rows) and keys [j, j + keys), no pair has to be looked at.
__device__ inline bool inside(const Call& c, int i, int rows, int j, int keys) {
    return j >= i + rows - 1 + c.below && j + keys - 1 <= i + c.above && j + keys <= c.m;
}

// Which tile of rows of which head the item is. Heads of one group are taken up together, each tile for all of them, so
// that what passes by the tiles stays in the L2 cache.
__device__ inline void which(int item, int tiles, int all, int together, int& tile, int& head) {
    const int group = item / (tiles * together), within = item % (tiles * together), heads = min(together, all - group * together);
    tile = within / heads;
    head = group * together + within % heads;
}

// A scaled and capped product becomes a score: biased, and -infinity where the pair is not allowed.
template <class T, class A, bool MAPS>
__device__ inline A biased(const Call& c, A s, bool edge, int i, int j, const unsigned char* mask, const T* bias) {
    bool seen = !edge || allowed(c, i, j);
    if (MAPS && seen && bias != nullptr) {
        A b = widen(bias[i * c.bias[2] + j * c.bias[3]]);
        s += b;
        seen = b != (A)NOTHING_SEEN;
    }
    if (MAPS && seen && mask != nullptr) seen = mask[i * c.mask[2] + j * c.mask[3]];
    return seen ? s : (A)NOTHING_SEEN;
}
template <class T, class A, bool MAPS>
__device__ inline A score(const Call& c, A raw, bool edge, int i, int j, const unsigned char* mask, const T* bias) {
    A s = raw * (A)c.scale;
    if (c.softcap > 0) s = (A)c.softcap * tanh_(s / (A)c.softcap);
    return biased<T, A, MAPS>(c, s, edge, i, j, mask, bias);
}

// ---- shared memory ---------------------------------------------------------------------------------------------------

// ROWS x COLUMNS elements from (row, column) of a matrix, zeros outside of [0, row_end) x [0, column_end).
template <int ROWS, int COLUMNS, class T, class A>
__device__ inline void stage(A* to, int stride, const T* from, long long row_stride, int row, int row_end, int column, int column_end,
                             bool vectors) {
    constexpr int V = 16 / sizeof(A), PER = COLUMNS / V;
    if (sizeof(T) == sizeof(A) && vectors) {
#pragma unroll
        for (int x = threadIdx.x; x < ROWS * PER; x += 256) {
            int r = x / PER, c = x % PER * V;
            bool there = row + r < row_end && column + c < column_end;
            copy16(to + r * stride + c, there ? from + (row + r) * row_stride + column + c : from, there);
        }
    } else {
        for (int x = threadIdx.x; x < ROWS * COLUMNS; x += 256) {
            int r = x / COLUMNS, c = x % COLUMNS;
            bool there = row + r < row_end && column + c < column_end;
            to[r * stride + c] = there ? (A)widen(from[(row + r) * row_stride + column + c]) : (A)0;
        }
    }
}
