#include "weights.h"

#include "kernels/simd.h"

#include <cstring>

#if defined(_WIN32)
#define GK_EXPORT extern "C" __declspec(dllexport)
#else
#define GK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace gk {
namespace {

bool fits(Kind kind, int64_t rows, int64_t cols) {
    if (kind < 0 || kind >= KINDS || rows < 0 || cols < 0) return false;
    // far beyond any weight, far below what would overflow the arithmetic on sizes
    if (rows > (int64_t)1 << 31 || cols > (int64_t)1 << 27) return false;
    const Format f = format(kind);
    return !f.group || cols % (f.super ? GROUP * BLOCK : GROUP) == 0;
}

bool cuts(int64_t rows, int64_t row0, int64_t row1) {
    return 0 <= row0 && row0 <= row1 && row1 <= rows && row0 % TILE == 0 && (row1 % TILE == 0 || row1 == rows);
}

// Sixteen rows, `stride` elements apart, of `count` elements each, to 16 elements side by side and back.
template <class T> void gather(const T *from, int64_t stride, int rows, int64_t count, T *to) {
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) std::memcpy(&to[i * TILE + r], &from[r * stride + i], sizeof(T));
    for (int r = rows; r < TILE; r++)
        for (int64_t i = 0; i < count; i++) to[i * TILE + r] = 0;
}
template <class T> void scatter(const T *from, T *to, int64_t stride, int rows, int64_t count) {
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) std::memcpy(&to[r * stride + i], &from[i * TILE + r], sizeof(T));
}

// Walks a tile's parts with one function for a plane's piece: place(plane, element size, elements a row, first of these,
// count, packed bytes). Scales of fewer than 8 bits and codes of 5 and 6 have functions of their own:
// small(block, packed bytes) and joined(group, packed bytes).
template <class Place, class Small, class Joined>
bool walk(Kind kind, int64_t cols, const Planes &p, uint8_t *tile, Place place, Small small, Joined joined) {
    const Format f = format(kind);
    const int64_t groups = cols / GROUP, blocks = groups / BLOCK;
    uint8_t *at = tile;
    if (f.super) {
        place(p.super_scales, 2, blocks, (int64_t)0, blocks, at);
        if (f.minima) place(p.super_mins, 2, blocks, (int64_t)0, blocks, at + blocks * TILE * 2);
        at += super_bytes(kind, cols);
    }
    for (int64_t g = 0; g < groups; g += BLOCK) {
        const int64_t n = groups - g < BLOCK ? groups - g : BLOCK;
        if (!f.super) {
            place(p.scales, 2, groups, g, n, at);
            if (f.minima) place(p.mins, 2, groups, g, n, at + n * TILE * 2);
        } else if (whole_scales(kind)) {
            const int64_t each = GROUP / f.group;
            place(p.scales, 1, groups * each, g * each, BLOCK * each, at);
        } else if (!small(g / BLOCK, at)) {
            return false;
        }
        at += scale_bytes(kind, n);
        for (int64_t i = g; i < g + n; i++) {
            if (f.low + f.high == 5 || f.low + f.high == 6) {
                joined(i, at);
            } else {
                place(p.codes, 4, groups * f.low, i * f.low, (int64_t)f.low, at);
                if (f.high) place(p.high, 4, groups * f.high, i * f.high, (int64_t)f.high, at + 64 * f.low);
            }
            at += code_bytes(kind);
        }
    }
    return true;
}

// The 16 rows' scales of a block of a K kind: S and M (planes' bytes) to the bytes that weights.h describes, and back.
bool join_scales(Kind kind, const uint8_t *s, const uint8_t *m, uint8_t *to, int64_t step) {
    uint8_t all = 0;
    if (kind == Q2_K) {
        for (int j = 0; j < 16; j++) all |= s[j] | m[j], to[j * step] = (uint8_t)(s[j] | m[j] << 4);
        return all < 16;
    }
    uint8_t *high = to + 8 * step;
    if (kind == Q3_K) {
        uint8_t u[16];
        for (int j = 0; j < 16; j++) u[j] = (uint8_t)(s[j] + 32), all |= u[j];
        for (int j = 0; j < 8; j++) to[j * step] = (uint8_t)((u[j] & 15) | (u[j + 8] & 15) << 4);
        for (int j = 0; j < 4; j++)
            high[j * step] = (uint8_t)(u[j] >> 4 | u[j + 4] >> 4 << 2 | u[j + 8] >> 4 << 4 | u[j + 12] >> 4 << 6);
    } else {
        for (int j = 0; j < 8; j++) all |= s[j] | m[j], to[j * step] = (uint8_t)((s[j] & 15) | (m[j] & 15) << 4);
        for (int j = 0; j < 4; j++)
            high[j * step] = (uint8_t)(s[j] >> 4 | m[j] >> 4 << 2 | s[j + 4] >> 4 << 4 | m[j + 4] >> 4 << 6);
    }
    return all < 64;
}
void split_scales(Kind kind, const uint8_t *from, int64_t step, uint8_t *s, uint8_t *m) {
    const auto high = [&](int j, int bit) { return (uint8_t)((from[(8 + j) * step] >> bit & 3) << 4); };
    if (kind == Q2_K) {
        for (int j = 0; j < 16; j++) s[j] = from[j * step] & 15, m[j] = from[j * step] >> 4;
    } else if (kind == Q3_K) {
        for (int j = 0; j < 16; j++) {
            const uint8_t low = j < 8 ? from[j * step] & 15 : from[(j - 8) * step] >> 4;
            s[j] = (uint8_t)((low | high(j % 4, j / 4 * 2)) - 32);
        }
    } else {
        for (int j = 0; j < 8; j++) {
            s[j] = (uint8_t)((from[j * step] & 15) | high(j % 4, j / 4 * 4));
            m[j] = (uint8_t)(from[j * step] >> 4 | high(j % 4, j / 4 * 4 + 2));
        }
    }
}

// A row's group of codes of 5 or 6 bits: four words of low bits and `more` = 1 or 2 of high bits to the 4 + more words that
// weights.h describes, and back. A word is four columns of a chunk.
constexpr uint32_t each(uint32_t byte) { return byte * 0x01010101; }

void join_codes(int more, const uint32_t *low, const uint32_t *high, uint32_t *to) {
    uint32_t c[8];
    for (int i = 0; i < 8; i++) {
        const uint32_t top = more == 1 ? high[0] >> i & each(1) : high[i % 2] >> (i / 2 * 2) & each(3);
        c[i] = (low[i % 4] >> (i / 4 * 4) & each(15)) | top << 4;
    }
    if (more == 1) {
        for (int v = 0; v < 3; v++) to[v] = c[v] | (c[5 + v] & each(7)) << 5;
        to[3] = c[3] | (c[5] >> 3 & each(3)) << 5 | (c[6] >> 3 & each(1)) << 7;
        to[4] = c[4] | (c[6] >> 4 & each(1)) << 5 | (c[7] >> 3 & each(3)) << 6;
    } else {
        for (int v = 0; v < 6; v++) to[v] = c[v / 3 * 4 + v % 3] | (c[v / 3 * 4 + 3] >> (v % 3 * 2) & each(3)) << 6;
    }
}
void split_codes(int more, const uint32_t *from, uint32_t *low, uint32_t *high) {
    uint32_t c[8] = {};
    if (more == 1) {
        for (int v = 0; v < 5; v++) c[v] = from[v] & each(31);
        for (int v = 0; v < 3; v++) c[5 + v] = from[v] >> 5 & each(7);
        c[5] |= (from[3] >> 5 & each(3)) << 3;
        c[6] |= (from[3] >> 7 & each(1)) << 3 | (from[4] >> 5 & each(1)) << 4;
        c[7] |= (from[4] >> 6 & each(3)) << 3;
    } else {
        for (int v = 0; v < 6; v++) {
            c[v / 3 * 4 + v % 3] = from[v] & each(63);
            c[v / 3 * 4 + 3] |= (from[v] >> 6 & each(3)) << (v % 3 * 2);
        }
    }
    for (int i = 0; i < 4; i++) low[i] = (c[i] & each(15)) | (c[i + 4] & each(15)) << 4;
    for (int v = 0; v < more; v++) high[v] = 0;
    for (int i = 0; i < 8; i++) {
        if (more == 1) high[0] |= (c[i] >> 4 & each(1)) << i;
        else high[i % 2] |= (c[i] >> 4 & each(3)) << (i / 2 * 2);
    }
}

float widen(Dense type, const void *p, int64_t i) {
    uint32_t bits;
    if (type == DENSE_F32) {
        std::memcpy(&bits, (const uint8_t *)p + i * 4, 4);
    } else {
        uint16_t half;
        std::memcpy(&half, (const uint8_t *)p + i * 2, 2);
        if (type != DENSE_BF16) return portable::half_to_float(half);
        bits = (uint32_t)half << 16;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

size_t packed_bytes(Kind kind, int64_t rows, int64_t cols) {
    return fits(kind, rows, cols) ? (size_t)((rows + TILE - 1) / TILE * tile_bytes(kind, cols)) : 0;
}

size_t activation_bytes(Kind kind, int64_t tokens, int64_t cols) {
    return quantized(kind) ? (size_t)(tokens * (cols / GROUP) * 64) : 0;
}

bool pack(Kind kind, int64_t rows, int64_t cols, const Planes &planes, uint8_t *out, int64_t row0, int64_t row1) {
    if (!fits(kind, rows, cols) || !cuts(rows, row0, row1)) return false;
    const Format f = format(kind);
    if (!f.group && kind == BF16 && planes.dense_type != DENSE_BF16) return false;
    if (!f.group && (planes.dense_type < DENSE_F32 || planes.dense_type > DENSE_F16)) return false;
    const int64_t bytes = tile_bytes(kind, cols);
    for (int64_t row = row0; row < row1; row += TILE) {
        uint8_t *tile = out + row / TILE * bytes;
        const int n = row1 - row < TILE ? (int)(row1 - row) : TILE;
        if (!f.group) {
            std::memset(tile + cols * TILE * (kind == F32 ? 4 : 2), 0, (size_t)(bytes - cols * TILE * (kind == F32 ? 4 : 2)));
            if (kind == BF16) {
                gather((const uint16_t *)planes.dense + row * cols, cols, n, cols, (uint16_t *)tile);
            } else if (planes.dense_type == DENSE_F32) {
                gather((const uint32_t *)planes.dense + row * cols, cols, n, cols, (uint32_t *)tile);
            } else {
                float *to = (float *)tile;
                for (int64_t c = 0; c < cols; c++)
                    for (int r = 0; r < TILE; r++)
                        to[c * TILE + r] = r < n ? widen((Dense)planes.dense_type, planes.dense, (row + r) * cols + c) : 0;
            }
            continue;
        }
        if (bytes) std::memset(tile, 0, (size_t)super_bytes(kind, cols));  // its padding; that of scales follows
        const int64_t groups = cols / GROUP, rest = groups % BLOCK;
        if (rest && !f.super) {
            const int64_t last = scale_bytes(kind, rest);
            std::memset(tile + bytes - rest * code_bytes(kind) - last, 0, (size_t)last);
        }
        const auto place = [&](const void *plane, int size, int64_t stride, int64_t first, int64_t count, uint8_t *to) {
            const uint8_t *from = (const uint8_t *)plane + (row * stride + first) * size;
            if (size == 1) gather(from, stride, n, count, to);
            if (size == 2) gather((const uint16_t *)from, stride, n, count, (uint16_t *)to);
            if (size == 4) gather((const uint32_t *)from, stride, n, count, (uint32_t *)to);
        };
        const int64_t many = cols / f.group;
        const auto small = [&](int64_t block, uint8_t *to) {
            std::memset(to, 0, (size_t)scale_bytes(kind, BLOCK));
            bool good = true;
            for (int r = 0; r < n; r++) {
                const int64_t first = (row + r) * many + block * (256 / f.group);
                const uint8_t *s = (const uint8_t *)planes.scales + first;
                good &= join_scales(kind, s, f.minima ? (const uint8_t *)planes.mins + first : s, to + r, TILE);
            }
            return good;
        };
        const auto joined = [&](int64_t group, uint8_t *to) {
            std::memset(to, 0, (size_t)code_bytes(kind));
            for (int r = 0; r < n; r++) {
                uint32_t low[4], high[2] = {}, words[6];
                std::memcpy(low, (const uint8_t *)planes.codes + ((row + r) * groups + group) * 16, 16);
                std::memcpy(high, (const uint8_t *)planes.high + ((row + r) * groups + group) * 4 * f.high, 4 * (size_t)f.high);
                join_codes(f.high, low, high, words);
                for (int v = 0; v < 4 + f.high; v++) std::memcpy(to + 64 * v + 4 * r, &words[v], 4);
            }
        };
        if (!walk(kind, cols, planes, tile, place, small, joined)) return false;
    }
    return true;
}

bool unpack(Kind kind, int64_t rows, int64_t cols, const uint8_t *packed, const Planes &planes, int64_t row0, int64_t row1) {
    if (!fits(kind, rows, cols) || !cuts(rows, row0, row1)) return false;
    const Format f = format(kind);
    const int64_t bytes = tile_bytes(kind, cols);
    if (!f.group && planes.dense_type != (kind == F32 ? DENSE_F32 : DENSE_BF16)) return false;
    for (int64_t row = row0; row < row1; row += TILE) {
        uint8_t *tile = const_cast<uint8_t *>(packed) + row / TILE * bytes;  // `walk` serves both ways; nothing is written
        const int n = row1 - row < TILE ? (int)(row1 - row) : TILE;
        if (!f.group) {
            if (kind == F32) scatter((const uint32_t *)tile, (uint32_t *)planes.dense + row * cols, cols, n, cols);
            if (kind == BF16) scatter((const uint16_t *)tile, (uint16_t *)planes.dense + row * cols, cols, n, cols);
            continue;
        }
        const auto place = [&](void *plane, int size, int64_t stride, int64_t first, int64_t count, const uint8_t *from) {
            uint8_t *to = (uint8_t *)plane + (row * stride + first) * size;
            if (size == 1) scatter(from, to, stride, n, count);
            if (size == 2) scatter((const uint16_t *)from, (uint16_t *)to, stride, n, count);
            if (size == 4) scatter((const uint32_t *)from, (uint32_t *)to, stride, n, count);
        };
        const int64_t many = cols / f.group;
        const auto small = [&](int64_t block, const uint8_t *from) {
            for (int r = 0; r < n; r++) {
                const int64_t first = (row + r) * many + block * (256 / f.group);
                uint8_t *s = (uint8_t *)planes.scales + first;
                split_scales(kind, from + r, TILE, s, f.minima ? (uint8_t *)planes.mins + first : s);
            }
            return true;
        };
        const auto joined = [&](int64_t group, const uint8_t *from) {
            const int64_t at = row * (cols / GROUP) + group, step = cols / GROUP;
            for (int r = 0; r < n; r++) {
                uint32_t low[4], high[2] = {}, words[6];
                for (int v = 0; v < 4 + f.high; v++) std::memcpy(&words[v], from + 64 * v + 4 * r, 4);
                split_codes(f.high, words, low, high);
                std::memcpy((uint8_t *)planes.codes + (at + r * step) * 16, low, 16);
                std::memcpy((uint8_t *)planes.high + (at + r * step) * 4 * f.high, high, 4 * (size_t)f.high);
            }
        };
        walk(kind, cols, planes, tile, place, small, joined);
    }
    return true;
}

}  // namespace gk

GK_EXPORT size_t gk_packed_bytes(int32_t kind, int64_t rows, int64_t cols) {
    return gk::packed_bytes((gk::Kind)kind, rows, cols);
}
GK_EXPORT int gk_unpack(int32_t kind, int64_t rows, int64_t cols, const uint8_t *packed, const gk::Planes *planes,
                        int64_t row0, int64_t row1) {
    return gk::unpack((gk::Kind)kind, rows, cols, packed, *planes, row0, row1);
}
