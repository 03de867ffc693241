// gpu/cuda/halves.cuh for the host, without float16.
#pragma once

struct bfloat16 { unsigned short bits; };
inline float widen(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
template <class T> T narrow(double x) { return T(x); }
template <class T> T narrow(float x) { return T(x); }
template <> inline bfloat16 narrow<bfloat16>(float x) { return {__float2bfloat16_rn(x).bits}; }
inline float exp2_fast(float x) { return exp2f(x); }

// Copies arrive when they are waited for, not before.
struct Copy {
    void* to;
    uint4 what;
};
static std::vector<std::vector<Copy>> under_way[1024];
inline void copy16(void* to, const void* from, bool there) {
    auto& groups = under_way[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    uint4 what{};
    if (there) std::memcpy(&what, from, 16);
    groups.back().push_back({to, what});
}
inline void copies_end() { under_way[threadIdx.x].emplace_back(); }
template <int LEFT> void copies_wait() {
    auto& groups = under_way[threadIdx.x];
    while (int(groups.size()) > LEFT + 1) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, &copy.what, 16);
        groups.erase(groups.begin());
    }
}
