// Linear recurrence h_t = a_t h_{t-1} + b_t in one pass over the data, its adjoint, and the RG-LRU, whose steps are gates.
//
// Idea. A block takes W·L neighbouring steps of its channels at a time: each thread composes L of them, the warps exchange
// their compositions through shared memory, and every thread then knows the h that arrives at its first step and runs its
// L steps again, now with results. Each number is read once and each result written once.
//
// Layouts. `rows`: channels are contiguous; a lane holds V neighbouring channels, so that a warp reads rows of 32 V
// numbers, and time runs over registers, warps and tiles. `lines`: time is contiguous; a lane holds E neighbouring steps,
// and lanes compose by shuffles. Both are right for any strides, and fast for theirs. Backwards is a negative stride.
//
// Two ways through time. With enough sequences and channels to fill the device a block walks through all of time, the
// carry in a register and the next tiles under way (`walk`). With few, chunks of time go to blocks of their own, and
// carries follow as block_scan.cuh says (`split`).
//
// Limit: memory, 12 bytes a step in float32.
#include "async_copy.cuh"
#include "block_scan.cuh"

// -- what is scanned: inputs, the steps they make, results ---------------------------------------------------------------
// shift(k): which row, seen from the step's, input k is read at; for a row outside 0 ... T-1 `outside` answers.
// `extra` is one more array of numbers: h before the first step (Adjoint), rates by channel (Gated).

template <class S_>
struct Forward {  // a, b -> h
    using S = S_;
    using X = Arithmetic<S>;
    enum { IN = 2, OUT = 1 };
    static constexpr __device__ int shift(int) { return 0; }
    static __device__ X outside(int, const X*, i64) { return X(0); }
    static __device__ X parameter(const X*, i64) { return X(0); }
    static __device__ Step<X> step(const X* in, X) { return {in[0], in[1]}; }
    static __device__ X keep(const X*) { return X(0); }
    static __device__ void results(X, X h, X* out) { out[0] = h; }
};

template <class S_>
struct Adjoint {  // over reversed time: a_{t+1}, dy_t, h_{t-1} -> db = g, da = conj(h_{t-1}) g
    using S = S_;
    using X = Arithmetic<S>;
    enum { IN = 3, OUT = 2 };
    static constexpr __device__ int shift(int k) { return k - 1; }
    static __device__ X outside(int k, const X* extra, i64 at) { return k == 0 ? X(1) : extra ? extra[at] : X(0); }
    static __device__ X parameter(const X*, i64) { return X(0); }
    static __device__ Step<X> step(const X* in, X) { return {conjugate(in[0]), in[1]}; }
    static __device__ X keep(const X* in) { return in[2]; }
    static __device__ void results(X h_before, X g, X* out) {
        out[0] = g;
        out[1] = conjugate(h_before) * g;
    }
};

template <class S_>
struct Gated {  // x, r, i -> h; r = inf marks the start of a segment. `extra` is exponent·log_a of each channel
    using S = S_;
    using X = Arithmetic<S>;
    enum { IN = 3, OUT = 1 };
    static constexpr __device__ int shift(int) { return 0; }
    static __device__ X outside(int, const X*, i64) { return X(0); }
    static __device__ X parameter(const X* extra, i64 channel) { return extra[channel]; }
    static __device__ Step<X> step(const X* in, X rate) {
        if (isinf(in[1])) return {X(0), in[2] * in[0]};
        const X w = rate * in[1];
        return {exp(w), sqrt(-expm1(2 * w)) * (in[2] * in[0])};
    }
    static __device__ X keep(const X*) { return X(0); }
    static __device__ void results(X, X h, X* out) { out[0] = h; }
};

template <class S>
struct Operand {
    S* at;
    i64 batch, time, channel;  // strides, in numbers
};

#define OPERANDS                                                                                                                       \
    const typename P::S *x0, i64 x0b, i64 x0t, i64 x0c, const typename P::S *x1, i64 x1b, i64 x1t, i64 x1c, const typename P::S *x2,      \
        i64 x2b, i64 x2t, i64 x2c, typename P::S *y0, i64 y0b, i64 y0t, i64 y0c, typename P::S *y1, i64 y1b, i64 y1t, i64 y1c,            \
        const typename P::X *state, const typename P::X *extra, typename P::X *last, i64 T, i64 c
#define GATHER                                                                                                                         \
    using S = typename P::S;                                                                                                            \
    using X = typename P::X;                                                                                                            \
    const Operand<const S> x[3] = {{x0, x0b, x0t, x0c}, {x1, x1b, x1t, x1c}, {x2, x2b, x2t, x2c}};                                      \
    const Operand<S> y[2] = {{y0, y0b, y0t, y0c}, {y1, y1b, y1t, y1c}};

// -- rows ----------------------------------------------------------------------------------------------------------------

// L steps of V channels in registers.
template <class P, int V, int L>
struct Tile {
    using S = typename P::S;
    using X = typename P::X;
    Step<X> steps[L][V];
    X kept[L][V];

    // Row l from the packs of its inputs; rows at or after T are no steps.
    __device__ __forceinline__ void set(int l, const Pack<S, V>* found, const bool* inside, bool step_exists, const X* extra, i64 at, const X* parameter) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            X one[P::IN];
#pragma unroll
            for (int k = 0; k < P::IN; ++k) one[k] = inside[k] ? widen<S>(found[k].of[v]) : step_exists ? P::outside(k, extra, at + v) : X(0);
            steps[l][v] = step_exists ? P::step(one, parameter[v]) : no_step<X>();
            kept[l][v] = P::keep(one);
        }
    }
    __device__ __forceinline__ Step<X> composed(int v) const {
        Step<X> all = steps[0][v];
#pragma unroll
        for (int l = 1; l < L; ++l) all = then(all, steps[l][v]);
        return all;
    }
    // Run the steps from h, and store the results of the first `count`; `to` are the first row's places.
    __device__ __forceinline__ void run(X* h, const Operand<S>* y, S* const* to, int count) const {
        S* at[P::OUT];
#pragma unroll
        for (int k = 0; k < P::OUT; ++k) at[k] = to[k];
#pragma unroll
        for (int l = 0; l < L; ++l) {
            Pack<S, V> result[P::OUT];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                X out[P::OUT];
                h[v] = steps[l][v](h[v]);
                P::results(kept[l][v], h[v], out);
#pragma unroll
                for (int k = 0; k < P::OUT; ++k) result[k].of[v] = narrow<S>(out[k]);
            }
#pragma unroll
            for (int k = 0; k < P::OUT; ++k) {
                if (l < count) store_pack(at[k], result[k]);
                at[k] += y[k].time;
            }
        }
    }
};

// One block: 32 V channels of one sequence, all of time. STAGES tiles are under way; a thread copies what it will itself
// use, so its own wait is all the synchronisation that the ring needs.
template <class P, int V, int L, int W, int STAGES>
__global__ void __launch_bounds__(32 * W, 1) walk_rows(OPERANDS) {
    GATHER
    using Packed = Pack<S, V>;
    extern __shared__ __align__(16) unsigned char memory[];
    Packed* ring = reinterpret_cast<Packed*>(memory);  // [stage][input][l][thread]
    auto exchange = reinterpret_cast<Step<X>(*)[W][32][V]>(memory + sizeof(Packed) * STAGES * P::IN * L * 32 * W);  // [parity]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 columns = (c + 32 * V - 1) / (32 * V), n = blockIdx.x / columns;
    const i64 channel = ((blockIdx.x % columns) * 32 + lane) * V, at = n * c + channel;
    const bool live = channel < c;
    const auto slot = [&](int stage, int k, int l) { return ring + ((stage * P::IN + k) * L + l) * (32 * W) + threadIdx.x; };
    const S* from[P::IN];  // where the next tile to fetch begins for this warp
    S* to[P::OUT];         // where the results of this tile go
#pragma unroll
    for (int k = 0; k < P::IN; ++k) from[k] = x[k].at + n * x[k].batch + (warp * L + P::shift(k)) * x[k].time + channel * x[k].channel;
#pragma unroll
    for (int k = 0; k < P::OUT; ++k) to[k] = y[k].at + n * y[k].batch + warp * L * y[k].time + channel * y[k].channel;
    // Rows of a tile that exist, seen from its first for this warp: [low, high). Almost always all of them.
    const auto low = [&](i64 tile, int k) { return P::shift(k) < 0 && tile == 0 && warp == 0 ? -P::shift(k) : 0; };
    const auto high = [&](i64 tile, int shift) {
        const i64 left = T - shift - (tile * W + warp) * L;
        return !live || left < 0 ? 0 : left < L ? int(left) : L;
    };
    const auto fetch = [&](i64 tile, int stage) {
#pragma unroll
        for (int k = 0; k < P::IN; ++k) {
            const int begin = low(tile, k), end = high(tile, P::shift(k));
            const S* source = from[k];
#pragma unroll
            for (int l = 0; l < L; ++l) {
                if (l >= begin && l < end) {
                    if constexpr (sizeof(Packed) >= 4) copy_async<sizeof(Packed)>(slot(stage, k, l), source);
                    else *slot(stage, k, l) = *reinterpret_cast<const Packed*>(source);
                }
                source += x[k].time;
            }
            from[k] += W * L * x[k].time;
        }
        close_copy_group();
    };
    X carry[V], parameter[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        carry[v] = state && live ? state[at + v] : X(0);
        parameter[v] = live ? P::parameter(extra, channel + v) : X(0);
    }
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) fetch(s, s);
    const i64 tiles = (T + W * L - 1) / (W * L);
    int stage = 0, ahead = STAGES - 1;
    for (i64 tile = 0; tile < tiles; ++tile) {
        fetch(tile + STAGES - 1, ahead);
        wait_for_copies<STAGES - 1>();
        Tile<P, V, L> mine;
        int begin[P::IN], end[P::IN];
        const int count = high(tile, 0);
#pragma unroll
        for (int k = 0; k < P::IN; ++k) begin[k] = low(tile, k), end[k] = high(tile, P::shift(k));
#pragma unroll
        for (int l = 0; l < L; ++l) {
            Packed found[P::IN];
            bool inside[P::IN];
#pragma unroll
            for (int k = 0; k < P::IN; ++k) {
                found[k] = load_pack<Packed>(slot(stage, k, l));
                inside[k] = l >= begin[k] && l < end[k];
            }
            mine.set(l, found, inside, l < count, extra, at, parameter);
        }
        X h[V];
#pragma unroll
        for (int v = 0; v < V; ++v) exchange[tile % 2][warp][lane][v] = mine.composed(v);
        __syncthreads();  // one is enough: a warp can be at most one tile ahead, in the other half of `exchange`
#pragma unroll
        for (int w = 0; w < W; ++w)
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (w == warp) h[v] = carry[v];
                carry[v] = exchange[tile % 2][w][lane][v](carry[v]);
            }
        mine.run(h, y, to, count);
#pragma unroll
        for (int k = 0; k < P::OUT; ++k) to[k] += W * L * y[k].time;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
    }
    if (last && live && warp == 0)
#pragma unroll
        for (int v = 0; v < V; ++v) last[at + v] = carry[v];
}

// One block: one chunk of W·L steps of 32 V channels, in registers from the first load to the last store. `board` is what
// blocks tell each other: a counter, then for each chunk two flags; in `told` for each chunk and channel a composition
// and the h that leaves the chunk.
template <class P, int V, int L, int W, int BLOCKS>
__global__ void __launch_bounds__(32 * W, BLOCKS) split_rows(OPERANDS, i64 chunks, unsigned* board, typename P::X* told) {
    GATHER
    using Packed = Pack<S, V>;
    static_assert(GROUP % W == 0, "the chunks of a group are dealt to the warps");
    __shared__ Step<X> exchange[W][32][V];
    __shared__ X arriving[32][V];
    __shared__ unsigned ticket;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) ticket = atomicAdd(board, 1u);
    __syncthreads();
    const i64 columns = (c + 32 * V - 1) / (32 * V), wide = gridDim.x / chunks;  // columns of a sequence, of all
    const i64 chunk = ticket / wide, column = ticket % wide, n = column / columns;
    const i64 channel = ((column % columns) * 32 + lane) * V, at = n * c + channel, first = (chunk * W + warp) * L;
    const bool live = channel < c;
    const auto exists = [&](i64 t) { return live && t >= 0 && t < T; };
    const auto composed = [&](i64 j) { return board + 1 + 2 * (j * wide + column); };
    const auto left = [&](i64 j) { return composed(j) + 1; };
    const auto entry = [&](i64 j, int v) { return told + 3 * (((j * wide + column) * V + v) * 32 + lane); };

    Tile<P, V, L> mine;
    Packed found[L][P::IN];
    bool inside[L][P::IN];
    X parameter[V];
#pragma unroll
    for (int v = 0; v < V; ++v) parameter[v] = live ? P::parameter(extra, channel + v) : X(0);
#pragma unroll
    for (int l = 0; l < L; ++l)
#pragma unroll
        for (int k = 0; k < P::IN; ++k) {
            const i64 t = first + l + P::shift(k);
            inside[l][k] = exists(t);
            if (inside[l][k]) found[l][k] = load_pack<Packed>(x[k].at + n * x[k].batch + t * x[k].time + channel * x[k].channel);
        }
#pragma unroll
    for (int l = 0; l < L; ++l) mine.set(l, found[l], inside[l], exists(first + l), extra, at, parameter);
#pragma unroll
    for (int v = 0; v < V; ++v) exchange[warp][lane][v] = mine.composed(v);
    __syncthreads();
    Step<X> below[V], whole[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        whole[v] = no_step<X>();
#pragma unroll
        for (int w = 0; w < W; ++w) {
            if (w == warp) below[v] = whole[v];
            whole[v] = then(whole[v], exchange[w][lane][v]);
        }
    }
    const i64 group = chunk / GROUP * GROUP;
    if (warp == 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            entry(chunk, v)[0] = whole[v].a;
            entry(chunk, v)[1] = whole[v].b;
        }
        __threadfence();
        __syncwarp();
        if (lane == 0) publish(composed(chunk), 1);
    }
    __syncthreads();  // `exchange` has been read
    Step<X> earlier[V];  // what some neighbouring chunks of the group come to: a share for each warp
#pragma unroll
    for (int v = 0; v < V; ++v) earlier[v] = no_step<X>();
    for (i64 j = group + warp * (GROUP / W); j < group + (warp + 1) * (GROUP / W) && j < chunk; ++j) {
        await(composed(j));
#pragma unroll
        for (int v = 0; v < V; ++v) earlier[v] = then(earlier[v], Step<X>{fresh_load(entry(j, v)), fresh_load(entry(j, v) + 1)});
    }
#pragma unroll
    for (int v = 0; v < V; ++v) exchange[warp][lane][v] = earlier[v];
    if (warp == 0) {
        if (group) await(left(group - 1));
#pragma unroll
        for (int v = 0; v < V; ++v) arriving[lane][v] = group ? fresh_load(entry(group - 1, v) + 2) : state && live ? state[at + v] : X(0);
    }
    __syncthreads();
    X h[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        h[v] = arriving[lane][v];
#pragma unroll
        for (int w = 0; w < W; ++w) h[v] = exchange[w][lane][v](h[v]);
    }
    if (warp == 0 && chunk == group + GROUP - 1) {
#pragma unroll
        for (int v = 0; v < V; ++v) entry(chunk, v)[2] = whole[v](h[v]);
        __threadfence();
        __syncwarp();
        if (lane == 0) publish(left(chunk), 1);
    }
    if (last && live && warp == 0 && chunk == chunks - 1)
#pragma unroll
        for (int v = 0; v < V; ++v) last[at + v] = whole[v](h[v]);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = below[v](h[v]);
    S* to[P::OUT];
#pragma unroll
    for (int k = 0; k < P::OUT; ++k) to[k] = y[k].at + n * y[k].batch + first * y[k].time + channel * y[k].channel;
    mine.run(h, y, to, !live || first >= T ? 0 : T - first < L ? int(T - first) : L);
}

// -- lines ---------------------------------------------------------------------------------------------------------------

// One block: one channel of one sequence, 32 W E steps at a time, the next tile on its way in registers. With `aligned`,
// E neighbours are one access wherever time runs by steps of 1 or -1 and the input is not shifted.
template <class P, int E, int W, int BLOCKS>
__global__ void __launch_bounds__(32 * W, BLOCKS) walk_lines(OPERANDS, int aligned) {
    GATHER
    __shared__ Step<X> exchange[2][W];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 n = blockIdx.x / c, channel = blockIdx.x % c, at = blockIdx.x;
    const i64 tiles = (T + 32 * W * E - 1) / (32 * W * E);
    const X parameter = P::parameter(extra, channel);
    const auto backwards = [](i64 stride) { return stride == -1; };

    const auto fetch = [&](i64 tile, Pack<S, E>* found) {
        const i64 first = (tile * 32 * W + threadIdx.x) * E;
#pragma unroll
        for (int k = 0; k < P::IN; ++k) {
            const S* line = x[k].at + n * x[k].batch + channel * x[k].channel;
            if (aligned && P::shift(k) == 0 && (x[k].time == 1 || x[k].time == -1)) {
                if (first >= T) continue;
                const Pack<S, E> there = load_pack<Pack<S, E>>(backwards(x[k].time) ? line - first - (E - 1) : line + first);
#pragma unroll
                for (int e = 0; e < E; ++e) found[k].of[e] = backwards(x[k].time) ? there.of[E - 1 - e] : there.of[e];
            } else {
#pragma unroll
                for (int e = 0; e < E; ++e) {
                    const i64 t = first + e + P::shift(k);
                    if (t >= 0 && t < T) found[k].of[e] = line[t * x[k].time];
                }
            }
        }
    };

    X carry = state ? state[at] : X(0);
    Pack<S, E> found[P::IN], next[P::IN];
    fetch(0, found);
    for (i64 tile = 0; tile < tiles; ++tile) {
        fetch(tile + 1, next);
        const i64 first = (tile * 32 * W + threadIdx.x) * E;
        Step<X> steps[E], mine = no_step<X>();
        X kept[E];
#pragma unroll
        for (int e = 0; e < E; ++e) {
            X one[P::IN];
#pragma unroll
            for (int k = 0; k < P::IN; ++k) {
                const i64 t = first + e + P::shift(k);
                one[k] = t >= 0 && t < T ? widen<S>(found[k].of[e]) : P::outside(k, extra, at);
            }
            steps[e] = first + e < T ? P::step(one, parameter) : no_step<X>();
            kept[e] = P::keep(one);
            mine = then(mine, steps[e]);
        }
        Step<X> whole;
        const Step<X> below = steps_below(mine, lane, whole);
        X h = carry;
        if constexpr (W == 1) {
            carry = whole(carry);
        } else {
            if (lane == 0) exchange[tile % 2][warp] = whole;
            __syncthreads();
#pragma unroll
            for (int w = 0; w < W; ++w) {
                if (w == warp) h = carry;
                carry = exchange[tile % 2][w](carry);
            }
        }
        h = below(h);
        Pack<S, E> result[P::OUT];
#pragma unroll
        for (int e = 0; e < E; ++e) {
            X out[P::OUT];
            h = steps[e](h);
            P::results(kept[e], h, out);
#pragma unroll
            for (int k = 0; k < P::OUT; ++k) result[k].of[e] = narrow<S>(out[k]);
        }
#pragma unroll
        for (int k = 0; k < P::OUT; ++k) {
            S* line = y[k].at + n * y[k].batch + channel * y[k].channel;
            if (aligned && (y[k].time == 1 || y[k].time == -1)) {
                if (first >= T) continue;
                Pack<S, E> there;
#pragma unroll
                for (int e = 0; e < E; ++e) there.of[backwards(y[k].time) ? E - 1 - e : e] = result[k].of[e];
                store_pack(backwards(y[k].time) ? line - first - (E - 1) : line + first, there);
            } else {
#pragma unroll
                for (int e = 0; e < E; ++e)
                    if (first + e < T) line[(first + e) * y[k].time] = result[k].of[e];
            }
        }
#pragma unroll
        for (int k = 0; k < P::IN; ++k) found[k] = next[k];
    }
    if (last && threadIdx.x == 0) last[at] = carry;
}
