// Linears over packed weights (weights.h), for every kind and any number of tokens.
//
// Activations become int8 with a scale for each 32 columns; products with the codes are exact integers; each group then
// costs a multiplication by the weight's scale and a fused multiply-add into a float of the (row, token), in ascending
// order of groups. Nothing else touches that float, so a result has the same bits however tokens and rows are cut.
//
// Few tokens: one step takes a tile of 16 rows and up to 8 tokens through all columns, and a group's codes are decoded into
// eight vectors, straight from the stream of weights.
// Many tokens: what these and some of the columns need of the activations stays in the second cache while the tiles pass
// by. A block of two tiles is decoded into the nearest cache, and eight tokens at a time are multiplied with it: so many
// sums grow at once that the processor always has a product to begin, where four would wait for each other.
#pragma once

#include "../weights.h"
#include "integers.h"

namespace gk {
namespace GK_ISA {

constexpr int TOKENS = 16;  // of a block of activations
constexpr int FLOATS = LANES_A_REGISTER == 16 ? 8 : 4;  // tokens at once of kinds that multiply floats: their sums stay in registers
// Bytes of the stream of weights that are asked for before they are used. The processor's own prefetch stops at the end
// of each page: with two threads of a Xeon one token took 1.15 to 1.3 times as long without, and 2 and 10 KiB were slower.
constexpr int AHEAD = 4096;
// Of many tokens: what is multiplied at once, with the sums of one group in registers.
constexpr int SOME = LANES_A_REGISTER == 16 ? 8 : 4, TILES = LANES_A_REGISTER == 16 ? 2 : 1;
// Tokens, and blocks of columns, that stay in the second cache while tiles pass by: 288 KiB. From half to twice of it
// made no difference on a cache of 1 MiB.
constexpr int64_t PANEL = 64, PART = 9;
constexpr int64_t WEIGHTS = 384 << 10;  // bytes of a weight of floats, which stays there instead while tokens pass by

// ---- activations ----------------------------------------------------------------------------------------------------

// A block holds `width` tokens (16; the last fewer), group by group, tokens side by side: Group[groups][width].
struct Room {
    Group *at;
    int64_t width;
};
inline Room block_of(const Activations &a, int64_t token) {
    const int64_t first = token / TOKENS * TOKENS, rest = a.tokens - first;
    return {(Group *)a.quantized + first * (a.cols / GROUP), rest < TOKENS ? rest : TOKENS};
}

inline void quantize_group(const float *x, Group &g) {
    const uint32_t most = largest_bits(x);
    float size;
    std::memcpy(&size, &most, 4);
    const bool finite = most < 0x7F800000;
    // Below 2^-100 numbers count as zero: the reciprocal would overflow. What is not finite makes every result so.
    const bool codes = finite && size >= 0x1p-100f;
    g.scale = codes ? size / 127.0f : finite ? 0.0f : std::nanf("");
    int32_t sum[2] = {0, 0};
    if (codes) to_codes(x, 127.0f / size, g.codes, sum);
    else std::memset(g.codes, 0, sizeof g.codes);
    for (int half = 0; half < 2; half++) g.minus16[half] = -sum[half], g.plus16[half] = (float)sum[half];
    g.minus32 = -sum[0] - sum[1];
    g.plus32 = (float)(sum[0] + sum[1]);
    g.unused = 0;
}

inline void quantize(const Activations &a, int64_t token0, int64_t token1) {
    for (int64_t t = token0; t < token1; t++) {
        const Room room = block_of(a, t);
        const float *x = a.x + t * a.cols;
        Group *at = room.at + t % TOKENS;
        for (int64_t g = 0; g < a.cols / GROUP; g++) quantize_group(x + g * GROUP, at[g * room.width]);
    }
}

// ---- decoding -------------------------------------------------------------------------------------------------------

// A group's codes as eight chunks; signed ones, and the numbers that codes stand for, ABOVE higher.
template <Kind K> inline void decode(const uint8_t *p, B64 *w) {
    constexpr Format f = format(K);
    if constexpr (f.low == 8) {
        GK_UNROLL
        for (int c = 0; c < 8; c++) {
            w[c] = bytes(p + 64 * c);
            if constexpr (ABOVE) w[c] = w[c] ^ ABOVE;
        }
    } else if constexpr (f.low + f.high == 6) {
        GK_UNROLL
        for (int c = 0; c < 8; c += 4) {
            const B64 v[3] = {bytes(p + 48 * c), bytes(p + 48 * c + 64), bytes(p + 48 * c + 128)};
            w[c] = v[0] & 63, w[c + 1] = v[1] & 63, w[c + 2] = v[2] & 63;
            w[c + 3] = ((v[0] >> 6) & 3) | ((v[1] >> 4) & 12) | ((v[2] >> 2) & 48);
        }
    } else if constexpr (f.low + f.high == 5) {
        const B64 v[5] = {bytes(p), bytes(p + 64), bytes(p + 128), bytes(p + 192), bytes(p + 256)};
        GK_UNROLL
        for (int c = 0; c < 5; c++) w[c] = v[c] & 31;
        w[5] = ((v[0] >> 5) & 7) | ((v[3] >> 2) & 24);
        w[6] = ((v[1] >> 5) & 7) | ((v[3] >> 4) & 8) | ((v[4] >> 1) & 16);
        w[7] = ((v[2] >> 5) & 7) | ((v[4] >> 3) & 24);
    } else if constexpr (f.low == 4) {
        GK_UNROLL
        for (int c = 0; c < 4; c++) {
            const B64 v = bytes(p + 64 * c);
            w[c] = v & 15, w[c + 4] = (v >> 4) & 15;
        }
    } else {
        const B64 v[2] = {bytes(p), bytes(p + 64)};
        GK_UNROLL
        for (int c = 0; c < 8; c++) w[c] = (v[c % 2] >> (c / 2 * 2)) & 3;
    }
    if constexpr (f.low + f.high == 3) {
        const B64 v = bytes(p + 128);
        GK_UNROLL
        for (int c = 0; c < 8; c++) w[c] = w[c] | ((c < 2 ? v << (2 - c) : v >> (c - 2)) & 4);
    }
    if constexpr (listed(K)) {
        const Table table = table_of(f.values);
        GK_UNROLL
        for (int c = 0; c < 8; c++) w[c] = look_up(table, w[c]);
    }
}

// A block's scales and minus its minima as floats, [group or half group][row].
struct Scales {
    alignas(64) float scale[16][TILE], minus[16][TILE];
};

// p: the block; supers: of this block, minima `stride` bytes after scales. n: groups.
template <Kind K> inline void decode_scales(const uint8_t *p, const uint8_t *supers, int64_t stride, int64_t n, Scales &s) {
    constexpr Format f = format(K);
    const F16 nothing = zero();
    if constexpr (!f.super) {
        for (int64_t g = 0; g < n; g++) {
            store(s.scale[g], from_half((const uint16_t *)p + g * TILE));
            if constexpr (f.minima) store(s.minus[g], sub(nothing, from_half((const uint16_t *)p + (n + g) * TILE)));
        }
    } else {
        F16 super = from_half((const uint16_t *)supers);
        if constexpr (f.unit != 1) super = mul(super, all(f.unit));
        const F16 super_minus = f.minima ? sub(nothing, from_half((const uint16_t *)(supers + stride))) : nothing;
        if constexpr (whole_scales(K)) {
            for (int g = 0; g < 256 / f.group; g++) store(s.scale[g], mul(super, from_i8(p + g * TILE)));
        } else {
            alignas(64) uint8_t small[2][16 * TILE];  // scales, minima
            if constexpr (K == Q2_K) {
                for (int i = 0; i < 4; i++) {
                    const B64 both = bytes(p + 64 * i);
                    put(small[0] + 64 * i, both & 15), put(small[1] + 64 * i, (both >> 4) & 15);
                }
            } else {
                const B64 low[2] = {bytes(p), bytes(p + 64)}, high = bytes(p + 128);
                // what lies at bits 0, 2, 4, 6 of the high byte: Q3_K counts on in quarters of the half groups
                const B64 part[4] = {(high << 4) & 48, (high << 2) & 48, high & 48, (high >> 2) & 48};
                if constexpr (K == Q3_K) {
                    put(small[0], (low[0] & 15) | part[0]), put(small[0] + 64, (low[1] & 15) | part[1]);
                    put(small[0] + 128, ((low[0] >> 4) & 15) | part[2]);
                    put(small[0] + 192, ((low[1] >> 4) & 15) | part[3]);
                } else {
                    for (int i = 0; i < 2; i++) {
                        put(small[0] + 64 * i, (low[i] & 15) | part[2 * i]);
                        put(small[1] + 64 * i, ((low[i] >> 4) & 15) | part[2 * i + 1]);
                    }
                }
            }
            const F16 shift = all(K == Q3_K ? 32.0f : 0.0f);
            for (int g = 0; g < 256 / f.group; g++) {
                store(s.scale[g], mul(super, sub(from_u8(small[0] + g * TILE), shift)));
                if constexpr (f.minima) store(s.minus[g], mul(super_minus, from_u8(small[1] + g * TILE)));
            }
        }
    }
}

// How many groups the block that begins with group `first` has: the last may have fewer, unless it is a superblock.
template <Kind K> constexpr int64_t groups_from(int64_t first, int64_t groups) {
    return format(K).super || groups - first >= BLOCK ? BLOCK : groups - first;
}

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// ---- multiplying ----------------------------------------------------------------------------------------------------

// Group g of a block of R tiles times that of M tokens, into their sums: y[t * R + r]. The codes of a tile are `step`
// vectors after those of the one before.
template <Kind K, int M, int R = 1>
inline void add_products(const B64 *w, int step, const Scales *s, int64_t g, const Group *x, F16 *y) {
    constexpr Format f = format(K);
    constexpr int BITS = listed(K) ? 8 : f.low + f.high, ZERO = BITS == 8 ? ABOVE : f.zero;
    I16 n[M * R], m[M * R];
    GK_UNROLL
    for (int t = 0; t < M; t++) {
        const I16 first = !ZERO ? no_sum() : scaled(f.group == 32 ? x[t].minus32 : x[t].minus16[0], log2_of(ZERO));
        const I16 second = !ZERO ? no_sum() : scaled(x[t].minus16[1], log2_of(ZERO));
        GK_UNROLL
        for (int r = 0; r < R; r++) n[t * R + r] = first, m[t * R + r] = second;
    }
    if constexpr (f.group == 32) {
        dots<BITS, 0, 8, M, R>(w, step, x, n);
    } else {
        dots<BITS, 0, 4, M, R>(w, step, x, n);
        dots<BITS, 4, 4, M, R>(w, step, x, m);
    }
    GK_UNROLL
    for (int t = 0; t < M; t++) {
        GK_UNROLL
        for (int r = 0; r < R; r++) {
            F16 v;
            if constexpr (f.group == 32) {
                v = mul(to_float(n[t * R + r]), load(s[r].scale[g]));
                if constexpr (f.minima) v = fma(load(s[r].minus[g]), all(x[t].plus32), v);
            } else {
                v = mul(to_float(n[t * R + r]), load(s[r].scale[2 * g]));
                v = fma(to_float(m[t * R + r]), load(s[r].scale[2 * g + 1]), v);
                if constexpr (f.minima) {
                    v = fma(load(s[r].minus[2 * g]), all(x[t].plus16[0]), v);
                    v = fma(load(s[r].minus[2 * g + 1]), all(x[t].plus16[1]), v);
                }
            }
            y[t * R + r] = fma(v, all(x[t].scale), y[t * R + r]);
        }
    }
}

inline void store_rows(float *to, F16 y, int64_t rows) {
    if (rows >= TILE) {
        store(to, y);
    } else {
        float part[TILE];
        store(part, y);
        std::memcpy(to, part, (size_t)rows * sizeof(float));
    }
}

// A tile times N tokens: x is their first group, `width` from one group to the next.
template <Kind K, int N>
void multiply(const uint8_t *p, int64_t cols, int64_t rows, const Group *x, int64_t width, float *out, int64_t stride) {
    constexpr int M = N < 4 ? N : 4;
    constexpr bool SPILL = N > M && LANES_A_REGISTER == 8;  // few registers: codes and sums in memory, products in registers
    F16 y[N];
    GK_UNROLL
    for (int t = 0; t < N; t++) y[t] = zero();
    const int64_t groups = cols / GROUP, minima = groups / BLOCK * TILE * 2;
    const uint8_t *supers = p;
    // Skipped by the stream and read bit by bit later: each line would be waited for.
    for (int64_t i = 0; i < super_bytes(K, cols); i += 64) __builtin_prefetch(p + i);
    p += super_bytes(K, cols);
    Scales s;
    for (int64_t first = 0; first < groups; first += BLOCK, supers += TILE * 2) {
        const int64_t n = groups_from<K>(first, groups);
        decode_scales<K>(p, supers, minima, n, s);
        p += scale_bytes(K, n);
        for (int64_t g = 0; g < n; g++, p += code_bytes(K), x += width) {
            for (int64_t i = 0; i < code_bytes(K); i += 64) __builtin_prefetch(p + AHEAD + i);
            B64 w[8];
            decode<K>(p, w);
            if constexpr (SPILL) {
                asm volatile("" : "+m"(w));
                for (int t = 0; t + M <= N; t += M) {
                    add_products<K, M>(w, 0, &s, g, x + t, y + t);
                    asm volatile("" : "+m"(w), "+m"(y));
                }
            } else {
                GK_UNROLL
                for (int t = 0; t + M <= N; t += M) add_products<K, M>(w, 0, &s, g, x + t, y + t);
            }
            if constexpr (N % M) add_products<K, N % M>(w, 0, &s, g, x + N / M * M, y + N / M * M);
        }
    }
    GK_UNROLL
    for (int t = 0; t < N; t++) store_rows(out + t * stride, y[t], rows);
}

inline F16 load_rows(const float *from, int64_t rows) {
    if (rows >= TILE) return load(from);
    float part[TILE] = {};
    std::memcpy(part, from, (size_t)rows * sizeof(float));
    return load(part);
}

// F32 and BF16: floats as they are. The sum of each 32 columns is added to the total: short sums err less than a long one.
template <Kind K> inline F16 column(const uint8_t *p, int64_t c) {
    if constexpr (K == F32) return load((const float *)p + c * TILE);
    else return from_bf16((const uint16_t *)p + c * TILE);
}
template <Kind K, int N>
void multiply_floats(const uint8_t *p, int64_t cols, int64_t rows, const float *x, float *out, int64_t stride) {
    F16 y[N];
    GK_UNROLL
    for (int t = 0; t < N; t++) y[t] = zero();
    for (int64_t first = 0; first < cols; first += GROUP) {
        const int64_t end = cols - first < GROUP ? cols : first + GROUP;
        F16 part[N];
        GK_UNROLL
        for (int t = 0; t < N; t++) part[t] = zero();
        for (int64_t c = first; c < end; c++) {
            const F16 w = column<K>(p, c);
            GK_UNROLL
            for (int t = 0; t < N; t++) part[t] = fma(w, all(x[t * cols + c]), part[t]);
        }
        GK_UNROLL
        for (int t = 0; t < N; t++) y[t] = add(y[t], part[t]);
    }
    GK_UNROLL
    for (int t = 0; t < N; t++) store_rows(out + t * stride, y[t], rows);
}

// R tiles times a panel of tokens, blocks block0 .. block1 of their columns; sums of the blocks before are in `out`.
// Tokens are a multiple of SOME, at most PANEL.
template <Kind K, int R>
void multiply_panel(const uint8_t *p, int64_t cols, int64_t block0, int64_t block1, int64_t rows, const Activations &a,
                    int64_t token, int64_t tokens, float *out, int64_t stride) {
    const int64_t groups = cols / GROUP, minima = groups / BLOCK * TILE * 2, bytes = tile_bytes(K, cols);
    F16 y[PANEL * R];  // of a token all tiles
    for (int64_t t = 0; t < tokens; t++)
        for (int r = 0; r < R; r++) y[t * R + r] = block0 ? load_rows(out + t * stride + r * TILE, rows - r * TILE) : zero();
    B64 w[R][BLOCK][8];
    Scales s[R];
    const int64_t before = super_bytes(K, cols) + block0 * (scale_bytes(K, BLOCK) + BLOCK * code_bytes(K));
    const uint8_t *at = p + before;
    for (int64_t block = block0; block < block1; block++) {
        const int64_t n = groups_from<K>(block * BLOCK, groups);
        for (int r = 0; r < R; r++) {
            const uint8_t *from = at + r * bytes;
            decode_scales<K>(from, p + r * bytes + block * TILE * 2, minima, n, s[r]);
            from += scale_bytes(K, n);
            for (int64_t g = 0; g < n; g++) decode<K>(from + g * code_bytes(K), w[r][g]);
        }
        at += scale_bytes(K, n) + n * code_bytes(K);
        // what is decoded next, asked for line by line while this is multiplied
        const uint8_t *next = block + 1 < block1 ? at : p + R * bytes + before;
        const uint8_t *end = next + scale_bytes(K, n) + n * code_bytes(K);
        const int64_t share = round64((end - next) * SOME / tokens);
        for (int64_t t = 0; t < tokens; t += SOME) {
            for (const uint8_t *stop = next + share; next < stop && next < end; next += 64)
                for (int r = 0; r < R; r++) prefetch(next + r * bytes);
            const Room room = block_of(a, token + t);
            const Group *x = room.at + (token + t) % TOKENS + block * BLOCK * room.width;
            for (int64_t g = 0; g < n; g++, x += room.width)
                add_products<K, SOME, R>(w[0][g], BLOCK * 8, s, g, x, y + t * R);
        }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int r = 0; r < R; r++) store_rows(out + t * stride + r * TILE, y[t * R + r], rows - r * TILE);
}

// The first tokens, as many as can be multiplied SOME at a time; returns how many these are.
template <Kind K>
int64_t linear_panels(const Weight &w, int64_t tile0, int64_t tile1, const Activations &a, float *y, int64_t stride) {
    const int64_t bytes = tile_bytes(K, w.cols), blocks = (w.cols / GROUP + BLOCK - 1) / BLOCK;
    const int64_t tokens = a.tokens / SOME * SOME;
    for (int64_t t = 0; t < tokens; t += PANEL) {
        const int64_t n = tokens - t < PANEL ? tokens - t : PANEL;
        for (int64_t b = 0; b < blocks; b += PART) {
            const int64_t end = blocks - b < PART ? blocks : b + PART;
            for (int64_t tile = tile0; tile < tile1; tile += TILES) {
                const uint8_t *p = w.data + tile * bytes;
                const int64_t rows = w.rows - tile * TILE;
                float *out = y + t * stride + tile * TILE;
                if (tile1 - tile >= TILES) multiply_panel<K, TILES>(p, w.cols, b, end, rows, a, t, n, out, stride);
                else multiply_panel<K, 1>(p, w.cols, b, end, rows, a, t, n, out, stride);
            }
        }
    }
    return tokens;
}

template <Kind K>
void linear(const Weight &w, int64_t tile0, int64_t tile1, const Activations &a, float *y, int64_t stride) {
    const int64_t bytes = tile_bytes(K, w.cols);
    int64_t done = 0;
    if constexpr (quantized(K))
        if (a.tokens >= TOKENS) done = linear_panels<K>(w, tile0, tile1, a, y, stride);
    const int64_t panel = bytes < WEIGHTS ? WEIGHTS / (bytes ? bytes : 1) : 1;
    for (int64_t start = tile0; start < tile1; start += panel) {
        const int64_t stop = tile1 - start < panel ? tile1 : start + panel;
        for (int64_t t = done, n; t < a.tokens; t += n) {
            const int64_t rest = a.tokens - t;
            if constexpr (quantized(K)) {
                n = rest >= 8 ? 8 : rest;
            } else {
                n = rest >= FLOATS ? FLOATS : rest > 3 ? 3 : rest;
            }
            for (int64_t tile = start; tile < stop; tile++) {
                const uint8_t *p = w.data + tile * bytes;
                const int64_t rows = w.rows - tile * TILE;
                float *out = y + t * stride + tile * TILE;
                if constexpr (quantized(K)) {
                    constexpr decltype(&multiply<K, 1>) by_tokens[] = {
                        multiply<K, 1>, multiply<K, 2>, multiply<K, 3>, multiply<K, 4>,
                        multiply<K, 5>, multiply<K, 6>, multiply<K, 7>, multiply<K, 8>,
                    };
                    const Room room = block_of(a, t);
                    by_tokens[n - 1](p, w.cols, rows, room.at + t % TOKENS, room.width, out, stride);
                } else {
                    constexpr decltype(&multiply_floats<K, 1>) by_tokens[] = {
                        multiply_floats<K, 1>, multiply_floats<K, 2>, multiply_floats<K, 3>, multiply_floats<K, FLOATS>,
                    };
                    by_tokens[n > 3 ? 3 : n - 1](p, w.cols, rows, a.x + t * w.cols, out, stride);
                }
            }
        }
    }
}

// ---- one row --------------------------------------------------------------------------------------------------------

// scale * (code - zero) - min, each operation rounded for itself: the definition of block_types.py.
template <Kind K> void row(const Weight &w, int64_t index, float *out) {
    constexpr Format f = format(K);
    const uint8_t *p = w.data + index / TILE * tile_bytes(K, w.cols);
    const int64_t r = index % TILE;
    if constexpr (!quantized(K)) {
        for (int64_t c = 0; c < w.cols; c++) {
            uint32_t bits = 0;
            if constexpr (K == F32) std::memcpy(&bits, p + (c * TILE + r) * 4, 4);
            else std::memcpy((uint8_t *)&bits + 2, p + (c * TILE + r) * 2, 2);  // its upper half: all machines here are little-endian
            std::memcpy(out + c, &bits, 4);
        }
    } else {
        const int64_t groups = w.cols / GROUP, minima = groups / BLOCK * TILE * 2;
        const uint8_t *supers = p;
        p += super_bytes(K, w.cols);
        Scales s;
        alignas(64) uint8_t codes[8][64];
        for (int64_t first = 0; first < groups; first += BLOCK, supers += TILE * 2) {
            const int64_t n = groups_from<K>(first, groups);
            decode_scales<K>(p, supers, minima, n, s);
            p += scale_bytes(K, n);
            for (int64_t g = 0; g < n; g++, p += code_bytes(K), out += GROUP) {
                B64 chunks[8];
                decode<K>(p, chunks);
                for (int c = 0; c < 8; c++) put(codes[c], chunks[c]);
                for (int c = 0; c < 8; c++) {
                    const int64_t at = f.group == 32 ? g : 2 * g + c / 4;
                    for (int j = 0; j < 4; j++) {
                        const bool is_signed = f.low == 8 || listed(K);
                        const int code = is_signed ? (int8_t)(codes[c][4 * r + j] ^ ABOVE) : codes[c][4 * r + j] - f.zero;
                        float value = (float)code * s.scale[at][r];
                        if constexpr (f.minima) value = value + s.minus[at][r];
                        out[4 * c + j] = value;
                    }
                }
            }
        }
    }
}

// ---- any kind -------------------------------------------------------------------------------------------------------

template <class Do> inline void by_kind(Kind kind, Do run) {
    switch (kind) {
        case F32: run.template operator()<F32>(); break;
        case BF16: run.template operator()<BF16>(); break;
        case Q4_0: run.template operator()<Q4_0>(); break;
        case Q4_1: run.template operator()<Q4_1>(); break;
        case Q5_0: run.template operator()<Q5_0>(); break;
        case Q5_1: run.template operator()<Q5_1>(); break;
        case Q8_0: run.template operator()<Q8_0>(); break;
        case Q2_K: run.template operator()<Q2_K>(); break;
        case Q3_K: run.template operator()<Q3_K>(); break;
        case Q4_K: run.template operator()<Q4_K>(); break;
        case Q5_K: run.template operator()<Q5_K>(); break;
        case Q6_K: run.template operator()<Q6_K>(); break;
        case IQ4_NL: run.template operator()<IQ4_NL>(); break;
        case IQ4_XS: run.template operator()<IQ4_XS>(); break;
        case IQ3_XXS: run.template operator()<IQ3_XXS>(); break;
        case IQ3_S: run.template operator()<IQ3_S>(); break;
        case IQ2_XXS: run.template operator()<IQ2_XXS>(); break;
        case IQ2_XS: run.template operator()<IQ2_XS>(); break;
        case IQ2_S: run.template operator()<IQ2_S>(); break;
        case IQ1_S: run.template operator()<IQ1_S>(); break;
        case IQ1_M: run.template operator()<IQ1_M>(); break;
        case KINDS: break;
    }
}
inline void any_linear(const Weight &w, int64_t tile0, int64_t tile1, const Activations &a, float *y, int64_t stride) {
    by_kind(w.kind, [&]<Kind K>() { linear<K>(w, tile0, tile1, a, y, stride); });
}
inline void any_row(const Weight &w, int64_t index, float *out) {
    by_kind(w.kind, [&]<Kind K>() { row<K>(w, index, out); });
}

}  // namespace GK_ISA
}  // namespace gk
