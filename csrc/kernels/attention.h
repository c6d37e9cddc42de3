// Attention of a tile of tokens over pages of keys and values, for one key/value head and all its query heads.
//
// A row is a token and a head of the group. Page by page, in ascending order: scores, soft cap, what is hidden, the
// softmax as far as it goes, weighted values. The numbers of a row come from its own query, and from every key and
// value by a sum of its own: other rows only decide which zeros are added, and `finish` makes all zeros alike.
//
// A few rows (a step of decoding) read the halves as they lie, once for all heads of the group, and ask for the values
// while they read the keys, and for the next keys while they read the values: without, two heads on one of 256 read 15
// GB/s instead of 24. Reading in order, 4 to 16 KiB at a time by all columns, was no better. More rows have each page made
// float32 once, in panels of columns, and multiply it block by block.
#pragma once

#include "functions.h"
#include "product.h"
#include "table.h"

namespace gk {
namespace GK_ISA {

constexpr int PASS = 32;  // rows that pass over a panel of columns while it is in the nearest cache
constexpr int FEW = 8;     // rows for which halves are read as they lie
constexpr int REGISTERS = PAGE / LANES;

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The same for every instruction set: attend_scratch_bytes returns it.
inline size_t scratch_bytes(int64_t tokens, int64_t group, int64_t head_dim) {
    const int64_t width = up_to(head_dim, LANES);
    const int64_t floats = up_to(tokens * group, 16) * head_dim + PAGE * head_dim + PAGE * width + PASS * (PAGE + 1);
    return (size_t)floats * sizeof(float) + 64;
}

inline void put_key(const float *k, int64_t head_dim, int64_t slot, uint16_t *page) {
    uint16_t halves[LANES];
    for (int64_t h = 0; h < head_dim; h += LANES) {
        const int64_t left = head_dim - h < LANES ? head_dim - h : LANES;
        to_half(halves, left < LANES ? load_part(k + h, left) : load(k + h));
        for (int64_t i = 0; i < left; i++) page[(h + i) * PAGE + slot] = halves[i];
    }
}

inline void put_value(const float *v, int64_t head_dim, int64_t slot, uint16_t *page) {
    uint16_t *to = page + slot * head_dim;
    int64_t h = 0;
    for (; h + LANES <= head_dim; h += LANES) to_half(to + h, load(v + h));
    if (h < head_dim) to_half_part(to + h, load_part(v + h, head_dim - h), head_dim - h);
}

// One side of a product: 16 columns from 16 * r on begin at data + r * by_register.
template <class Cell> struct Side {
    const Cell *data;
    int64_t by_register;
    int64_t by_step;  // 0: panels, whose steps follow each other
    const Cell *at(int64_t r) const { return data + r * by_register; }
    int64_t step(int registers) const { return by_step ? by_step : registers * LANES; }
};

// Registers of columns at once for R rows. Floats lie in panels; halves leave the choice, and few rows need many sums
// to keep the multipliers busy.
template <class Cell, int R> constexpr int across() {
    if constexpr (std::is_same_v<Cell, float>) return WIDE;
    if constexpr (WIDE > 1) return R > 4 ? 2 : 4;
    return R == 1 ? 4 : R == 2 ? 2 : 1;
}

// Asks for what will be read next, at the pace at which halves are read now.
template <class Cell, int V> struct Ahead {
    const uint16_t *next;
    void operator()(int64_t k) const {
        if constexpr (std::is_same_v<Cell, uint16_t>) {
            const uint16_t *p = next + k * V * LANES;
            if (V > 1 || k % 2 == 0) prefetch(p);
            if (V > 2) prefetch(p + 2 * LANES);
        }
    }
};

template <class Cell> struct Page {
    Side<Cell> keys, values;
    const uint16_t *next_values, *next_keys;  // to ask for while keys, and values, are read
    int64_t first;  // position
};

struct Rows {
    const Attend *a;
    Partial p;
    const float *q;  // scaled, ROWS side by side
    float *scores;   // (PASS, PAGE), then weights
    float *factor;   // (PASS)
    int64_t token(int64_t row) const { return row / a->group; }
    Range sees(int64_t row, int64_t first) const {  // slots of the page that begins at position first
        const Range all = visible(*a, a->position + token(row));
        return {all.lo - first < 0 ? 0 : all.lo - first, all.hi - first > PAGE ? PAGE : all.hi - first};
    }
};

template <int R, class Cell> inline void score(const Rows &rows, const Page<Cell> &page, int64_t row, float *scores) {
    constexpr int V = across<Cell, R>();
    const int64_t head_dim = rows.a->head_dim;
    const int64_t lo = rows.sees(row, page.first).lo, hi = rows.sees(row + R - 1, page.first).hi;
    const float *q = rows.q + row / ROWS * ROWS * head_dim + row % ROWS;
    for (int r = 0; r < REGISTERS; r += V) {
        if (!Range{lo, hi}.meets(r * LANES, (r + V) * LANES)) continue;
        product<R, V>(
            q, Number<1>(), Number<ROWS>(), page.keys.at(r), page.keys.step(V), head_dim,
            [](int, int) { return zero(); },
            [&](int i, int v, F16 sum) { store(scores + i * PAGE + (r + v) * LANES, sum); },
            Ahead<Cell, V>{page.next_values + r * LANES * head_dim});
    }
}

// Scores of one row become weights relative to the largest so far; returns what earlier weights are to be multiplied by.
inline float weigh(const Attend &a, Range sees, float *scores, float *most, float *total) {
    alignas(64) static const float slots[PAGE] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    F16 s[REGISTERS];
    for (int r = 0; r < REGISTERS; r++) s[r] = load(scores + r * LANES);
    if (a.softcap != 0)
        for (int r = 0; r < REGISTERS; r++) s[r] = softcap(s[r], all(a.softcap));
    if (sees.lo > 0 || sees.hi < PAGE) {
        const F16 lo = all((float)sees.lo), hi = all((float)sees.hi), hidden = all(-INFINITY);
        for (int r = 0; r < REGISTERS; r++) {
            const F16 slot = load(slots + r * LANES);
            s[r] = choose(less(slot, hi), choose(less(slot, lo), hidden, s[r]), hidden);
        }
    }
    const float here = largest(max(max(s[0], s[1]), max(s[2], s[3])));
    const float now = here > *most ? here : *most;
    const F16 shift = all(now == -INFINITY ? 0.0f : now);
    for (int r = 0; r < REGISTERS; r++) {
        s[r] = exp(sub(s[r], shift));
        store(scores + r * LANES, s[r]);
    }
    const float factor = now == *most ? 1.0f : largest(exp(sub(all(*most), shift)));
    *most = now;
    *total = *total * factor + sum(add(add(s[0], s[1]), add(s[2], s[3])));
    return factor;
}

template <int R, class Cell>
inline void gather(const Rows &rows, const Page<Cell> &page, int64_t row, const float *weights, const float *factor) {
    constexpr int V = across<Cell, R>();
    const int64_t head_dim = rows.a->head_dim;
    const int64_t lo = rows.sees(row, page.first).lo, hi = rows.sees(row + R - 1, page.first).hi;
    float *sum = rows.p.sum + row * head_dim;
    const auto columns = [&](int64_t r, auto wide) {
        constexpr int W = decltype(wide)::value;
        const int64_t left = head_dim - r * LANES, step = page.values.step(W);
        product<R, W>(
            weights + lo, Number<PAGE>(), Number<1>(), page.values.at(r) + lo * step, step, hi - lo,
            [&](int i, int v) {
                const float *p = sum + i * head_dim + (r + v) * LANES;
                return mul(all(factor[i]), W == 1 && left < LANES ? load_part(p, left) : load(p));
            },
            [&](int i, int v, F16 c) {
                float *p = sum + i * head_dim + (r + v) * LANES;
                W == 1 && left < LANES ? store_part(p, c, left) : store(p, c);
            },
            Ahead<Cell, W>{page.next_keys + r * LANES * PAGE});
    };
    const int64_t registers = (head_dim + LANES - 1) / LANES;
    int64_t r = 0;
    for (; (r + V) * LANES <= head_dim; r += V) columns(r, Number<V>());
    for (; r < registers; r++) columns(r, Number<1>());
}

// Rows row0 .. row1, at most PASS and from a multiple of ROWS or the first that sees anything on.
template <class Cell> inline void advance(const Rows &rows, const Page<Cell> &page, int64_t row0, int64_t row1) {
    const auto panels = [&](auto f) {
        for (int64_t row = row0; row < row1;) {
            const int64_t end = row / ROWS * ROWS + ROWS < row1 ? row / ROWS * ROWS + ROWS : row1;
            with_number((int)(end - row), [&](auto n) { f(row, n); });
            row = end;
        }
    };
    panels([&](int64_t row, auto n) {
        score<decltype(n)::value>(rows, page, row, rows.scores + (row - row0) * PAGE);
    });
    for (int64_t row = row0; row < row1; row++)
        rows.factor[row - row0] = weigh(*rows.a, rows.sees(row, page.first), rows.scores + (row - row0) * PAGE,
                                        rows.p.most + row, rows.p.total + row);
    panels([&](int64_t row, auto n) {
        gather<decltype(n)::value>(rows, page, row, rows.scores + (row - row0) * PAGE, rows.factor + (row - row0));
    });
}

// A page as float32, in panels of WIDE registers of columns (what is left over: of one).
inline void widen_keys(const uint16_t *keys, int64_t head_dim, float *to) {
    for (int64_t h = 0; h < head_dim; h++)
        for (int r = 0; r < REGISTERS; r++)
            store(to + r / WIDE * WIDE * LANES * head_dim + (h * WIDE + r % WIDE) * LANES,
                  from_half(keys + h * PAGE + r * LANES));
}
inline void widen_values(const uint16_t *values, int64_t head_dim, int64_t lo, int64_t hi, float *to) {
    const int64_t whole = head_dim / (WIDE * LANES) * WIDE, registers = (head_dim + LANES - 1) / LANES;
    for (int64_t slot = lo; slot < hi; slot++) {
        const uint16_t *from = values + slot * head_dim;
        for (int64_t r = 0; r < registers; r++) {
            const int64_t left = head_dim - r * LANES;
            const F16 v = left < LANES ? from_half_part(from + r * LANES, left) : from_half(from + r * LANES);
            float *panel = to + (r < whole ? r / WIDE * WIDE : r) * LANES * PAGE;
            store(panel + (r < whole ? slot * WIDE + r % WIDE : slot) * LANES, v);
        }
    }
}

inline void attend(const Attend &a, const Pages &pages, int64_t page0, int64_t page1, bool fresh, Partial p,
                   void *scratch) {
    const int64_t rows = (int64_t)a.tokens * a.group, head_dim = a.head_dim;
    float *room = (float *)(((uintptr_t)scratch + 63) / 64 * 64);
    float *q = room, *keys = q + up_to(rows, ROWS) * head_dim, *values = keys + PAGE * head_dim;
    float *scores = values + PAGE * up_to(head_dim, LANES);
    const Rows all_rows = {&a, p, q, scores, scores + PASS * PAGE};

    for (int64_t row = 0; row < rows; row++) {
        const float *from = a.q + row / a.group * a.q_stride + row % a.group * head_dim;
        float *to = q + row / ROWS * ROWS * head_dim + row % ROWS;
        for (int64_t h = 0; h < head_dim; h++) to[h * ROWS] = from[h] * a.scale;
        if (!fresh) continue;
        p.most[row] = -INFINITY;
        p.total[row] = 0;
        std::memset(p.sum + row * head_dim, 0, (size_t)head_dim * sizeof(float));
    }

    const auto seen_by = [&](int64_t page) {  // tokens: those that see any of it follow each other
        Range tokens = {0, a.tokens};
        const auto hidden = [&](int64_t t) {
            return !visible(a, a.position + t).meets(page * PAGE, page * PAGE + PAGE);
        };
        while (tokens.lo < tokens.hi && hidden(tokens.lo)) tokens.lo++;
        while (tokens.lo < tokens.hi && hidden(tokens.hi - 1)) tokens.hi--;
        return tokens;
    };
    const bool few = rows <= FEW && head_dim % LANES == 0;
    for (int64_t i = page0; i < page1; i++) {
        const Range tokens = seen_by(i);
        if (tokens.lo == tokens.hi) continue;
        const int64_t row0 = tokens.lo * a.group, row1 = tokens.hi * a.group;
        if (few) {
            const bool more = i + 1 < page1 && pages.keys[i + 1];
            advance(all_rows,
                    Page<uint16_t>{{pages.keys[i], LANES, PAGE},
                                   {pages.values[i], LANES, head_dim},
                                   pages.values[i],
                                   more ? pages.keys[i + 1] : pages.keys[i],
                                   i * PAGE},
                    row0, row1);
            continue;
        }
        const int64_t lo = all_rows.sees(row0, i * PAGE).lo, hi = all_rows.sees(row1 - 1, i * PAGE).hi;
        widen_keys(pages.keys[i], head_dim, keys);
        widen_values(pages.values[i], head_dim, lo, hi, values);
        const Page<float> page = {{keys, LANES * head_dim, 0}, {values, LANES * PAGE, 0}, nullptr, nullptr, i * PAGE};
        for (int64_t row = row0; row < row1;) {
            const int64_t end = row / PASS * PASS + PASS < row1 ? row / PASS * PASS + PASS : row1;
            advance(all_rows, page, row, end);
            row = end;
        }
    }
}

inline void merge(Partial earlier, Partial later, int64_t rows, int64_t head_dim) {
    for (int64_t row = 0; row < rows; row++) {
        float &most = earlier.most[row], other = later.most[row];
        if (other == -INFINITY && later.total[row] == 0) continue;  // it saw nothing
        const float now = other > most ? other : most;
        const F16 shift = all(now == -INFINITY ? 0.0f : now);
        const float keep = largest(exp(sub(all(most), shift))), take = largest(exp(sub(all(other), shift)));
        earlier.total[row] = earlier.total[row] * keep + later.total[row] * take;
        most = now;
        float *to = earlier.sum + row * head_dim;
        const float *from = later.sum + row * head_dim;
        for (int64_t h = 0; h < head_dim; h += LANES) {
            const int64_t n = head_dim - h;
            if (n < LANES)
                store_part(to + h, fma(load_part(from + h, n), all(take), mul(load_part(to + h, n), all(keep))), n);
            else
                store(to + h, fma(load(from + h), all(take), mul(load(to + h), all(keep))));
        }
    }
}

// sum / total; zeros for a row that saw nothing. Adding 0 turns -0 into 0.
inline void finish(Partial p, int64_t rows, int64_t head_dim, float *out, int64_t out_stride, int64_t group) {
    for (int64_t row = 0; row < rows; row++) {
        const float *from = p.sum + row * head_dim;
        float *to = out + row / group * out_stride + row % group * head_dim;
        const F16 total = all(p.total[row] == 0 ? 1.0f : p.total[row]);
        for (int64_t h = 0; h < head_dim; h += LANES) {
            const int64_t n = head_dim - h;
            if (n < LANES)
                store_part(to + h, add(div(load_part(from + h, n), total), zero()), n);
            else
                store(to + h, add(div(load(from + h), total), zero()));
        }
    }
}

}  // namespace GK_ISA
}  // namespace gk
