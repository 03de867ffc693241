// Selective scan, forward, of bfloat16 with 16 states: what kernel_selective_scan.cu does, by strips of 16 channels.
//
// Idea. A warp takes a strip through time, all by itself: blocks have no barrier. A lane has two channels with four states each; what
// enters and what is read out are matrix instructions (block_selective_strip.cuh), off the chain of dependent states. In the stretch
// between two meetings of the warp's lanes are the gate of the last piece, the recurrence of this and the steps of the next; the
// inputs of the one after that are on their way to shared memory.
//
// Limit: the special-function unit, n + 3 exponentials and reciprocals per (time, channel) at 16 a clock.
#include "block_selective_strip.cuh"

enum { RESULTS = 0, CHECKPOINTS = 2 };

template <class S>
struct Strip {  // of a warp, in shared memory
    RawPiece<S> raw[4];
    Entering entering[2];
    ReadOut sums[2];
    alignas(16) float D[PIECE], bias[PIECE];
};

// CHECKPOINTS: no results, but the state before every piece, for the gradient to start from.
template <int MODE, class S, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) selective_scan_strips(
    const S* u, i64 u_batch, i64 u_time, const S* delta, i64 delta_batch, i64 delta_time, const S* z, i64 z_batch, i64 z_time, const S* B,
    i64 B_batch, i64 B_time, i64 B_group, const S* C, i64 C_batch, i64 C_time, i64 C_group, const S* A, const S* D, const S* bias,
    const float* state, float* last, S* y, int T, int c, int G, int softplused) {
    extern __shared__ __align__(16) unsigned char memory[];
    Strip<S>& shared = reinterpret_cast<Strip<S>*>(memory)[threadIdx.x / 32];
    const Place at(blockIdx.x, c, G, 1, WARPS * PIECE);
    const int of_warp = threadIdx.x / 32 * PIECE, channel = at.channel + of_warp;
    if (of_warp >= at.channels) return;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const Lane mine(lane, 0);
    if (lane < PIECE) {
        shared.D[lane] = D ? widen<S>(D[channel + lane]) / MEAN_CUT : 0.f;
        shared.bias[lane] = bias ? widen<S>(bias[channel + lane]) : 0.f;
    }
    const auto pair_of_states = [&](i64 row, int s, int e) { return (row * c + channel + g + e * 8) * PIECE + 8 * s + 2 * q; };
    float rate[2][4], h[2][4] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rate[s][i] = rate_of(widen<S>(A[pair_of_states(0, s, i % 2) + i / 2]));
            if (state) h[s][i] = state[pair_of_states(at.sequence, s, i % 2) + i / 2];
        }
    const auto keep = [&](i64 row) {
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int e = 0; e < 2; ++e) store_pack(last + pair_of_states(row, s, e), Pack<float, 2>{h[s][e], h[s][2 + e]});
    };
    const Rows<S> u_from(u + at.sequence * u_batch + channel, u_time, lane), delta_from(delta + at.sequence * delta_batch + channel, delta_time, lane),
        z_from(z + at.sequence * z_batch + channel, z_time, lane), B_from(B + at.sequence * B_batch + at.group * B_group, B_time, lane),
        C_from(C + at.sequence * C_batch + at.group * C_group, C_time, lane);
    const int time = lane / 2, column = lane % 2 * 8;  // of what a lane fetches, and of results
    const auto fetch = [&](int first) {
        RawPiece<S>& raw = shared.raw[first / PIECE & 3];
        const int row = first + time, to = raw.place(time, column);
        const bool there = row < T;
        u_from.fetch(raw.u + to, row, there);
        delta_from.fetch(raw.delta + to, row, there);
        B_from.fetch(raw.B + to, row, there);
        if (MODE == RESULTS) {
            if (z) z_from.fetch(raw.z + to, row, there);
            C_from.fetch(raw.C + to, row, there);
        }
        close_copy_group();
    };
    S* const y_to = y + at.sequence * T * c + channel + column;
    const auto leave = [&](int first, int part) {  // two parts
        const RawPiece<S>& raw = shared.raw[first / PIECE & 3];
        const auto sum = load_pack<Pack<float, 4>>(shared.sums[first / PIECE & 1].of + time * ReadOut::ROW + column + 4 * part);
        const int from = raw.place(time, column) + 4 * part, row = first + time;
        const auto results = gated<S, 4>(sum, raw.u + from, raw.z + from, shared.D + column + 4 * part, z != nullptr);
        if (row >= 0 && row < T) store_pack(y_to + unsigned(row) * static_cast<unsigned long long>(unsigned(c)) + 4 * part, results);
    };

    fetch(0);
    fetch(PIECE);
    wait_for_copies<1>();
    __syncwarp();
    Steps<4> next(lane);
    next.find(shared.raw[0], shared.bias, T, softplused);
    next.put(shared.entering[0]);
    __syncwarp();
    // The next four steps are made ready beside the recurrence of these, and what they are made from is read beside that of the four before.
    FourSteps<S, 2> found;
    ReadySteps<2> ready, soon;
    found.load(shared.entering[0], shared.raw[0], 0, mine);
#pragma unroll
    for (int j = 0; j < 4; ++j) ready.make(found, j, rate, mine.q);
    found.load(shared.entering[0], shared.raw[0], 4, mine);
#pragma unroll 1
    for (int first = 0; first < T; first += PIECE) {
        wait_for_copies<0>();
        __syncwarp();
        fetch(first + 2 * PIECE);
        if (MODE == CHECKPOINTS) keep(at.sequence * ((T + PIECE - 1) / PIECE) + first / PIECE);
        const int number = first / PIECE;
        const RawPiece<S> &raw = shared.raw[number & 3], &raw_after = shared.raw[number + 1 & 3];
        Entering &entering = shared.entering[number & 1], &entering_after = shared.entering[number + 1 & 1];
        float sums[2][4] = {};
        Pack<float, 2> C_of[2];
#pragma unroll
        for (int t = 0; t < PIECE; t += 4) {
            FourSteps<S, 2> further;
            further.load(t < 8 ? entering : entering_after, t < 8 ? raw : raw_after, (t + 8) % PIECE, mine);
            if (MODE == RESULTS && t % 8 == 0)
#pragma unroll
                for (int s = 0; s < 2; ++s) C_of[s] = load_wide<S, 2>(raw.C + mine.C + raw.place(t, 0) + 8 * s);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                soon.make(found, j, rate, mine.q);
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    ready.take(h[s], j, s);
                    if (MODE == RESULTS) read_out(sums[t / 8], h[s], C_of[s], mine.g == t % 8 + j);
                }
            }
            if (t == 0) next.template find<0, 2>(raw_after, shared.bias, T - first - PIECE, softplused);
            if (t == 4) next.template find<2, 4>(raw_after, shared.bias, T - first - PIECE, softplused);
            if (t == 4) next.put(entering_after);
            if (MODE == RESULTS && t >= 8) leave(first - PIECE, t / 4 - 2);
            if (MODE == RESULTS && t % 8) shared.sums[number & 1].put(sums[t / 8], t - 4, mine.sums);
            ready = soon;
            found = further;
            if (t + 4 < PIECE) __syncwarp();
        }
    }
    if (MODE == RESULTS) {
        __syncwarp();
        for (int part = 0; part < 2; ++part) leave((T - 1) / PIECE * PIECE, part);
        if (last) keep(at.sequence);
    }
    wait_for_copies<0>();
}
