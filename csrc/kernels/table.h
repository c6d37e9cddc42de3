// The kernels of one instruction set: arithmetic on raw pointers, one thread, no allocation, no torch, no Python.
//
// The executor divides the work and calls these from its threads. Every sum has an order that depends on a weight's
// shape and on absolute positions alone: never on how many tokens come at once, how they are cut, or which thread.
// All pointers may be unaligned except where said; no two outputs overlap an input unless said.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gk {

// ---- weights of linears (weights.h makes them) ----------------------------------------------------------------------

enum Kind : int32_t {  // numbers are part of packed files: append only
    F32 = 0, BF16 = 1,
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 4, Q5_1 = 5, Q8_0 = 6, Q2_K = 7, Q3_K = 8, Q4_K = 9, Q5_K = 10, Q6_K = 11,
    IQ4_NL = 12, IQ4_XS = 13, IQ3_XXS = 14, IQ3_S = 15, IQ2_XXS = 16, IQ2_XS = 17, IQ2_S = 18, IQ1_S = 19, IQ1_M = 20,
    KINDS = 21
};

constexpr int TILE = 16;  // rows of a weight that are stored, and multiplied, side by side

struct Weight {  // (rows, cols), in tiles of 16 rows; rows beyond the last are zeros
    Kind kind;
    int64_t rows, cols;
    const uint8_t *data;  // 64-byte aligned; packed_bytes(kind, rows, cols) of it
};

// Activations of T tokens, as a kind of weight wants them: int8 with a scale for each 32 columns and the sums of codes for
// each 16 (for zero points and minima), or float32 as they are. `activation_bytes` of room, 64-byte aligned.
struct Activations {
    int64_t tokens, cols;
    const float *x;  // (tokens, cols), contiguous
    uint8_t *quantized;  // null where the kind multiplies floats
};

// ---- attention ------------------------------------------------------------------------------------------------------

constexpr int PAGE = 64;  // positions of a page of keys and values; page i holds positions i * PAGE to (i + 1) * PAGE

// One key/value head's view of one sequence. Keys are float16 (H, PAGE) in a page: a lane is a position; values float16
// (PAGE, H). Pages outside of what is visible may be null.
struct Pages {
    const uint16_t *const *keys;  // by page number
    const uint16_t *const *values;
};

struct Span {  // positions start .. end - 1, whose tokens see one another
    int64_t start, end;
};

struct Attend {
    const float *q;  // rotated queries of `tokens` tokens: token t, head g of the group at q + t * q_stride + g * head_dim
    int64_t q_stride;
    int32_t tokens, group, head_dim;  // group: query heads of this key/value head
    int64_t position;  // absolute, of the first token
    int64_t end;  // of the sequence: one past its last position
    int64_t before, after;  // positions that a token sees before and after its own; ALL: every one
    const Span *spans;  // ascending and disjoint: those that may hold a token of these
    int64_t n_spans;
    float scale, softcap;  // softcap 0: none
};

constexpr int64_t ALL = INT64_MAX;

struct Range {
    int64_t lo, hi;  // lo .. hi - 1
    bool meets(int64_t from, int64_t to) const { return lo < to && from < hi; }
};

// The positions that position q sees: those of its window, and those of its span. It ends no earlier, and begins no
// earlier, than what the position before sees. Static: each instruction set has its own.
static inline Range visible(const Attend &a, int64_t q) {
    Range seen = {q > a.before ? q - a.before : 0, a.after < a.end - 1 - q ? q + 1 + a.after : a.end};
    for (int64_t i = 0; i < a.n_spans; i++) {
        const Span span = a.spans[i];
        if (q < span.start || q >= span.end) continue;
        if (span.start < seen.lo) seen.lo = span.start;
        if (span.end > seen.hi) seen.hi = span.end;
    }
    return seen;
}

// Running softmax of rows (token, head of the group), merged over pages in ascending order.
struct Partial {
    float *most;  // (tokens * group): largest score so far, -inf at first
    float *total;  // (tokens * group): sum of exp(score - most)
    float *sum;  // (tokens * group, head_dim): sum of exp(score - most) * value
};

// One head of rows that all see one another, of which nothing is remembered: the patches of an image. Row r of each array
// is at r * its stride.
struct Within {
    const float *q, *k, *v;
    float *out;
    int64_t q_stride, k_stride, v_stride, out_stride, rows;
    int32_t head_dim;
    float scale;
};

struct Planes;  // of a weight as files have it, before it is laid out for the kernels (weights.h)

struct Kernels {
    const char *name;  // "avx512", "avx2", "portable"

    // linear.h
    void (*quantize)(const Activations &a, int64_t token0, int64_t token1);  // fill a.quantized for these tokens
    // y[t * stride + r] = sum_c w[r, c] * x[t, c] for the rows of tiles tile0 .. tile1 (rows beyond w.rows are not written)
    void (*linear)(const Weight &w, int64_t tile0, int64_t tile1, const Activations &a, float *y, int64_t stride);
    void (*row)(const Weight &w, int64_t row, float *out);  // one row, exactly the numbers that its kind defines

    // dense.h: rows row0 .. row1 of a quantized weight in float32, at their places in out (rows, cols)
    void (*dense)(Kind kind, const Planes &planes, int64_t row0, int64_t row1, int64_t cols, float *out);

    // sketch.h: one tile of a sketch, from the numbers of 16 rows side by side, (cols, 16), which it turns in their place
    void (*make_sketch)(float *rows, const float *signs, int64_t cols, uint8_t *out);
    void (*sketch)(const uint8_t *data, int64_t tile0, int64_t tile1, int64_t cols, const int8_t *q, int32_t sum, float step,
                   float slack, float *bounds, float *best);

    // elementwise.h: rows of n floats
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *y);  // weight as stored; 1 + weight
    void (*rope)(float *x, int64_t heads, int64_t head_dim, const float *cos, const float *sin, int64_t half);
    void (*gelu)(const float *x, int64_t n, float *y);
    void (*geglu)(const float *gate, const float *up, int64_t n, float *y);
    void (*softcap)(float *x, float cap, int64_t n);
    void (*add)(const float *a, const float *b, int64_t n, float *y);  // y may be a or b
    void (*mul)(const float *a, const float *b, int64_t n, float *y);
    // largest absolute value, for range checks: infinite or not a number comes back as infinite
    float (*magnitude)(const float *x, int64_t n);
    int64_t (*below)(const float *x, float least, int64_t n);  // how many at the start are below `least`, by 64

    // attention.h
    void (*put_key)(const float *k, int64_t head_dim, int64_t slot, uint16_t *page);  // slot: position in the page
    void (*put_value)(const float *v, int64_t head_dim, int64_t slot, uint16_t *page);
    // pages page0 .. page1 of what these tokens may see, into a partial (initialised by its first call: fresh = true)
    void (*attend)(const Attend &a, const Pages &pages, int64_t page0, int64_t page1, bool fresh, Partial p, void *scratch);
    // fold later into earlier (pages after those of `earlier`)
    void (*merge)(Partial earlier, Partial later, int64_t rows, int64_t head_dim);
    void (*finish)(Partial p, int64_t rows, int64_t head_dim, float *out, int64_t out_stride, int64_t group);

    // encoder.h: the image tower's
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int64_t n, float *y);
    void (*attend_within)(const Within &w, void *scratch);

    // recurrence.h
    // causal convolution of T rows; tail: (taps - 1, R) inputs before them (zeros before a sequence), updated in place
    void (*conv1d)(const float *x, int64_t tokens, int64_t width, int64_t stride, const float *weight, const float *bias,
                   int64_t taps, float *tail, float *y, int64_t channel0, int64_t channel1);
    // (T, blocks, in) by (blocks, in, out) + bias, blocks block0 .. block1
    void (*block_linear)(const float *x, int64_t tokens, int64_t blocks, int64_t width, const float *weight,
                         const float *bias, float *y, int64_t block0, int64_t block1);
    // RG-LRU over T rows; hidden (R) is read and left at the last row. first: the row 0 is the first of its sequence
    void (*rg_lru)(const float *x, const float *input_gate, const float *recurrent_gate, const float *param, int64_t tokens,
                   int64_t width, bool first, float *hidden, float *y, int64_t channel0, int64_t channel1);
};

const Kernels *portable_kernels();
const Kernels *avx2_kernels();    // null where the build has none
const Kernels *avx512_kernels();  // needs F, BW, VL, DQ and VNNI

size_t activation_bytes(Kind kind, int64_t tokens, int64_t cols);
size_t attend_scratch_bytes(int32_t tokens, int32_t group, int32_t head_dim);
size_t attend_within_scratch_bytes(int64_t rows, int32_t head_dim);

}  // namespace gk
