// What benchmarks/attention.py times, in loops of its own: Python is entered once a measurement.
#include "kernels/attention.h"

using namespace gk;
using namespace gk::GK_ISA;

extern "C" {

// One key/value head after the other, as a step does layer by layer: pages page0 .. page1 in segments of their own,
// merged in order.
void attend_all(const Attend *a, const Pages *heads, int64_t count, int64_t page0, int64_t page1, int64_t segment,
                const Partial *whole, const Partial *part, float *out, void *scratch) {
    const int64_t rows = (int64_t)a->tokens * a->group;
    for (int64_t head = 0; head < count; head++) {
        for (int64_t page = page0; page < page1; page += segment) {
            const int64_t end = page + segment < page1 ? page + segment : page1;
            attend(*a, heads[head], page, end, true, page == page0 ? *whole : *part, scratch);
            if (page != page0) merge(*whole, *part, rows, a->head_dim);
        }
        finish(*whole, rows, a->head_dim, out, a->group * a->head_dim, a->group);
    }
}

// A prompt of `tokens`, a tile at a time, each with all that it may see.
void prefill(const Attend *prompt, const Pages *head, int64_t tile, const Partial *p, float *out, void *scratch) {
    for (int64_t t = 0; t < prompt->tokens; t += tile) {
        Attend a = *prompt;
        a.q += t * a.q_stride;
        a.position += t;
        a.tokens = (int32_t)(prompt->tokens - t < tile ? prompt->tokens - t : tile);
        const int64_t last = a.position + a.tokens, rows = (int64_t)a.tokens * a.group;
        attend(a, *head, 0, (last + PAGE - 1) / PAGE, true, *p, scratch);
        finish(*p, rows, a.head_dim, out + t * a.q_stride, a.q_stride, a.group);
    }
}

// The limits: nothing but reading, and nothing but multiplying.
float read_all(const float *p, int64_t n) {
    F16 s[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i + 64 <= n; i += 64)
        for (int k = 0; k < 4; k++) s[k] = max(s[k], load(p + i + k * LANES));
    return largest(max(max(s[0], s[1]), max(s[2], s[3])));
}

float multiply(int64_t n) {  // 6 * 2 * LANES operations each
    F16 s[6];
    const F16 x = all(0.999f), y = all(0.001f);
    for (int k = 0; k < 6; k++) s[k] = all((float)k);
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 6
        for (int k = 0; k < 6; k++) s[k] = fma(s[k], x, y);
    return sum(add(add(add(s[0], s[1]), add(s[2], s[3])), add(s[4], s[5])));
}
}
