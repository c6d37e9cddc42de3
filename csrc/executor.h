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
    LAYER_NORM = 20, ADD_POSITIONS = 21, ATTEND_WITHIN = 22, GAIN = 23, REPLACE_ROWS = 24, REPLACE_COLUMNS = 25,
    OPS = 26
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
    int32_t kind;  // 0 floats, 1 quantized activations, 2 the output that the caller gets
};

struct Table {  // a weight: packed (kind of table.h), or a plain array of floats (kind -1)
    int32_t kind, rows, cols, unused;
    const void *data;
    uint64_t bytes;
};

struct Chunk {  // new tokens of one sequence: rows first .. end - 1 of the call
    int64_t first, end, slot, position;
    int64_t span0, span1;  // those of the call's spans that lie in it
};

struct LogitsFilter {  // which logits of a row the caller will look at
    int32_t top_n;  // this many of the largest; 0: no filter, the row is returned in full
    float max_gap;  // or, if not negative, all that are at most this much below the largest (after the cap)
    int64_t always0, always1;  // ids that are returned whatever their logits, ascending, in `Call::always`; not counted
};

struct Candidates {  // what a filter leaves of a row: ids ascending
    std::vector<int64_t> ids;
    std::vector<float> logits;
};

class Executor {
public:
    // Checks everything that a step refers to; `error` says what is wrong with a program that must not run.
    static Executor *make(const Kernels *kernels, const Step *steps, int64_t n_steps, const Buffer *buffers, int64_t n_buffers,
                          const Table *table, int64_t n_table, const Layer *layers, int64_t n_layers, std::string &error);

    enum Result : int32_t { DONE = 0, STOPPED = 1, NO_MEMORY = 2, TOO_LARGE = 3, NO_SUCH_OUTPUT = 4 };

    struct Call {  // of 8-byte words, so that Python fills it in
        const int64_t *tokens;
        int64_t n_tokens;
        const Chunk *chunks;
        int64_t n_chunks;
        const Span *spans;
        const int64_t *rows;
        int64_t n_rows;
        const float *features;  // image features, (n_features, width), and the rows that they replace
        const int64_t *feature_rows;
        int64_t n_features;
        int64_t hidden;  // 1: the output is what the head reads, in place of its logits
        float *out;  // (rows, width): all of them, or of logits those without a filter
        const LogitsFilter *filters;  // null, or one a row
        const int64_t *always;
        int64_t *computed;  // null, or of each row how many logits were computed
        double *seconds;  // null, or one a step: how long it took (steps then run one by one)
    };

    // `keep_on` is asked between regions, now and then, and ends the run with false. On anything but DONE the state is as before.
    Result run(const Call &call, State &state, Pool &pool, bool (*keep_on)());

    const std::vector<Layer> &layers() const { return layers_; }

    // Whether it is a program without tokens, from rows of `in` floats (`features`) to rows of `out` floats.
    bool encodes(int64_t in, int64_t out) const;

    struct Shape {
        int64_t width, domain;  // of the output
        int64_t hidden;  // width of what the head reads; 0: there is no head
        int64_t filters;  // whether its rows can be filtered
    };
    const Shape &shape() const { return shape_; }
    // Of the last run, by row; empty where there was no filter.
    const std::vector<Candidates> &candidates() const { return candidates_; }

private:
    struct Run;
    void region(Run &run, size_t first, size_t end);
    void rows(Run &run, const Step &step, int64_t row0, int64_t row1);
    void linear(Run &run, const Step &step);
    void attend(Run &run, const Step &step);
    void attend_within(Run &run, const Step &step);
    void filter(Run &run);
    bool screen(Run &run, const Step &step);
    void find_head();
    float cap() const { return head_ + 1 < steps_.size() ? steps_[head_ + 1].f[0] : 0.0f; }  // of the logits; 0: none
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
    size_t head_ = 0;  // the step that makes logits
    Slice read_{};  // what it reads, before it is quantized
    Shape shape_{};
    std::vector<Candidates> candidates_;
    std::vector<float> bounds_, best_, found_;  // of screening
    std::vector<int64_t> picked_;  // tiles of the output table that are computed
    int misses_ = 0, pause_ = 0;
    std::atomic<int> overflow_{0};
};

}  // namespace gk
