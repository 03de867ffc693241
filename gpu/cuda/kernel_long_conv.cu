// Causal long convolution of real sequences, y_t = sum_s kernel_s u_(t-s) + skip u_t: each channel by a kernel of its own.
//
// The idea. Time is cut into segments of S = N/2 steps. Segment i of y is a sum over the segments m <= i of u; each term is the
// first half of a circular convolution of length N, of segment m, padded by S zeros, with the 2 S rows of the kernel around
// (i - m) S (overlap-save, in blocks of the kernel too). So everything is transforms of N points, which fit into one block, and
// products of spectra; a single segment, T <= S, is the usual padded convolution.
//     Two rows of the batch share a complex transform, u_1 + i u_2, for the kernel is real and does not mix them. Their sizes may
// differ, and rounding errors would leak from one to the other: row 2 is scaled by a power of two to the size of row 1.
//
// The layout. A block (threads x, y) holds blockDim.y transforms at once. Time is contiguous. Spectra are kept in the order of the
// registers, two points to a float4: nobody else needs them. `work` counts (channel, pair of rows), pairs fastest, so that
// blocks which run together read the same kernel's spectrum.
//
// What limits it. For N = 2^14: shared memory and instructions in about equal parts (see block_fft.cuh); the inputs are read once
// and the outputs written once. With many segments, reading the spectra back from the L2 cache.
#include "async_copy.cuh"
#include "block_fft.cuh"

template <class R>
struct Rows {  // real sequences (batch, channel, time), time contiguous
    R* data;
    long long batch, channel;  // strides, in elements
    __device__ R* at(long long b, long long c) const { return data + b * batch + c * channel; }
};

template <int E>
__device__ __forceinline__ void store_spectrum(const Complex* x, float4* to, int threads, int j) {
#pragma unroll
    for (int e = 0; e < E / 2; ++e) to[e * threads + j] = make_float4(x[2 * e].x, x[2 * e].y, x[2 * e + 1].x, x[2 * e + 1].y);
}

// x <- a x, or x <- conj(a) x; the first AHEAD points of a are in shared memory already
template <int E, int AHEAD, bool CONJUGATE>
__device__ __forceinline__ void multiply(Complex* x, const float4* a, const float4* ring, int threads) {
#pragma unroll
    for (int e = 0; e < E / 2; ++e) {
        const float4 v = e < AHEAD ? ring[e * threads] : a[e * threads];
        x[2 * e] = times({v.x, CONJUGATE ? -v.y : v.y}, x[2 * e]);
        x[2 * e + 1] = times({v.z, CONJUGATE ? -v.w : v.w}, x[2 * e + 1]);
    }
}

__device__ __forceinline__ void add_product(Complex& x, Complex a, Complex b) {
    x.x = fmaf(a.x, b.x, fmaf(-a.y, b.y, x.x));
    x.y = fmaf(a.x, b.y, fmaf(a.y, b.x, x.y));
}

// x <- x + a b, or x + conj(a) b
template <int E, bool CONJUGATE>
__device__ __forceinline__ void accumulate(Complex* x, const float4* a, const float4* b, int threads, int j) {
#pragma unroll
    for (int e = 0; e < E / 2; ++e) {
        const float4 v = a[e * threads + j], w = b[e * threads + j];
        add_product(x[2 * e], {v.x, CONJUGATE ? -v.y : v.y}, {w.x, w.y});
        add_product(x[2 * e + 1], {v.z, CONJUGATE ? -v.w : v.w}, {w.z, w.w});
    }
}

// x <- x + the sum over `other` = 1 ... count of a[other] b[other], or conj(a) b: spectra that lie `a_step` and `b_step` apart. A
// thread reads what only it reads, three points ahead, through eight float4 of its own in shared memory.
template <int E, int THREADS, bool CONJUGATE>
__device__ __forceinline__ void accumulate_ahead(Complex* x, const float4* a, long long a_step, const float4* b, long long b_step, int count,
                                                 float4* ring) {
    constexpr int POINTS = E / 2;
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        copy_async<16>(ring + 2 * e * THREADS, a + a_step + e * THREADS);
        copy_async<16>(ring + (2 * e + 1) * THREADS, b + b_step + e * THREADS);
        close_copy_group();
    }
    for (int other = 1; other <= count; ++other) {
#pragma unroll
        for (int e = 0; e < POINTS; ++e) {
            const int next = (e + 3) % POINTS, of = other + (e + 3 >= POINTS ? 1 : 0), to = 2 * ((e + 3) % 4) * THREADS;
            if (of <= count) {
                copy_async<16>(ring + to, a + of * a_step + next * THREADS);
                copy_async<16>(ring + to + THREADS, b + of * b_step + next * THREADS);
            }
            close_copy_group();
            wait_for_copies<3>();
            const float4 v = ring[2 * (e % 4) * THREADS], w = ring[(2 * (e % 4) + 1) * THREADS];
            add_product(x[2 * e], {v.x, CONJUGATE ? -v.y : v.y}, {w.x, w.y});
            add_product(x[2 * e + 1], {v.z, CONJUGATE ? -v.w : v.w}, {w.z, w.w});
        }
    }
}

// The largest |value| of a row, as the bits of a float, over the threads of one transform.
template <int THREADS>
__device__ __forceinline__ void keep_largest(float size, unsigned* peak) {
    unsigned bits = __float_as_uint(size);
    if (THREADS % 32 == 0) {
        bits = __reduce_max_sync(0xffffffffu, bits);
        if ((threadIdx.x & 31) == 0) atomicMax(peak, bits);
    } else {
        atomicMax(peak, bits);
    }
}

// A power of two that brings what is as large as `b` to the size of `a`; 1 where either is 0 or not finite.
__device__ __forceinline__ float balance(unsigned a, unsigned b) {
    const int ea = int(a >> 23), eb = int(b >> 23);
    if (ea == 0 || eb == 0 || ea == 255 || eb == 255) return 1.0f;
    return __uint_as_float(unsigned(127 + max(-90, min(90, ea - eb))) << 23);
}

// Spectra of every segment of pairs of rows: of a kernel's windows (WINDOW: row c alone, positions (i-1) S ... (i+1) S, those
// after S first, divided by N; `segments` counts them), or of segments padded with zeros, row 2 divided by scales[work] and left out where
// that is 0: what `convolve` multiplied its own row 2 by.
template <int LOG, int LOGE, bool WINDOW>
__global__ void __launch_bounds__(BlockFFT<LOG, LOGE>::BLOCK, BlockFFT<LOG, LOGE>::BLOCKS)
long_conv_spectra(const float* data, long long batch_stride, long long channel_stride, float4* spectra, const float* scales,
                  long long batch, long long channels, long long T, int segments) {
    const Rows<const float> rows = {data, batch_stride, channel_stride};
    using F = BlockFFT<LOG, LOGE>;
    constexpr int N = F::N, S = N / 2, E = F::E;
    extern __shared__ float4 memory[];
    Complex* shared = reinterpret_cast<Complex*>(memory) + threadIdx.y * F::SHARED;
    const int j = threadIdx.x;
    const long long pairs = WINDOW ? 1 : (batch + 1) / 2, count = channels * pairs * segments;
    const long long item = blockIdx.x * (long long)blockDim.y + threadIdx.y;
    const bool here = item < count;
    const long long work = item / segments, i = item % segments, c = work / pairs, b = 2 * (work % pairs);
    Complex x[E];
    const bool second = here && !WINDOW && b + 1 < batch;
    const float scale = second && scales ? scales[work] : 1.0f;
    const float *in1 = here ? rows.at(b, c) : nullptr, *in2 = second && scale != 0 ? rows.at(b + 1, c) : nullptr;
#pragma unroll
    for (int e = 0; e < E; ++e) {
        const long long t = i * S + e * F::THREADS + j - (e < E / 2 ? 0 : N);  // the second half comes before the first
        const bool inside = here && (e < E / 2 || WINDOW) && t >= 0 && t < T;
        x[e] = {inside ? in1[t] * (WINDOW ? 1.0f / N : 1.0f) : 0.0f, inside && in2 ? in2[t] / scale : 0.0f};
    }
    F::template forward<LOG, !WINDOW>(x, shared, j);
    if (here) store_spectrum<E>(x, spectra + item * (N / 2), F::THREADS, j);
}

// y = kernel * u + skip u, y (batch, channel, T) contiguous, or (ADJOINT) the correlation that is its gradient: with conjugated spectra, segments last to first.
// `kept` has room for the spectra of u: of every (work, segment) if keep_all, else of the segments of one work at a time for each
// transform of the grid; it may be null for one segment. scales[work], if given, gets what row 2 was multiplied by; 0 for a row of zeros.
template <int LOG, int LOGE, bool ADJOINT>
__global__ void __launch_bounds__(BlockFFT<LOG, LOGE>::BLOCK, BlockFFT<LOG, LOGE>::BLOCKS)
long_conv_convolve(const float* u_data, long long u_batch, long long u_channel, float* y_data, const float4* kernel, const float* skip,
                   float4* kept, float* scales, long long batch, long long channels, long long T, int segments, int windows, int keep_all) {
    const Rows<const float> u = {u_data, u_batch, u_channel};
    const Rows<float> y = {y_data, channels * T, T};
    using F = BlockFFT<LOG, LOGE>;
    constexpr int N = F::N, S = N / 2, E = F::E;
    extern __shared__ float4 memory[];
    __shared__ unsigned peaks[2][2 * 32];
    constexpr int AHEAD = E / 2 < 8 ? E / 2 : 8;
    Complex* shared = reinterpret_cast<Complex*>(memory) + threadIdx.y * F::SHARED;
    const int j = threadIdx.x;
    float4* ring = memory + blockDim.y * (F::SHARED / 2) + threadIdx.y * 8 * F::THREADS + j;
    int turn = 0;
    if (j < 2) peaks[0][2 * threadIdx.y + j] = peaks[1][2 * threadIdx.y + j] = 0;
    __syncthreads();
    const long long pairs = (batch + 1) / 2, count = channels * pairs, lane = blockIdx.x * (long long)blockDim.y + threadIdx.y;
    const long long lanes = gridDim.x * (long long)blockDim.y;
    for (long long first = blockIdx.x * (long long)blockDim.y; first < count; first += lanes) {
        const long long work = first + threadIdx.y, c = work / pairs, b = 2 * (work % pairs);
        const bool here = work < count, second = here && b + 1 < batch;
        const float *u1 = here ? u.at(b, c) : nullptr, *u2 = second ? u.at(b + 1, c) : nullptr;
        float4* mine = kept ? kept + (keep_all ? work : lane) * segments * (N / 2) : nullptr;
        const float4* spectrum = kernel + c * windows * (N / 2);
        Complex x[E];
        float scale = 1.0f;
        bool alive1 = true, alive2 = second;

        unsigned* peak = peaks[turn] + 2 * threadIdx.y;
        if (segments > 1) {
            float m1 = 0, m2 = 0;
            for (long long t = j; here && t < T; t += F::THREADS) {
                m1 = fmaxf(m1, fabsf(u1[t]));
                if (second) m2 = fmaxf(m2, fabsf(u2[t]));
            }
            keep_largest<F::THREADS>(m1, peak);
            keep_largest<F::THREADS>(m2, peak + 1);
        }
        for (int step = 0; step < segments; ++step) {
            const int i = ADJOINT ? segments - 1 - step : step;
            const long long start = (long long)i * S;
            const int length = here ? int(min((long long)S, T - start)) : 0;
            const float *in1 = u1 + start + j, *in2 = u2 + start + j;
            float m1 = 0, m2 = 0;
#pragma unroll
            for (int e = 0; e < E / 2; ++e) {  // the other half of the points is padding
                const bool inside = e * F::THREADS + j < length;
                x[e] = {inside ? in1[e * F::THREADS] : 0.0f, inside && second ? in2[e * F::THREADS] : 0.0f};
                m1 = fmaxf(m1, fabsf(x[e].x));
                m2 = fmaxf(m2, fabsf(x[e].y));
            }
            if (segments == 1) {
                keep_largest<F::THREADS>(m1, peak);
                keep_largest<F::THREADS>(m2, peak + 1);
            }
            if (step == 0) {
                __syncthreads();
                turn ^= 1;
                if (j < 2) peaks[turn][2 * threadIdx.y + j] = 0;  // which all have read: that was before this barrier
                scale = balance(peak[0], peak[1]);
                alive1 = peak[0] != 0;
                alive2 = second && peak[1] != 0;
                if (here && scales && j == 0) scales[work] = alive2 ? scale : 0.0f;
            }
#pragma unroll
            for (int e = 0; e < E / 2; ++e) {
                x[e].y *= scale;
                x[e + E / 2] = {0.0f, 0.0f};
            }
            if (here) {
#pragma unroll
                for (int e = 0; e < AHEAD; ++e) copy_async<16>(ring + e * F::THREADS, spectrum + e * F::THREADS + j);
            }
            close_copy_group();
            F::template forward<LOG, true>(x, shared, j);
            if (here && mine) store_spectrum<E>(x, mine + i * (N / 2), F::THREADS, j);
            wait_for_copies<0>();
            if (here) {
                multiply<E, AHEAD, ADJOINT>(x, spectrum + j, ring, F::THREADS);
                const int others = min(step, windows - 1);  // segments done before, whose windows reach this one
                const long long to_next = (ADJOINT ? 1 : -1) * (N / 2);
                if (others > 0) accumulate_ahead<E, F::THREADS, ADJOINT>(x, spectrum + j, N / 2, mine + i * (N / 2) + j, to_next, others, ring);
            }
            F::inverse(x, shared, j);
            const float direct = here && skip ? skip[c] : 0.0f;
            float *out1 = y.at(b, c) + start + j, *out2 = y.at(b + 1, c) + start + j;
#pragma unroll
            for (int e = 0; e < E / 2; ++e) {
                if (e * F::THREADS + j < length) {
                    out1[e * F::THREADS] = (alive1 ? x[e].x : 0.0f) + (skip ? direct * in1[e * F::THREADS] : 0.0f);
                    if (second) out2[e * F::THREADS] = (alive2 ? x[e].y / scale : 0.0f) + (skip ? direct * in2[e * F::THREADS] : 0.0f);
                }
            }
        }
    }
}

// Gradient of the kernel's window `lag` of a channel: conj(spectrum of segment m of u) times that of segment m + lag of dy,
// over all m and pairs; the real part of the inverse transform is the sum over both rows.
template <int LOG, int LOGE>
__global__ void __launch_bounds__(BlockFFT<LOG, LOGE>::BLOCK, BlockFFT<LOG, LOGE>::BLOCKS)
long_conv_lags(const float4* of_u, const float4* of_dy, float* gradient, long long pairs, long long channels, int segments, int windows) {
    using F = BlockFFT<LOG, LOGE>;
    constexpr int N = F::N, E = F::E;
    extern __shared__ float4 memory[];
    Complex* shared = reinterpret_cast<Complex*>(memory) + threadIdx.y * F::SHARED;
    const int j = threadIdx.x;
    const long long item = blockIdx.x * (long long)blockDim.y + threadIdx.y;
    const bool here = item < channels * windows;
    const long long c = item / windows;
    const int lag = int(item % windows);
    Complex x[E];
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = {0, 0};
    for (long long p = 0; here && p < pairs; ++p) {
        for (int m = 0; m + lag < segments; ++m) {
            const long long at = (c * pairs + p) * segments + m;
            accumulate<E, true>(x, of_u + at * (N / 2), of_dy + (at + lag) * (N / 2), F::THREADS, j);
        }
    }
    F::inverse(x, shared, j);
    if (here) {
#pragma unroll
        for (int e = 0; e < E; ++e) gradient[item * N + F::template place<LOG>(j, e)] = x[e].x * (1.0f / N);
    }
}
