// What Hopper has and others lack: the bulk tensor copy engine, barriers that count bytes, products of a whole warpgroup.
//
// Layout. A tile of 16-bit numbers lies in shared memory as panels of 64 columns: each row of a panel is 128 bytes, and
// within 8 rows (1024 bytes, the alignment of a panel) the 16-byte piece p of row r stands in place p ^ (r mod 8). The copy
// engine writes this "128-byte swizzle", and wgmma reads it without bank conflicts, both ways:
//   by rows     the 64 columns are the dimension that is summed over (Q, K in S = Q K^T): a step of 16 of them is 32 bytes;
//   by columns  the rows are summed over (V in O = P V): a step of 16 rows is 2048 bytes, the next panel of columns lies
//               the height of a panel further on.
// A warpgroup's result of 64 x N: thread t holds, of row 16 (t / 32) + (t % 32) / 4 (+ 8), columns 8 j + 2 (t % 4) (+ 1), as
// d[4 j + 0, 1] (+ 2 for the row below). Rounded in pairs, the same registers are the left operand of the next product: no
// data moves between S and P V.
#pragma once
#include "block_attention.cuh"

struct alignas(64) TensorMap { unsigned char bytes[128]; };  // a CUtensorMap, made by the driver on the host

// This thread arrives, and so many bytes are to come before the phase ends.
__device__ inline void barrier_expect(Barrier* b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}

// ---- the copy engine -------------------------------------------------------------------------------------------------
// One box of a tensor (column, row, head, batch): its bytes count at the barrier; outside the tensor there are zeros.
__device__ inline void copy_box(void* to, const TensorMap* from, Barrier* b, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(shared_address(b)), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

template <int REGISTERS> __device__ inline void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> __device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// ---- products of a warpgroup -----------------------------------------------------------------------------------------
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ inline void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// The compiler must not use these registers before this line.
template <int N> __device__ inline void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Where an operand lies: panels of 128-byte rows; `panel` bytes from one panel to the next (read by columns only).
__device__ inline unsigned long long operand(unsigned address, int panel) {
    const unsigned long long start = address >> 4 & 0x3fff, next_panel = panel >> 4, eight_rows = 1024 >> 4, swizzle = 1;
    return start | next_panel << 16 | eight_rows << 32 | swizzle << 62;
}

// D (64 x N) = A (64 x 16) B (16 x N) + (add ? D : 0). A in shared memory by rows, or in registers; B by rows of B^T
// (BY_COLUMNS false) or by columns.
template <class T, int N, bool BY_COLUMNS> struct Product;
#define PRODUCT(T, TYPE, N, BY_COLUMNS, DIGIT, LIST, D, A0, A1, A2, A3, A4, A5)                                                     \
    template <> struct Product<T, N, BY_COLUMNS> {                                                                                   \
        static __device__ inline void add(float (&d)[N / 2], unsigned long long a, unsigned long long b, int add) {                  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A2 ", 0;\n"                                                          \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST "}, %" A0 ", %" A1                \
                         ", p, 1, 1, 0, " DIGIT ";\n}" : D : "l"(a), "l"(b), "r"(add));                                             \
        }                                                                                                                            \
        static __device__ inline void add(float (&d)[N / 2], const unsigned* a, unsigned long long b, int add) {                     \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A5 ", 0;\n"                                                          \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST "}, {%" A0 ", %" A1 ", %" A2      \
                         ", %" A3 "}, %" A4 ", p, 1, 1, " DIGIT ";\n}" : D                                                          \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                            \
        }                                                                                                                            \
    };
#define REGISTERS_64 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), \
    "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), \
    "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
    "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define LIST_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_128 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), \
    "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), \
    "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
    "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), \
    "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), \
    "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
    "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define LIST_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_176 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), \
    "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), \
    "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
    "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), \
    "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), \
    "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
    "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), \
    "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), \
    "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define LIST_176 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, " \
    "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"
PRODUCT(bfloat16, "bf16", 64, false, "0", LIST_64, REGISTERS_64, "32", "33", "34", "35", "36", "37")
PRODUCT(bfloat16, "bf16", 64, true, "1", LIST_64, REGISTERS_64, "32", "33", "34", "35", "36", "37")
PRODUCT(float16, "f16", 64, false, "0", LIST_64, REGISTERS_64, "32", "33", "34", "35", "36", "37")
PRODUCT(float16, "f16", 64, true, "1", LIST_64, REGISTERS_64, "32", "33", "34", "35", "36", "37")
PRODUCT(bfloat16, "bf16", 128, false, "0", LIST_128, REGISTERS_128, "64", "65", "66", "67", "68", "69")
PRODUCT(bfloat16, "bf16", 128, true, "1", LIST_128, REGISTERS_128, "64", "65", "66", "67", "68", "69")
PRODUCT(float16, "f16", 128, false, "0", LIST_128, REGISTERS_128, "64", "65", "66", "67", "68", "69")
PRODUCT(float16, "f16", 128, true, "1", LIST_128, REGISTERS_128, "64", "65", "66", "67", "68", "69")
PRODUCT(bfloat16, "bf16", 176, false, "0", LIST_176, REGISTERS_176, "88", "89", "90", "91", "92", "93")
PRODUCT(float16, "f16", 176, false, "0", LIST_176, REGISTERS_176, "88", "89", "90", "91", "92", "93")

// This warp's 16 rows of a tile as left operands in registers, 16 columns each: `row` is the first of the 16, in panels of `panel` bytes.
template <int D> __device__ inline void read_operand(unsigned (&a)[D / 16][4], unsigned address, int panel, int row) {
    const int lane = threadIdx.x % 32, r = row + lane % 16;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const int piece = k % 4 * 2 + lane / 16;
        const unsigned from = address + k / 4 * panel + r * 128 + ((piece ^ r % 8) << 4);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a[k][0]), "=r"(a[k][1]), "=r"(a[k][2]), "=r"(a[k][3])
                     : "r"(from)
                     : "memory");
    }
}

// ---- results ---------------------------------------------------------------------------------------------------------
// 64 x D of a warpgroup to memory, rounded, from column `first` on: this thread's rows are `row` and `row` + 8 of `rows`, scaled by
// its factors.
// Neighbouring lanes swap halves of two groups of 8 columns, so that each writes 4 neighbouring numbers.
template <class T, int N>
__device__ inline void write_rows(const float (&d)[N], const float (&factor)[2], T* out, int row, int rows, int columns, int first = 0) {
    const int lane = threadIdx.x % 32, odd = lane % 2;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int x = 0; x < N / 4; x += 2) {
            const unsigned even_group = pack<T>(d[4 * x + 2 * r] * factor[r], d[4 * x + 2 * r + 1] * factor[r]);
            const unsigned odd_group = pack<T>(d[4 * x + 4 + 2 * r] * factor[r], d[4 * x + 5 + 2 * r] * factor[r]);
            const unsigned other = __shfl_xor_sync(0xffffffff, odd ? even_group : odd_group, 1);
            const int column = first + 8 * (x + odd) + 2 * (lane % 4 - odd);
            if (row + 8 * r < rows && column < columns)
                *(uint2*)(out + (long long)(row + 8 * r) * columns + column) =
                    odd ? make_uint2(other, odd_group) : make_uint2(even_group, other);
        }
}
