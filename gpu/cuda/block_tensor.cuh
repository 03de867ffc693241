// Tensor cores of one warp (mma.sync, sm_80 and later), tiles in shared memory that it reads from, and what moves them there.
//
// Tiles. bfloat16 in panels of 64 columns: each row of a panel is 128 bytes, and the 16-byte piece p of row r stands in place
// p ^ (r mod 8), so that eight rows' pieces of one column lie in different banks.
// Fragments, of lane l, g = l / 4, t = l % 4, each register two neighbours, the lower in its lower half:
//   left    16 x 16   (g, 2t)  (g + 8, 2t)  (g, 2t + 8)  (g + 8, 2t + 8)
//   right   16 x 8    rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g
//   result  16 x 8    d[0], d[1] = (g, 2t), (g, 2t + 1); d[2], d[3] eight rows below
// Two results side by side, rounded in pairs, are a left operand.
// A second file of this name, tests/gpu/host/block_tensor.cuh, has the same functions for the host.
#pragma once
#include <cuda_bf16.h>

#include "barriers.cuh"

using i64 = long long;

// A place in shared memory as a number. Where tiles start at multiples of 128 bytes, piece p of a row lies at that of piece 0 ^ 16 p: an
// instruction for a place, and none for one so many rows away, which is part of the instruction that reads.
using Place = unsigned;
__device__ __forceinline__ Place place(const void* p) { return shared_address(p); }

// Four 8 x 8 matrices whose rows start where lanes 0-7, 8-15, 16-23, 24-31 say: lane l gets (g, 2t), (g, 2t + 1) of each.
__device__ __forceinline__ void load_tiles(unsigned (&x)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_tiles(unsigned (&x)[4], const void* row) { load_tiles(x, place(row)); }
// The same, each matrix transposed.
__device__ __forceinline__ void load_tiles_turned(unsigned (&x)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_tiles_turned(unsigned (&x)[4], const void* row) { load_tiles_turned(x, place(row)); }
// result += left right, in float32
__device__ __forceinline__ void multiply_tiles(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers in one register, and back.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float low(unsigned x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }

// 2^x on the special-function unit: 2 units in the last place.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory, in the background; zeros where there is nothing to copy.
__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// x, of which the compiler no longer knows where it comes from: what depends on it is computed where it is used, not once and kept.
__device__ __forceinline__ int fresh(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// All threads of the block, wherever they are in the program.
__device__ __forceinline__ void meet_all() { asm volatile("bar.sync 0;" ::: "memory"); }
