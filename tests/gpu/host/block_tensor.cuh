// gpu/cuda/block_tensor.cuh for the host: the same functions, all lanes of a warp meeting in each.
#pragma once
#include <cassert>

#include "barriers.cuh"

using i64 = long long;

inline unsigned pack(float low, float high) { return __float2bfloat16_rn(low).bits | unsigned(__float2bfloat16_rn(high).bits) << 16; }
inline float low(unsigned x) { return __uint_as_float(x << 16); }
inline float high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
inline float exp2_fast(float x) { return exp2f(x); }
inline int fresh(int x) { return x; }

using Place = std::uintptr_t;
inline Place place(const void* p) { return Place(p); }

inline const unsigned short* row_of(const host::Shown* all, int lane) { return host::of_lane<const unsigned short*>(all, lane); }
inline void load_tiles(unsigned (&x)[4], const void* row) {
    assert(std::uintptr_t(row) % 16 == 0);
    const host::Shown* const all = host::show(row);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) std::memcpy(&x[i], row_of(all, 8 * i + lane / 4) + 2 * (lane % 4), 4);
}
inline void load_tiles_turned(unsigned (&x)[4], const void* row) {
    assert(std::uintptr_t(row) % 16 == 0);
    const host::Shown* const all = host::show(row);
    const int lane = threadIdx.x % 32, t = lane % 4;
    for (int i = 0; i < 4; ++i) x[i] = row_of(all, 8 * i + 2 * t)[lane / 4] | unsigned(row_of(all, 8 * i + 2 * t + 1)[lane / 4]) << 16;
}
inline void multiply_tiles(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Operands {
        unsigned a[4], b[2];
    };
    const host::Shown* const all = host::show(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = threadIdx.x % 32;
    float right[16][2], left[2][16];
    for (int k = 0; k < 16; ++k) {
        for (int x = 0; x < 2; ++x) {
            const unsigned of_a = host::of_lane<Operands>(all, lane / 4 * 4 + k % 8 / 2).a[k / 8 * 2 + x];
            const unsigned of_b = host::of_lane<Operands>(all, (2 * (lane % 4) + x) * 4 + k % 8 / 2).b[k / 8];
            left[x][k] = k % 2 ? high(of_a) : low(of_a);
            right[k][x] = k % 2 ? high(of_b) : low(of_b);
        }
    }
    for (int x = 0; x < 4; ++x) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += double(left[x / 2][k]) * right[k][x % 2];
        d[x] = float(d[x] + sum);
    }
}
inline void load_tiles(unsigned (&x)[4], Place row) { load_tiles(x, reinterpret_cast<const void*>(row)); }
inline void load_tiles_turned(unsigned (&x)[4], Place row) { load_tiles_turned(x, reinterpret_cast<const void*>(row)); }

#include "copies_on_host.h"

inline void meet_all() { host::meet_block(); }
