// Softmax attention on the ordinary arithmetic units: any head size, every option, float32, float64 and halves.
//
// One block of 256 threads makes a tile of rows x columns of the output. Keys pass by in tiles; of a tile, first slices
// of the features of K (to make the scores S), then slices of the keys of V (to add P V), each slice 128 bytes wide,
// through a ring of three buffers that is filled two slices ahead. A thread holds R rows x R keys of S and R rows x E
// columns of O in registers: row ty + 16 i, key tx + 16 j, for ty = thread / 16, tx = thread % 16. So a row of S lies in
// 16 lanes of one warp: the row's maximum takes four shuffles, and P goes through shared memory within the warp alone.
//
// Rows' strides are 16 bytes more than a multiple of 128: neighbouring rows lie in other banks. Where float32 alone is asked for,
// `kernel_attention_float.cu` is faster.
#include "block_attention.cuh"

template <class A> struct alignas(16) Vector { A x[16 / sizeof(A)]; };
template <class A> __device__ inline Vector<A> load(const A* p) { return *(const Vector<A>*)p; }

template <class A> constexpr int SLICE = 128 / sizeof(A);         // columns of a slice
template <class A> constexpr int VECTOR = 16 / sizeof(A);         // elements of one read
template <class A> constexpr int STRIDE = SLICE<A> + VECTOR<A>;  // of a slice's rows

// S[i][j] += X[row i] . Y[column j] over one slice.
template <class A, int R>
__device__ inline void multiply_slice(A (&s)[R][R], const A* x, const A* y, int tx, int ty) {
    constexpr int V = VECTOR<A>;
#pragma unroll 1
    for (int w = 0; w < SLICE<A>; w += V) {
        Vector<A> a[R];
#pragma unroll
        for (int i = 0; i < R; i++) a[i] = load(x + (ty + 16 * i) * STRIDE<A> + w);
#pragma unroll
        for (int j = 0; j < R; j++) {
            Vector<A> b = load(y + (tx + 16 * j) * STRIDE<A> + w);
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int z = 0; z < V; z++) s[i][j] += a[i].x[z] * b.x[z];
        }
    }
}

// O[i][.] += P[row i][.] Y over one slice of SLICE keys; thread's columns are tx * V + 16 V h.
template <class A, int R, int E, int p_stride>
__device__ inline void add_slice(A (&o)[R][E], const A* p, const A* y, int tx, int ty) {
    constexpr int V = VECTOR<A>;
#pragma unroll 1
    for (int w = 0; w < SLICE<A>; w += V) {
        Vector<A> a[R];
#pragma unroll
        for (int i = 0; i < R; i++) a[i] = load(p + (ty + 16 * i) * p_stride + w);
#pragma unroll
        for (int z = 0; z < V; z++)
#pragma unroll
            for (int h = 0; h < E / V; h++) {
                Vector<A> b = load(y + (w + z) * 16 * E + (tx + 16 * h) * V);
#pragma unroll
                for (int i = 0; i < R; i++)
#pragma unroll
                    for (int u = 0; u < V; u++) o[i][h * V + u] += a[i].x[z] * b.x[u];
            }
    }
}

// Over the 16 threads of a row, which are half a warp.
template <class A> __device__ inline A largest_of_row(A x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        const A y = __shfl_xor_sync(0xffffffff, x, step);
        x = x > y ? x : y;
    }
    return x;
}
template <class A> __device__ inline A sum_of_row(A x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// A tile in which a mask lets no pair through is dropped before its products.
__device__ inline bool mask_shows(const Call& c, const unsigned char* mask, int i0, int rows, int j0, int keys) {
    int shows = 0;
    for (int x = threadIdx.x; x < rows * keys && !shows; x += 256) {
        int i = i0 + x / keys, j = j0 + x % keys;
        shows = i < c.n && j < c.m && mask[i * c.mask[2] + j * c.mask[3]];
    }
    return __syncthreads_or(shows);
}

// Grid: (batch, head, tile of rows, tile of columns), the last fastest, rows from the last tile to the first (with a
// causal mask the longest work first). Shared memory: P, three buffers.
template <class T, class A, int R, int E>
__global__ void __launch_bounds__(256, 1)
attention_tiled(const Call c, const T* q, const T* k, const T* v, const unsigned char* mask, const T* bias, const A* sink, A* o, A* lse) {
    constexpr int W = SLICE<A>, S = STRIDE<A>, ROWS = 16 * R, KEYS = 16 * R, COLUMNS = 16 * E, P_STRIDE = KEYS + VECTOR<A>;
    constexpr int FIRST = (KEYS + ROWS) * S, SECOND = W * COLUMNS, BUFFER = FIRST > SECOND ? FIRST : SECOND;
    extern __shared__ __align__(16) unsigned char memory[];
    const int q_slices = (c.d + W - 1) / W;
    A* const p_tile = (A*)memory;
    A* const buffers = p_tile + ROWS * P_STRIDE;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;

    const int tiles = (c.n + ROWS - 1) / ROWS, chunks = (c.e + COLUMNS - 1) / COLUMNS;
    const int chunk = blockIdx.x % chunks, tile = tiles - 1 - blockIdx.x / chunks % tiles, head = blockIdx.x / chunks / tiles;
    const int b = head / c.Hq, h = head % c.Hq, kv = h / (c.Hq / c.Hkv), row = tile * ROWS, column = chunk * COLUMNS;
    q += b * c.q[0] + h * c.q[1], k += b * c.k[0] + kv * c.k[1], v += b * c.v[0] + kv * c.v[1];
    if (mask != nullptr) mask += b * c.mask[0] + h * c.mask[1];
    if (bias != nullptr) bias += b * c.bias[0] + h * c.bias[1];

    const int last_row = min(row + ROWS, c.n) - 1;
    const int from = max(0, row + c.below) / KEYS, until = (min(c.m, last_row + c.above + 1) + KEYS - 1) / KEYS;  // tiles of keys

    A acc[R][E], top[R], total[R];  // total: this lane's part
    const A logit = sink == nullptr ? (A)NOTHING_SEEN : sink[h];
#pragma unroll
    for (int i = 0; i < R; i++) {
        top[i] = logit;  // the sink is the first key: weight 1 and no value
        total[i] = tx == 0 && logit > (A)NOTHING_SEEN ? 1 : 0;
#pragma unroll
        for (int x = 0; x < E; x++) acc[i][x] = 0;
    }

    const int steps = q_slices + KEYS / W;
    auto run = [&](int first, int end) {  // tiles [first, end) of the keys
        const int all = (end - first) * steps;
        auto fetch = [&](int at) {
            if (at < all) {
                A* to = buffers + at % 3 * BUFFER;
                const int key = (first + at / steps) * KEYS, x = at % steps;
                if (x < q_slices) {
                    stage<KEYS, W>(to, S, k, c.k[2], key, c.m, x * W, c.d, c.vectors);
                    stage<ROWS, W>(to + KEYS * S, S, q, c.q[2], row, c.n, x * W, c.d, c.vectors);
                } else
                    stage<W, COLUMNS>(to, COLUMNS, v, c.v[2], key + (x - q_slices) * W, c.m, column, c.e, c.vectors);
            }
            copies_end();
        };
        int at = 0;
        auto next = [&]() -> const A* {  // the slice that is due; the buffer of the one before it is free for the one after the next
            copies_wait<1>();
            __syncthreads();
            fetch(at + 2);
            return buffers + at++ % 3 * BUFFER;
        };
        fetch(0);
        fetch(1);
        for (int key = first * KEYS; key < end * KEYS; key += KEYS) {
            A s[R][R];
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int j = 0; j < R; j++) s[i][j] = 0;
            for (int x = 0; x < q_slices; x++) {
                const A* slice = next();
                multiply_slice(s, slice + KEYS * S, slice, tx, ty);
            }
            const bool edge = row + ROWS > c.n || !inside(c, row, ROWS, key, KEYS);  // rows beyond the last have no bias to read
            A larger[R];
            const A scale = (A)c.scale;
            if (c.softcap > 0) {
                const A cap = (A)c.softcap, factor = scale / cap;
#pragma unroll
                for (int i = 0; i < R; i++)
#pragma unroll
                    for (int j = 0; j < R; j++) s[i][j] = cap * tanh_(s[i][j] * factor);
            } else {
#pragma unroll
                for (int i = 0; i < R; i++)
#pragma unroll
                    for (int j = 0; j < R; j++) s[i][j] *= scale;
            }
#pragma unroll
            for (int i = 0; i < R; i++) {
                larger[i] = top[i];
#pragma unroll
                for (int j = 0; j < R; j++) {
                    s[i][j] = biased<T, A, true>(c, s[i][j], edge, row + ty + 16 * i, key + tx + 16 * j, mask, bias);
                    larger[i] = s[i][j] > larger[i] ? s[i][j] : larger[i];
                }
            }
#pragma unroll
            for (int i = 0; i < R; i++) {
                larger[i] = largest_of_row(larger[i]);
                const A shift = larger[i] == (A)NOTHING_SEEN ? (A)0 : larger[i], keep = exp_(top[i] - shift);
                top[i] = larger[i];
                total[i] *= keep;
#pragma unroll
                for (int j = 0; j < R; j++) {
                    A w = exp_(s[i][j] - shift);
                    total[i] += w;
                    p_tile[(ty + 16 * i) * P_STRIDE + tx + 16 * j] = w;
                }
#pragma unroll
                for (int x = 0; x < E; x++) acc[i][x] *= keep;
            }
            __syncwarp();
            for (int x = 0; x < KEYS / W; x++) add_slice<A, R, E, P_STRIDE>(acc, p_tile + x * W, next(), tx, ty);
            __syncwarp();
        }
        copies_wait<0>();
        __syncthreads();
    };
    if (mask != nullptr) {
        for (int t = from; t < until; t++)
            if (mask_shows(c, mask, row, ROWS, t * KEYS, KEYS)) run(t, t + 1);
    } else if (from < until)
        run(from, until);
    copies_wait<0>();

#pragma unroll
    for (int i = 0; i < R; i++) {
        const int r = row + ty + 16 * i;
        const A sum = sum_of_row(total[i]);
        if (r >= c.n) continue;
        const long long at = ((long long)b * c.Hq + h) * c.n + r;
        if (chunk == 0 && tx == 0) lse[at] = (top[i] == (A)NOTHING_SEEN ? (A)0 : top[i]) + log_(sum);
        const A factor = sum == 0 ? (A)1 : 1 / sum;
#pragma unroll
        for (int x = 0; x < E; x++) {
            const int col = column + (tx + 16 * (x / VECTOR<A>)) * VECTOR<A> + x % VECTOR<A>;
            if (col < c.e) o[at * c.e + col] = acc[i][x] * factor;
        }
    }
}

// The gradient, one of three results a launch, each block a tile of it and nobody else: no sums between blocks, the same
// bits every time.
//   QUERIES  dq = scale ds k        rows are queries, columns keys
//   KEYS     dk = scale ds^T q      rows are keys, columns queries, of all heads that read these keys
//   VALUES   dv = p^T do            likewise
// Weights are made again as e^{s - lse}; ds = p (do.v + across), across = dlse - do.o, of each query. Where the bias has
// a gradient it is ds: QUERIES writes it to dbias, one number a pair.
enum Gradient { QUERIES, KEYS, VALUES };

template <class T, class A, Gradient OF, int E>
__global__ void __launch_bounds__(256, 1)
attention_gradient(const Call c, const T* q, const T* k, const T* v, const T* dy, const unsigned char* mask, const T* bias, const A* lse,
                   const A* across, A* out, A* dbias) {
    constexpr int R = 4, W = SLICE<A>, S = STRIDE<A>, TILE = 64, P_STRIDE = TILE + VECTOR<A>, COLUMNS = 16 * E;
    constexpr int FIRST = 2 * TILE * S, SECOND = W * COLUMNS, BUFFER = FIRST > SECOND ? FIRST : SECOND;
    constexpr bool BY_KEY = OF != QUERIES;
    extern __shared__ __align__(16) unsigned char memory[];
    A* const w_tile = (A*)memory;
    A* const buffers = w_tile + TILE * P_STRIDE;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;

    const int rows = BY_KEY ? c.m : c.n, columns = BY_KEY ? c.n : c.m, heads = BY_KEY ? c.Hkv : c.Hq, width = OF == VALUES ? c.e : c.d;
    const int tiles = (rows + TILE - 1) / TILE, chunks = (width + COLUMNS - 1) / COLUMNS, group = c.Hq / c.Hkv;
    const int chunk = blockIdx.x % chunks, tile = blockIdx.x / chunks % tiles, b = blockIdx.x / chunks / tiles / heads;
    const int head = blockIdx.x / chunks / tiles % heads, row = tile * TILE, last_row = min(row + TILE, rows) - 1;
    const int kv = BY_KEY ? head : head / group;
    k += b * c.k[0] + kv * c.k[1], v += b * c.v[0] + kv * c.v[1];

    A acc[R][E];
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int x = 0; x < E; x++) acc[i][x] = 0;
    const int from = max(0, BY_KEY ? row - c.above : row + c.below) / TILE;
    const int until = (min(columns, (BY_KEY ? last_row - c.below : last_row + c.above) + 1) + TILE - 1) / TILE;
    const int d_slices = (c.d + W - 1) / W, e_slices = OF == VALUES ? 0 : (c.e + W - 1) / W;

    for (int h = BY_KEY ? head * group : head; h < (BY_KEY ? (head + 1) * group : head + 1); h++) {
        const T *qh = q + b * c.q[0] + h * c.q[1], *dyh = dy + b * c.dy[0] + h * c.dy[1];
        const unsigned char* mask_h = mask == nullptr ? mask : mask + b * c.mask[0] + h * c.mask[1];
        const T* bias_h = bias == nullptr ? bias : bias + b * c.bias[0] + h * c.bias[1];
        const A *lse_h = lse + ((long long)b * c.Hq + h) * c.n, *across_h = across + ((long long)b * c.Hq + h) * c.n;
        A* dbias_h = dbias == nullptr ? dbias : dbias + ((long long)b * c.Hq + h) * c.n * c.m;
        const T *x1 = BY_KEY ? k : qh, *y1 = BY_KEY ? qh : k, *x2 = BY_KEY ? v : dyh, *y2 = BY_KEY ? dyh : v;
        const T* third = OF == VALUES ? dyh : y1;
        const long long x1s = BY_KEY ? c.k[2] : c.q[2], y1s = BY_KEY ? c.q[2] : c.k[2], x2s = BY_KEY ? c.v[2] : c.dy[2],
                        y2s = BY_KEY ? c.dy[2] : c.v[2], thirds = OF == VALUES ? c.dy[2] : y1s;
        for (int t = from; t < until; t++) {
            const int column = t * TILE;
            const int i0 = BY_KEY ? column : row, j0 = BY_KEY ? row : column;
            if (mask_h != nullptr && !mask_shows(c, mask_h, i0, TILE, j0, TILE)) continue;
            auto fetch = [&](int at) {
                A* to = buffers + at % 3 * BUFFER;
                int x = at;
                if (x < d_slices) {
                    stage<TILE, W>(to, S, x1, x1s, row, rows, x * W, c.d, c.vectors);
                    stage<TILE, W>(to + TILE * S, S, y1, y1s, column, columns, x * W, c.d, c.vectors);
                } else if ((x -= d_slices) < e_slices) {
                    stage<TILE, W>(to, S, x2, x2s, row, rows, x * W, c.e, c.vectors);
                    stage<TILE, W>(to + TILE * S, S, y2, y2s, column, columns, x * W, c.e, c.vectors);
                } else if ((x -= e_slices) < TILE / W)
                    stage<W, COLUMNS>(to, COLUMNS, third, thirds, column + x * W, columns, chunk * COLUMNS, width, c.vectors);
                copies_end();
            };
            int at = 0;
            auto next = [&]() -> const A* {
                copies_wait<1>();
                __syncthreads();
                fetch(at + 2);
                return buffers + at++ % 3 * BUFFER;
            };
            fetch(0);
            fetch(1);
            A s[R][R], dp[R][R];
#pragma unroll
            for (int i = 0; i < R; i++)
#pragma unroll
                for (int j = 0; j < R; j++) s[i][j] = dp[i][j] = 0;
            for (int x = 0; x < d_slices; x++) {
                const A* slice = next();
                multiply_slice(s, slice, slice + TILE * S, tx, ty);
            }
            for (int x = 0; x < e_slices; x++) {
                const A* slice = next();
                multiply_slice(dp, slice, slice + TILE * S, tx, ty);
            }
#pragma unroll
            for (int a = 0; a < R; a++)
#pragma unroll
                for (int z = 0; z < R; z++) {
                    const int r = row + ty + 16 * a, col = column + tx + 16 * z, i = BY_KEY ? col : r, j = BY_KEY ? r : col;
                    const bool there = i < c.n && j < c.m;
                    const A raw = s[a][z], x = there ? score<T, A, true>(c, raw, true, i, j, mask_h, bias_h) : (A)NOTHING_SEEN;
                    A w = 0;
                    if (x != (A)NOTHING_SEEN) {
                        w = exp_(x - lse_h[i]);
                        if (OF != VALUES) {
                            w *= dp[a][z] + across_h[i];
                            if (OF == QUERIES && dbias_h != nullptr && chunk == 0) dbias_h[(long long)i * c.m + j] = w;
                            if (c.softcap > 0) w *= tanh_slope(raw * (A)c.scale / (A)c.softcap);
                        }
                    }
                    w_tile[(ty + 16 * a) * P_STRIDE + tx + 16 * z] = w;
                }
            for (int x = 0; x < TILE / W; x++) add_slice<A, R, E, P_STRIDE>(acc, w_tile + x * W, next(), tx, ty);
            copies_wait<0>();
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int r = row + ty + 16 * i;
        if (r >= rows) continue;
        A* to = out + (((long long)b * heads + head) * rows + r) * width;
#pragma unroll
        for (int x = 0; x < E; x++) {
            const int col = chunk * COLUMNS + (tx + 16 * (x / VECTOR<A>)) * VECTOR<A> + x % VECTOR<A>;
            if (col < width) to[col] = OF == VALUES ? acc[i][x] : acc[i][x] * (A)c.scale;
        }
    }
}
