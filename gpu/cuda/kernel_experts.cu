// What mixtures of experts do beside products: who goes where, rows there and back, activations and their gradients.
//
// The idea. Pairs of a token and an expert get a slot: sorted by expert, each expert's filled up to whole blocks of `size` slots. A
// pair's place in its expert's queue is known (kernel_places.cu), so its slot is a sum of three numbers, and nothing is sorted.
// Everything else is one pass over the data in accesses of 16 bytes, one block for each row. What limits it: memory.
#include "numbers.cuh"
#include "stable.cuh"

// ---- who goes where ------------------------------------------------------------------------------------------------------

// Of counts (entries, E), cut at `capacity`: before (entries, E), pairs of the expert in earlier entries; totals and starts (E), the
// expert's pairs and first slot; of_block (blocks), the expert of each block of slots. One block of 256 threads.
__global__ void __launch_bounds__(256)
plan(i64* counts, i64* before, i64* totals, i64* starts, i64* of_block, i64 capacity, i64 entries, int E, int size, int blocks) {
    __shared__ i64 sums[256];
    i64 carried = 0;
    for (int e0 = 0; e0 < E; e0 += 256) {
        const int e = e0 + threadIdx.x;
        i64 total = 0;
        for (i64 entry = 0; entry < entries && e < E; ++entry) {
            const i64 kept = min(counts[entry * E + e], capacity);
            counts[entry * E + e] = kept;
            before[entry * E + e] = total;
            total += kept;
        }
        const i64 filled = (total + size - 1) / size * size;
        sums[threadIdx.x] = filled;
        __syncthreads();
        for (int away = 1; away < 256; away *= 2) {
            const i64 earlier = int(threadIdx.x) >= away ? sums[threadIdx.x - away] : 0;
            __syncthreads();
            sums[threadIdx.x] += earlier;
            __syncthreads();
        }
        if (e < E) {
            totals[e] = total;
            starts[e] = carried + sums[threadIdx.x] - filled;
        }
        carried += sums[255];
        __syncthreads();
    }
    for (int b = threadIdx.x; b < blocks; b += 256) {
        int low = 0, high = E;  // the last expert that starts at this block or before; one without tokens starts where the next does
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (starts[middle] <= i64(b) * size ? low : high) = middle;
        }
        of_block[b] = low;
    }
}

// slot (pairs), -1 for dropped ones; pair_of (slots), which holds -1 where nobody stands. Pairs of an entry are `per_entry` neighbours.
__global__ void __launch_bounds__(256)
stand(const i64* experts, const i64* place, const i64* before, const i64* starts, i64* slot, i64* pair_of, i64 capacity, i64 pairs,
      i64 per_entry, int E) {
    const i64 p = blockIdx.x * i64(256) + threadIdx.x;
    if (p >= pairs) return;
    const i64 e = experts[p], s = place[p] < capacity ? starts[e] + before[p / per_entry * E + e] + place[p] : -1;
    slot[p] = s;
    if (s >= 0) pair_of[s] = p;
}

// ---- rows there and back ---------------------------------------------------------------------------------------------------

template <class S, int V> __device__ __forceinline__ Pack<S, V> zeros() {
    Pack<S, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.of[i] = narrow<S>(Arithmetic<S>(0));
    return pack;
}

// rows (slots, d): those of the tokens that stand there, zeros where nobody does. V: numbers an access.
template <class S, int V>
__global__ void __launch_bounds__(128) gather_rows(const S* x, const i64* pair_of, S* rows, int k, int d) {
    const i64 pair = pair_of[blockIdx.x], token = pair / k;
    for (int c = threadIdx.x * V; c < d; c += 128 * V)
        store_pack(rows + blockIdx.x * i64(d) + c, pair < 0 ? zeros<S, V>() : load_pack<Pack<S, V>>(x + token * d + c));
}

// y (tokens, d) = sum over a token's k pairs, in their order, of weight (1 if there are none) times the slot's row; dropped ones are 0.
template <class R, class S, int V>
__global__ void __launch_bounds__(128)
combine_rows(const R* rows, const i64* slot, const Arithmetic<R>* weights, S* y, int k, int d) {
    using X = Arithmetic<R>;
    const i64 token = blockIdx.x;
    for (int c = threadIdx.x * V; c < d; c += 128 * V) {
        X sums[V] = {};
        for (int j = 0; j < k; ++j) {
            const i64 s = slot[token * k + j];
            if (s < 0) continue;
            const X weight = weights == nullptr ? X(1) : weights[token * k + j];
            const auto row = load_pack<Pack<R, V>>(rows + s * d + c);
#pragma unroll
            for (int i = 0; i < V; ++i) sums[i] = multiply_add(weight, widen(row.of[i]), sums[i]);
        }
        Pack<S, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) out.of[i] = narrow<S>(sums[i]);
        store_pack(y + token * d + c, out);
    }
}

// ---- activations -------------------------------------------------------------------------------------------------------------

enum Activation { SILU, GELU, RELU };

// Of the normal distribution.
template <class X> __device__ __forceinline__ X cumulative(X x) { return X(0.5) * erfc(X(-0.70710678118654752440) * x); }
template <class X> __device__ __forceinline__ X activated(int activation, X x) {
    return activation == SILU ? x * sigmoid(x) : activation == GELU ? x * cumulative(x) : x < X(0) ? X(0) : x;
}
template <class X> __device__ __forceinline__ X slope(int activation, X x) {
    if (activation == SILU) return sigmoid(x) * (X(1) + x * sigmoid(-x));
    if (activation == GELU) return cumulative(x) + X(0.39894228040143267794) * x * exp(X(-0.5) * x * x);
    return x > X(0) ? X(1) : X(0);
}

// h = act(g) a, or act(a) without g, of (slots, f); zeros where nobody stands. h may be where a or g is.
template <class S, int V>
__global__ void __launch_bounds__(256) activate(const S* a, const S* g, S* h, const i64* pair_of, int activation, int f) {
    const bool empty = pair_of[blockIdx.x] < 0;
    const i64 first = blockIdx.x * i64(f);
    for (int c = threadIdx.x * V; c < f; c += 256 * V) {
        Pack<S, V> out = zeros<S, V>();
        if (!empty) {
            const auto a_pack = load_pack<Pack<S, V>>(a + first + c), g_pack = g == nullptr ? a_pack : load_pack<Pack<S, V>>(g + first + c);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const auto y = activated(activation, widen(g_pack.of[i]));
                out.of[i] = narrow<S>(g == nullptr ? y : y * widen(a_pack.of[i]));
            }
        }
        store_pack(h + first + c, out);
    }
}

// Backwards, a block for each slot. Of a and g (slots, f) and dh, the cotangent of h as if the weight w of the slot's pair were 1:
// w h to dh's place, the gradients da and dg to a's and g's, and the weight's, sum of h dh, to dweights (pairs). Zeros where nobody stands.
template <class S, int V>
__global__ void __launch_bounds__(256)
activate_backwards(S* a, S* g, S* dh, const i64* pair_of, const Arithmetic<S>* weights, Arithmetic<S>* dweights, int activation, int f) {
    using X = Arithmetic<S>;
    __shared__ X sums[8];
    const i64 pair = pair_of[blockIdx.x], first = blockIdx.x * i64(f);
    const X w = pair < 0 ? X(0) : weights[pair];
    X sum = X(0);
    for (int c = threadIdx.x * V; c < f; c += 256 * V) {
        Pack<S, V> a_pack = zeros<S, V>(), g_pack = a_pack, dh_pack = a_pack;
        if (pair >= 0) {
            a_pack = load_pack<Pack<S, V>>(a + first + c), dh_pack = load_pack<Pack<S, V>>(dh + first + c);
            g_pack = g == nullptr ? a_pack : load_pack<Pack<S, V>>(g + first + c);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const X a_i = widen(a_pack.of[i]), g_i = widen(g_pack.of[i]), d = widen(dh_pack.of[i]);
                const X act = activated(activation, g_i), h = g == nullptr ? act : act * a_i, wd = w * d;
                sum += h * d;
                dh_pack.of[i] = narrow<S>(w * h);
                a_pack.of[i] = narrow<S>(wd * (g == nullptr ? slope(activation, g_i) : act));
                g_pack.of[i] = narrow<S>(wd * a_i * slope(activation, g_i));
            }
        }
        store_pack(dh + first + c, dh_pack);
        store_pack(a + first + c, a_pack);
        if (g != nullptr) store_pack(g + first + c, g_pack);
    }
#pragma unroll
    for (int away = 16; away > 0; away /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, away);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0 && pair >= 0) {
        for (int i = 1; i < 8; ++i) sum += sums[i];
        dweights[pair] = sum;
    }
}
