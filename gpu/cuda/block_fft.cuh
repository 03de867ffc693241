// A complex Fourier transform of 2^LOG points by 2^(LOG - LOGE) threads: each holds 2^LOGE points in registers.
//
// The idea. Points are cut by decimation in frequency: with N = R M, n = i M + m and k = a + R b,
//
//     X[a + R b] = sum_m w_M^(m b) ( w_N^(m a) sum_i w_R^(i a) x[i M + m] ),        w_N = e^(-2 pi i / N).
//
// A thread takes the R points of one m (they lie M apart), transforms them in registers, and multiplies by powers of w_N^m: a
// pass. What remains are R transforms of M points, each in a range of its own: the next pass, after an exchange through shared
// memory. The passes leave the spectrum in the order of reversed digits, in which spectra can be multiplied as well as in any
// other; and the inverse transform runs the same passes backwards, from that order to the natural one. So a convolution of 2^14
// points needs two exchanges each way, and nothing is ever sorted.
//
// The layout. Register b R + i of thread j is point i of the butterfly j (E/R) + b; `place` says where that stands. Shared memory
// holds point p at p + p/E, so that neither runs nor strides of points meet in one bank. A thread writes, at an exchange, just the points
// that it read at the last one: so nobody needs to wait before writing, only before reading; and where all points that a warp
// needs are its own, it waits for nobody else.
//
// What limits it. An exchange writes and reads N points of shared memory, at 128 bytes a cycle; a pass of 2^5 points is about
// 800 instructions a thread. For 2^14 points both take the same order of time, and nothing leaves the multiprocessor.
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
    int out = 0;
    for (int bit = 0; bit < r; ++bit) out |= ((i >> bit) & 1) << (r - 1 - bit);
    return out;
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
    static constexpr int N = 1 << LOG, E = 1 << LOGE, THREADS = 1 << (LOG - LOGE);
    static constexpr int SHARED = N + N / E;                          // points of shared memory
    static constexpr int TOGETHER = THREADS < 256 ? 256 / THREADS : 1;  // transforms that a block holds at most
    static constexpr int BLOCK = THREADS * TOGETHER, BLOCKS = BLOCK > 256 ? 1 : 2;

    static __host__ __device__ constexpr int radix(int rest) { return rest < LOGE ? rest : LOGE; }

    // Which point stands in register `element` of thread j before and after the pass over blocks of 2^REST points.
    template <int REST>
    static __device__ __forceinline__ int place(int j, int element) {
        constexpr int r = radix(REST), m = REST - r;
        const int i = element & ((1 << r) - 1), butterfly = (j << (LOGE - r)) + (element >> r);
        return ((butterfly >> m) << REST) + (i << m) + (butterfly & ((1 << m) - 1));
    }

    template <int REST, bool INVERSE, bool HALF>
    static __device__ __forceinline__ void pass(Complex* x, int j) {
        constexpr int r = radix(REST), R = 1 << r, m = REST - r;
#pragma unroll
        for (int b = 0; b < E / R; ++b) {
            Complex w1 = {1, 0};
            if (m > 0) {
                const int offset = ((j << (LOGE - r)) + b) & ((1 << m) - 1);
                sincospif((INVERSE ? 2.0f : -2.0f) * offset / (1 << REST), &w1.y, &w1.x);
            }
            if (INVERSE && m > 0) turn<R>(x + b * R, w1);
            transform_registers<r, INVERSE, HALF>(x + b * R);
            if (!INVERSE && m > 0) turn<R>(x + b * R, w1);
        }
    }

    // x_i <- w^i x_i. Powers by fours, so that none is the product of more than a few.
    template <int R>
    static __device__ __forceinline__ void turn(Complex* x, Complex w1) {
        Complex w2 = times(w1, w1), w3 = times(w2, w1), w4 = times(w2, w2), high = {1, 0};
#pragma unroll
        for (int i = 0; i < R; i += 4) {
            if (i > 0) {
                high = i == 4 ? w4 : times(high, w4);
                x[i] = times(x[i], high);
            }
            if (i + 1 < R) x[i + 1] = times(x[i + 1], i == 0 ? w1 : times(high, w1));
            if (i + 2 < R) x[i + 2] = times(x[i + 2], i == 0 ? w2 : times(high, w2));
            if (i + 3 < R) x[i + 3] = times(x[i + 3], i == 0 ? w3 : times(high, w3));
        }
    }

    // Where shared memory holds the first point of a butterfly; point i stands (i << m) + (i << m) / E after it, without a carry,
    // since what is below bit m belongs to the butterfly.
    template <int REST>
    static __device__ __forceinline__ int slot(int j, int b) {
        const int p = place<REST>(j, b << radix(REST));
        return p + (p >> LOGE);
    }

    template <int REST>
    static __host__ __device__ constexpr int step(int i) {
        return (i << (REST - radix(REST))) + ((i << (REST - radix(REST))) >> LOGE);
    }

    // Registers in the order of one pass to those of another; blocks of 2^REST points stay among the threads that have them.
    template <int REST, int FROM, int TO>
    static __device__ __forceinline__ void exchange(Complex* x, Complex* shared, int j) {
#pragma unroll
        for (int e = 0; e < E; ++e) shared[slot<FROM>(j, e >> radix(FROM)) + step<FROM>(e & ((1 << radix(FROM)) - 1))] = x[e];
        if (REST - LOGE <= 5) {
            __syncwarp();
        } else {
            __syncthreads();
        }
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = shared[slot<TO>(j, e >> radix(TO)) + step<TO>(e & ((1 << radix(TO)) - 1))];
    }

    // From points in the order of place<LOG> (with HALF the second half of them is zero) to the spectrum in that of the last pass.
    template <int REST, bool HALF>
    static __device__ __forceinline__ void forward(Complex* x, Complex* shared, int j) {
        constexpr int next = REST - radix(REST);
        pass<REST, false, HALF>(x, j);
        if constexpr (next > 0) {
            exchange<REST, REST, next>(x, shared, j);
            forward<next, false>(x, shared, j);
        }
    }

    // And back, times N.
    template <int REST = LOG>
    static __device__ __forceinline__ void inverse(Complex* x, Complex* shared, int j) {
        constexpr int next = REST - radix(REST);
        if constexpr (next > 0) {
            inverse<next>(x, shared, j);
            exchange<REST, next, REST>(x, shared, j);
        }
        pass<REST, true, false>(x, j);
    }
};
