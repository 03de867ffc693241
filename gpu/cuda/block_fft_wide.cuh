// The transform of block_fft.cuh for M = 2^(10+r) complex points, r = 2, 3, 4, in fewer instructions: 32 points of a thread, passes over
// 5, 5 and r bits.
//
// The idea. The factors between two passes belong to the points that the next pass reads: it evaluates polynomials at the points
// w e^(-2 pi i k/R) of the unit circle instead of at the roots of unity, and that is the same butterflies, a + v b and a - v b, with
// other numbers v. So the factors cost the powers of w alone. Forwards w belongs to the frequencies known so far, backwards to the
// points within a block; both ways frequencies end up in the order of reversed digits.
//     A pass is six multiply-adds a butterfly, but for the first one forwards, of which half the points are zero, and the first
// one backwards, both of which have the roots of unity.
//
// The layout. Blocks a and 32 - a of the second pass belong to one warp. So a warp reads in the third pass what it wrote in the second,
// and the butterflies of frequencies f + 1024 i and their mirror images 1024 - f + 1024 i can be one thread's. Only the exchange between
// first and second pass needs a barrier.
//     In shared memory a point stands in its run of 16 where the bits above tell (`place`), so that no two lanes of a half-warp meet
// in one bank: neighbours (first pass), neighbours in 16/R blocks (second), runs of R points, two at a time (third).
#pragma once
#include "block_fft.cuh"

// a + v b and a - v b = 2 a - (a + v b).
__device__ __forceinline__ void turned_butterfly(Complex& a, Complex& b, Complex v) {
    const Complex sum = {fmaf(-v.y, b.y, fmaf(v.x, b.x, a.x)), fmaf(v.y, b.x, fmaf(v.x, b.y, a.y))};
    b = {fmaf(2.0f, a.x, -sum.x), fmaf(2.0f, a.y, -sum.y)};
    a = sum;
}

// As `transform_registers`, at other points: sum_i x_i (w e^(-+2 pi i k/R))^i.
template <int r, bool INVERSE>
__device__ __forceinline__ void transform_turned(Complex* x, Complex w) {
    constexpr int R = 1 << r;
    Complex z[R], power[r];  // level l turns by w^(R / 2^(l+1)) and roots of unity
    power[r - 1] = w;
#pragma unroll
    for (int level = r - 2; level >= 0; --level) power[level] = times(power[level + 1], power[level + 1]);
#pragma unroll
    for (int i = 0; i < R; ++i) z[i] = x[reversed(i, r)];
#pragma unroll
    for (int level = 0; level < r; ++level) {
        const int half = 1 << level;
#pragma unroll
        for (int k = 0; k < (half + 1) / 2; ++k) {
            const Complex root = {cosine32(k * (16 / half)), (INVERSE ? 1.0f : -1.0f) * cosine32(k * (16 / half) - 8)};
            const Complex v = k == 0 ? power[level] : times(power[level], root), quarter = INVERSE ? Complex{-v.y, v.x} : Complex{v.y, -v.x};
#pragma unroll
            for (int at = k; at < R; at += 2 * half) {
                turned_butterfly(z[at], z[at + half], v);
                if (half > 1) turned_butterfly(z[at + half / 2], z[at + half + half / 2], quarter);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = z[i];
}

template <int r>
struct WideFFT {
    static_assert(r >= 2 && r <= 4);
    static constexpr int LOG = 10 + r, M = 1 << LOG, R = 1 << r, L = M / 32, THREADS = L;
    static constexpr int UNITS = 16 / R;      // pairs of butterflies of a thread in the third pass
    static constexpr int ROOTS = 3 + UNITS;   // numbers on the unit circle that a thread needs
    static constexpr int BLOCKS = 512 / THREADS;  // of a multiprocessor

    // Where shared memory holds point p: bits 1, 2, 3 changed by others above.
    static __host__ __device__ constexpr int place(int p) {
        int moved = p;
        for (int t = 1; t < 4; ++t) moved ^= (p >> (t < r ? t + 3 : LOG - 5 + t - r) & 1) << t;
        return moved;
    }
    // The place of a point `offset` after one whose place is `base`, if no bit of the offset is one of that point's number.
    static __device__ __forceinline__ int after(int base, int offset) { return (base ^ (place(offset) & 15)) + (offset & ~15); }

    // The block of a lane group of the second pass: units of a warp, then their mirror images.
    static __device__ __forceinline__ int block_of(int j, int group) {
        const int unit = j / 32 * UNITS + group % UNITS;
        return group < UNITS ? unit : unit == 0 ? 16 : 32 - unit;
    }
    // The butterflies f = a + 32 b of a unit of the third pass: one and its mirror image; for the very first, 0 and 512.
    static __device__ __forceinline__ void butterflies(int j, int unit, int (&a)[2], int (&b)[2]) {
        const int t = j % 32, u = j / 32 * UNITS + unit;
        a[0] = u > 0 ? u : t < 16 ? 0 : 16, a[1] = u > 0 ? 32 - u : a[0];
        b[0] = u > 0 ? t : t % 16, b[1] = u > 0 ? 31 - t : t == 0 ? 16 : t < 16 ? 32 - t : 47 - t;
    }

    // The number by which a pass turns: 0 the second, forwards; 1 the second, 2 the first, backwards; 3 ... e^(-pi i f/M) of a unit.
    static __device__ __forceinline__ Complex root(int which, int j) {
        int a[2], b[2];
        butterflies(j, which > 3 ? which - 3 : 0, a, b);
        const float half_turns = which == 0   ? block_of(j, j % 32 / R) * (-2.0f / 1024)
                                 : which == 1 ? j % R * (2.0f / (32 * R))
                                 : which == 2 ? j * (2.0f / M)
                                              : (a[0] + 32 * b[0]) * (-1.0f / M);
        Complex w;
        sincospif(half_turns, &w.y, &w.x);
        return w;
    }

    // Points i L + j in register i to their spectrum, the second half of the points being zero: frequencies f + 1024 i of butterflies 2 n
    // and 2 n + 1, those of unit n. `roots(which)` says by what to turn; `meet` is a barrier of the block; `then` is done once the
    // warp's own ranges of shared memory have been read.
    template <class Roots, class Meet, class Then>
    static __device__ __forceinline__ void forward(Complex* x, Complex* shared, int j, Roots roots, Meet meet, Then then) {
        const int first = place(j), second = place(32 * R * block_of(j, j % 32 / R) + j % R);
        transform_registers<5, false, true>(x);
#pragma unroll
        for (int i = 0; i < 32; ++i) shared[after(first, i * L)] = x[i];
        meet();
#pragma unroll
        for (int i = 0; i < 32; ++i) x[i] = shared[after(second, i * R)];
        transform_turned<5, false>(x, roots(0));
#pragma unroll
        for (int i = 0; i < 32; ++i) shared[after(second, i * R)] = x[i];
        __syncwarp();
        runs(j, [&](int e, float4* at) {
            x[2 * e] = {at->x, at->y}, x[2 * e + 1] = {at->z, at->w};
        }, shared);
        then();
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            const Complex base = roots(3 + unit), w = times(base, base);
            const bool self = unit == 0 && j == 0;  // its other butterfly is 512
            const Complex of_512 = {cosine32(16 / R), -cosine32(16 / R - 8)};
            const Complex mirrored = times({cosine32(32 / R), -cosine32(32 / R - 8)}, conjugate(w));
            const Complex other = {self ? of_512.x : mirrored.x, self ? of_512.y : mirrored.y};
            transform_turned<r, false>(x + 2 * unit * R, w);
            transform_turned<r, false>(x + (2 * unit + 1) * R, other);
        }
    }

    // And back, times M. `then` is done when the thread's own points i L + j have been read.
    template <class Roots, class Meet, class Then>
    static __device__ __forceinline__ void inverse(Complex* x, Complex* shared, int j, Roots roots, Meet meet, Then then) {
        const int first = place(j), second = place(32 * R * block_of(j, j % 32 / R) + j % R);
#pragma unroll
        for (int n = 0; n < 2 * UNITS; ++n) transform_registers<r, true, false>(x + n * R);
        runs(j, [&](int e, float4* at) { *at = make_float4(x[2 * e].x, x[2 * e].y, x[2 * e + 1].x, x[2 * e + 1].y); }, shared);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 32; ++i) x[i] = shared[after(second, i * R)];
        transform_turned<5, true>(x, roots(1));
#pragma unroll
        for (int i = 0; i < 32; ++i) shared[after(second, i * R)] = x[i];
        meet();
#pragma unroll
        for (int i = 0; i < 32; ++i) x[i] = shared[after(first, i * L)];
        then();
        transform_turned<5, true>(x, roots(2));
    }

    // Where registers 2 e and 2 e + 1 of the third pass are, for each e.
    template <class Each>
    static __device__ __forceinline__ void runs(int j, Each each, Complex* shared) {
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            int a[2], b[2];
            butterflies(j, unit, a, b);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int base = place(32 * R * a[h] + R * b[h]);
#pragma unroll
                for (int i = 0; i < R; i += 2) each(((2 * unit + h) * R + i) / 2, reinterpret_cast<float4*>(shared + after(base, i)));
            }
        }
    }

    // The registers of pair `slot` of a unit: a frequency and its mirror image. SELF: of thread 0's first unit, where a butterfly is
    // its own mirror image; slot 0 are the frequencies 0 and M/2, each by itself.
    template <bool SELF>
    static __device__ __forceinline__ void pair(int unit, int slot, int& one, int& other) {
        const int x = 2 * unit * R, y = x + R;
        if (!SELF) one = x + slot, other = y + R - 1 - slot;
        else if (slot < R / 2) one = x + slot, other = slot == 0 ? x + R / 2 : x + R - slot;
        else one = y + slot - R / 2, other = y + R - 1 - (slot - R / 2);
    }

    // e^(-pi i k/M) of that pair's first frequency k, where `base` is that of the unit.
    template <bool SELF>
    static __device__ __forceinline__ Complex turn(int unit, int slot, Complex base) {
        int one, other;
        pair<SELF>(unit, slot, one, other);
        const int i = one % R, quarter = i % (R / 2);
        const bool of_512 = SELF && one / R % 2;  // base e^(-pi i/2R)
        const int angle = quarter * (32 / R) + (of_512 ? 16 / R : 0);  // of 64 to a turn
        const Complex turned = {cosine64(angle), -cosine64(angle - 16)};
        const Complex w = SELF ? turned : quarter == 0 ? base : times(base, turned);
        return i < R / 2 ? w : Complex{w.y, -w.x};
    }

    // cos(2 pi k / 64)
    static __device__ __forceinline__ constexpr float cosine64(int k) {
        constexpr float odd[8] = {0.99518472667219693f, 0.95694033573220882f, 0.88192126434835505f, 0.77301045336273699f,
                                  0.63439328416364549f, 0.47139673682599764f, 0.29028467725446233f, 0.09801714032956060f};
        k = k < 0 ? -k : k;
        if (k % 2 == 0) return cosine32(k / 2);
        return k < 16 ? odd[k / 2] : k < 32 ? -odd[(31 - k) / 2] : k < 48 ? -odd[(k - 33) / 2] : odd[(63 - k) / 2];
    }
};
