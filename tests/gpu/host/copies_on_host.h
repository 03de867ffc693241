// Copies in the background (cp.async) for the host.
#pragma once
#include <cassert>

// Copies arrive when they are waited for, not before.
struct Copy {
    void* to;
    uint4 what;
};
static std::vector<std::vector<Copy>> under_way[1024];
inline void copy16(void* to, const void* from, bool there = true) {
    assert(std::uintptr_t(to) % 16 == 0 && std::uintptr_t(from) % 16 == 0);
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
