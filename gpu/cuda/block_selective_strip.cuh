// Strips: 16 channels with 16 states each, taken through time in pieces of 16 steps; what the selective scan's kernels for bfloat16 share.
//
// The layout of matrix instructions decides that of states. Lane 4 g + q has of channels g and g + 8 the states 8 s + 2q and
// 8 s + 2q + 1, for one s or two. What enters a step, x B', is a product of 16 by 4 numbers (channels by steps) and 4 by 8 (steps by states)
// of which one step is left: it waits for no state. What is read out, y = h C, is a product of 16 by 8 numbers (channels by states)
// and 8 by 8 (states by steps), of whose columns one is not zero, so that eight steps add up to one block of results.
//
// Precision. States, decays and sums are float; x = dt u loses all but 11 bits where it enters, a state where it is read out. What is cut off
// on average is made up for.
#pragma once
#include "block_selective_tensor.cuh"

enum { PIECE = 16 };  // steps, channels, states
constexpr float MEAN_CUT = 1.00035f;  // of numbers whose logarithms are spread evenly, over their first 11 bits

// A piece of the inputs as they are stored, by step. After every four rows a gap, for the banks of shared memory.
template <class S>
struct RawPiece {
    enum { SIZE = (PIECE + PIECE / 4) * PIECE };
    alignas(16) S u[SIZE], delta[SIZE], z[SIZE], B[SIZE], C[SIZE];
    static __device__ __forceinline__ int place(int row, int column) { return (row + row / 4) * PIECE + column; }
};

// Rows of 16 numbers, a row a step; a lane fetches half a row. Zeros beyond the last. There when wait_for_copies says so, and for all lanes
// after a barrier.
template <class S>
struct Rows {
    const char* from;
    unsigned stride;  // bytes
    __device__ __forceinline__ Rows(const S* first, unsigned stride, int lane) : from(reinterpret_cast<const char*>(first + lane % 2 * 8)), stride(stride) {}
    __device__ __forceinline__ void fetch(S* to, unsigned row, bool there) const { copy_async_or_zeros(to, from + row * static_cast<unsigned long long>(stride), there); }
};

// Step sizes and what they let in, by channel with time fastest.
struct Entering {
    enum { SIZE = PIECE * (PIECE + 4) + 4 };
    alignas(16) float dt[SIZE], x[SIZE];
    static __device__ __forceinline__ int row(int channel) { return channel * (PIECE + 4) + channel / 8 * 4; }
};

template <class S, int COUNT>
__device__ __forceinline__ Pack<float, COUNT> load_wide(const S* from) {
    Raw<Pack<S, COUNT>> raw;
    raw.load(from);
    return widened(raw);
}

// Of channels 2 i and 2 i + 1, i = index % 8, TIMES steps from index / 8 * TIMES on.
template <int TIMES>
struct Steps {
    Pack<float, TIMES> dt[2], x[2];

    // Those from BEGIN up to END.
    int channel, first, from, to;
    __device__ __forceinline__ Steps(int index)
        : channel(kept(index % 8 * 2)), first(kept(index / 8 * TIMES)), from(kept(RawPiece<short>::place(index / 8 * TIMES, index % 8 * 2))),
          to(kept(Entering::row(index % 8 * 2) + index / 8 * TIMES)) {}
    template <int BEGIN = 0, int END = TIMES, class S>
    __device__ __forceinline__ void find(const RawPiece<S>& raw, const float* bias, int rows, int softplused) {
        const auto bias_of = load_pack<Pack<float, 2>>(bias + channel);
#pragma unroll
        for (int i = BEGIN; i < END; ++i) {
            const auto u_of = load_wide<S, 2>(raw.u + from + i * PIECE), delta_of = load_wide<S, 2>(raw.delta + from + i * PIECE);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float given = delta_of.of[e] + bias_of.of[e], chosen = choose(softplused, step_size<S>(given), given);
                dt[e].of[i] = first + i < rows ? chosen : 0.f;  // no step: decay 1, nothing enters
                x[e].of[i] = dt[e].of[i] * u_of.of[e] * MEAN_CUT;
            }
        }
    }
    __device__ __forceinline__ void put(Entering& entering) const {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            store_pack(entering.dt + to + Entering::row(1) * e, dt[e]);
            store_pack(entering.x + to + Entering::row(1) * e, x[e]);
        }
    }
};

// Sums over states, by step.
struct ReadOut {
    enum { ROW = PIECE + 4, SIZE = PIECE * ROW };
    alignas(16) float of[SIZE];
    // Of the products of eight steps: channels g, g + 8, times 2q, 2q + 1.
    __device__ __forceinline__ void put(const float (&sums)[4], int first, int at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of[at + (first + i % 2) * ROW + i / 2 * 8] = sums[i];
    }
};

// Skip and gate of COUNT channels at one time. D comes divided by MEAN_CUT, by which everything is multiplied.
template <class S, int COUNT>
__device__ __forceinline__ Pack<S, COUNT> gated(Pack<float, COUNT> sum, const S* u, const S* z, const float* D, bool with_z) {
    const auto u_of = load_wide<S, COUNT>(u), z_of = load_wide<S, COUNT>(z);
    const auto D_of = load_pack<Pack<float, COUNT>>(D);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const float gate = z_of.of[i] * reciprocal(fmaf(exponential(-z_of.of[i]), 1 / MEAN_CUT, 1 / MEAN_CUT));
        sum.of[i] = fmaf(D_of.of[i], u_of.of[i], sum.of[i]) * choose(with_z, gate, MEAN_CUT);
    }
    return narrowed<S>(sum);
}

// Where a lane finds what it needs, in the arrays of the same names.
struct Lane {
    int g, q, sizes, x, B, C, sums;
    __device__ __forceinline__ Lane(int lane, int first_state)
        : g(kept(lane / 4)), q(kept(lane % 4)), sizes(kept(Entering::row(lane / 4))), x(kept(Entering::row(lane / 4) + lane % 4)),
          B(kept(lane % 4 * PIECE + first_state + lane / 4)), C(kept(RawPiece<short>::place(lane / 4, first_state + lane % 4 * 2))),
          sums(kept(lane % 4 * 2 * ReadOut::ROW + lane / 4)) {}
};
// Of four steps what a lane needs: the sizes of both channels; x of both, and B of TILES times 8 states, at the q-th.
template <class S, int TILES>
struct FourSteps {
    Pack<float, 4> dt[2];
    float x[2], B[TILES];
    __device__ __forceinline__ void load(const Entering& entering, const RawPiece<S>& raw, int first, const Lane& at) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            dt[e] = load_pack<Pack<float, 4>>(entering.dt + at.sizes + Entering::row(8) * e + first);
            x[e] = entering.x[at.x + Entering::row(8) * e + first];
        }
#pragma unroll
        for (int s = 0; s < TILES; ++s) B[s] = widen<S>(raw.B[at.B + raw.place(first, 0) + 8 * s]);
    }
};
// What is made from them: decays and what enters, of states in the order in which a product of 16 by 8 wants them, [2 k + e] of state 2q + k and
// channel g + 8 e. No state is needed for that.
template <int TILES>
struct ReadySteps {
    float a[4][TILES][4], in[4][TILES][4];
    template <class S>
    __device__ __forceinline__ void make(const FourSteps<S, TILES>& from, int j, const float (&rate)[TILES][4], int q) {
#pragma unroll
        for (int s = 0; s < TILES; ++s) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[j][s][i] = decay(from.dt[i % 2].of[j], rate[s][i]);
            product_of_4(in[j][s], from.x[0], from.x[1], q == j ? from.B[s] : 0.f);
        }
    }
    __device__ __forceinline__ void take(float (&h)[4], int j, int s) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) h[i] = fmaf(a[j][s][i], h[i], in[j][s][i % 2 * 2 + i / 2]);
    }
};
// sums += states (channels by 8) C, at time `t` of eight.
__device__ __forceinline__ void read_out(float (&sums)[4], const float (&h)[4], Pack<float, 2> C, bool now) {
    add_product_of_8(sums, h, now ? C.of[0] : 0.f, now ? C.of[1] : 0.f);
}
