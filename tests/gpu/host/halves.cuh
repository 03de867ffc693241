// gpu/cuda/halves.cuh for the host, without float16.
#pragma once

struct bfloat16 { unsigned short bits; };
inline float widen(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
template <class T> T narrow(double x) { return T(x); }
template <class T> T narrow(float x) { return T(x); }
template <> inline bfloat16 narrow<bfloat16>(float x) { return {__float2bfloat16_rn(x).bits}; }
inline float exp2_fast(float x) { return exp2f(x); }

#include "copies_on_host.h"
