// What the selective scan and its gradient share: tiles of (time, channel) numbers, their functions, sums over lanes.
#pragma once
#include "async_copy.cuh"
#include "machine.cuh"
#include "numbers.cuh"

// -- functions, in the precision of their argument -----------------------------------------------------------------------

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
__device__ __forceinline__ float exponential(float x) { return power_of_2(LOG2_E * x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float quotient(float x, float y) { return x * reciprocal(y); }
__device__ __forceinline__ double quotient(double x, double y) { return x / y; }

// log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x| <= 1, and log(1 + e) = e p(e), p a polynomial: relatively exact however
// small it is, and one special function. Of degree 8 it errs by 3e-8, of degree 5, for halves, by 8e-6.
template <int DEGREE> __device__ __forceinline__ float softplus_by(const float (&p)[DEGREE + 1], float x) {
    const float e = exponential(-fabsf(x));
    float sum = p[DEGREE];
#pragma unroll
    for (int i = DEGREE - 1; i >= 0; --i) sum = fmaf(sum, e, p[i]);
    return fmaf(sum, e, fmaxf(x, 0.f));
}
__device__ __forceinline__ float softplus(float x) {
    const float p[] = {0.99999997f, -0.499994931f, 0.333190967f, -0.248429817f, 0.19106005f,
                       -0.136632425f, 0.0782259175f, -0.0295052199f, 0.00523269003f};
    return softplus_by<8>(p, x);
}
__device__ __forceinline__ float short_softplus(float x) {
    const float p[] = {0.999991598f, -0.499361365f, 0.32520668f, -0.210048693f, 0.101222292f, -0.0238691554f};
    return softplus_by<5>(p, x);
}
__device__ __forceinline__ double softplus(double x) { return fmax(x, 0.) + log1p(exp(-fabs(x))); }
template <class S> __device__ __forceinline__ Arithmetic<S> step_size(Arithmetic<S> x) {
    if constexpr (sizeof(S) == 2) return short_softplus(x);
    else return softplus(x);
}
template <class R> __device__ __forceinline__ R sigmoid(R x) { return quotient(R(1), 1 + exponential(-x)); }
template <class R> __device__ __forceinline__ R silu(R x) { return quotient(x, 1 + exponential(-x)); }
template <class R> __device__ __forceinline__ R silu_slope(R x) {
    const R s = sigmoid(x);
    return s == 0 ? R(0) : s * (1 + x * (1 - s));
}

// yes ? x : y without a branch, which would cut a tile's instructions into pieces that cannot overlap: the compiler likes to
// compute x only where it is wanted.
template <class R> __device__ __forceinline__ R choose(bool yes, R x, R y) { return yes ? x : y; }

// Rates are kept in the units that make e^(dt A) cheapest: base 2 for float, as they are otherwise.
__device__ __forceinline__ float rate_of(float A) { return A * LOG2_E; }
__device__ __forceinline__ float of_rate(float x) { return x * LN_2; }
__device__ __forceinline__ float decay(float dt, float rate) { return power_of_2(dt * rate); }
__device__ __forceinline__ double rate_of(double A) { return A; }
__device__ __forceinline__ double of_rate(double x) { return x; }
__device__ __forceinline__ double decay(double dt, double rate) { return exp(dt * rate); }
template <class R> __device__ __forceinline__ Complex<R> rate_of(Complex<R> A) { return A; }
template <class R> __device__ __forceinline__ Complex<R> decay(R dt, Complex<R> rate) {
    const R size = exp(dt * rate.re);
    R sine, cosine;
    sincos(dt * rate.im, &sine, &cosine);
    return {size * cosine, size * sine};
}
// Σ conj(A) r was summed with rates in place of A.
__device__ __forceinline__ float from_rate(float sum, float) { return of_rate(sum); }
template <class R, class X> __device__ __forceinline__ R from_rate(R sum, X) { return sum; }

__device__ __forceinline__ float real_product(float x, float y, float plus) { return fmaf(x, y, plus); }
__device__ __forceinline__ double real_product(double x, double y, double plus) { return fma(x, y, plus); }
template <class R> __device__ __forceinline__ R real_product(Complex<R> x, Complex<R> y, R plus) { return fma(x.re, y.re, fma(-x.im, y.im, plus)); }
template <class X> struct PairOf { enum { COUNT = 1 }; };  // complex numbers stand for conjugate pairs
template <class R> struct PairOf<Complex<R>> { enum { COUNT = 2 }; };

// -- sums over lanes -----------------------------------------------------------------------------------------------------

template <class X> __device__ __forceinline__ X from_across(X x, int bit) { return __shfl_xor_sync(0xffffffffu, x, bit); }
template <class R> __device__ __forceinline__ Complex<R> from_across(Complex<R> x, int bit) { return {from_across(x.re, bit), from_across(x.im, bit)}; }

// Each of COUNT values summed over LANES lanes, which stand UNIT apart. Lanes that would all compute the same divide the
// values instead: at every exchange each gives away the half that it will not keep, COUNT - 1 shuffles where COUNT times
// log2(LANES) are usual. The sums are left in the first entries; returned is which value the first of them is.
template <int LANES, int UNIT, int COUNT, class X>
__device__ __forceinline__ int sums_over_lanes(X (&values)[COUNT], int lane) {
    int first = 0, count = COUNT;
#pragma unroll
    for (int bit = LANES / 2; bit; bit /= 2) {
        const bool upper = lane & (bit * UNIT);
        if (count > 1) {
            count /= 2;
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i)
                if (i < count) {
                    const X give = upper ? values[i] : values[i + count];
                    values[i] = (upper ? values[i + count] : values[i]) + from_across(give, bit * UNIT);
                }
            first += upper ? count : 0;
        } else {
            values[0] = values[0] + from_across(values[0], bit * UNIT);
        }
    }
    return first;
}

// -- tiles: TT steps of CH channels, spread over the threads of a block in packs along the channels ----------------------

// A number's bits, as they come from memory. What is on its way must not be looked at: even to pick a half out of a word
// would be to wait for it.
template <class P>
struct Raw {
    using Word = typename WordOf<sizeof(P)>::type;
    enum { WORDS = sizeof(P) / sizeof(Word) };
    Word word[WORDS];
    __device__ __forceinline__ void load(const void* from) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) word[i] = reinterpret_cast<const Word*>(from)[i];
    }
    __device__ __forceinline__ P get() const { return load_pack<P>(word); }
};
template <class S>
struct RawHalf {  // one half, in a register of its own
    unsigned word;
    __device__ __forceinline__ void load(const void* from) { word = *reinterpret_cast<const unsigned short*>(from); }
    __device__ __forceinline__ Pack<S, 1> get() const {
        const unsigned short bits = word;
        return load_pack<Pack<S, 1>>(&bits);
    }
};
template <> struct Raw<Pack<__half, 1>> : RawHalf<__half> {};
template <> struct Raw<Pack<__nv_bfloat16, 1>> : RawHalf<__nv_bfloat16> {};

template <class X, class Y> struct SameType { enum { value = false }; };
template <class X> struct SameType<X, X> { enum { value = true }; };
// A pack in the precision of the arithmetic, and back. Two bfloat16 in a word are the upper halves of two floats.
template <class S, int V> __device__ __forceinline__ Pack<Arithmetic<S>, V> widened(const Raw<Pack<S, V>>& raw) {
    Pack<Arithmetic<S>, V> wide;
    if constexpr (SameType<S, __nv_bfloat16>::value && V % 2 == 0) {
        const unsigned* bits = reinterpret_cast<const unsigned*>(raw.word);
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            wide.of[i] = __uint_as_float(bits[i / 2] << 16);
            wide.of[i + 1] = __uint_as_float(bits[i / 2] & 0xffff0000u);
        }
    } else {
        const auto narrow_ones = raw.get();
#pragma unroll
        for (int i = 0; i < V; ++i) wide.of[i] = widen<S>(narrow_ones.of[i]);
    }
    return wide;
}
template <class S, int V> __device__ __forceinline__ Pack<S, V> narrowed(const Pack<Arithmetic<S>, V>& wide) {
    Pack<S, V> pack;
    if constexpr (SameType<S, __nv_bfloat16>::value && V % 2 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 2)
            reinterpret_cast<__nv_bfloat162*>(pack.of)[i / 2] = __floats2bfloat162_rn(wide.of[i], wide.of[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) pack.of[i] = narrow<S>(wide.of[i]);
    }
    return pack;
}

template <class S, int THREADS, int CH, int TT>
struct Spread {
    // Packs of four: neighbouring lanes then write neighbouring 32 bytes of shared memory, nearly without bank conflicts.
    enum { EACH = TT * CH / THREADS, MOST = sizeof(S) > 4 ? 2 : 4, WIDE = EACH < MOST ? EACH : MOST, PASSES = EACH / WIDE, ROWS = THREADS * WIDE / CH };
    static_assert(EACH >= 1 && TT * CH % THREADS == 0 && THREADS * WIDE % CH == 0, "a tile must fill the block");
    using Packed = Pack<S, WIDE>;
    static __device__ __forceinline__ int row(int pass) { return pass * ROWS + threadIdx.x * WIDE / CH; }
    static __device__ __forceinline__ int column() { return threadIdx.x * WIDE % CH; }  // the same in every pass
    static __device__ __forceinline__ i64 place(i64 stride) { return row(0) * stride + column(); }

    struct Bits {
        Raw<Packed> of[PASSES];
    };
    // Rows of an array with contiguous channels, from `at`: this thread's place in the first pass. All that are there, of
    // `rows` rows and `channels` channels, and zeros beyond; or, where none is beyond and packs are aligned, packs.
    static __device__ __forceinline__ void load(Bits& into, const S* at, i64 stride) {
#pragma unroll
        for (int p = 0; p < PASSES; ++p, at += ROWS * stride) into.of[p].load(at);
    }
    static __device__ __forceinline__ void load(Bits& into, const S* at, i64 stride, int rows, int channels) {
#pragma unroll
        for (int p = 0; p < PASSES; ++p, at += ROWS * stride) {
            Packed found;
#pragma unroll
            for (int i = 0; i < WIDE; ++i) found.of[i] = row(p) < rows && column() + i < channels ? at[i] : narrow<S>(0);
            into.of[p].load(&found);
        }
    }
    // The same into shared memory, each thread for itself; done when wait_for_copies says so.
    static __device__ __forceinline__ void fetch(Packed (*into)[THREADS], const S* at, i64 stride, int rows, int channels, bool whole) {
#pragma unroll
        for (int p = 0; p < PASSES; ++p, at += ROWS * stride) {
            Packed& place = into[p][threadIdx.x];
            if (whole && sizeof(Packed) >= 4) {
                copy_async<sizeof(Packed) >= 4 ? sizeof(Packed) : 4>(&place, at);
            } else {
#pragma unroll
                for (int i = 0; i < WIDE; ++i) place.of[i] = row(p) < rows && column() + i < channels ? at[i] : narrow<S>(0);
            }
        }
    }
    static __device__ __forceinline__ void store(const Packed (&values)[PASSES], S* at, i64 stride, int rows, int channels, bool whole) {
#pragma unroll
        for (int p = 0; p < PASSES; ++p, at += ROWS * stride) {
            if (whole) {
                store_pack(at, values[p]);
            } else if (row(p) < rows) {
#pragma unroll
                for (int i = 0; i < WIDE; ++i)
                    if (column() + i < channels) at[i] = values[p].of[i];
            }
        }
    }
};

// B or C of TT steps: numbers by thread, (t, n) with n fastest, padded with zeros to NS states; rows of ROW in shared memory.
template <class SX, class X, int THREADS, int ROW, int TT, int NS = ROW>
struct Maps {
    enum { EACH = (TT * NS + THREADS - 1) / THREADS, AHEAD = EACH <= 4 };  // few enough to wait in registers
    static __device__ __forceinline__ int row(int i) { return (i * THREADS + threadIdx.x) / NS; }
    static __device__ __forceinline__ int state() { return threadIdx.x % NS; }
    static_assert(THREADS % NS == 0 || !AHEAD, "a thread keeps its state");
    struct Bits {
        Raw<Pack<SX, 1>> of[EACH];
    };
    static __device__ __forceinline__ void load(Bits& into, const SX* from, i64 stride, int rows, int n) {
        from += row(0) * stride + state();
#pragma unroll
        for (int i = 0; i < EACH; ++i, from += THREADS / NS * stride) {
            into.of[i] = {};
            if (row(i) < rows && state() < n) into.of[i].load(from);
        }
    }
    static __device__ __forceinline__ void put(const Bits& values, X (*shared)[ROW]) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (TT * NS % THREADS == 0 || row(i) < TT) shared[row(i)][state()] = widen<SX>(values.of[i].get().of[0]);
    }
    static __device__ __forceinline__ void put_raw(const Bits& values, SX (*shared)[ROW]) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (TT * NS % THREADS == 0 || row(i) < TT) shared[row(i)][state()] = values.of[i].get().of[0];
    }
    // By state, with time fastest: a thread then reads four steps of a state at once. The padding spreads states over banks.
    template <int WIDTH>
    static __device__ __forceinline__ void put_across(const Bits& values, X (*shared)[WIDTH]) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (TT * NS % THREADS == 0 || row(i) < TT) shared[state()][row(i)] = widen<SX>(values.of[i].get().of[0]);
    }
    template <int WIDTH>
    static __device__ __forceinline__ void copy_across(const SX* from, i64 stride, int rows, int n, X (*shared)[WIDTH]) {
#pragma unroll 4
        for (int at = threadIdx.x; at < TT * NS; at += THREADS) {
            const int t = at / NS, state = at % NS;
            shared[state][t] = t < rows && state < n ? widen<SX>(from[t * stride + state]) : X(0);
        }
    }
    static __device__ __forceinline__ void copy(const SX* from, i64 stride, int rows, int n, X (*shared)[ROW]) {
#pragma unroll 4
        for (int at = threadIdx.x; at < TT * NS; at += THREADS) {
            const int t = at / NS, state = at % NS;
            shared[t][state] = t < rows && state < n ? widen<SX>(from[t * stride + state]) : X(0);
        }
    }
};

// Which sequence, segment of time, group and channels a block works on.
struct Place {
    i64 sequence, segment;
    int group, channel, channels;
    __device__ Place(i64 block, int c, int G, i64 segments, int CH) {
        const int each = c / G, parts = (each + CH - 1) / CH;
        const int part = block % parts;
        block /= parts;
        group = block % G;
        block /= G;
        segment = block % segments;
        sequence = block / segments;
        channel = group * each + part * CH;
        channels = each - part * CH < CH ? each - part * CH : CH;
    }
};
