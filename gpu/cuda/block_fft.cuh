// The Fourier transform of 2^(LOG+1) real points by 2^(LOG-LOGE) threads, as one of M = 2^LOG complex ones: even points are real parts,
// odd ones imaginary parts. A thread holds 2^LOGE complex points in registers.
//
// The idea. Points are cut by decimation in frequency: with M = R L, n = i L + m and k = a + R b,
//
//     Z[a + R b] = sum_m w_L^(m b) ( w_M^(m a) sum_i w_R^(i a) z[i L + m] ),        w_M = e^(-2 pi i / M).
//
// A thread takes the R points of one m (they lie L apart), transforms them in registers, and multiplies by powers of w_M^m: a
// pass, over one butterfly. What remains are R transforms of L points, each in a range of its own: the next pass, after an exchange
// through shared memory. The passes leave the spectrum in the order of reversed digits, in which spectra can be multiplied as well as in
// any other; the inverse transform runs the same passes backwards, and nothing is ever sorted.
//     The spectrum X of the real points follows from Z[k] and Z[M - k] together (`unpack`). In the last pass a butterfly holds the
// frequencies f + Q i, Q = M/R, for all i; a thread takes f and Q - f, so that k and M - k are both its own.
//
// The layout. Shared memory holds point p at p + p/E + p/(M/E), so that neither runs nor strides of points meet in one bank. A thread
// writes, at an exchange, just the points that it read at the last one: so nobody needs to wait before writing, only before reading.
//
// What limits it. An exchange writes and reads M points of shared memory, at 128 bytes a cycle; a pass of 2^5 points is about
// 800 instructions a thread. Both take the same order of time, and nothing leaves the multiprocessor.
#pragma once

struct alignas(8) Complex {
    float x, y;
};

__device__ __forceinline__ Complex times(Complex a, Complex b) {
    return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}

__device__ __forceinline__ Complex conjugate(Complex a) { return {a.x, -a.y}; }

// cos(2 pi k / 32); a quarter turn later it is the sine.
__device__ __forceinline__ constexpr float cosine32(int k) {
    constexpr float table[9] = {1.0f, 0.98078528040323043f, 0.92387953251128674f, 0.83146961230254524f, 0.70710678118654752f,
                                0.55557023301960218f, 0.38268343236508977f, 0.19509032201612825f, 0.0f};
    k &= 31;
    k = k > 16 ? 32 - k : k;
    return k <= 8 ? table[k] : -table[16 - k];
}

// The order in which a transform of 2^r points in place wants them: reversed bits.
__device__ __forceinline__ constexpr int reversed(int i, int r) {
    return ((i & 1) << 4 | (i & 2) << 2 | (i & 4) | (i & 8) >> 2 | (i & 16) >> 4) >> (5 - r);  // no loop: it must be a constant
}

// The transform of 2^r points in registers, in place, natural order on both sides (renaming registers costs nothing). With HALF the
// second half of the points is zero.
template <int r, bool INVERSE, bool HALF>
__device__ __forceinline__ void transform_registers(Complex* x) {
    constexpr int R = 1 << r;
    Complex z[R];
#pragma unroll
    for (int i = 0; i < R; ++i) z[i] = x[reversed(i, r)];
#pragma unroll
    for (int level = 0; level < r; ++level) {
        const int half = 1 << level;
#pragma unroll
        for (int p = 0; p < R / 2; ++p) {
            const int k = p & (half - 1), at = ((p >> level) << (level + 1)) + k;
            const Complex a = z[at], b = z[at + half];
            if (HALF && level == 0) {
                z[at + half] = a;
            } else if (k == 0) {
                z[at] = {a.x + b.x, a.y + b.y};
                z[at + half] = {a.x - b.x, a.y - b.y};
            } else if (2 * k == half) {  // w = -i, or i
                const Complex turned = INVERSE ? Complex{-b.y, b.x} : Complex{b.y, -b.x};
                z[at] = {a.x + turned.x, a.y + turned.y};
                z[at + half] = {a.x - turned.x, a.y - turned.y};
            } else {
                const float c = cosine32(k * (16 / half)), s = (INVERSE ? 1.0f : -1.0f) * cosine32(k * (16 / half) - 8);
                const Complex sum = {fmaf(-s, b.y, fmaf(c, b.x, a.x)), fmaf(s, b.x, fmaf(c, b.y, a.y))};
                z[at] = sum;
                z[at + half] = {fmaf(2.0f, a.x, -sum.x), fmaf(2.0f, a.y, -sum.y)};  // a - w b = 2 a - (a + w b)
            }
        }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = z[i];
}

template <int LOG, int LOGE>
struct BlockFFT {
    static constexpr int M = 1 << LOG, E = 1 << LOGE, THREADS = 1 << (LOG - LOGE);
    static constexpr int SHARED = M + M / E + E;                        // points of shared memory
    static constexpr int TOGETHER = THREADS < 256 ? 256 / THREADS : 1;  // transforms that a block holds at most
    static constexpr int BLOCK = THREADS * TOGETHER, BLOCKS = BLOCK > 256 ? 1 : 2;

    // Bits of a pass: as many as a thread holds, but at most half of that in the last one, which needs butterflies in pairs.
    static __host__ __device__ constexpr int radix(int rest) { return rest < LOGE ? rest : rest == LOGE ? LOGE - 1 : LOGE; }
    static __host__ __device__ constexpr int last(int rest = LOG) { return rest == radix(rest) ? rest : last(rest - radix(rest)); }
    static constexpr int R = 1 << last(), Q = M / R, PAIRS = E / R / 2;  // of the last pass: points, butterflies, pairs of a thread

    // The lower frequency of a pair of butterflies of thread j in the last pass; the other one is Q - f, or Q/2 for f = 0.
    static __device__ __forceinline__ int frequency(int j, int pair) { return j + pair * THREADS; }

    // The butterfly of the last pass that holds the frequencies f + Q i: digits in the reverse order.
    template <int REST = LOG>
    static __device__ __forceinline__ int butterfly_of(int f) {
        constexpr int r = radix(REST);
        if constexpr (r == REST) {
            return 0;
        } else {
            return ((f & ((1 << r) - 1)) << (REST - r - last())) + butterfly_of<REST - r>(f >> r);
        }
    }

    // The butterfly in registers b 2^r ... of thread j, in the pass over blocks of 2^REST points.
    template <int REST>
    static __device__ __forceinline__ int butterfly(int j, int b) {
        if constexpr (radix(REST) == REST) {
            const int f = frequency(j, b / 2);
            return butterfly_of(b % 2 == 0 ? f : f == 0 ? Q / 2 : Q - f);
        } else {
            return (j << (LOGE - radix(REST))) + b;
        }
    }

    // Where shared memory holds the first point of that butterfly; point i stands `step(i)` after it, without a carry, since what is
    // below bit m belongs to the butterfly.
    template <int REST>
    static __device__ __forceinline__ int slot(int j, int b) {
        constexpr int m = REST - radix(REST);
        const int of = butterfly<REST>(j, b), p = ((of >> m) << REST) + (of & ((1 << m) - 1));
        return p + (p >> LOGE) + (p >> (LOG - LOGE));
    }

    template <int REST>
    static __host__ __device__ constexpr int step(int i) {
        return (i << (REST - radix(REST))) + ((i << (REST - radix(REST))) >> LOGE) + ((i << (REST - radix(REST))) >> (LOG - LOGE));
    }

    template <int REST, bool INVERSE, bool HALF, int B = 0>
    static __device__ __forceinline__ void pass(Complex* x, int j) {
        constexpr int r = radix(REST), m = REST - r;
        Complex w1 = {1, 0};
        if (m > 0) {
            const int offset = butterfly<REST>(j, B) & ((1 << m) - 1);
            sincospif((INVERSE ? 2.0f : -2.0f) * offset / (1 << REST), &w1.y, &w1.x);
        }
        if (INVERSE && m > 0) turn<1 << r>(x + (B << r), w1);
        transform_registers<r, INVERSE, HALF>(x + (B << r));
        if (!INVERSE && m > 0) turn<1 << r>(x + (B << r), w1);
        if constexpr (B + 1 < E >> r) pass<REST, INVERSE, HALF, B + 1>(x, j);
    }

    // x_i <- w^i x_i. Powers by fours, so that none is the product of more than a few.
    template <int COUNT>
    static __device__ __forceinline__ void turn(Complex* x, Complex w1) {
        Complex w2 = times(w1, w1), w3 = times(w2, w1), w4 = times(w2, w2), high = {1, 0};
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            if (i > 0) {
                high = i == 4 ? w4 : times(high, w4);
                x[i] = times(x[i], high);
            }
            if (i + 1 < COUNT) x[i + 1] = times(x[i + 1], i == 0 ? w1 : times(high, w1));
            if (i + 2 < COUNT) x[i + 2] = times(x[i + 2], i == 0 ? w2 : times(high, w2));
            if (i + 3 < COUNT) x[i + 3] = times(x[i + 3], i == 0 ? w3 : times(high, w3));
        }
    }

    // Registers in the order of one pass to those of another.
    template <int FROM, int TO>
    static __device__ __forceinline__ void exchange(Complex* x, Complex* shared, int j) {
#pragma unroll
        for (int e = 0; e < E; ++e) shared[slot<FROM>(j, e >> radix(FROM)) + step<FROM>(e & ((1 << radix(FROM)) - 1))] = x[e];
        __syncthreads();
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = shared[slot<TO>(j, e >> radix(TO)) + step<TO>(e & ((1 << radix(TO)) - 1))];
    }

    // Complex points e THREADS + j in register e (with HALF the second half of them is zero) to their spectrum, in the order of the last pass.
    template <int REST, bool HALF>
    static __device__ __forceinline__ void forward(Complex* x, Complex* shared, int j) {
        constexpr int next = REST - radix(REST);
        pass<REST, false, HALF>(x, j);
        if constexpr (next > 0) {
            exchange<REST, next>(x, shared, j);
            forward<next, false>(x, shared, j);
        }
    }

    // And back, times M.
    template <int REST = LOG>
    static __device__ __forceinline__ void inverse(Complex* x, Complex* shared, int j) {
        constexpr int next = REST - radix(REST);
        if constexpr (next > 0) {
            inverse<next>(x, shared, j);
            exchange<next, REST>(x, shared, j);
        }
        pass<REST, true, false>(x, j);
    }

    // From Z to 2 X, of frequencies k and M - k at a time, or from Y to 2 Z (INVERSE):
    //     X[k] = E + P,  X[M-k] = conj(E - P),  E = (Z[k] + conj Z[M-k]) / 2,  P = -i w^k (Z[k] - conj Z[M-k]) / 2,  w = e^(-2 pi i / 2M).
    // X[0] and X[M] are real: they are kept as one number, register 0 of thread 0.
    template <bool INVERSE, int PAIR = 0>
    static __device__ __forceinline__ void unpack(Complex* x, int j) {
        Complex *a = x + 2 * PAIR * R, *b = a + R, base;
        const int f = frequency(j, PAIR);
        sincospif(-float(f) / M, &base.y, &base.x);
        if (PAIR > 0 || f > 0) {
#pragma unroll
            for (int i = 0; i < R; ++i) both<INVERSE>(a[i], b[R - 1 - i], root(base, i));
        } else {
            a[0] = {a[0].x + a[0].y, a[0].x - a[0].y};
            if (!INVERSE) a[0] = {2 * a[0].x, 2 * a[0].y};
            const Complex half = {0.0f, -1.0f};
            both<INVERSE>(a[R / 2], a[R / 2], half);
#pragma unroll
            for (int i = 1; i < R / 2; ++i) both<INVERSE>(a[i], a[R - i], root({1.0f, 0.0f}, i));
            sincospif(-0.5f / R, &base.y, &base.x);
#pragma unroll
            for (int i = 0; i < R / 2; ++i) both<INVERSE>(b[i], b[R - 1 - i], root(base, i));
        }
        if constexpr (PAIR + 1 < PAIRS) unpack<INVERSE, PAIR + 1>(x, j);
    }

    // base e^(-2 pi i index / 2R)
    static __device__ __forceinline__ Complex root(Complex base, int index) {
        return times(base, {cosine32(index * (16 / R)), -cosine32(index * (16 / R) - 8)});
    }

    // Of one frequency and its mirror image, which may be the same.
    template <bool INVERSE>
    static __device__ __forceinline__ void both(Complex& z, Complex& mirror, Complex w) {
        const Complex e = {z.x + mirror.x, z.y - mirror.y}, o = {z.x - mirror.x, z.y + mirror.y};
        const Complex turned = INVERSE ? times({w.y, w.x}, o) : times({w.y, -w.x}, o);  // i conj(w) o, or -i w o
        const Complex first = {e.x + turned.x, e.y + turned.y}, second = {e.x - turned.x, turned.y - e.y};
        mirror = second;
        z = first;
    }
};
