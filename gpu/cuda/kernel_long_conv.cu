// Causal long convolution of real sequences, y_t = sum_s kernel_s u_(t-s) + skip u_t: each channel by a kernel of its own.
//
// The idea. Time is cut into segments of S = M steps, the transforms have N = 2 M points. Segment i of y is a sum over the segments
// m <= i of u; each term is the first half of a circular convolution of length N, of segment m, padded by S zeros, with the 2 S
// rows of the kernel around (i - m) S (overlap-save, in blocks of the kernel too). So everything is transforms of N real points, which
// fit into one block, and products of spectra; a single segment, T <= S, is the usual padded convolution.
// (kernel_long_conv_rows.cu does that in fewer instructions, for more than 2048 steps and without the gradient.)
//
// The layout. A block (threads x, y) holds blockDim.y transforms at once. Time is contiguous. Spectra are kept in the order of the
// registers, two numbers to a float4: nobody else needs them. `work` counts (channel, row of the batch), rows fastest, so that
// blocks which run together read the same kernel's spectrum. Transforms leave out their factors; the kernel's carries 1/8M for all.
//
// What limits it. Shared memory and instructions in about equal parts (see block_fft.cuh); the inputs are read once and the
// outputs written once. With many segments, reading the spectra back, from the L2 cache as long as they fit.
#include "async_copy.cuh"
#include "block_fft.cuh"

using i64 = long long;

template <int E>
__device__ __forceinline__ void store_spectrum(const Complex* x, float4* to, int threads) {
#pragma unroll
    for (int e = 0; e < E / 2; ++e) to[e * threads] = make_float4(x[2 * e].x, x[2 * e].y, x[2 * e + 1].x, x[2 * e + 1].y);
}

// x + a b, or x + conj(a) b; of the number that holds two real frequencies, each by itself.
template <bool CONJUGATE>
__device__ __forceinline__ Complex plus_product(Complex x, Complex a, Complex b, bool two_real) {
    if (two_real) return {fmaf(a.x, b.x, x.x), fmaf(a.y, b.y, x.y)};
    if (CONJUGATE) a.y = -a.y;
    return {fmaf(a.x, b.x, fmaf(-a.y, b.y, x.x)), fmaf(a.x, b.y, fmaf(a.y, b.x, x.y))};
}

// Two numbers at a time, e-th of all; v is of the spectrum that may be conjugated.
template <bool CONJUGATE>
__device__ __forceinline__ void add_products(Complex* x, float4 v, float4 w, int e, int j) {
    x[2 * e] = plus_product<CONJUGATE>(x[2 * e], {v.x, v.y}, {w.x, w.y}, e == 0 && j == 0);
    x[2 * e + 1] = plus_product<CONJUGATE>(x[2 * e + 1], {v.z, v.w}, {w.z, w.w}, false);
}

// x <- a x, or conj(a) x; the first AHEAD float4 of a are in shared memory already.
template <int E, int AHEAD, bool CONJUGATE>
__device__ __forceinline__ void multiply(Complex* x, const float4* a, const float4* ring, int threads, int j) {
#pragma unroll
    for (int e = 0; e < E / 2; ++e) {
        const float4 v = e < AHEAD ? ring[e * threads] : a[e * threads], w = make_float4(x[2 * e].x, x[2 * e].y, x[2 * e + 1].x, x[2 * e + 1].y);
        x[2 * e] = x[2 * e + 1] = {0.0f, 0.0f};
        add_products<CONJUGATE>(x, v, w, e, j);
    }
}

// x <- x + the sum over `other` = 1 ... count of a[other] b[other], or conj(a) b: spectra that lie `a_step` and `b_step` apart. A
// thread reads what only it reads, three float4 ahead, through eight of its own in shared memory.
template <int E, int THREADS, bool CONJUGATE>
__device__ __forceinline__ void accumulate(Complex* x, const float4* a, i64 a_step, const float4* b, i64 b_step, int count, float4* ring, int j) {
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
            add_products<CONJUGATE>(x, ring[2 * (e % 4) * THREADS], ring[(2 * (e % 4) + 1) * THREADS], e, j);
        }
    }
}

// Register e: points 2 n and 2 n + 1 from `in` on, n = e THREADS + j, of which there are `length`; zeros beyond.
template <int COUNT, int THREADS>
__device__ __forceinline__ void load(Complex* x, const float* in, i64 length, int j) {
    const bool pairs = (reinterpret_cast<unsigned long long>(in) & 7) == 0;
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
        const int n = 2 * (e * THREADS + j);
        if (n + 1 < length && pairs) {
            const float2 v = *reinterpret_cast<const float2*>(in + n);
            x[e] = {v.x, v.y};
        } else {
            x[e] = {n < length ? in[n] : 0.0f, n + 1 < length ? in[n + 1] : 0.0f};
        }
    }
}

// Spectra, 2 X, of every segment of every row: of a kernel's windows (WINDOW: rows i S ... (i+1) S, then those from (i-1) S on, times
// 1/8M), or of segments padded with zeros.
template <int LOG, int LOGE, bool WINDOW>
__global__ void __launch_bounds__(BlockFFT<LOG, LOGE>::BLOCK, BlockFFT<LOG, LOGE>::BLOCKS)
long_conv_spectra(const float* data, i64 batch_stride, i64 channel_stride, float4* spectra, i64 batch, i64 channels, i64 T, int segments) {
    using F = BlockFFT<LOG, LOGE>;
    constexpr int S = F::M, E = F::E;
    extern __shared__ float4 memory[];
    Complex* shared = reinterpret_cast<Complex*>(memory) + threadIdx.y * F::SHARED;
    const int j = threadIdx.x;
    const i64 count = channels * batch * segments, item = blockIdx.x * i64(blockDim.y) + threadIdx.y;
    const bool here = item < count;
    const i64 work = item / segments, i = item % segments, c = work / batch, b = work % batch;
    const float* in = data + (here ? b * batch_stride + c * channel_stride : 0);
    Complex x[E];
    load<E / 2, F::THREADS>(x, in + (here ? i * S : 0), here ? min(i64(S), T - i * S) : 0, j);
    if (WINDOW) {
        const bool earlier = here && i > 0;
        load<E / 2, F::THREADS>(x + E / 2, in + (earlier ? (i - 1) * S : 0), earlier ? min(i64(S), T - (i - 1) * S) : 0, j);
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = {x[e].x * (0.125f / F::M), x[e].y * (0.125f / F::M)};
    } else {
#pragma unroll
        for (int e = E / 2; e < E; ++e) x[e] = {0.0f, 0.0f};
    }
    F::template forward<LOG, !WINDOW>(x, shared, j);
    F::template unpack<false>(x, j);
    if (here) store_spectrum<E>(x, spectra + item * (F::M / 2) + j, F::THREADS);
}

// y = kernel * u + skip u, y (batch, channel, T) contiguous, or (ADJOINT) the correlation that is its gradient: with conjugated spectra,
// segments last to first. `kept` has room for the spectra of u: of every (work, segment) if keep_all, else of the segments of one
// work at a time for each transform of the grid; it may be null for one segment.
template <int LOG, int LOGE, bool ADJOINT>
__global__ void __launch_bounds__(BlockFFT<LOG, LOGE>::BLOCK, BlockFFT<LOG, LOGE>::BLOCKS)
long_conv_convolve(const float* u, i64 batch_stride, i64 channel_stride, float* y, const float4* kernel, const float* skip, float4* kept,
                   i64 batch, i64 channels, i64 T, int segments, int windows, int keep_all) {
    using F = BlockFFT<LOG, LOGE>;
    constexpr int S = F::M, E = F::E, AHEAD = E / 2 < 8 ? E / 2 : 8, SIZE = F::M / 2;
    extern __shared__ float4 memory[];
    Complex* shared = reinterpret_cast<Complex*>(memory) + threadIdx.y * F::SHARED;
    float4* const rings = memory + blockDim.y * (F::SHARED / 2) + threadIdx.y * 8 * F::THREADS;
    const i64 count = channels * batch, lanes = gridDim.x * i64(blockDim.y);
    for (i64 first = blockIdx.x * i64(blockDim.y); first < count; first += lanes) {
        const i64 work = first + threadIdx.y, c = work / batch, b = work % batch;
        const bool here = work < count;
        float4* const room = kept ? kept + (keep_all ? work : blockIdx.x * i64(blockDim.y) + threadIdx.y) * segments * SIZE : nullptr;
        const float4* const spectra = kernel + c * windows * SIZE;
        for (int step = 0; step < segments; ++step) {
            const int i = ADJOINT ? segments - 1 - step : step, j = threadIdx.x;
            float4 *const ring = rings + j, *const mine = room + j;
            const float4* const spectrum = spectra + j;
            const i64 start = i64(i) * S;
            const int length = here ? int(min(i64(S), T - start)) : 0;
            const float* in = u + (here ? b * batch_stride + c * channel_stride + start : 0);
            Complex x[E];
            load<E / 2, F::THREADS>(x, in, length, j);
#pragma unroll
            for (int e = E / 2; e < E; ++e) x[e] = {0.0f, 0.0f};
            if (here) {
#pragma unroll
                for (int e = 0; e < AHEAD; ++e) copy_async<16>(ring + e * F::THREADS, spectrum + e * F::THREADS);
            }
            close_copy_group();
            F::template forward<LOG, true>(x, shared, j);
            F::template unpack<false>(x, j);
            if (here && kept && (keep_all || step + 1 < segments)) store_spectrum<E>(x, mine + i * SIZE, F::THREADS);
            wait_for_copies<0>();
            if (here) {
                multiply<E, AHEAD, ADJOINT>(x, spectrum, ring, F::THREADS, j);
                const int others = min(step, windows - 1);  // segments done before, whose windows reach this one
                const i64 to_next = (ADJOINT ? 1 : -1) * SIZE;
                if (others > 0) accumulate<E, F::THREADS, ADJOINT>(x, spectrum, SIZE, mine + i * SIZE, to_next, others, ring, j);
            }
            F::template unpack<true>(x, j);
            F::inverse(x, shared, j);
            const float direct = here && skip ? skip[c] : 0.0f;
            float* out = y + (here ? (b * channels + c) * T + start : 0);
            const bool pairs = (reinterpret_cast<unsigned long long>(out) & 7) == 0;
            if (skip) {
                Complex again[E / 2];
                load<E / 2, F::THREADS>(again, in, length, j);
#pragma unroll
                for (int e = 0; e < E / 2; ++e) x[e] = {fmaf(direct, again[e].x, x[e].x), fmaf(direct, again[e].y, x[e].y)};
            }
#pragma unroll
            for (int e = 0; e < E / 2; ++e) {
                const int n = 2 * (e * F::THREADS + j);
                if (n + 1 < length && pairs) {
                    *reinterpret_cast<float2*>(out + n) = make_float2(x[e].x, x[e].y);
                } else {
                    if (n < length) out[n] = x[e].x;
                    if (n + 1 < length) out[n + 1] = x[e].y;
                }
            }
        }
    }
}

// Gradient of the kernel's window `lag` of a channel, N numbers: conj(spectrum of segment m of u) times that of segment m + lag of
// dy, summed over all m and rows of the batch, and transformed back.
template <int LOG, int LOGE>
__global__ void __launch_bounds__(BlockFFT<LOG, LOGE>::BLOCK, BlockFFT<LOG, LOGE>::BLOCKS)
long_conv_lags(const float4* of_u, const float4* of_dy, float* gradient, i64 batch, i64 channels, int segments, int windows) {
    using F = BlockFFT<LOG, LOGE>;
    constexpr int E = F::E, SIZE = F::M / 2;
    extern __shared__ float4 memory[];
    Complex* shared = reinterpret_cast<Complex*>(memory) + threadIdx.y * F::SHARED;
    const int j = threadIdx.x;
    float4* ring = memory + blockDim.y * (F::SHARED / 2) + threadIdx.y * 8 * F::THREADS + j;
    const i64 item = blockIdx.x * i64(blockDim.y) + threadIdx.y, c = item / windows;
    const bool here = item < channels * windows;
    const int lag = int(item % windows), count = segments - lag;
    Complex x[E];
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = {0.0f, 0.0f};
    for (i64 b = 0; here && b < batch; ++b) {
        const i64 at = (c * batch + b) * segments;
        accumulate<E, F::THREADS, true>(x, of_u + (at - 1) * SIZE + j, SIZE, of_dy + (at + lag - 1) * SIZE + j, SIZE, count, ring, j);
    }
    wait_for_copies<0>();
    F::template unpack<true>(x, j);
    F::inverse(x, shared, j);
    if (here) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
            const float scale = 0.125f / F::M;
            *reinterpret_cast<float2*>(gradient + item * 2 * F::M + 2 * (e * F::THREADS + j)) = make_float2(x[e].x * scale, x[e].y * scale);
        }
    }
}
