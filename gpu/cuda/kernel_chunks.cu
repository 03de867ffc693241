// What lies between the products of a matrix memory in chunks (chunkwise.py): decays applied, states carried from chunk to chunk.
//
// The equations are in chunkwise.py, what each kernel computes is in chunk_steps.py under the same name, in NumPy. Arrays are
// (G, H, chunks, L, features), contiguous, with 1 in place of H where heads share one: `share` turns the number of a block's
// head into that of an array's entry.
//
// The idea. cuBLAS does the products; what is left is one pass over memory each, and nothing here waits for another thread
// but where it says so. Decays between two steps of a chunk are sums, formed by walking from one to the other: a thread that
// has a column s walks down the rows t = s, s + 1, ... and adds. Nothing is a difference of running sums.
//
// What limits it: bytes. The weights M are chunks * L * L numbers that are written once and read once; the states d * e for each chunk.
#include "numbers.cuh"
#include "stable.cuh"

// float32 of which tensor cores read 11 digits: rounded to them, since they would cut it off.
struct Tf32 {
    float value;
};
template <> struct ArithmeticOf<Tf32> { using type = float; };
template <> __device__ __forceinline__ float widen<Tf32>(Tf32 x) { return x.value; }
template <> __device__ __forceinline__ Tf32 narrow<Tf32>(float x) {
    const unsigned bits = __float_as_uint(x);
    return {(bits & 0x7f800000u) == 0x7f800000u ? x : __uint_as_float((bits + 0x1000u) & 0xffffe000u)};
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// x e^a, where it is representable though e^a is not; 0 for x = 0.
__device__ __forceinline__ float times_exp(float x, float a) {
    const float half = expf(fminf(a, 177.44f) / 2);
    return x * half * half;
}
__device__ __forceinline__ double times_exp(double x, double a) {
    const double half = exp(fmin(a, 1419.56) / 2);
    return x * half * half;
}

// Entry of an array with `shared` heads a group, 1 or all, for the block's (g, h).
__device__ __forceinline__ i64 entry(i64 gh, int heads, int of_array) { return of_array == heads ? gh : gh / heads; }

// x f or x e^f: f is a number of each element, of each row, of each column, or one: what its two strides say.
template <class In, class Out, bool EXP, int V>
__global__ void __launch_bounds__(256)
chunk_scale(const In* x, const Arithmetic<In>* f, Out* y, i64 rows, int columns, i64 f_rows, int f_row, int f_column, int heads, int x_heads,
            int f_heads) {
    using X = Arithmetic<In>;
    x += entry(blockIdx.x, heads, x_heads) * rows * columns, f += entry(blockIdx.x, heads, f_heads) * f_rows, y += blockIdx.x * rows * columns;
    const int packs = columns / V;
    for (i64 at = blockIdx.y * i64(blockDim.x) + threadIdx.x; at < rows * packs; at += i64(gridDim.y) * blockDim.x) {
        const i64 row = at / packs;
        const int column = int(at - row * packs) * V;
        const auto in = load_pack<Pack<In, V>>(x + row * columns + column);
        Pack<Out, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const X factor = f[row * f_row + (column + i) * f_column];
            out.of[i] = narrow<Out>(EXP ? times_exp(widen<In>(in.of[i]), factor) : widen<In>(in.of[i]) * factor);
        }
        store_pack(y + row * columns + column, out);
    }
}

// (scale (within + factor before) + D x) silu(z); factor is a number of each row, or its logarithm, D of each head.
template <class S, class Out, int V>
__global__ void __launch_bounds__(256)
chunk_finish(const Arithmetic<S>* within, const Arithmetic<S>* before, const Arithmetic<S>* factor, const S* x, const Arithmetic<S>* D,
             const S* z, Out* y, Arithmetic<S> scale, i64 rows, int columns, int is_logarithm, int heads, int factor_heads) {
    using X = Arithmetic<S>;
    const i64 first = blockIdx.x * rows * columns;
    if (factor) factor += entry(blockIdx.x, heads, factor_heads) * rows;
    const int packs = columns / V;
    for (i64 at = blockIdx.y * i64(blockDim.x) + threadIdx.x; at < rows * packs; at += i64(gridDim.y) * blockDim.x) {
        const i64 row = at / packs, from = first + at * V;
        const auto b = load_pack<Pack<X, V>>(before + from);
        const X by = factor ? factor[row] : X(1);
        X sum[V];
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = is_logarithm ? times_exp(b.of[i], by) : by * b.of[i];
        if (within) {
            const auto a = load_pack<Pack<X, V>>(within + from);
#pragma unroll
            for (int i = 0; i < V; ++i) sum[i] += a.of[i];
        }
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] *= scale;
        if (D) {
            const auto skipped = load_pack<Pack<S, V>>(x + from);
#pragma unroll
            for (int i = 0; i < V; ++i) sum[i] += D[blockIdx.x] * widen<S>(skipped.of[i]);
        }
        if (z) {
            const auto gate = load_pack<Pack<S, V>>(z + from);
#pragma unroll
            for (int i = 0; i < V; ++i) sum[i] *= widen<S>(gate.of[i]) / (X(1) + exponential(-widen<S>(gate.of[i])));
        }
        Pack<Out, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) out.of[i] = narrow<Out>(sum[i]);
        store_pack(y + from, out);
    }
}

// Sums of x y along the rows: a warp for each.
template <class A, class B>
__global__ void __launch_bounds__(256)
chunk_dots(const A* x, const B* y, Arithmetic<A>* sums, i64 rows, int columns, int heads, int x_heads, int y_heads) {
    using X = Arithmetic<A>;
    x += entry(blockIdx.x, heads, x_heads) * rows * columns, y += entry(blockIdx.x, heads, y_heads) * rows * columns;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (i64 row = blockIdx.y * i64(warps) + threadIdx.x / 32; row < rows; row += i64(gridDim.y) * warps) {
        X sum = X(0);
        for (int i = lane; i < columns; i += 32) sum += widen<A>(x[row * columns + i]) * widen<B>(y[row * columns + i]);
        for (int away = 16; away > 0; away /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, away);
        if (lane == 0) sums[blockIdx.x * rows + row] = sum;
    }
}

// States: x_c = e^peak x, x <- e^rest x_c + added_c; with BACK x_c = x, x <- e^peak (e^rest x + added_c), last chunk first.
// A thread has an element of the state, (d, e), through all chunks; peak and rest are of each row or, with `of_rows` = 1, one.
template <class X, class S, bool BACK>
__global__ void __launch_bounds__(256)
chunk_carry(const X* added, const X* peak, const X* rest, const X* state, S* passed, X* last, i64 chunks, int d, int e, int of_rows) {
    const i64 size = i64(d) * e, at = blockIdx.y * i64(blockDim.x) + threadIdx.x;
    if (at >= size) return;
    const int row = of_rows == 1 ? 0 : int(at / e);
    const i64 first = blockIdx.x * chunks;
    X x = state[blockIdx.x * size + at];
#pragma unroll 4
    for (i64 step = 0; step < chunks; ++step) {
        const i64 c = first + (BACK ? chunks - 1 - step : step);
        const X grows = peak[c * of_rows + row], fades = rest[c * of_rows + row], more = added[c * size + at];
        if (!BACK) x = times_exp(x, grows);
        passed[c * size + at] = narrow<S>(x);
        x = times_exp(x, fades) + more;
        if (BACK) x = times_exp(x, grows);
    }
    last[blockIdx.x * size + at] = x;
}

// F relative to its largest value, the logarithms of that and of what is left of F at the end, and the logarithm of K_s. A thread
// has a decay through one chunk of `entries` in all. What is not finite is no largest value.
template <class X>
__global__ void __launch_bounds__(128)
chunk_spans(const X* w, X* since, X* peak, X* rest, X* kept, i64 entries, int L, int features) {
    const i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x;
    if (at >= entries * features) return;
    const i64 first = at / features * L * features + at % features;
    w += first, since += first, kept += first;
    X sum = X(0), largest = X(0);
    for (int t = 0; t < L; ++t) {
        sum += w[i64(t) * features];
        if (sum > largest && sum < infinity<X>()) largest = sum;
    }
    peak[at] = largest, rest[at] = sum - largest;
    sum = X(0);
    for (int t = 0; t < L; ++t) {
        sum += w[i64(t) * features];
        since[i64(t) * features] = exponential(sum - largest);
    }
    sum = X(0);
    for (int t = L - 1; t >= 0; --t) {
        kept[i64(t) * features] = sum;
        sum += w[i64(t) * features];
    }
}

// The adjoint: to dw_r, in place, what the states that enter give for every t >= r, what chunks leave behind for every s < r, and
// what passes through for all.
template <class X>
__global__ void __launch_bounds__(128)
chunk_spans_vjp(X* dw, const X* of_since, const X* of_kept, const X* held, i64 entries, int L, int features) {
    const i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x;
    if (at >= entries * features) return;
    const i64 first = at / features * L * features + at % features;
    dw += first, of_since += first, of_kept += first;
    X sum = held[at];
    for (int r = 0; r < L; ++r) {
        dw[i64(r) * features] += sum;
        sum += of_kept[i64(r) * features];
    }
    sum = X(0);
    for (int r = L - 1; r >= 0; --r) {
        sum += of_since[i64(r) * features];
        dw[i64(r) * features] += sum;
    }
}

// M = product ∘ E on and below the diagonal, with an exponent more for each column where there is a gain. A block has `rows` rows of a chunk, a thread some of its columns.
template <class X, class S>
__global__ void __launch_bounds__(128)
chunk_weigh(const X* product, const X* w, const X* gain, S* weights, i64 chunks, int L, int rows, int strict, int heads, int product_heads, int w_heads) {
    const i64 gh = blockIdx.x / chunks, c = blockIdx.x % chunks;
    product += (entry(gh, heads, product_heads) * chunks + c) * L * L, w += (entry(gh, heads, w_heads) * chunks + c) * L;
    if (gain) gain += (entry(gh, heads, w_heads) * chunks + c) * L;
    weights += blockIdx.x * i64(L) * L;
    const int first = blockIdx.y * rows, end = min(first + rows, L);
    for (int s = threadIdx.x; s < L; s += blockDim.x) {
        X exponent = gain ? gain[s] : X(0);
        for (int t = 1; t < first; ++t) exponent += t > s ? w[t] : X(0);
        for (int t = first; t < end; ++t) {
            exponent += t > s ? w[t] : X(0);
            weights[t * L + s] = t >= s + strict ? narrow<S>(times_exp(product[t * L + s], exponent)) : narrow<S>(X(0));
        }
    }
}

// From the cotangents of M those of the product, weights ∘ E, and of the decays: of w_r the sum of weights ∘ M over s < r <= t. A
// block has a chunk, 32 rows at a time: a thread of each column walks down them, then one of each row sums along it, and then
// one of each column down again. The barriers are between these three.
template <class X, class S>
__global__ void __launch_bounds__(128)
chunk_weigh_vjp(const X* product, const X* weights, const X* w, const X* gain, S* d_product, X* dw, i64 chunks, int L, int strict, int heads,
                int product_heads, int w_heads) {
    extern __shared__ double memory[];
    X *upto = reinterpret_cast<X*>(memory), *exponents = upto + 32 * (L + 1);  // (32, L + 1), (L): before column r, the walk's sums
    const i64 gh = blockIdx.x / chunks, c = blockIdx.x % chunks;
    product += (entry(gh, heads, product_heads) * chunks + c) * L * L, w += (entry(gh, heads, w_heads) * chunks + c) * L;
    if (gain) gain += (entry(gh, heads, w_heads) * chunks + c) * L;
    weights += blockIdx.x * i64(L) * L, d_product += blockIdx.x * i64(L) * L, dw += blockIdx.x * i64(L);
    for (int s = threadIdx.x; s < L; s += blockDim.x) exponents[s] = gain ? gain[s] : X(0), dw[s] = X(0);
    for (int first = 0; first < L; first += 32) {
        const int rows = min(32, L - first);
        for (int s = threadIdx.x; s < L; s += blockDim.x) {
            X exponent = exponents[s];
            for (int i = 0; i < rows; ++i) {
                const int t = first + i;
                exponent += t > s ? w[t] : X(0);
                const X faded = t >= s + strict ? times_exp(weights[t * L + s], exponent) : X(0);
                d_product[t * L + s] = narrow<S>(faded);
                upto[i * (L + 1) + s] = t > s ? faded * product[t * L + s] : X(0);
            }
            exponents[s] = exponent;
        }
        __syncthreads();
        if (threadIdx.x < rows) {
            X sum = X(0);
            for (int s = 0; s < L; ++s) {
                const X here = upto[threadIdx.x * (L + 1) + s];
                upto[threadIdx.x * (L + 1) + s] = sum;
                sum += here;
            }
        }
        __syncthreads();
        for (int r = threadIdx.x; r < L; r += blockDim.x) {
            X sum = dw[r];
            for (int i = 0; i < rows; ++i) sum += first + i >= r ? upto[i * (L + 1) + r] : X(0);
            dw[r] = sum;
        }
        __syncthreads();
    }
}

// M with a decay of each channel: M_ts = sum over channels of q_t k_s e^(w_(s+1) + ... + w_t). A block has a chunk, a thread the
// columns s; of CHANNELS channels at a time it keeps what is left of k_s, which every step multiplies by its decays.
template <class S, int CHANNELS>
__global__ void __launch_bounds__(128)
chunk_pairs(const S* q, const S* k, const Arithmetic<S>* w, S* weights, i64 chunks, int L, int d, int strict, int heads, int q_heads,
            int k_heads, int w_heads) {
    using X = Arithmetic<S>;
    extern __shared__ double memory[];
    X *M = reinterpret_cast<X*>(memory), *q_s = M + L * L, *decay_s = q_s + L * CHANNELS;  // (L, L), (L, CHANNELS) twice
    const i64 gh = blockIdx.x / chunks, c = blockIdx.x % chunks;
    q += (entry(gh, heads, q_heads) * chunks + c) * L * d, k += (entry(gh, heads, k_heads) * chunks + c) * L * d;
    w += (entry(gh, heads, w_heads) * chunks + c) * L * d, weights += blockIdx.x * i64(L) * L;
    for (int at = threadIdx.x; at < L * L; at += blockDim.x) M[at] = X(0);
    for (int first = 0; first < d; first += CHANNELS) {
        __syncthreads();
        for (int at = threadIdx.x; at < L * CHANNELS; at += blockDim.x) {
            const int t = at / CHANNELS, i = first + at % CHANNELS;
            q_s[at] = i < d ? widen<S>(q[t * d + i]) : X(0);
            decay_s[at] = i < d ? exponential(w[t * d + i]) : X(0);
        }
        __syncthreads();
        for (int s = threadIdx.x; s < L; s += blockDim.x) {
            X left[CHANNELS];
#pragma unroll
            for (int i = 0; i < CHANNELS; ++i) left[i] = first + i < d ? widen<S>(k[s * d + first + i]) : X(0);
            for (int t = s; t < L; ++t) {
                X sum = X(0);
#pragma unroll
                for (int i = 0; i < CHANNELS; ++i) {
                    if (t > s) left[i] *= decay_s[t * CHANNELS + i];
                    sum += q_s[t * CHANNELS + i] * left[i];
                }
                M[t * L + s] += sum;
            }
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < L * L; at += blockDim.x) weights[at] = narrow<S>(at / L >= at % L + strict ? M[at] : X(0));
}

// The adjoint: a thread has a channel, and goes through the rows t. With c_r the sum over s < r of weights_ts k_s faded to step
// r - 1, dq_t = c_(t+1), and of w_r it is q_t c_r faded from r to t; dk_s takes weights_ts q_t faded from s + 1 to t.
template <class S>
__global__ void __launch_bounds__(32)
chunk_pairs_vjp(const S* q, const S* k, const Arithmetic<S>* w, const Arithmetic<S>* weights, Arithmetic<S>* dq, Arithmetic<S>* dk,
                Arithmetic<S>* dw, i64 chunks, int L, int d, int strict, int heads, int q_heads, int k_heads, int w_heads) {
    using X = Arithmetic<S>;
    extern __shared__ double memory[];
    const int i = blockIdx.y * 32 + threadIdx.x;
    X* decay = reinterpret_cast<X*>(memory) + threadIdx.x;  // five of (L, 32), of which a thread has a column: no other touches it
    X *key = decay + 32 * L, *before = key + 32 * L, *to_k = before + 32 * L, *to_w = to_k + 32 * L;
    const i64 gh = blockIdx.x / chunks, c = blockIdx.x % chunks;
    if (i >= d) return;
    q += (entry(gh, heads, q_heads) * chunks + c) * L * d + i, k += (entry(gh, heads, k_heads) * chunks + c) * L * d + i;
    w += (entry(gh, heads, w_heads) * chunks + c) * L * d + i, weights += blockIdx.x * i64(L) * L;
    dq += blockIdx.x * i64(L) * d + i, dk += blockIdx.x * i64(L) * d + i, dw += blockIdx.x * i64(L) * d + i;
    for (int t = 0; t < L; ++t) decay[32 * t] = exponential(w[t * d]), key[32 * t] = widen<S>(k[t * d]), to_k[32 * t] = to_w[32 * t] = X(0);
    for (int t = 0; t < L; ++t) {
        const X q_t = widen<S>(q[t * d]);
        X sum = X(0);
        for (int r = 0; r <= t; ++r) {
            before[32 * r] = sum;
            sum = decay[32 * r] * sum + (r < t || !strict ? weights[t * L + r] * key[32 * r] : X(0));
        }
        dq[t * d] = sum;
        X faded = q_t;
        for (int r = t; r >= 0; --r) {
            if (r < t || !strict) to_k[32 * r] += weights[t * L + r] * faded;
            faded *= decay[32 * r];
            if (before[32 * r] != X(0)) to_w[32 * r] += before[32 * r] * faded;  // of nothing nothing, however it grows
        }
    }
    for (int t = 0; t < L; ++t) dk[t * d] = to_k[32 * t], dw[t * d] = to_w[32 * t];
}

// (I + diag(beta) A)^-1, A below the diagonal: forward substitution, a thread for some of the columns.
template <class X>
__global__ void __launch_bounds__(128)
chunk_inverse(const X* A, const X* beta, X* inverse, int L) {
    extern __shared__ double memory[];
    X* solved = reinterpret_cast<X*>(memory);  // (L, L), of which a thread has its columns: no other touches them
    A += blockIdx.x * i64(L) * L, beta += blockIdx.x * i64(L), inverse += blockIdx.x * i64(L) * L;
    for (int column = threadIdx.x; column < L; column += blockDim.x) {
        for (int t = 0; t < L; ++t) {
            X sum = X(0);
            for (int s = column; s < t; ++s) sum += A[t * L + s] * solved[s * L + column];
            solved[t * L + column] = t < column ? X(0) : t == column ? X(1) : -beta[t] * sum;
            inverse[t * L + column] = solved[t * L + column];
        }
    }
}
