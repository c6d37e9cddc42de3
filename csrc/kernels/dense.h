// Planes of quantized rows to float32, to the bits of the definition in block_types.py:
//
//     value = scale * (code - zero) - min        scale = super_scale * scale, min = super_min * min
//     value = scale * values[code]               scale = super_scale * unit * scale
//
// Training multiplies by dense weights and keeps them quantized, so that each is made dense anew where it is multiplied.
#pragma once

#include "linear.h"
#include "simd.h"

namespace gk {
namespace GK_ISA {

// Codes of a run of 32 elements, one a byte and four a word. A plane of b bits is b words for a run: element e is in byte
// e % (4 b) at bit b (e / (4 b)).
template <int BITS> inline void plane_codes(const uint8_t *plane, uint32_t *codes) {
    uint32_t words[BITS];
    std::memcpy(words, plane, sizeof words);
    constexpr uint32_t FIELD = 0x01010101u * ((1u << BITS) - 1);
    for (int j = 0; j < 8 / BITS; j++)
        for (int w = 0; w < BITS; w++) codes[j * BITS + w] = words[w] >> (j * BITS) & FIELD;
}

// Scales, or minima, of up to 16 groups.
template <bool SUPER, bool SIGNED>
inline void group_scales(const void *plane, const void *super, float of_one, int64_t first, int64_t block, int count,
                         float *to) {
    if constexpr (!SUPER) {
        store(to, from_half_part((const uint16_t *)plane + first, count));
    } else {
        alignas(64) float unit[LANES];
        store(unit, mul(from_half_part((const uint16_t *)super + block, 1), all(of_one)));
        const uint8_t *small = (const uint8_t *)plane + first;
        for (int i = 0; i < count; i++) to[i] = unit[0] * (float)(SIGNED ? (int)(int8_t)small[i] : (int)small[i]);
    }
}

template <Kind KIND> void dense_row(const Planes &p, int64_t row, int64_t cols, float *out) {
    constexpr Format f = format(KIND);
    constexpr bool SIGNED = KIND == Q3_K || whole_scales(KIND);  // scales that are multiples of a super scale
    constexpr int64_t WIDE = GROUP * BLOCK;
    for (int64_t c = 0; c < cols; c += WIDE) {
        const int64_t width = cols - c < WIDE ? cols - c : WIDE;
        const int count = (int)(width / f.group);
        const int64_t first = (row * cols + c) / f.group, block = row * (cols / WIDE) + c / WIDE;
        alignas(64) float scales[LANES], minima[LANES];
        group_scales<f.super, SIGNED>(p.scales, p.super_scales, f.unit, first, block, count, scales);
        if constexpr (f.minima) group_scales<f.super, false>(p.mins, p.super_mins, f.unit, first, block, count, minima);
        for (int64_t run = 0; run < width / GROUP; run++) {
            const int64_t at = (row * cols + c) / GROUP + run;
            alignas(64) uint32_t codes[8];
            if constexpr (f.low == 8) {
                std::memcpy(codes, (const uint8_t *)p.codes + at * GROUP, GROUP);
            } else {
                plane_codes<f.low>((const uint8_t *)p.codes + at * 4 * f.low, codes);
                if constexpr (f.high != 0) {
                    uint32_t high[8];
                    plane_codes<f.high>((const uint8_t *)p.high + at * 4 * f.high, high);
                    for (int i = 0; i < 8; i++) codes[i] |= high[i] << f.low;
                }
            }
            if constexpr (listed(KIND)) {
                int8_t *each = (int8_t *)codes;
                for (int i = 0; i < GROUP; i++) each[i] = f.values[each[i]];
            }
            for (int half = 0; half < 2; half++) {
                const int64_t group = run * (GROUP / f.group) + (f.group == LANES ? half : 0);
                F16 value = from_bytes((const int8_t *)codes + half * LANES);
                if constexpr (f.zero != 0) value = sub(value, all((float)f.zero));
                value = mul(value, all(scales[group]));
                if constexpr (f.minima) value = sub(value, all(minima[group]));
                store(out + c + run * GROUP + half * LANES, value);
            }
        }
    }
}

inline void dense(Kind kind, const Planes &p, int64_t row0, int64_t row1, int64_t cols, float *out) {
    by_kind(kind, [&]<Kind K>() {
        if constexpr (quantized(K))
            for (int64_t row = row0; row < row1; row++) dense_row<K>(p, row, cols, out + row * cols);
    });
}

}  // namespace GK_ISA
}  // namespace gk
