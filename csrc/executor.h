// Runs a lowered Program: a flat list of steps over buffers, without returning to Python between them.
//
// A step has a domain. Steps over rows (a token each) that follow one another are one parallel region, so that a token's
// row stays in a core's cache through a norm, a sum and a quantization; projections are divided by tiles of a weight,
// attention by sequence, key/value head, tile of queries and segment of pages, recurrences by channels.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/table.h"
#include "pool.h"
#include "state.h"

namespace gk {

enum Op : int32_t {  // numbers are part of packed files: append only
    EMBED = 0, ROPE_TABLE = 1, RMS_NORM = 2, QUANTIZE = 3, LINEAR = 4, ROPE = 5, REMEMBER = 6, ATTEND = 7, GEGLU = 8, GELU = 9,
    ADD = 10, MUL = 11, BIAS = 12, SOFTCAP = 13, TAKE_ROWS = 14, CONV1D = 15, BLOCK_LINEAR = 16, RG_LRU = 17, PUT_ROWS = 18, SCALE = 19,
    LAYER_NORM = 20, ADD_POSITIONS = 21, ATTEND_WITHIN = 22, OPS = 23
};

struct Slice {  // columns of a buffer
    int32_t buffer, offset, width;
};

constexpr int STEP_WEIGHTS = 8, STEP_NUMBERS = 6;

struct Step {
    int32_t op;
    Slice in[3], out;
    int32_t weights[STEP_WEIGHTS];  // of the table, -1: none
    int32_t n[STEP_NUMBERS];  // by op: heads, layer, window, ...
    float f[3];  // by op: scale, eps, cap
};
static_assert(sizeof(Step) == 120, "Python writes these as 30 words");

struct Buffer {
    int32_t width;  // floats a row; a quantized buffer: columns of the weight that reads it
    int32_t domain;  // rows: 0 tokens, 1 rows that need logits
    int32_t kind;  // 0 floats, 1 quantized activations, 2 the logits that the caller gets
};

struct Table {  // a weight: packed (kind of table.h), or a plain array of floats (kind -1)
    int32_t kind, rows, cols, unused;
    const void *data;
    uint64_t bytes;
};

struct Span {  // new tokens of one sequence
    int64_t first, end, slot, position, prefix;
};

class Executor {
public:
    // Checks everything that a step refers to; `error` says what is wrong with a program that must not run.
    static Executor *make(const Kernels *kernels, const Step *steps, int64_t n_steps, const Buffer *buffers, int64_t n_buffers,
                          const Table *table, int64_t n_table, const Layer *layers, int64_t n_layers, std::string &error);

    // What a caller will look at in a row of logits; for the rest -inf is as good. See `screen`.
    struct Wanted {
        int32_t best;  // so many of the best rows; 0: all of the table
        float drop;  // or, if not negative, all rows down to so much below the best one (after the cap)
        int64_t kept0, kept1;  // rows that are always computed, in `kept`; they do not count among the best
    };

    enum Result : int32_t { DONE = 0, STOPPED = 1, NO_MEMORY = 2, TOO_LARGE = 3 };

    struct Call {
        const int64_t *tokens;
        int64_t n_tokens;
        const Span *spans;
        int64_t n_spans;
        const int64_t *rows;
        int64_t n_rows;
        const float *features;  // image features, (n_features, width), and the rows that they replace
        const int64_t *feature_rows;
        int64_t n_features;
        float *logits;
        const Wanted *wanted;  // null, or one a row
        const int64_t *kept;
        int64_t *computed;  // null, or of each row how many logits were computed
        double *seconds;  // null, or one a step: how long it took (steps then run one by one)
    };

    // `keep_on` is asked between regions, now and then, and ends the run with false. On anything but DONE the state is as before.
    Result run(const Call &call, State &state, Pool &pool, bool (*keep_on)());

    const std::vector<Layer> &layers() const { return layers_; }

    // Whether it is a program without tokens, from rows of `in` floats (`features`) to rows of `out` (`logits`).
    bool encodes(int64_t in, int64_t out) const;

private:
    struct Run;
    void region(Run &run, size_t first, size_t end);
    void rows(Run &run, const Step &step, int64_t row0, int64_t row1);
    void linear(Run &run, const Step &step);
    void attend(Run &run, const Step &step);
    void attend_within(Run &run, const Step &step);
    bool screen(Run &run, const Step &step);
    void softcap(Run &run, const Step &step);
    void recur(Run &run, const Step &step);
    bool layout(int64_t tokens, int64_t rows);

    const Kernels *kernels_ = nullptr;
    std::vector<Step> steps_;
    std::vector<Buffer> buffers_;
    std::vector<Table> table_;
    std::vector<Layer> layers_;
    std::vector<char> arena_;
    std::vector<size_t> offsets_;
    std::vector<char> partials_;
    std::vector<std::vector<char>> scratch_;
    std::vector<float> bounds_, best_;
    int misses_ = 0, pause_ = 0;  // of screening
    std::vector<int64_t> picked_;  // tiles of the output table that were computed, where the rest was screened out
    std::atomic<int> overflow_{0};
};

}  // namespace gk
