// Causal long convolution, y_t = sum_s kernel_s u_(t-s) + skip u_t, of rows that one transform holds: 2048 < T <= 16384, time contiguous.
//
// The idea. A real row is M = 2^(10+r) complex numbers, even points the real parts, half of them zero (block_fft_wide.cuh). From Z, their
// transform, follows the row's spectrum, which is multiplied by the kernel's, from which follow the transform of the
// result's even and odd points: three linear maps of the pair A = Z[k], B = conj Z[M-k], which are one,
//
//     A' = (S - D sin t) A + i D cos t B,    B' = (S + D sin t) B - i D cos t A,        t = pi k/M,
//
// where the kernel's own spectrum is S + D at frequency k and conj(S - D) at M - k. So S and D are what is kept of a kernel.
//
// The layout. A block takes one row after the other; blocks that run together have rows of the same few channels, so that their S
// and D come from the L2 cache. Nothing is waited for from afar: what a transform does not need of its shared memory at the time
// receives copies. Half of S and D arrives during the first two passes, in a ring; the other half in the third, in the warp's own range;
// the row once more, for `skip`, and the next row, in the last pass, in the places of the thread's (or its neighbour's) points.
//
// What limits it. Instructions, 3650 a row and thread, of which 3000 are arithmetic: two blocks of a multiprocessor issue 2.6 in a
// cycle that could take four. Loads are not waited for, and shared memory is busy half of the time.
#include "async_copy.cuh"
#include "block_fft_wide.cuh"

using i64 = long long;

constexpr int AHEAD = 8;  // float4 of S and D in the ring, of 16

// Points 2 n and 2 n + 1 of a row, n = i L + j, to the places FROM + i of the first pass; zeros beyond `length`.
template <int r, int FROM>
__device__ __forceinline__ void fetch(Complex* shared, const float* in, int length, int j) {
    using F = WideFFT<r>;
    if (((reinterpret_cast<unsigned long long>(in) & 15) | (length & 3)) == 0) {  // both points of two threads, for every other i
        const int n = (j & ~1) + (j & 1) * F::L, base = F::place(n);
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            const int at = 2 * (n + i * F::L);
            copy_async_or_zeros(shared + F::after(base, (FROM + i) * F::L), in + (at < length ? at : 0), at < length);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 16; ++i) {
            float* to = reinterpret_cast<float*>(shared + F::place(j + (FROM + i) * F::L));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = 2 * (i * F::L + j) + half;
                if (at < length) copy_async<4>(to + half, in + at);
                else to[half] = 0.0f;
            }
        }
    }
    close_copy_group();
}

template <int THREADS>
__device__ __forceinline__ void store_row(const Complex* x, float* out, int length, int j) {
    if (((reinterpret_cast<unsigned long long>(out) & 7) | (length & 1)) == 0) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int n = i * THREADS + j;
            if (2 * n < length) reinterpret_cast<float2*>(out)[n] = make_float2(x[i].x, x[i].y);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int n = 2 * (i * THREADS + j);
            if (n < length) out[n] = x[i].x;
            if (n + 1 < length) out[n + 1] = x[i].y;
        }
    }
}

// From A and conj B to A' and conj B', with w = cos t - i sin t.
__device__ __forceinline__ void multiply_pair(Complex& one, Complex& other, float4 sd, Complex w) {
    const Complex a = one, b = conjugate(other), p = {fmaf(w.y, sd.z, sd.x), fmaf(w.y, sd.w, sd.y)};
    const Complex q = {fmaf(-w.y, sd.z, sd.x), fmaf(-w.y, sd.w, sd.y)}, d = {-w.x * sd.w, w.x * sd.z};
    one = {fmaf(-d.y, b.y, fmaf(d.x, b.x, fmaf(-p.y, a.y, p.x * a.x))), fmaf(d.y, b.x, fmaf(d.x, b.y, fmaf(p.y, a.x, p.x * a.y)))};
    other.x = fmaf(d.y, a.y, fmaf(-d.x, a.x, fmaf(-q.y, b.y, q.x * b.x)));
    other.y = -fmaf(-d.y, a.x, fmaf(-d.x, a.y, fmaf(q.y, b.x, q.x * b.y)));
}

// All pairs of a unit, the kernel's S and D from get(n). Of frequencies 0 and M/2 the kernel's own Z are kept.
template <int r, bool SELF, class Get>
__device__ __forceinline__ void multiply_unit(Complex* x, int unit, Complex base, Get get) {
    using F = WideFFT<r>;
#pragma unroll
    for (int slot = 0; slot < F::R; ++slot) {
        const float4 sd = get(unit * F::R + slot);
        int one, other;
        F::template pair<SELF>(unit, slot, one, other);
        if (SELF && slot == 0) {
            const Complex zero = x[one];
            x[one] = {fmaf(sd.y, zero.y, sd.x * zero.x), fmaf(sd.y, zero.x, sd.x * zero.y)};
            x[other] = times({sd.z, sd.w}, x[other]);
        } else {
            multiply_pair(x[one], x[other], sd, F::template turn<SELF>(unit, slot, base));
        }
    }
}

template <int r, bool SELF>
__device__ __forceinline__ void store_unit(const Complex* x, int unit, Complex base, float4* to) {
    using F = WideFFT<r>;
    constexpr float SCALE = 1.0f / F::M;  // which the transforms leave out
#pragma unroll
    for (int slot = 0; slot < F::R; ++slot) {
        int one, other;
        F::template pair<SELF>(unit, slot, one, other);
        const Complex a = {SCALE * x[one].x, SCALE * x[one].y}, b = {SCALE * x[other].x, -SCALE * x[other].y};
        float4 sd = make_float4(a.x, a.y, b.x, -b.y);
        if (!SELF || slot > 0) {
            const Complex v = times(F::template turn<SELF>(unit, slot, base), {0.5f * (a.x - b.x), 0.5f * (a.y - b.y)});  // i D
            sd = make_float4(0.5f * (a.x + b.x), 0.5f * (a.y + b.y), v.y, -v.x);
        }
        to[(unit * F::R + slot) * F::THREADS] = sd;
    }
}

// S and D of the kernels (channels, K), a block each, in the order in which threads want them.
template <int r>
__global__ void __launch_bounds__(WideFFT<r>::THREADS, WideFFT<r>::BLOCKS)
long_conv_kernels(const float* kernels, i64 channel_stride, float4* kept, int K) {
    using F = WideFFT<r>;
    extern __shared__ float4 memory[];
    Complex* shared = reinterpret_cast<Complex*>(memory);
    const int j = threadIdx.x;
    fetch<r, 0>(shared, kernels + blockIdx.x * channel_stride, K, j);
    wait_for_copies<0>();
    __syncwarp();
    Complex x[32];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = shared[F::after(F::place(j), i * F::L)], x[i + 16] = {0.0f, 0.0f};
    F::forward(x, shared, j, [&](int which) { return F::root(which, j); }, [] { __syncthreads(); }, [] {});
    float4* const to = kept + blockIdx.x * i64(16 * F::THREADS) + j;
#pragma unroll
    for (int unit = 0; unit < F::UNITS; ++unit) {
        const Complex base = F::root(3 + unit, j);
        if (unit == 0 && j == 0) store_unit<r, true>(x, unit, base, to);
        else store_unit<r, false>(x, unit, base, to);
    }
}

// y (batch, channels, T), contiguous; u with strides of batch and channels.
template <int r>
__global__ void __launch_bounds__(WideFFT<r>::THREADS, WideFFT<r>::BLOCKS)
long_conv_rows(const float* u, i64 batch_stride, i64 channel_stride, float* y, const float4* kept, const float* skip,
               i64 batch, i64 channels, int T) {
    using F = WideFFT<r>;
    constexpr int THREADS = F::THREADS;
    extern __shared__ float4 memory[];
    Complex* const shared = reinterpret_cast<Complex*>(memory);
    const int j = threadIdx.x;
    float4* const ring = memory + F::M / 2 + j;
    Complex* const table = reinterpret_cast<Complex*>(memory + F::M / 2 + AHEAD * THREADS) + j;
    const auto roots = [&](int which) { return table[which * THREADS]; };
    const auto meet = [] { __syncthreads(); };
#pragma unroll
    for (int which = 0; which < F::ROOTS; ++which) table[which * THREADS] = F::root(which, j);

    const i64 count = batch * channels, step_c = gridDim.x / batch, step_b = gridDim.x % batch;
    i64 at = blockIdx.x, c = at / batch, b = at % batch;
    if (at >= count) return;
    fetch<r, 0>(shared, u + b * batch_stride + c * channel_stride, T, j);
    // The n-th of 16: in the ring, or in the warp's own blocks of the second pass.
    const auto room = [&](int n) -> float4* {
        const int e = n - AHEAD, each = F::R / 2;
        return n < AHEAD ? ring + n * THREADS : memory + 16 * F::R * F::block_of(j, e / each) + e % each * 32 + j % 32;
    };
    for (bool last = false; !last;) {
        const float* const in = u + b * batch_stride + c * channel_stride;
        const float direct = skip ? skip[c] : 0.0f;
        const float4* const mine = kept + c * (16 * THREADS) + j;
        float* const out = y + (b * channels + c) * i64(T);
        at += gridDim.x, c += step_c, b += step_b, last = at >= count;
        if (b >= batch) b -= batch, ++c;

        Complex x[32];
        wait_for_copies<0>();
        __syncwarp();  // a neighbour may have asked for them
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = shared[F::after(F::place(j), i * F::L)], x[i + 16] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) copy_async<16>(room(n), mine + n * THREADS);
        F::forward(x, shared, j, roots, meet, [&] {
            __syncwarp();  // all lanes have read
#pragma unroll
            for (int n = AHEAD; n < 16; ++n) copy_async<16>(room(n), mine + n * THREADS);
            close_copy_group();
        });
        wait_for_copies<0>();
#pragma unroll
        for (int unit = 0; unit < F::UNITS; ++unit) {
            const auto get = [&](int n) { return *room(n); };
            if (unit == 0 && j == 0) multiply_unit<r, true>(x, unit, roots(3 + unit), get);
            else multiply_unit<r, false>(x, unit, roots(3 + unit), get);
        }
        __syncwarp();
        F::inverse(x, shared, j, roots, meet, [&] {
            __syncwarp();
            if (skip) fetch<r, 16>(shared, in, T, j);
            if (!last) fetch<r, 0>(shared, u + b * batch_stride + c * channel_stride, T, j);
            else close_copy_group();
        });
        if (skip) {
            wait_for_copies<1>();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const Complex v = shared[F::after(F::place(j), (16 + i) * F::L)];
                x[i] = {fmaf(direct, v.x, x[i].x), fmaf(direct, v.y, x[i].y)};
            }
        }
        store_row<THREADS>(x, out, T, j);
    }
}
