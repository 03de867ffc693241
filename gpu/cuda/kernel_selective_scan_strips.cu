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

template <class S, int TEAM>
struct Strip {  // of a team, in shared memory
    RawPiece<S> raw[4];
    Entering entering[2];
    ReadOut sums[2][TEAM];
    alignas(16) float D[PIECE], bias[PIECE];
};

// CHECKPOINTS: no results, but the state before every piece, for the gradient to start from.
template <int MODE, class S, int TEAM, int TEAMS, int BLOCKS>
__global__ void __launch_bounds__(32 * TEAM * TEAMS, BLOCKS) selective_scan_strips(
    const S* u, i64 u_batch, unsigned u_row, const S* delta, i64 delta_batch, unsigned delta_row, const S* z, i64 z_batch, unsigned z_row, const S* B,
    i64 B_batch, unsigned B_row, i64 B_group, const S* C, i64 C_batch, unsigned C_row, i64 C_group, const S* A, const S* D, const S* bias,
    const float* state, float* last, S* y, int T, int c, int G, int softplused) {
    extern __shared__ double memory[];
    enum { MEMBERS = 32 * TEAM, TILES = 2 / TEAM, TIMES = 4 / TEAM, COLUMNS = 8 / TEAM };
    will_come(0, TEAMS, MEMBERS);
    const int team = threadIdx.x / MEMBERS, member = threadIdx.x % MEMBERS, half = member / 32, lane = member % 32;
    Strip<S, TEAM>& shared = reinterpret_cast<Strip<S, TEAM>*>(memory)[team];
    const Place at(blockIdx.x, c, G, 1, TEAMS * PIECE);
    const int channel = at.channel + team * PIECE;
    if (team * PIECE >= at.channels) return;
    const auto meet_team = [&] {
        if (TEAM == 1) __syncwarp();
        else meet(team, MEMBERS);
    };
    const Lane mine(lane, 8 * half);
    if (member < PIECE) {
        shared.D[member] = D ? widen<S>(D[channel + member]) / MEAN_CUT : 0.f;
        shared.bias[member] = bias ? widen<S>(bias[channel + member]) : 0.f;
    }
    const auto pair_of_states = [&](i64 row, int s, int e) { return (row * c + channel + mine.g + e * 8) * PIECE + 8 * (half + s) + 2 * mine.q; };
    float rate[TILES][4], h[TILES][4] = {};
#pragma unroll
    for (int s = 0; s < TILES; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rate[s][i] = rate_of(widen<S>(A[pair_of_states(0, s, i % 2) + i / 2]));
            if (state) h[s][i] = state[pair_of_states(at.sequence, s, i % 2) + i / 2];
        }
    const auto keep = [&](i64 row) {
#pragma unroll
        for (int s = 0; s < TILES; ++s)
#pragma unroll
            for (int e = 0; e < 2; ++e) store_pack(last + pair_of_states(row, s, e), Pack<float, 2>{h[s][e], h[s][2 + e]});
    };
    const Rows<S> u_from(u + at.sequence * u_batch + channel, u_row, lane), delta_from(delta + at.sequence * delta_batch + channel, delta_row, lane),
        z_from(z + at.sequence * z_batch + channel, z_row, lane), B_from(B + at.sequence * B_batch + at.group * B_group, B_row, lane),
        C_from(C + at.sequence * C_batch + at.group * C_group, C_row, lane);
    const int time = member / (2 * TEAM), column = member % (2 * TEAM) * COLUMNS;  // of results
    const auto fetch = [&](int first) {
        RawPiece<S>& raw = shared.raw[first / PIECE & 3];
        const int row = first + lane / 2, to = raw.place(lane / 2, lane % 2 * 8);
        const bool there = row < T;
        if (half == 0) {
            u_from.fetch(raw.u + to, row, there);
            delta_from.fetch(raw.delta + to, row, there);
        }
        if (half == TEAM - 1) {
            B_from.fetch(raw.B + to, row, there);
            if (MODE == RESULTS) {
                if (z) z_from.fetch(raw.z + to, row, there);
                C_from.fetch(raw.C + to, row, there);
            }
        }
        close_copy_group();
    };
    S* const y_to = y + at.sequence * T * c + channel + column;
    const auto leave = [&](int first, int part) {  // two parts
        constexpr int COUNT = COLUMNS / 2;
        const RawPiece<S>& raw = shared.raw[first / PIECE & 3];
        const int from = raw.place(time, column) + COUNT * part, row = first + time;
        Pack<float, COUNT> sum = {};
#pragma unroll
        for (int w = 0; w < TEAM; ++w) {
            const auto more = load_pack<Pack<float, COUNT>>(shared.sums[first / PIECE & 1][w].of + time * ReadOut::ROW + column + COUNT * part);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sum.of[i] += more.of[i];
        }
        const auto results = gated<S, COUNT>(sum, raw.u + from, raw.z + from, shared.D + column + COUNT * part, z != nullptr);
        if (row >= 0 && row < T) store_pack(y_to + unsigned(row) * static_cast<unsigned long long>(unsigned(c)) + COUNT * part, results);
    };

    fetch(0);
    fetch(PIECE);
    wait_for_copies<1>();
    meet_team();
    Steps<TIMES> next(member);
    next.find(shared.raw[0], shared.bias, T, softplused);
    next.put(shared.entering[0]);
    meet_team();
    // The next four steps are made ready beside the recurrence of these, and what they are made from is read beside that of the four before.
    FourSteps<S, TILES> found;
    ReadySteps<TILES> ready, soon;
    found.load(shared.entering[0], shared.raw[0], 0, mine);
#pragma unroll
    for (int j = 0; j < 4; ++j) ready.make(found, j, rate, mine.q);
    found.load(shared.entering[0], shared.raw[0], 4, mine);
#pragma unroll 1
    for (int first = 0; first < T; first += PIECE) {
        wait_for_copies<0>();
        meet_team();
        fetch(first + 2 * PIECE);
        if (MODE == CHECKPOINTS) keep(at.sequence * ((T + PIECE - 1) / PIECE) + first / PIECE);
        const int number = first / PIECE;
        const RawPiece<S> &raw = shared.raw[number & 3], &raw_after = shared.raw[number + 1 & 3];
        Entering &entering = shared.entering[number & 1], &entering_after = shared.entering[number + 1 & 1];
        float sums[2][4] = {};
        Pack<float, 2> C_of[TILES];
#pragma unroll
        for (int t = 0; t < PIECE; t += 4) {
            FourSteps<S, TILES> further;
            further.load(t < 8 ? entering : entering_after, t < 8 ? raw : raw_after, (t + 8) % PIECE, mine);
            if (MODE == RESULTS && t % 8 == 0)
#pragma unroll
                for (int s = 0; s < TILES; ++s) C_of[s] = load_wide<S, 2>(raw.C + mine.C + raw.place(t, 0) + 8 * s);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                soon.make(found, j, rate, mine.q);
#pragma unroll
                for (int s = 0; s < TILES; ++s) {
                    ready.take(h[s], j, s);
                    if (MODE == RESULTS) read_out(sums[t / 8], h[s], C_of[s], mine.g == t % 8 + j);
                }
            }
            if (t == 0) next.template find<0, TIMES / 2>(raw_after, shared.bias, T - first - PIECE, softplused);
            if (t == 4) next.template find<TIMES / 2, TIMES>(raw_after, shared.bias, T - first - PIECE, softplused);
            if (t == 4) next.put(entering_after);
            if (MODE == RESULTS && t >= 8) leave(first - PIECE, t / 4 - 2);
            if (MODE == RESULTS && t % 8) shared.sums[number & 1][half].put(sums[t / 8], t - 4, mine.sums);
            ready = soon;
            found = further;
            if (t == 4 || (TEAM == 1 && t + 4 < PIECE)) meet_team();  // the compiler moves less from one stretch to another
        }
    }
    if (MODE == RESULTS) {
        meet_team();
        for (int part = 0; part < 2; ++part) leave((T - 1) / PIECE * PIECE, part);
        if (last) keep(at.sequence);
    }
    wait_for_copies<0>();
}
