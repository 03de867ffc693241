// gpu/cuda/block_selective_tensor.cuh for the host: the same functions, all lanes of a warp meeting in each.
#pragma once
#include "block_selective.cuh"

inline float cut_to_11_bits(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
inline float half_of(unsigned pair, int high) { return __uint_as_float(high ? pair & 0xffff0000u : pair << 16); }

// d += left right: of a lane the numbers of row g, then of row g + 8, in columns 2q and 2q + 1.
template <int DEPTH, class Left, class Right>
void add_products(float (&d)[4], Left left, Right right) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
        double sum = d[i];
        for (int k = 0; k < DEPTH; ++k) sum += double(left(g, i / 2, k)) * right(k, 2 * q + i % 2);
        d[i] = float(sum);
    }
}
template <int COUNT> struct Operands {
    float of[COUNT];
};
inline void add_product_of_4(float (&d)[4], float a0, float a1, float b) {
    using All = Operands<3>;
    const host::Shown* const all = host::show(All{{cut_to_11_bits(a0), cut_to_11_bits(a1), cut_to_11_bits(b)}});
    add_products<4>(d, [&](int g, int below, int k) { return host::of_lane<All>(all, 4 * g + k).of[below]; },
                    [&](int k, int column) { return host::of_lane<All>(all, 4 * column + k).of[2]; });
}
inline void product_of_4(float (&d)[4], float a0, float a1, float b) {
    for (float& x : d) x = 0;
    add_product_of_4(d, a0, a1, b);
}
inline void add_product(float& d0, float& d1, float& d2, float& d3, float a0, float a1, float b) {
    float d[] = {d0, d1, d2, d3};
    add_product_of_4(d, a0, a1, b);
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
inline void add_product_of_8(float (&d)[4], const float (&a)[4], float b0, float b1) {
    using All = Operands<6>;
    All mine{{a[0], a[1], a[2], a[3], b0, b1}};
    for (float& x : mine.of) x = cut_to_11_bits(x);
    const host::Shown* const all = host::show(mine);
    add_products<8>(d, [&](int g, int below, int k) { return host::of_lane<All>(all, 4 * g + k % 4).of[k / 4 * 2 + below]; },
                    [&](int k, int column) { return host::of_lane<All>(all, 4 * column + k % 4).of[4 + k / 4]; });
}
struct Pairs {
    unsigned of[4];
};
inline void add_product(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
    const host::Shown* const all = host::show(Pairs{{a0, a1, b}});
    add_products<8>(d, [&](int g, int below, int k) { return half_of(host::of_lane<Pairs>(all, 4 * g + k / 2).of[below], k % 2); },
                    [&](int k, int column) { return half_of(host::of_lane<Pairs>(all, 4 * column + k / 2).of[2], k % 2); });
}
inline void add_product_of_8_rows(float (&d)[4], unsigned a0, unsigned a2, unsigned b0, unsigned b1) {
    const host::Shown* const all = host::show(Pairs{{a0, a2, b0, b1}});
    add_products<16>(d, [&](int g, int below, int k) { return below ? NAN : half_of(host::of_lane<Pairs>(all, 4 * g + k % 8 / 2).of[k / 8], k % 2); },
                     [&](int k, int column) { return half_of(host::of_lane<Pairs>(all, 4 * column + k % 8 / 2).of[2 + k / 8], k % 2); });
}
inline unsigned pair_of(float x, float y) { return __float2bfloat16_rn(x).bits | unsigned(__float2bfloat16_rn(y).bits) << 16; }
inline unsigned transposed(unsigned pair) {
    const host::Shown* const all = host::show(pair);
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const auto number = [&](int row) { return host::of_lane<unsigned>(all, 4 * row + g / 2) >> 16 * (g % 2) & 0xffff; };
    return number(2 * q) | number(2 * q + 1) << 16;
}
