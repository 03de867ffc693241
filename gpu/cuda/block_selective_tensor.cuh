// Matrix instructions as the selective scan's kernels for bfloat16 use them: 16 by 8 sums lie with lane 4 g + q in rows g and
// g + 8, columns 2q and 2q + 1.
#pragma once
#include "block_selective.cuh"

// Sums of 16 by 8 (rows g, g + 8; columns 2q, 2q + 1) to which products of 16 by 4 numbers and 4 by 8 are added.
__device__ __forceinline__ void add_product(float& d0, float& d1, float& d2, float& d3, float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)));
}
// The product of 16 by 4 numbers and 4 by 8.
__device__ __forceinline__ void product_of_4(float (&d)[4], float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)), "f"(0.f));
}
// Sums to which products of 16 by 8 numbers (rows g, g + 8 of column q, then of column q + 4) and 8 by 8 (rows q, q + 4 of column g)
// are added.
__device__ __forceinline__ void add_product_of_8(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// Sums to which products of 16 by 8 numbers, in pairs of bfloat16, and 8 by 8 are added.
__device__ __forceinline__ void add_product(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ unsigned pair_of(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const unsigned*>(&pair);
}
// The same with 16 rows of which those from 8 on are anything, in pairs, and 16 by 8; rows g, columns 2q and 2q + 1 are d[0] and d[1].
__device__ __forceinline__ void add_product_of_8_rows(float (&d)[4], unsigned a0, unsigned a2, unsigned b0, unsigned b1) {
    asm("{.reg .b32 any; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, any, %5, any}, {%6, %7}, {%0, %1, %2, %3};}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a2), "r"(b0), "r"(b1));
}
// 8 by 8 numbers, a pair of lane 4 g + q from row g, columns 2q and 2q + 1: rows become columns.
__device__ __forceinline__ unsigned transposed(unsigned pair) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
    return y;
}
