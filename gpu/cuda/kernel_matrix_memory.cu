// The recurrence of a matrix memory: linear attention, the delta rule, Mamba-2, mLSTM, RWKV-6 and RWKV-7 are cases of it.
//
//     p_t = S_(t-1)^T a_t                                              (LOWRANK)
//     S_t = diag(exp(w_t)) S_(t-1) + k_t v_t^T + b_t p_t^T
//     o_t = S_t^T q_t,         or, with BEFORE, S_(t-1)^T q_t
//
// S is d x e, a row for each key channel and a column for each value. Columns do not see each other, so that a block takes some of
// them through all of time, with S in registers, and reads each input once.
//
// Forward. LANES neighbouring threads share C columns and have ROWS rows of them each: a read is ROWS products in a thread and
// log2(LANES) exchanges. Inputs of `tile` steps at a time go through shared memory.
//
// Backward. With R the cotangent of S_t, last step first:
//
//     dq = S_t do,  R += q do^T;    dk = R v,  dv = R^T k,  db = R p,  dp = R^T b,  da = S_(t-1) dp,  dw = exp(w) sum_e R S_(t-1)
//     R <- exp(w) R + a dp^T        (with BEFORE: dq = S_(t-1) do, and q do^T is added last)
//
// needs the states in falling order. The forward pass keeps one of every `every` steps; a block computes those between again and
// writes them to memory of its own, `every` states that stay in the L2 cache. Here a warp has all rows of C columns, so that sums over
// columns (dq, dk, dw, da, db) are sums in a thread, then over warps through shared memory, in a fixed order; blocks that
// share a memory's columns write partial sums side by side. Sequences that share inputs (heads of a group) do all of it for themselves.
//
// What limits it. Instructions: 3 multiply-adds for each element of S and step (5 with LOWRANK), and about three times that
// backwards; not memory, and no tensor cores. A chunked form on tensor cores can take its place behind the same arguments.

using i64 = long long;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Products and sums that keep subnormal numbers, whatever the compiler is told: a memory that fades is not cut off before its end.
__device__ __forceinline__ float product(float a, float b) {
#ifdef __CUDA_ARCH__
    float c;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#else
    return a * b;
#endif
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
#else
    return a * b + c;
#endif
}
__device__ __forceinline__ double product(double a, double b) { return a * b; }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Row r of a thread: runs of 4 (or of all, if fewer), so that neighbouring threads read neighbouring runs.
template <int ROWS, int LANES>
__device__ __forceinline__ int row_of(int r, int lane) {
    constexpr int RUN = ROWS < 4 ? ROWS : 4;
    return (r / RUN) * RUN * LANES + lane * RUN + r % RUN;
}

// Steps t0 ... t0 + n of an array (T, size), from column `first`, as (n, padded) with zeros; exponentials on the way if asked for.
template <class X, bool EXP>
__device__ __forceinline__ void stage(X* to, const X* from, i64 t0, int n, int size, int stride, int first, int padded, int repeat) {
    for (int at = threadIdx.x; at < n * padded; at += blockDim.x) {
        const int t = at / padded, i = at % padded, column = first + i;
        X value = X(0);
        if (column < size) {
            value = from ? from[(t0 + t) * stride + (repeat ? 0 : column)] : X(0);
            if (EXP) value = exponential(value);
        }
        to[at] = value;
    }
}

template <class X, int ROWS, int LANES, int C, bool LOWRANK, bool BEFORE>
__global__ void __launch_bounds__(256)
matrix_memory(const X* q, const X* k, const X* v, const X* w, const X* a, const X* b, const X* state, X* o, X* last, X* kept,
              i64 T, int d, int e, int share_q, int share_k, int share_v, int per_channel, int tile, int every) {
    constexpr int D = ROWS * LANES;
    extern __shared__ double memory[];
    const int lane = threadIdx.x % LANES, columns = blockDim.x / LANES * C, mine = threadIdx.x / LANES * C;
    X* q_s = reinterpret_cast<X*>(memory);
    X *k_s = q_s + tile * D, *w_s = k_s + tile * D, *a_s = w_s + tile * D, *b_s = a_s + (LOWRANK ? tile * D : 0);
    X* v_s = b_s + (LOWRANK ? tile * D : 0);
    const i64 s = blockIdx.x;
    const int first = blockIdx.y * columns, wide = per_channel ? d : 1;
    q += s / share_q * T * d, k += s / share_k * T * d, v += s / share_v * T * e, o += s * T * e;
    if (w) w += s / share_v * T * wide;
    if (LOWRANK) a += s / share_k * T * d, b += s / share_k * T * d;

    X S[ROWS][C];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const int i = row_of<ROWS, LANES>(r, lane), j = first + mine + c;
            S[r][c] = state && i < d && j < e ? state[(s / share_v * d + i) * e + j] : X(0);
        }
    }
    for (i64 t0 = 0; t0 < T; t0 += tile) {
        const int n = int(min(i64(tile), T - t0));
        stage<X, false>(q_s, q, t0, n, d, d, 0, D, 0);
        stage<X, false>(k_s, k, t0, n, d, d, 0, D, 0);
        stage<X, true>(w_s, w, t0, n, d, wide, 0, D, !per_channel);
        if (LOWRANK) stage<X, false>(a_s, a, t0, n, d, d, 0, D, 0), stage<X, false>(b_s, b, t0, n, d, d, 0, D, 0);
        stage<X, false>(v_s, v, t0, n, e, e, first, columns, 0);
        __syncthreads();
        for (int t = 0; t < n; ++t) {
            if (kept && (t0 + t) % every == 0) {
                X* to = kept + (s * ((T + every - 1) / every) + (t0 + t) / every) * d * e;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        const int i = row_of<ROWS, LANES>(r, lane), j = first + mine + c;
                        if (i < d && j < e) to[i64(i) * e + j] = S[r][c];
                    }
                }
            }
            X read[C], recalled[C], value[C];
#pragma unroll
            for (int c = 0; c < C; ++c) read[c] = recalled[c] = X(0), value[c] = v_s[t * columns + mine + c];
            if (LOWRANK) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const X a_i = a_s[t * D + row_of<ROWS, LANES>(r, lane)];
#pragma unroll
                    for (int c = 0; c < C; ++c) recalled[c] += a_i * S[r][c];
                }
#pragma unroll
                for (int c = 0; c < C; ++c) {
#pragma unroll
                    for (int away = LANES / 2; away > 0; away /= 2) recalled[c] += __shfl_xor_sync(0xffffffffu, recalled[c], away);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int at = t * D + row_of<ROWS, LANES>(r, lane);
                const X q_i = q_s[at], k_i = k_s[at], decay = w_s[at], b_i = LOWRANK ? b_s[at] : X(0);
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    if (BEFORE) read[c] = multiply_add(q_i, S[r][c], read[c]);
                    S[r][c] = multiply_add(k_i, value[c], product(decay, S[r][c]));
                    if (LOWRANK) S[r][c] = multiply_add(b_i, recalled[c], S[r][c]);
                    if (!BEFORE) read[c] = multiply_add(q_i, S[r][c], read[c]);
                }
            }
#pragma unroll
            for (int c = 0; c < C; ++c) {
#pragma unroll
                for (int away = LANES / 2; away > 0; away /= 2) read[c] += __shfl_xor_sync(0xffffffffu, read[c], away);
                const int j = first + mine + c;
                if (lane == 0 && j < e) o[(t0 + t) * e + j] = read[c];
            }
        }
        __syncthreads();
    }
    if (last && s % share_v == 0) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int i = row_of<ROWS, LANES>(r, lane), j = first + mine + c;
                if (i < d && j < e) last[(s / share_v * d + i) * e + j] = S[r][c];
            }
        }
    }
}

// Sums over a warp of C numbers in each lane: C/2 + C/4 + ... exchanges in place of C log2(32); all lanes get all sums.
template <class X, int C>
__device__ __forceinline__ void sum_over_warp(X* x) {
    const int lane = threadIdx.x & 31;
    int away = 16;
#pragma unroll
    for (int half = C / 2; half > 0; half /= 2, away /= 2) {
        const bool upper = lane & away;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const X keep = upper ? x[i + half] : x[i], send = upper ? x[i] : x[i + half];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, send, away);
        }
    }
    for (; away > 0; away /= 2) x[0] += __shfl_xor_sync(0xffffffffu, x[0], away);
    const X sum = x[0];
#pragma unroll
    for (int i = 0; i < C; ++i) {
        int from = 0, bit = 16;
#pragma unroll
        for (int half = C / 2; half > 0; half /= 2, bit /= 2) from |= i & half ? bit : 0;
        x[i] = __shfl_sync(0xffffffffu, sum, from);
    }
}

// dq, dk, dw, da, db: (parts, sequences, T, d), of every block's columns; dv: (sequences, T, e); dstate in and out: (sequences, d, e).
template <class X, int ROWS, int C, bool LOWRANK, bool BEFORE>
__global__ void __launch_bounds__(256)
matrix_memory_vjp(const X* q, const X* k, const X* v, const X* w, const X* a, const X* b, const X* kept, const X* d_o, const X* dlast,
                  X* dq, X* dk, X* dv, X* dw, X* da, X* db, X* dstate, X* scratch, i64 sequences, i64 T, int d, int e, int share_q,
                  int share_k, int share_v, int per_channel, int every) {
    constexpr int LANES = 32, D = ROWS * LANES, SUMS = LOWRANK ? 5 : 3;
    extern __shared__ double memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, columns = warps * C, mine = warp * C;
    X* q_s = reinterpret_cast<X*>(memory);
    X *k_s = q_s + every * D, *w_s = k_s + every * D, *a_s = w_s + every * D, *b_s = a_s + (LOWRANK ? every * D : 0);
    X *v_s = b_s + (LOWRANK ? every * D : 0), *do_s = v_s + every * columns;
    X* sums = do_s + every * columns;  // (2, warps, SUMS, D)
    const int first = blockIdx.y * columns, wide = per_channel ? d : 1;
    scratch += (blockIdx.x * i64(gridDim.y) + blockIdx.y) * every * ROWS * C * blockDim.x + threadIdx.x;
    const i64 segments = (T + every - 1) / every;
    X* outputs[5] = {dq, dk, dw, da, db};
    for (i64 s = blockIdx.x; s < sequences; s += gridDim.x) {
        const X *q_g = q + s / share_q * T * d, *k_g = k + s / share_k * T * d, *v_g = v + s / share_v * T * e, *do_g = d_o + s * T * e;
        const X* w_g = w ? w + s / share_v * T * wide : nullptr;
        const X *a_g = LOWRANK ? a + s / share_k * T * d : nullptr, *b_g = LOWRANK ? b + s / share_k * T * d : nullptr;
        const i64 rows_at = (blockIdx.y * sequences + s) * T * d;
        X S[ROWS][C], R[ROWS][C];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const int i = row_of<ROWS, LANES>(r, lane), j = first + mine + c;
                R[r][c] = dlast && i < d && j < e ? dlast[(s * d + i) * e + j] : X(0);
            }
        }
        int turn = 0;
        for (i64 segment = segments - 1; segment >= 0; --segment) {
            const i64 t0 = segment * every;
            const int n = int(min(i64(every), T - t0));
            __syncthreads();
            stage<X, false>(q_s, q_g, t0, n, d, d, 0, D, 0);
            stage<X, false>(k_s, k_g, t0, n, d, d, 0, D, 0);
            stage<X, true>(w_s, w_g, t0, n, d, wide, 0, D, !per_channel);
            if (LOWRANK) stage<X, false>(a_s, a_g, t0, n, d, d, 0, D, 0), stage<X, false>(b_s, b_g, t0, n, d, d, 0, D, 0);
            stage<X, false>(v_s, v_g, t0, n, e, e, first, columns, 0);
            stage<X, false>(do_s, do_g, t0, n, e, e, first, columns, 0);
            __syncthreads();
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    const int i = row_of<ROWS, LANES>(r, lane), j = first + mine + c;
                    S[r][c] = i < d && j < e ? kept[((s * segments + segment) * d + i) * e + j] : X(0);
                }
            }
            for (int t = 0; t < n; ++t) {  // the states of this segment once more
                X recalled[C];
#pragma unroll
                for (int c = 0; c < C; ++c) recalled[c] = X(0);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        scratch[i64((t * ROWS + r) * C + c) * blockDim.x] = S[r][c];
                        if (LOWRANK) recalled[c] += a_s[t * D + row_of<ROWS, LANES>(r, lane)] * S[r][c];
                    }
                }
                if (LOWRANK) sum_over_warp<X, C>(recalled);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const int at = t * D + row_of<ROWS, LANES>(r, lane);
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        S[r][c] = w_s[at] * S[r][c] + k_s[at] * v_s[t * columns + mine + c];
                        if (LOWRANK) S[r][c] += b_s[at] * recalled[c];
                    }
                }
            }
            for (int t = n - 1; t >= 0; --t) {
                X* total = sums + (turn * warps + warp) * SUMS * D;
                X recalled[C], to_value[C], to_recalled[C], value[C], cotangent[C];
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    recalled[c] = to_value[c] = to_recalled[c] = X(0);
                    value[c] = v_s[t * columns + mine + c], cotangent[c] = do_s[t * columns + mine + c];
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const int i = row_of<ROWS, LANES>(r, lane), at = t * D + i;
                    X read = X(0);
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        if (!BEFORE) {
                            read += S[r][c] * cotangent[c];
                            R[r][c] += q_s[at] * cotangent[c];
                        }
                        S[r][c] = scratch[i64((t * ROWS + r) * C + c) * blockDim.x];
                        if (BEFORE) read += S[r][c] * cotangent[c];
                        to_value[c] += R[r][c] * k_s[at];
                        if (LOWRANK) {
                            recalled[c] += a_s[at] * S[r][c];
                            to_recalled[c] += R[r][c] * b_s[at];
                        }
                    }
                    total[i] = read;
                }
                sum_over_warp<X, C>(to_value);
                if (LOWRANK) sum_over_warp<X, C>(recalled), sum_over_warp<X, C>(to_recalled);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const int i = row_of<ROWS, LANES>(r, lane), at = t * D + i;
                    X to_k = X(0), to_w = X(0), to_a = X(0), to_b = X(0);
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        to_k += R[r][c] * value[c];
                        const X faded = w_s[at] * R[r][c];
                        to_w += faded * S[r][c];
                        if (LOWRANK) {
                            to_a += S[r][c] * to_recalled[c];
                            to_b += R[r][c] * recalled[c];
                        }
                        R[r][c] = faded;
                        if (LOWRANK) R[r][c] += a_s[at] * to_recalled[c];
                        if (BEFORE) R[r][c] += q_s[at] * cotangent[c];
                    }
                    total[D + i] = to_k;
                    total[2 * D + i] = to_w;
                    if (LOWRANK) total[3 * D + i] = to_a, total[4 * D + i] = to_b;
                }
                if (lane == 0) {
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        if (first + mine + c < e) dv[(s * T + t0 + t) * e + first + mine + c] = to_value[c];
                    }
                }
                __syncthreads();  // the other half of `sums` is being filled when this one is read
                for (int at = threadIdx.x; at < SUMS * D; at += blockDim.x) {
                    const int kind = at / D, i = at % D;
                    X sum = X(0);
                    for (int other = 0; other < warps; ++other) sum += sums[(turn * warps + other) * SUMS * D + at];
                    if (i < d) outputs[kind][rows_at + (t0 + t) * d + i] = sum;
                }
                turn ^= 1;
            }
        }
        if (dstate) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    const int i = row_of<ROWS, LANES>(r, lane), j = first + mine + c;
                    if (i < d && j < e) dstate[(s * d + i) * e + j] = R[r][c];
                }
            }
        }
    }
}
