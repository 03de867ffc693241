// bfloat16 of CUDA, as far as a kernel on the host needs it (cuda_on_host.h).
#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const std::uint32_t wide = std::uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {std::uint16_t(0x7fff)};
    return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to even
}
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
