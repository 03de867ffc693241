// The gradient of a matrix memory with one decay per head (kernel_memory.cu), on tensor cores.
//
// The idea. With S the state that enters a chunk of 64 steps and R the cotangent of the one that leaves it, the gradient of the chunk needs
// no other chunk. So one kernel walks and keeps nothing but states (kernel_memory_states.cu): forwards S, backwards R, in bfloat16,
//     S <- e^{A_end} S + sum of e^{A_end - A_s + g_s} k_s v_s^T,      R <- e^{A_end} R + c sum of e^{A_t + f_t} q_t dy_t^T
// (A: sums of w from the chunk's start; e^g factors of keys, e^f of queries, c of what is read), and another, `memory_gradient`, takes all
// chunks at once. With M the faded pairs of queries and keys, P the faded pairs of dy and v (+ p of each query, where a normaliser reads n):
//     dq_t = P K + e^{A_t + f_t} c (S dy_t),    dk_s = P^T Q + e^{A_end - A_s + g_s} R v_s,    dv_s = M^T dY + e^{A_end - A_s + g_s} R^T k_s
//     dw_r = sum over s < r <= t of z_ts + sum over t >= r of q_t . (S dy_t) + sum over s < r of k_s . (R v_s) + <S, R>,   each faded
// z the product of M and P without one of its fadings: what a pair is worth. w_r stands in every exponent that spans step r; no term is
// subtracted again.
//
// A block takes a chunk and walks over tiles of 64 values, and over heads that share queries and keys: their P and what S and R give are
// summed in registers, so that dq and dk are written once. Eight warps have queries, 16 rows of each two: half the columns of dq each, and
// every second block of 16 keys of M and P. Eight have keys: half the columns of dk and of dv. M goes from the former to the latter
// through shared memory, made while the head before is at work. The latter, who have registers to spare, also copy: the next tiles while one is at
// work, and what was found. kernel_memory_decays.cu says first what the decays of a chunk make of its steps, and puts the parts of dw together last.
// What limits it: with 4 warps a scheduler latency, of loads from shared memory first, and then memory.
#include "block_memory_gradient.cuh"

// q, k, v as above; dy (G, heads, T, e); what `memory_told` told; S, R (G heads, chunks, d, e), of n too, ns and rs (G heads, chunks, d);
// skip (G, heads). dq and dk (G, heads or 1, T, d), dv (G, heads, T, e); found (G heads, chunks).
// Grid: G chunks if heads are TOGETHER, which share q and k, else G heads chunks.
constexpr int ALONE = 0, TOGETHER = 1, WITH_NORM = 2;
template <int D, int KIND>
__global__ void __launch_bounds__(CROWD, 1)
memory_gradient(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* dy, const Told* all_told,
                const __nv_bfloat16* states, const __nv_bfloat16* adjoints, const float* ns, const float* rs, const float* skip, __nv_bfloat16* dq,
                __nv_bfloat16* dk, __nv_bfloat16* dv, Found* all_found, i64 T, int d, int e, int heads, int q_heads, int k_heads, int v_heads,
                float scale) {
    constexpr bool SHARED = KIND == TOGETHER, NORMALISED = KIND == WITH_NORM;
    constexpr int ROWS = L * D * 2, VALUES = L * E * 2, STATE = D * E * 2, STAGE = 2 * VALUES + 2 * STATE, PAIRS = L * L * 2;
    extern __shared__ __align__(128) double memory[];
    __shared__ Told told[3];
    __shared__ Found found[2];
    char* const Q = reinterpret_cast<char*>(memory);
    char* const K = Q + ROWS;
    const Place at_Q = place(Q), at_K = at_Q + ROWS, at_stages = at_K + ROWS, at_M = at_stages + 2 * STAGE;
    char* const stages = K + ROWS;
    char* const M_s = stages + 2 * STAGE;  // of two heads, each
    char* const dv_s = M_s + 2 * PAIRS;
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int chunks = int((T + L - 1) / L), c = blockIdx.x % chunks;
    const int tiles = (e + E - 1) / E, each = SHARED ? heads : 1, items = each * tiles;
    const i64 unit = blockIdx.x / chunks, G = SHARED ? unit : unit / heads, t0 = i64(c) * L;
    const int first_head = SHARED ? 0 : int(unit % heads);
    const auto of_head = [&](int number) { return G * heads + first_head + number; };

    stage<D, CROWD>(Q, q + ((G * q_heads + (q_heads > 1 ? first_head : 0)) * T + t0) * d, T - t0, d, 0);
    stage<D, CROWD>(K, k + ((G * k_heads + (k_heads > 1 ? first_head : 0)) * T + t0) * d, T - t0, d, 0);
    for (int i = threadIdx.x; i < 8 * L; i += CROWD) found[i / (4 * L)].column[i / L % 4][i % L] = 0.0f;  // past a group's triangle
    // Late queries have more keys than early ones, and every fourth warp has the same scheduler: it gets some of both.
    const int half = warp / 4 % 2, group = (warp ^ half * 3) % 4, row = 16 * group + g, first = half * (D / 2);
    char* const P_s = stages + items % 2 * STAGE;  // once all items have been read
    const Place at_P = at_stages + items % 2 * STAGE;
    // The place of a half's columns of q and k.
    const auto of_half = [half](Place x) { return D == 128 ? x + half * PANEL : x ^ half * 64; };
    float sum[D / 16][4] = {};  // half the columns of dq or dk

    if (warp < 8) {
        copies_end();
        copies_wait<0>();
        meet_all();
        // Of the blocks of 16 keys that are not later than its queries a warp has every second one.
        float P[4][4] = {}, dP[4][4] = {}, read[2] = {0.0f, 0.0f}, product = 0.0f, diagonal = 0.0f;
        unsigned pairs[4][2], by[4][2];  // rounded: two neighbours in one
#pragma unroll
        for (int own = 0; own < 2; ++own) {
            const int block = 2 * own + half;
            if (block <= group) {
                const Place rows = at_Q + group * BLOCK + across(lane), columns = at_K + block * BLOCK + along(lane);
                float x[2][4] = {};
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    unsigned a[4];
                    load_tiles(a, (rows ^ i % 4 * 32) + i / 4 * PANEL);
                    add_overlaps(x[0], x[1], a, (columns ^ i % 4 * 32) + i / 4 * PANEL);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) pairs[2 * own + i / 2][i % 2] = pack(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
            }
        }
        const auto fade = [&](int number) {  // how a head's pairs fade, and M
            const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4, row = 16 * group + g;
            const Told& head = told[number % 3];
            const float at_row[2] = {head.sums[row], head.sums[row + 8]}, rest[2] = {head.rows[row], head.rows[row + 8]};
            char* const M = M_s + number % 2 * PAIRS;
            const int own = (row * 128 + 4 * t4 + (g << 4)) ^ half * 32;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int block = j / 2 * 2 + half, s = 16 * block + j % 2 * 8 + 2 * t4;
                if (block <= group) {
                    const float2 to = *reinterpret_cast<const float2*>(head.sums + s), less = *reinterpret_cast<const float2*>(head.columns + s);
                    const float2 gain = *reinterpret_cast<const float2*>(head.gains + s);
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        float faded[2];
#pragma unroll
                        for (int y = 0; y < 2; ++y) {
                            faded[y] = exp2_fast(min((at_row[x] - (y ? to.y : to.x)) + (rest[x] - (y ? less.y : less.x)), 127.0f));
                            if (block == group && s + y > row + 8 * x) faded[y] = 0.0f;
                        }
                        by[j][x] = pack(faded[0], faded[1]);
                        const float m[2] = {low(pairs[j][x]) * faded[0] * (scale * gain.x), high(pairs[j][x]) * faded[1] * (scale * gain.y)};
                        *reinterpret_cast<unsigned*>(M + (own ^ (j / 2 * 64 + j % 2 * 16)) + x * (BLOCK / 2)) = pack(m[0], m[1]);
                    }
                }
            }
        };
        const auto look = [&](int item, const Told& head) {  // at a tile
            const Place V = at_stages + item % 2 * STAGE, Y = V + VALUES, S = Y + VALUES;
            const int lane = fresh(threadIdx.x) % 32, row = 16 * group + lane / 4, to_right = along(lane), to_left = across(lane);
            const Place rows = Y + group * BLOCK + to_left, columns = V + half * BLOCK + to_right;
            const float since[2] = {head.since[row], head.since[row + 8]};
            unsigned y[E / 16][4];
#pragma unroll
            for (int i = 0; i < E / 16; ++i) load_tiles(y[i], rows ^ 32 * i);
            through(sum, read, y, S + half * (STATE / 2) + to_right, of_half(at_Q + group * BLOCK + to_left), since);
#pragma unroll
            for (int own = 0; own < 2; ++own) {
                if (2 * own + half <= group) {
#pragma unroll
                    for (int i = 0; i < E / 16; ++i) add_overlaps(dP[2 * own], dP[2 * own + 1], y[i], (columns ^ 32 * i) + 2 * own * BLOCK);
                }
            }
            product += product_of_states<D>(S, S + STATE, warp);
        };
        // What the pairs are worth, z, and P of it; `more` than what was found before. `corner`: of r within this group's steps, sums over s < r <= t.
        const auto weigh = [&](int number, bool more) {
            const Told& head = told[number % 3];
            Found& of = found[number % 2];
            const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4, row = 16 * group + g;
            const float of_rows[2] = {NORMALISED ? head.of_n[row] : 0.0f, NORMALISED ? head.of_n[row + 8] : 0.0f};
            float corner[2][4] = {};
#pragma unroll
            for (int mine = 0; mine < 2; ++mine) {
                const int block = 2 * mine + half;
                if (block <= group) {
                    if (skip && block == group) {
#pragma unroll
                        for (int x = 0; x < 8; ++x) diagonal += x / 4 * 8 + 2 * t4 + x % 2 == g + x % 4 / 2 * 8 ? dP[2 * mine + x / 4][x % 4] : 0.0f;
                    }
                    unsigned z[4];
                    float columns[4];
#pragma unroll
                    for (int part = 0; part < 2; ++part) {
                        const int j = 2 * mine + part, s = 16 * block + 8 * part + 2 * t4;
                        const float2 gain = *reinterpret_cast<const float2*>(head.gains + s);
                        const float factor[2] = {gain.x * scale, gain.y * scale};
#pragma unroll
                        for (int x = 0; x < 4; ++x) {
                            const float faded = x % 2 ? high(by[j][x / 2]) : low(by[j][x / 2]);
                            const float pair = x % 2 ? high(pairs[j][x / 2]) : low(pairs[j][x / 2]);
                            const float p = (NORMALISED ? dP[j][x] + of_rows[x / 2] : dP[j][x]) * faded;
                            P[j][x] = SHARED ? fmaf(p, factor[x % 2], P[j][x]) : p * factor[x % 2];
                            dP[j][x] = p * pair;
                        }
#pragma unroll
                        for (int x = 0; x < 2; ++x) {
                            columns[2 * part + x] = dP[j][x] + dP[j][x + 2];
                            z[2 * part + x] = pack(dP[j][2 * x] * factor[0], dP[j][2 * x + 1] * factor[1]);
                        }
                    }
                    const float whole_column = over_rows_of_four(columns);
                    float& to_column = of.column[group][16 * block + lane / 16 * 8 + 2 * t4 + lane / 8 % 2];
                    if (lane % 8 < 4) to_column = whole_column + (more ? to_column : 0.0f);
#pragma unroll
                    for (int part = 0; part < 2; ++part) {  // times ones where s < r
                        const int r = 16 * group + 8 * part + g, s = 16 * block + 2 * t4;
                        const auto ones = [r](int s) { return (s < r ? 0x3f80u : 0u) | (s + 1 < r ? 0x3f800000u : 0u); };
                        multiply_tiles(corner[part], z, ones(s), ones(s + 8));
                    }
                }
            }
            float later[4];
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                const int r = x / 2 * 8 + 2 * t4 + x % 2;
                later[x] = (g >= r ? corner[x / 2][x % 2] : 0.0f) + (g + 8 >= r ? corner[x / 2][x % 2 + 2] : 0.0f);
            }
            const float whole_corner = over_rows_of_four(later);
            float& to_corner = of.corner[4 * half + group][lane / 16 * 8 + 2 * t4 + lane / 8 % 2];
            if (lane % 8 < 4) to_corner = whole_corner + (more ? to_corner : 0.0f);
        };
        const auto conclude = [&](int number) {
            const Told& head = told[number % 3];
            Found& of = found[number % 2];
            const int lane = fresh(threadIdx.x) % 32, t4 = lane % 4, row = 16 * group + lane / 4;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float whole = over_columns(read[x]) * head.since[row + 8 * x];
                if (t4 == 0) of.from_state[half][row + 8 * x] = whole;
            }
            product = over_rows(over_columns(product)) * head.all[0];
            if (skip) diagonal = over_rows(over_columns(diagonal));
            if (lane == 0) of.kept[warp] = product, of.diagonal[warp] = diagonal;
        };
        fade(0);
        meet_all();
        if (SHARED) {
            for (int item = 0, number = 0, tile = 0; item < items; ++item) {
                if (item > 0) meet_all();
                look(item, told[number % 3]);
                weigh(number, tile > 0);  // each tile is worth something by itself
#pragma unroll
                for (int x = 0; x < 16; ++x) dP[x / 4][x % 4] = 0.0f;
                if (++tile < tiles) continue;
                conclude(number);
                read[0] = read[1] = product = diagonal = 0.0f;
                tile = 0;
                if (++number < each) fade(number);
            }
        } else {
            for (int item = 0; item < items; ++item) {
                if (item > 0) meet_all();
                look(item, told[0]);
            }
            if (NORMALISED) {
                const i64 at_norm = (of_head(0) * chunks + c) * d;
                const float of_rows[2] = {told[0].of_n[row], told[0].of_n[row + 8]}, since[2] = {told[0].since[row], told[0].since[row + 8]};
                through_norm(sum, read, of_rows, ns + at_norm, first, d, Q, row, since);
                for (int i = 16 * warp + lane; i < min(d, 16 * (warp + 1)); i += 32) product += ns[at_norm + i] * rs[at_norm + i];
            }
            weigh(0, false);
            conclude(0);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int block = j / 2 * 2 + half;
#pragma unroll
            for (int x = 0; x < 2; ++x)
                *reinterpret_cast<unsigned*>(at<L>(P_s, row + 8 * x, 2 * block + j % 2) + 4 * t4) = pack(P[j][2 * x], P[j][2 * x + 1]);
        }
        meet_all();
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            if (block <= group) {
                unsigned a[4];
                load_tiles(a, (at_P + group * BLOCK + across(lane)) ^ 32 * block);
                add_product(sum, a, of_half(at_K + across(lane)), block * BLOCK);
            }
        }
    } else {
        // They also ask for what is next, and hand on what was found: a thread has 8 numbers of two rows of v and dy, of two or four of S and R.
        const int thread = threadIdx.x - CROWD / 2;
        const i64 own_values = (t0 + thread / 8) * e + thread % 8 * 8, own_state = ((of_head(0) * chunks + c) * d + thread / 8) * e + thread % 8 * 8;
        const i64 head_values = T * e, head_states = i64(chunks) * d * e;
        const __nv_bfloat16* next_v = v + (v_heads > 1 ? of_head(0) : G) * head_values + own_values;
        const __nv_bfloat16* next_y = dy + of_head(0) * head_values + own_values;
        const __nv_bfloat16 *next_S = states + own_state, *next_R = adjoints + own_state;
        char* const own_stage = stages + thread / 8 * 128 + ((thread ^ thread / 8) % 8 << 4);
        const auto tell = [&](int number) {
            constexpr int PIECES = sizeof(Told) / 16;
            if (number < each && thread < PIECES) {
                const char* const from = reinterpret_cast<const char*>(all_told + of_head(number) * chunks + c);
                copy16(reinterpret_cast<char*>(&told[number % 3]) + 16 * thread, from + 16 * thread);
            }
        };
        const auto fetch = [&](int item, int number, int tile) {  // the next item, if there is one
            if (item < items) {
                char* const to = own_stage + item % 2 * STAGE;
                if (t0 + L <= T && d == D && tile * E + E <= e) {
#pragma unroll
                    for (int i = 0; i < L; i += 32) copy16(to + i * 128, next_v + i * e), copy16(to + VALUES + i * 128, next_y + i * e);
#pragma unroll
                    for (int i = 0; i < D; i += 32) {
                        copy16(to + 2 * VALUES + i * 128, next_S + i * e);
                        copy16(to + 2 * VALUES + STATE + i * 128, next_R + i * e);
                    }
                } else {
                    const bool in_row = tile * E + thread % 8 * 8 < e;
#pragma unroll 1
                    for (int i = 0; i < D; i += 32) {
                        const int r = thread / 8 + i;
                        if (i < L) {
                            copy16(to + i * 128, next_v + i * e, in_row && t0 + r < T);
                            copy16(to + VALUES + i * 128, next_y + i * e, in_row && t0 + r < T);
                        }
                        copy16(to + 2 * VALUES + i * 128, next_S + i * e, in_row && r < d);
                        copy16(to + 2 * VALUES + STATE + i * 128, next_R + i * e, in_row && r < d);
                    }
                }
                if (tile == 0) tell(number + 1);
                const bool to_head = tile + 1 == tiles;
                const i64 back = i64(tiles - 1) * E;
                next_v += to_head ? (v_heads > 1 ? head_values : 0) - back : E;
                next_y += to_head ? head_values - back : E;
                next_S += to_head ? head_states - back : E, next_R += to_head ? head_states - back : E;
            }
            copies_end();
        };
        const auto turn = [&](int item, int number, int tile) {  // an item is there, the next one is asked for
            copies_wait<0>();
            meet_all();
            const bool to_head = tile + 1 == tiles;
            fetch(item + 1, number + to_head, to_head ? 0 : tile + 1);
        };
        const auto hand_on = [&](int number) {
            constexpr int PIECES = sizeof(Found) / 16;
            Found& to = all_found[of_head(number) * chunks + c];
            if (thread < PIECES) reinterpret_cast<uint4*>(&to)[thread] = reinterpret_cast<const uint4*>(&found[number % 2])[thread];
        };
        tell(0);
        fetch(0, 0, 0);
        turn(0, 0, 0);
        meet_all();  // M is there
        float written[2], product;
        for (int item = 0, number = 0, tile = 0; item < items; ++item) {
            if (item > 0) turn(item, number, tile);
            if (tile == 0) {
                if (number > 0) hand_on(number - 1);
                written[0] = written[1] = product = 0.0f;
            }
            const Told& head = told[number % 3];
            const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4, row = 16 * group + g;
            const float left[2] = {head.left[row], head.left[row + 8]};  // of a key at the end of the chunk, without its gain
            const float faded[2] = {left[0] * head.gains[row], left[1] * head.gains[row + 8]};
            const Place V = at_stages + item % 2 * STAGE, Y = V + VALUES, R = Y + VALUES + STATE;
            const int to_right = along(lane), to_left = across(lane);
            const Place keys = at_K + group * BLOCK + to_left, rows = V + group * BLOCK + to_left;
            unsigned values[E / 16][4];
#pragma unroll
            for (int i = 0; i < E / 16; ++i) load_tiles(values[i], rows ^ 32 * i);
            through(sum, written, values, R + half * (STATE / 2) + to_right, of_half(keys), faded);
            float o[E / 16][4] = {};  // half the columns of dv
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                unsigned a[4];
                load_tiles(a, (keys ^ i % 4 * 32) + i / 4 * PANEL);
                add_product(o, a, (R + to_left) ^ half * 64, i * BLOCK);
            }
            times(o, faded);
#pragma unroll
            for (int block = 0; block < L / 16; ++block) {
                if (block >= group) {
                    unsigned a[4];
                    load_tiles_turned(a, ((at_M + number % 2 * PAIRS + to_right) ^ 32 * group) + block * BLOCK);
                    add_product(o, a, (Y + to_left) ^ half * 64, block * BLOCK);
                }
            }
            if (skip) {
                const float skipped = skip[of_head(number)];
                const int at_own = (row * 128 + 4 * t4 + (g << 4)) ^ half * 64;
                const char* const dy_s = stages + item % 2 * STAGE + VALUES;
#pragma unroll
                for (int j = 0; j < E / 16; ++j) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const unsigned own = *reinterpret_cast<const unsigned*>(dy_s + (at_own ^ 16 * j) + x * (BLOCK / 2));
                        o[j][2 * x] += skipped * low(own), o[j][2 * x + 1] += skipped * high(own);
                    }
                }
            }
            const i64 t = t0 + 16 * group;
            store_rows(dv_s + (warp - 8) * (OUT / 2), o, dv + (of_head(number) * T + t) * e, T - t, e, tile * E + 32 * half);
            product += product_of_states<D>(R - STATE, R, warp);
            if (++tile < tiles) continue;
            if (NORMALISED) {
                const i64 at_norm = (of_head(number) * chunks + c) * d;
                const float one[2] = {1.0f, 1.0f};
                through_norm(sum, written, one, rs + at_norm, first, d, K, row, faded);
            }
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                const float whole = over_columns(written[x]) * left[x];
                if (t4 == 0) found[number % 2].to_state[half][row + 8 * x] = whole;
            }
            product = over_rows(over_columns(product)) * head.all[0];
            if (lane == 0) found[number % 2].kept[warp] = product;
            tile = 0, ++number;
        }
        meet_all();
        hand_on(each - 1);
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
            if (block >= group) {
                unsigned a[4];
                load_tiles_turned(a, ((at_P + along(lane)) ^ 32 * group) + block * BLOCK);
                add_product(sum, a, of_half(at_Q + across(lane)), block * BLOCK);
            }
        }
    }
    const i64 t = t0 + 16 * group;
    char* const room = stages + (items + 1) % 2 * STAGE + warp * OUT;
    store_rows(room, sum, (warp < 8 ? dq : dk) + (unit * T + t) * d, T - t, d, first);
}
