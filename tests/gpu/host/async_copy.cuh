// gpu/cuda/async_copy.cuh for the host: copies arrive when they are waited for, not before.
#pragma once
#include <cassert>

struct CopyAsync {
    void* to;
    char what[16];
    int bytes;
};
static std::vector<std::vector<CopyAsync>> copies_under_way[1024];  // of each thread, by groups
inline void copy_async_of(void* to, const void* from, int bytes, bool there) {
    assert(std::uintptr_t(to) % bytes == 0 && (!there || std::uintptr_t(from) % bytes == 0));
    auto& groups = copies_under_way[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    CopyAsync copy{to, {}, bytes};
    if (there) std::memcpy(copy.what, from, bytes);
    groups.back().push_back(copy);
}
template <int BYTES> void copy_async(void* to, const void* from) { copy_async_of(to, from, BYTES, true); }
inline void copy_async_or_zeros(void* to, const void* from, bool there) { copy_async_of(to, from, 16, there); }
inline void close_copy_group() {
    auto& groups = copies_under_way[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();  // the open one
}
template <int LEFT> void wait_for_copies() {
    auto& groups = copies_under_way[threadIdx.x];
    while (groups.size() > LEFT + 1) {
        for (const CopyAsync& copy : groups.front()) std::memcpy(copy.to, copy.what, copy.bytes);
        groups.erase(groups.begin());
    }
}
