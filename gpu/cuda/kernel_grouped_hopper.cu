// Products of groups of rows with a matrix of each group, in 16-bit numbers on Hopper's tensor cores; float32 sums.
//
//   by columns   out[r] = x[r] w[g(r)]                 w (groups, inner, columns)      PLAIN
//                out[r] = act(x[r] v[g]) * (x[r] w[g])                                 GATED: two products, one tile each, one result
//   by rows      out[r] = x[r] w[g(r)]^T               w (groups, columns, inner)      TRANSPOSED; or the sum of two such products
//   outer        out[g] = sum of x[r]^T z[r] over g's rows                             OUTER
//
// Rows lie in slots: sorted by group, each group's filled up with zeros to a multiple of `size`. How many rows a group has is known on
// the device alone: every block walks through the groups' counts to find its tiles, and the host launches as many blocks as there
// are multiprocessors.
//
// A tile of the result is 128 x 256. Of a block's three warpgroups one is the producer: a single thread that has the copy engine bring
// steps of 64 of the inner dimension, 4 of them under way: 2 boxes of 64 x 64 of x and 4 of w. The other two multiply, 64 rows each, with
// 128 sums a thread in registers. While one of them writes its results the other may multiply, and the next tile's first steps are under
// way. Pairs of blocks share what both need: the matrix, if their tiles lie one below the other (WEIGHTS), or the rows, if side by side
// (ROWS).
//
// Order of tiles. Blocks that run at the same time should need the same rows and columns, which then come from the L2 cache: about `band`
// units of rows are taken up together, and walk from column to column.
//
// What limits it: the tensor cores (1024 clocks a step, active nine clocks in ten), at the clock that the chip's power allows; the
// copies keep up if pairs share. A step takes 48 KB into shared memory; of the matrix's 32 KB each block of a pair brings half, for
// both.
#include "block_pairs.cuh"

using i64 = long long;

enum Form { PLAIN, GATED, TRANSPOSED, OUTER };
enum Activation { NONE, SILU, RELU };
enum Shared { NOTHING, WEIGHTS, ROWS };

constexpr int TILE_ROWS = 128, TILE_COLUMNS = 256, STEP = 64, STAGES = 4, BOX = 64 * 128, STAGE = 6 * BOX;

struct Sizes {
    int groups, size;    // slots of a group are a multiple of size, which is one of a unit of rows
    int rows, columns;   // of the result; rows of OUTER's alone
    int inner, terms;    // terms: products that are added up, each with x and w of its own (TRANSPOSED)
    int band;
};

template <int ACTIVATION> __device__ inline float activated(float x) {
    if (ACTIVATION == SILU) return __fdividef(x, 1.0f + exp2_fast(-(float)LOG2E * x));
    if (ACTIVATION == RELU) return x < 0 ? 0.0f : x;
    return x;
}

// The tiles of one block, in the order in which all blocks take them.
template <int FORM, int SHARED> struct Walk {
    static constexpr int UNIT = SHARED == WEIGHTS ? 2 * TILE_ROWS : TILE_ROWS, WIDE = FORM == GATED ? TILE_COLUMNS / 2 : TILE_COLUMNS;
    static constexpr int ACROSS = SHARED == ROWS ? 2 * WIDE : WIDE;
    const Sizes& n;
    const i64* counts;
    int group, items_before;
    int slot, count, row, column;  // first slot and rows of the group; where the tile begins in the group (or in OUTER's result)

    __device__ Walk(const Sizes& n, const i64* counts) : n(n), counts(counts), group(0), items_before(0), slot(0) {}

    __device__ bool find(int item) {
        const int across = (n.columns + ACROSS - 1) / ACROSS;
        for (; group < n.groups; group++) {
            count = (int)counts[group];
            const int units = ((FORM == OUTER ? n.rows : count) + UNIT - 1) / UNIT;
            if (item < items_before + units * across) {
                const int bands = max(1, (units + n.band / 2) / n.band);  // of equal height, or nearly
                int c, u;
                which(item - items_before, across, units, (units + bands - 1) / bands, c, u);
                row = u * UNIT + (SHARED == WEIGHTS ? rank_in_pair() * TILE_ROWS : 0);
                column = c * ACROSS + (SHARED == ROWS ? rank_in_pair() * WIDE : 0);
                return true;
            }
            items_before += units * across;
            slot += (count + n.size - 1) / n.size * n.size;
        }
        return false;
    }
    __device__ int steps() const { return ((FORM == OUTER ? count : n.inner) + STEP - 1) / STEP; }  // of one term
};

// 64 rows x 2 N columns of a warpgroup, rounded, to where `out` points; columns beyond `left` are left out.
template <class T, int N> __device__ inline void write_tile(const float (&d)[128], T* out, i64 stride, int rows, int left) {
    const int thread = threadIdx.x % 128, lane = thread % 32, odd = lane % 2, row = thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int x = 0; x < N / 4; x += 2) {
            const unsigned even_group = pack<T>(d[4 * x + 2 * r], d[4 * x + 2 * r + 1]);
            const unsigned odd_group = pack<T>(d[4 * x + 4 + 2 * r], d[4 * x + 5 + 2 * r]);
            const unsigned other = __shfl_xor_sync(0xffffffff, odd ? even_group : odd_group, 1);
            const int column = 8 * (x + odd) + 2 * (lane % 4 - odd);
            if (row + 8 * r < rows && column < left)
                *(uint2*)(out + (row + 8 * r) * stride + column) = odd ? make_uint2(other, odd_group) : make_uint2(even_group, other);
        }
}

template <class T, int FORM, int ACTIVATION, int SHARED>
__global__ void __cluster_dims__(SHARED == NOTHING ? 1 : 2) __launch_bounds__(384, 1)
grouped_product(const __grid_constant__ Sizes n, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap x2_map,
                const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap w2_map, const i64* counts, T* out) {
    constexpr int PAIR = SHARED == NOTHING ? 1 : 2;
    extern __shared__ unsigned char memory[];
    unsigned char* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
    Barrier *const full = (Barrier*)(stages + STAGES * STAGE), *const empty = full + STAGES;
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + s, 1), barrier_init(empty + s, 8 * PAIR);  // one arrival a warp
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    pair_meets();
    Walk<FORM, SHARED> walk(n, counts);
    int round = 0;  // steps so far: they tell stage and phase

    if (warpgroup == 0) {
        keep_registers<56>();
        if (threadIdx.x == 0) {
            const int rank = PAIR == 1 ? 0 : rank_in_pair();
            for (int item = blockIdx.x / PAIR; walk.find(item); item += gridDim.x / PAIR) {
                const int steps = walk.steps(), slot = walk.slot;
                for (int t = 0; t < steps * n.terms; t++, round++) {
                    const int stage = round % STAGES, phase = round / STAGES % 2, k = t % steps * STEP;
                    const bool second = t >= steps;
                    unsigned char* const to = stages + stage * STAGE;
                    Barrier* const b = full + stage;
                    barrier_wait(empty + stage, phase ^ 1);
                    barrier_expect(b, STAGE);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (SHARED == ROWS && i != rank) continue;
                        const TensorMap* const map = second ? &x2_map : &x_map;
                        const int column = FORM == OUTER ? walk.row + 64 * i : k, row = FORM == OUTER ? slot + k : slot + walk.row + 64 * i;
                        if (SHARED == ROWS) copy_box_to_pair(to + i * BOX, map, b, column, row, 0, 0);
                        else copy_box(to + i * BOX, map, b, column, row, 0, 0);
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (SHARED == WEIGHTS && i / 2 != rank) continue;
                        const TensorMap* const map = second || (FORM == GATED && i < 2) ? &w2_map : &w_map;
                        const int along = walk.column + 64 * (FORM == GATED ? i % 2 : i);
                        const int column = FORM == TRANSPOSED ? k : along, row = FORM == TRANSPOSED ? along : FORM == OUTER ? slot + k : k;
                        const int matrix = FORM == OUTER ? 0 : walk.group;
                        if (SHARED == WEIGHTS) copy_box_to_pair(to + (2 + i) * BOX, map, b, column, row, matrix, 0);
                        else copy_box(to + (2 + i) * BOX, map, b, column, row, matrix, 0);
                    }
                }
            }
        }
    } else {
        take_registers<224>();
        const int me = warpgroup - 1, lane = threadIdx.x % 32;
        constexpr bool X_BY_COLUMNS = FORM == OUTER, W_BY_COLUMNS = FORM != TRANSPOSED;
        constexpr int X_STEP = X_BY_COLUMNS ? 2048 : 32, W_STEP = W_BY_COLUMNS ? 2048 : 32;  // bytes to the next 16 of the inner dimension
        auto release = [&](int which_round) {
            __syncwarp();
            if (lane < PAIR) barrier_arrive_at(empty + which_round % STAGES, lane);
        };
        for (int item = blockIdx.x / PAIR; walk.find(item); item += gridDim.x / PAIR) {
            float acc[128];
            const int steps = walk.steps() * n.terms;
            if (FORM == OUTER && steps == 0) {
#pragma unroll
                for (int i = 0; i < 128; i++) acc[i] = 0;
            }
            for (int t = 0; t < steps; t++, round++) {
                const unsigned at = shared_address(stages) + round % STAGES * STAGE;
                const unsigned long long x = operand(at + me * BOX, BOX), w = operand(at + 2 * BOX, BOX);
                barrier_wait(full + round % STAGES, round / STAGES % 2);
                products_begin();
#pragma unroll
                for (int i = 0; i < STEP / 16; i++)
                    Product256<T, X_BY_COLUMNS, W_BY_COLUMNS>::add(acc, x + (i * X_STEP >> 4), w + (i * W_STEP >> 4), t > 0 || i > 0);
                products_commit();
                if (t > 0) {
                    products_wait<1>();
                    release(round - 1);
                }
            }
            products_wait<0>();
            hold(acc);
            if (steps > 0) release(round - 1);
            const i64 first = FORM == OUTER ? (i64)walk.group * n.rows + walk.row : (i64)walk.slot + walk.row;
            T* const to = out + (first + 64 * me) * n.columns + walk.column;
            const int rows = FORM == OUTER ? n.rows - walk.row - 64 * me : 64, left = n.columns - walk.column;
            if (FORM == GATED) {  // the first half of the columns is the gate's, the second the other's
#pragma unroll
                for (int i = 0; i < 64; i++) acc[i] = activated<ACTIVATION>(acc[i]) * acc[64 + i];
                write_tile<T, 64>(acc, to, n.columns, rows, left);
            } else {
#pragma unroll
                for (int i = 0; i < 128; i++) acc[i] = activated<ACTIVATION>(acc[i]);
                write_tile<T, 128>(acc, to, n.columns, rows, left);
            }
        }
    }
    pair_meets();  // nobody leaves while the other may still write to it
}
