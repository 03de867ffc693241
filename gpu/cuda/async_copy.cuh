// Copies from global to shared memory that run while the threads compute (cp.async, sm_80 and later).
#pragma once

// One access of 4, 8 or 16 bytes, both addresses aligned to it. Smaller ones have no asynchronous form.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}
// 16 bytes, or zeros where there is nothing to copy.
__device__ __forceinline__ void copy_async_or_zeros(void* shared, const void* global, bool there) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void close_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>  // until at most LEFT groups of this thread are under way
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
