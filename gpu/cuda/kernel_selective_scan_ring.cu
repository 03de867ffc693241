// Selective scan, forward, of bfloat16 with 16 states, where few channels go through a long time: one pass, no exponential twice.
//
// Idea. A block takes one strip of 16 channels (block_selective_strip.cuh) through time, TEAMS pieces of 16 steps at once. A team is two
// warps, with half of the states each, and takes every TEAMS-th piece:
//
//     from zero   the recurrence as if the piece began with h = 0: its results, and its decays, which stay in registers
//     hand on     wait for the state h that enters; send that which leaves, exp(A (sum of steps)) h + (end of that from zero), to the next team
//     correct     what h adds to the results: h <- a_t h, C_t h, with the decays that were kept
//
// The state goes round the ring of teams, through shared memory and a barrier of two teams at a time; one hand-over has to take less than
// a TEAMS-th of a piece's work, and nobody waits. Sums are in a fixed order: the same bits in every run.
//
// Limit: issue slots.
#include "block_selective_strip.cuh"

template <class S, int TEAMS>
struct Ring {
    struct Team {
        RawPiece<S> raw[2];
        Entering entering;
        ReadOut sums[2];
        alignas(16) Pack<float, 4> handed[64];  // the state with which its piece begins
    } team[TEAMS];
    alignas(16) float D[PIECE], bias[PIECE];
};

template <class S, int TEAMS>
__global__ void __launch_bounds__(64 * TEAMS, 1) selective_scan_ring(
    const S* u, i64 u_batch, unsigned u_row, const S* delta, i64 delta_batch, unsigned delta_row, const S* z, i64 z_batch, unsigned z_row, const S* B,
    i64 B_batch, unsigned B_row, i64 B_group, const S* C, i64 C_batch, unsigned C_row, i64 C_group, const S* A, const S* D, const S* bias,
    const float* state, float* last, S* y, int T, int c, int G, int softplused) {
    static_assert(TEAMS >= 2 && TEAMS <= 8, "two barriers a team, of sixteen");
    will_come(0, TEAMS, 64), will_come(TEAMS, TEAMS, 128);
    extern __shared__ double memory[];
    Ring<S, TEAMS>& ring = *reinterpret_cast<Ring<S, TEAMS>*>(memory);
    const Place at(blockIdx.x, c, G, 1, PIECE);
    const int team = threadIdx.x / 64, member = threadIdx.x % 64, half = member / 32, lane = member % 32, g = lane / 4, q = lane % 4;
    const Lane mine(lane, 8 * half);
    Steps<2> steps(member);
    const int next_team = team + 1 == TEAMS ? 0 : team + 1;
    auto& shared = ring.team[team];
    if (threadIdx.x < PIECE) {
        ring.D[threadIdx.x] = D ? widen<S>(D[at.channel + threadIdx.x]) / MEAN_CUT : 0.f;
        ring.bias[threadIdx.x] = bias ? widen<S>(bias[at.channel + threadIdx.x]) : 0.f;
    }
    const auto pair_of_states = [&](i64 row, int e) { return (row * c + at.channel + g + e * 8) * PIECE + 8 * half + 2 * q; };
    float rate[1][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rate[0][i] = rate_of(widen<S>(A[pair_of_states(0, i % 2) + i / 2]));

    y += at.sequence * T * c + at.channel;
    // One warp of a team fetches u and delta, the other z, B and C.
    const auto fetch = [&](int first, RawPiece<S>& raw) {
        const int row = first + lane / 2, to = raw.place(lane / 2, lane % 2 * 8);
        const bool there = row < T;
        if (half == 0) {
            Rows<S>(u + at.sequence * u_batch + at.channel, u_row, lane).fetch(raw.u + to, row, there);
            Rows<S>(delta + at.sequence * delta_batch + at.channel, delta_row, lane).fetch(raw.delta + to, row, there);
        } else {
            if (z) Rows<S>(z + at.sequence * z_batch + at.channel, z_row, lane).fetch(raw.z + to, row, there);
            Rows<S>(B + at.sequence * B_batch + at.group * B_group, B_row, lane).fetch(raw.B + to, row, there);
            Rows<S>(C + at.sequence * C_batch + at.group * C_group, C_row, lane).fetch(raw.C + to, row, there);
        }
        close_copy_group();
    };
    fetch(team * PIECE, shared.raw[0]);
    wait_for_copies<0>();
    __syncthreads();
    int slot = 0;
#pragma unroll 1
    for (int first = team * PIECE; first < T; first += TEAMS * PIECE, slot ^= 1) {
        const RawPiece<S>& raw = shared.raw[slot];
        steps.find(raw, ring.bias, T - first, softplused);
        steps.put(shared.entering);
        meet(team, 64);
        fetch(first + TEAMS * PIECE, shared.raw[slot ^ 1]);

        float a[PIECE][4], h[4] = {}, elapsed[2], sums[2][4] = {};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const auto dt = load_pack<Pack<float, 4>>(shared.entering.dt + mine.sizes + Entering::row(8) * e + 4 * mine.q);
            elapsed[e] = (dt.of[0] + dt.of[1]) + (dt.of[2] + dt.of[3]);
            elapsed[e] += from_across(elapsed[e], 1);
            elapsed[e] += from_across(elapsed[e], 2);
        }
        Pack<float, 2> C_of[2];
#pragma unroll
        for (int t = 0; t < PIECE; t += 4) {
            FourSteps<S, 1> found;
            ReadySteps<1> ready;
            found.load(shared.entering, raw, t, mine);
            if (t % 8 == 0) C_of[t / 8] = load_wide<S, 2>(raw.C + mine.C + raw.place(t, 0));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                ready.make(found, j, rate, mine.q);
                ready.take(h, j, 0);
#pragma unroll
                for (int i = 0; i < 4; ++i) a[t + j][i] = ready.a[j][0][i];
                read_out(sums[t / 8], h, C_of[t / 8], mine.g == t % 8 + j);
            }
        }
        Pack<float, 4> entered = {}, left;
#pragma unroll
        for (int i = 0; i < 4; ++i) left.of[i] = decay(elapsed[i % 2], rate[0][i]);
        if (first) {
            meet(TEAMS + team, 128);
            entered = shared.handed[member];
        } else if (state) {
#pragma unroll
            for (int i = 0; i < 4; ++i) entered.of[i] = state[pair_of_states(at.sequence, i % 2) + i / 2];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) left.of[i] = fmaf(left.of[i], entered.of[i], h[i]);
        if (first + PIECE < T) {
            ring.team[next_team].handed[member] = left;
            pass(TEAMS + next_team, 128);
        } else if (last) {
#pragma unroll
            for (int e = 0; e < 2; ++e) store_pack(last + pair_of_states(at.sequence, e), Pack<float, 2>{left.of[e], left.of[2 + e]});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) h[i] = entered.of[i];
        float more_sums[2][4] = {};  // every other step's, so that products wait less for each other
#pragma unroll
        for (int t = 0; t < PIECE; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) h[i] *= a[t][i];
            read_out(t % 2 ? more_sums[t / 8] : sums[t / 8], h, C_of[t / 8], mine.g == t % 8);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += more_sums[i / 4][i % 4];
#pragma unroll
        for (int i = 0; i < 2; ++i) shared.sums[half].put(sums[i], 8 * i, mine.sums);
        wait_for_copies<0>();  // of its next piece
        meet(team, 64);

        const int time = member / 4, column = member % 4 * 4, from = raw.place(time, column), of_sums = time * ReadOut::ROW + column, row = first + time;
        auto sum = load_pack<Pack<float, 4>>(shared.sums[0].of + of_sums);
        const auto more = load_pack<Pack<float, 4>>(shared.sums[1].of + of_sums);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.of[i] += more.of[i];
        const auto results = gated<S, 4>(sum, raw.u + from, raw.z + from, ring.D + column, z != nullptr);
        if (row < T) store_pack(y + unsigned(row) * static_cast<unsigned long long>(unsigned(c)) + column, results);
    }
}
