// Products of 64 x 256 of a warpgroup, either operand by rows or by columns, and blocks in pairs (clusters of two).
//
// The blocks of a pair run at the same time on neighbouring multiprocessors. What both need the copy engine reads once from the L2 cache
// and writes into the shared memory of both, at the same offset, and the bytes count at the barrier that lies there in either.
// So a place in shared memory is free only when the consumers of both blocks have said so, to both.
#pragma once
#include "block_hopper.cuh"

// ---- a pair ------------------------------------------------------------------------------------------------------------
__device__ inline int rank_in_pair() {  // read again where it is needed, so that it takes no register
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline void pair_meets() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// An arrival at the barrier of this name in the block of a rank. It says that shared memory was read by the tensor cores, and orders
// nothing else: with `.release.cluster`, which waits for all that the warp wrote to memory, products took half as long again.
__device__ inline void barrier_arrive_at(Barrier* b, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(b)), "r"(rank) : "memory");
}
// `copy_box` into both blocks of a pair.
__device__ inline void copy_box_to_pair(void* to, const TensorMap* from, Barrier* b, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
        "l"(from), "r"(shared_address(b)), "r"(column), "r"(row), "r"(head), "r"(batch), "h"((unsigned short)3)
        : "memory");
}

// ---- D (64 x 256) = A (64 x 16) B (16 x 256) + (add ? D : 0), both in shared memory --------------------------------------
template <class T, bool A_BY_COLUMNS, bool B_BY_COLUMNS> struct Product256;
#define EIGHT(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define THIRTY_TWO(i) EIGHT(i), EIGHT(i + 8), EIGHT(i + 16), EIGHT(i + 24)
#define LIST_256 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
    "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, " \
    "%71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, " \
    "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
    "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PRODUCT_256(T, TYPE, A_BY_COLUMNS, B_BY_COLUMNS, DIGITS)                                                              \
    template <> struct Product256<T, A_BY_COLUMNS, B_BY_COLUMNS> {                                                            \
        static __device__ inline void add(float (&d)[128], unsigned long long a, unsigned long long b, int add) {             \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                       \
                         "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" LIST_256 "}, %128, %129"           \
                         ", p, 1, 1, " DIGITS ";\n}"                                                                          \
                         : THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64), THIRTY_TWO(96)                                      \
                         : "l"(a), "l"(b), "r"(add));                                                                         \
        }                                                                                                                     \
    };
PRODUCT_256(bfloat16, "bf16", false, true, "0, 1")
PRODUCT_256(bfloat16, "bf16", false, false, "0, 0")
PRODUCT_256(bfloat16, "bf16", true, true, "1, 1")
PRODUCT_256(float16, "f16", false, true, "0, 1")
PRODUCT_256(float16, "f16", false, false, "0, 0")
PRODUCT_256(float16, "f16", true, true, "1, 1")
