// How the weights of linears lie in memory for the kernels, and how the planes of block_types.py get there and back.
//
// A weight is cut into tiles of 16 rows, and a tile is one sequential stream; rows side by side fill the lanes of a vector.
//
//     tile        [supers] block block ... block          all parts begin at multiples of 64 bytes
//     supers      kinds with superblocks: super scales of all blocks, 16 float16 (one a row) each; then super minima
//     block       [scales] group group ... group          256 columns: 8 groups; the last of a row may have fewer
//     scales      see below, as stored: nothing is rounded, nothing grows
//     group       32 columns: vectors of 64 bytes, byte 4 r + j belongs to row r
//
// A group of codes is eight chunks of 4 columns; chunk c, byte 4 r + j is the code of row r, column 4 c + j:
//
//     8 bits      vector c is chunk c, signed as it is
//     4 bits      vector c holds chunk c in the low half of each byte, chunk c + 4 in the high half      (c = 0 .. 3)
//     2 bits      vector v holds chunk 2 i + v at bit 2 i of each byte                                   (v = 0, 1)
//     1 bit       the vector holds chunk c at bit c of each byte
//     5 bits      vector v holds chunk v in the low bits of each byte                                    (v = 0 .. 4)
//                 and above them: v = 0, 1, 2 the low three bits of chunks 5, 6, 7; v = 3 the high two of 5, then bit 3 of
//                 6; v = 4 bit 4 of 6, then the high two of 7
//     6 bits      vector v holds a chunk in the low bits of each byte: 0, 1, 2, then 4, 5, 6             (v = 0 .. 5)
//                 and above them two bits of chunk 3, low ones first, then of chunk 7
//
// 5 and 6 bits are two planes put together: decoding them from vectors of 4 bits and of 1 or 2 takes half as many steps
// more. Q3_K keeps its planes apart, 2 bits first. All but 5 and 6 bits are the planes' own 32-bit words, transposed.
//
// Scales (S) and minima (M) of a block, for each of the 16 rows:
//
//     Q4_0 Q5_0 Q8_0    float16 S of each group
//     Q4_1 Q5_1         float16 S of each group, then M of each
//     IQ4_NL            float16 S of each group
//     Q6_K              int8 S of 16 half groups
//     other IQ kinds    int8 S of 8 groups, or of 16 half groups
//     Q2_K              one byte for each of 16 half groups: S + 16 M
//     Q4_K Q5_K         6 bits each: 8 bytes of low halves, S + 16 M; 4 bytes of high bits: groups j and j + 4 share one,
//                       S at bit 0, M at bit 2, S of j + 4 at bit 4, M of j + 4 at bit 6
//     Q3_K              S + 32 in 6 bits: 8 bytes of low halves, half groups j and j + 8 share one; 4 bytes of high bits:
//                       half groups j, j + 4, j + 8, j + 12 at bits 0, 2, 4, 6
//
// F32 and BF16 have no blocks: a tile is 16 rows' numbers of column 0, then of column 1, and so on.
#pragma once

#include "kernels/table.h"

namespace gk {

constexpr int GROUP = 32;  // columns that share a scale of the activations, and at least one of the weight
constexpr int BLOCK = 8;  // groups

struct Format {
    int low, high;  // bits of the two planes of codes; 0: none
    int group;  // columns that share a scale; 0: not quantized
    int zero;  // the code that stands for 0
    bool minima, super;
    const int8_t *values = nullptr;  // the numbers that the 16 codes stand for; null: code - zero
    float unit = 1;  // what a super scale of 1 is
};

// 16 each; codes of 3 bits use half of them.
constexpr int8_t VALUES_4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t VALUES_3_XXS[16] = {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62};
constexpr int8_t VALUES_3_S[16] = {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15};
constexpr int8_t VALUES_2[16] = {8, 25, 43, 0, -8, -25, -43, 0};
constexpr int8_t VALUES_1[16] = {-7, 1, 9, 0, -9, -1, 7, 0};

constexpr Format format(Kind kind) {
    switch (kind) {
        case Q4_0: return {4, 0, 32, 8, false, false};
        case Q4_1: return {4, 0, 32, 0, true, false};
        case Q5_0: return {4, 1, 32, 16, false, false};
        case Q5_1: return {4, 1, 32, 0, true, false};
        case Q8_0: return {8, 0, 32, 0, false, false};
        case Q2_K: return {2, 0, 16, 0, true, true};
        case Q3_K: return {2, 1, 16, 4, false, true};
        case Q4_K: return {4, 0, 32, 0, true, true};
        case Q5_K: return {4, 1, 32, 0, true, true};
        case Q6_K: return {4, 2, 16, 32, false, true};
        case IQ4_NL: return {4, 0, 32, 0, false, false, VALUES_4};
        case IQ4_XS: return {4, 0, 32, 0, false, true, VALUES_4};
        case IQ3_XXS: return {4, 0, 32, 0, false, true, VALUES_3_XXS, 0.25f};
        case IQ3_S: return {4, 0, 32, 0, false, true, VALUES_3_S};
        case IQ2_XXS: return {2, 1, 32, 0, false, true, VALUES_2, 0.125f};
        case IQ2_XS: return {2, 1, 16, 0, false, true, VALUES_2, 0.125f};
        case IQ2_S: return {2, 1, 16, 0, false, true, VALUES_2, 0.125f};
        case IQ1_S: return {2, 1, 32, 0, false, true, VALUES_1, 0.125f};
        case IQ1_M: return {2, 1, 16, 0, false, true, VALUES_1, 0.125f};
        default: return {0, 0, 0, 0, false, false};
    }
}

constexpr bool quantized(Kind kind) { return format(kind).group != 0; }
// Whether codes are places in a list of values.
constexpr bool listed(Kind kind) { return IQ4_NL <= kind && kind <= IQ1_M; }
// Whether small scales are whole bytes, as in the planes.
constexpr bool whole_scales(Kind kind) { return kind == Q6_K || (format(kind).super && listed(kind)); }
constexpr int64_t round64(int64_t n) { return (n + 63) / 64 * 64; }

// Bytes of the parts of a tile.
constexpr int64_t super_bytes(Kind kind, int64_t cols) {
    const Format f = format(kind);
    return f.super ? round64(cols / (GROUP * BLOCK) * TILE * 2 * (1 + f.minima)) : 0;
}
constexpr int64_t scale_bytes(Kind kind, int64_t groups) {  // of a block of this many groups
    const Format f = format(kind);
    if (!f.super) return round64(groups * TILE * 2 * (1 + f.minima));
    return TILE * (whole_scales(kind) ? GROUP * BLOCK / f.group : kind == Q2_K ? 16 : 12);
}
constexpr int64_t code_bytes(Kind kind) { return 64 * (format(kind).low + format(kind).high); }  // of a group
constexpr int64_t tile_bytes(Kind kind, int64_t cols) {
    if (!quantized(kind)) return round64(cols * TILE * (kind == F32 ? 4 : 2));
    const int64_t groups = cols / GROUP, rest = groups % BLOCK;
    return super_bytes(kind, cols) + groups / BLOCK * scale_bytes(kind, BLOCK) + (rest ? scale_bytes(kind, rest) : 0) +
           groups * code_bytes(kind);
}

enum Dense : int32_t { DENSE_F32 = 0, DENSE_BF16 = 1, DENSE_F16 = 2 };

// The planes of a whole weight, each contiguous, row by row; those that its kind does not have are not looked at.
struct Planes {
    void *codes, *high, *scales, *mins, *super_scales, *super_mins;
    void *dense;  // F32, BF16: (rows, cols)
    int32_t dense_type;
};

// 0 where there is no such kind, or rows of `cols` do not divide into its blocks.
size_t packed_bytes(Kind kind, int64_t rows, int64_t cols);

// Rows row0 to row1 (row0 a multiple of 16; row1 too, or the last) of `planes`, written to their place in `out`, the
// packed weight: ranges may be filled by several threads. False, where a kind does not exist, has no such shape, cannot
// hold a dense type without rounding (F32 holds all three, BF16 its own), or a scale has more bits than its kind stores.
bool pack(Kind kind, int64_t rows, int64_t cols, const Planes &planes, uint8_t *out, int64_t row0, int64_t row1);

// The inverse: fills the planes, byte for byte those that were packed (a dense weight in its kind's own type).
bool unpack(Kind kind, int64_t rows, int64_t cols, const uint8_t *packed, const Planes &planes, int64_t row0, int64_t row1);

}  // namespace gk
