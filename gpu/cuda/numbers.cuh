// Numbers: how arrays store them and in what arithmetic a kernel computes.
//
// Storage S is float, double, __half, __nv_bfloat16 or Complex<float/double>; arithmetic X is the same type, or float for
// the two halves. `widen` and `narrow` go between them. A Pack<S, V> is V neighbours that move in one access.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using i64 = long long;

template <class R>
struct alignas(2 * sizeof(R)) Complex {
    R re, im;
    __device__ Complex() {}
    __device__ Complex(R r, R i = R(0)) : re(r), im(i) {}
};
template <class R> __device__ __forceinline__ Complex<R> operator+(Complex<R> x, Complex<R> y) { return {x.re + y.re, x.im + y.im}; }
template <class R> __device__ __forceinline__ Complex<R> operator*(Complex<R> x, Complex<R> y) {
    return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
template <class R> __device__ __forceinline__ Complex<R> operator*(R x, Complex<R> y) { return {x * y.re, x * y.im}; }

__device__ __forceinline__ float conjugate(float x) { return x; }
__device__ __forceinline__ double conjugate(double x) { return x; }
template <class R> __device__ __forceinline__ Complex<R> conjugate(Complex<R> x) { return {x.re, -x.im}; }
__device__ __forceinline__ float real_part(float x) { return x; }
__device__ __forceinline__ double real_part(double x) { return x; }
template <class R> __device__ __forceinline__ R real_part(Complex<R> x) { return x.re; }

// a·x + y
__device__ __forceinline__ float multiply_add(float a, float x, float y) { return fmaf(a, x, y); }
__device__ __forceinline__ double multiply_add(double a, double x, double y) { return fma(a, x, y); }
template <class R> __device__ __forceinline__ Complex<R> multiply_add(Complex<R> a, Complex<R> x, Complex<R> y) {
    return {multiply_add(a.re, x.re, multiply_add(-a.im, x.im, y.re)), multiply_add(a.re, x.im, multiply_add(a.im, x.re, y.im))};
}
template <class R> __device__ __forceinline__ Complex<R> multiply_add(R a, Complex<R> x, Complex<R> y) {
    return {multiply_add(a, x.re, y.re), multiply_add(a, x.im, y.im)};
}

template <class S> struct ArithmeticOf { using type = S; };
template <> struct ArithmeticOf<__half> { using type = float; };
template <> struct ArithmeticOf<__nv_bfloat16> { using type = float; };
template <class S> using Arithmetic = typename ArithmeticOf<S>::type;

template <class S> __device__ __forceinline__ Arithmetic<S> widen(S x) { return x; }
template <> __device__ __forceinline__ float widen<__half>(__half x) { return __half2float(x); }
template <> __device__ __forceinline__ float widen<__nv_bfloat16>(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class S> __device__ __forceinline__ S narrow(Arithmetic<S> x) { return x; }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class S, int V>
struct alignas(sizeof(S) * V < 16 ? sizeof(S) * V : 16) Pack {
    S of[V];
};

// A pack moves as one machine word: left to itself, the compiler stores halves one by one.
template <int BYTES> struct WordOf { using type = uint4; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<4> { using type = unsigned; };
template <> struct WordOf<2> { using type = unsigned short; };
template <class P> __device__ __forceinline__ P load_pack(const void* from) {
    using Word = typename WordOf<sizeof(P)>::type;
    constexpr int WORDS = sizeof(P) / sizeof(Word);
    union Both {
        Word words[WORDS];
        P pack;
        __device__ Both() {}
    } both;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) both.words[i] = reinterpret_cast<const Word*>(from)[i];
    return both.pack;
}
template <class P> __device__ __forceinline__ void store_pack(void* to, const P& pack) {
    using Word = typename WordOf<sizeof(P)>::type;
    constexpr int WORDS = sizeof(P) / sizeof(Word);
    union Both {
        Word words[WORDS];
        P pack;
        __device__ Both() {}
    } both;
    both.pack = pack;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) reinterpret_cast<Word*>(to)[i] = both.words[i];
}

template <class X> __device__ __forceinline__ X from_lane(X x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <class R> __device__ __forceinline__ Complex<R> from_lane(Complex<R> x, int lane) { return {from_lane(x.re, lane), from_lane(x.im, lane)}; }
template <class X> __device__ __forceinline__ X from_below(X x, int distance) { return __shfl_up_sync(0xffffffffu, x, distance); }
template <class R> __device__ __forceinline__ Complex<R> from_below(Complex<R> x, int distance) {
    return {from_below(x.re, distance), from_below(x.im, distance)};
}
