// What the kernels of attention's gradient on Hopper share: tiles of 64 rows that pass by 128 rows of a block, and products with them.
#pragma once
#include "block_hopper.cuh"

constexpr int PASSING = 64;  // rows of a tile that passes by
constexpr int ROWS = 128;    // of the result
constexpr int STAGES = 3;

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

// Contiguous bytes, a multiple of 16, by the copy engine.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, Barrier* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}

// d = A B^T over D features: 64 rows of A (in panels of height `rows`), N rows of B.
template <class T, int D, int N>
__device__ inline void multiply_rows(float (&d)[N / 2], unsigned a, int a_panel, unsigned b, int b_panel) {
    const unsigned long long x = operand(a, 0), y = operand(b, 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        Product<T, N, false>::add(d, x + ((k / 4 * a_panel + k % 4 * 32) >> 4), y + ((k / 4 * b_panel + k % 4 * 32) >> 4), k > 0);
    products_commit();
}
// The same with A in registers.
template <class T, int D, int N>
__device__ inline void multiply_rows(float (&d)[N / 2], const unsigned (&a)[D / 16][4], unsigned b, int b_panel) {
    const unsigned long long y = operand(b, 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++) Product<T, N, false>::add(d, a[k], y + ((k / 4 * b_panel + k % 4 * 32) >> 4), k > 0);
    products_commit();
}
// d += W B, W 64 x 64 in registers, B 64 rows x D.
template <class T, int D>
__device__ inline void multiply_columns(float (&d)[D / 2], const unsigned (&w)[PASSING / 4], unsigned b, int b_panel) {
    const unsigned long long y = operand(b, b_panel);
#pragma unroll
    for (int k = 0; k < PASSING / 16; k++) Product<T, D, true>::add(d, w + 4 * k, y + (k * 2048 >> 4), 1);
    products_commit();
}
