// Elementary functions without overflow or cancellation, as in refimpl.core.numerics.
#pragma once

template <class X> __device__ __forceinline__ X infinity() { return X(__int_as_float(0x7f800000)); }
template <class X> __device__ __forceinline__ X finite_or_zero(X x) { return x == -infinity<X>() ? X(0) : x; }
template <class X> __device__ __forceinline__ X sigmoid(X x) { return X(1) / (X(1) + exp(-x)); }
template <class X> __device__ __forceinline__ X log_sigmoid(X x) { return -(max(-x, X(0)) + log1p(exp(-fabs(x)))); }
// 1 - tanh^2 x
template <class X> __device__ __forceinline__ X tanh_derivative(X x) {
    const X e = exp(X(-2) * fabs(x));
    return X(4) * e / ((X(1) + e) * (X(1) + e));
}
