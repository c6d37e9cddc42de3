// Checks everything that the steps of a program refer to, so that a damaged file is refused and never read out of bounds.
#include <algorithm>

#include "executor.h"
#include "kernels/sketch.h"
#include "weights.h"

namespace gk {

namespace {

int inputs(int32_t op) {
    switch (op) {
    case EMBED: case ROPE_TABLE: return 0;
    case ATTEND: case ATTEND_WITHIN: case RG_LRU: case ROPE: return 3;
    case REMEMBER: case GEGLU: case ADD: case MUL: case REPLACE_COLUMNS: return 2;
    default: return 1;
    }
}

bool tokens_only(int32_t op) {
    switch (op) {
    case EMBED: case ROPE_TABLE: case PUT_ROWS: case REPLACE_ROWS: case ATTEND: case ATTEND_WITHIN: case ADD_POSITIONS: case CONV1D:
    case BLOCK_LINEAR: case RG_LRU: return true;
    default: return false;
    }
}

}  // namespace

Executor *Executor::make(const Kernels *kernels, const Step *steps, int64_t n_steps, const Buffer *buffers, int64_t n_buffers,
                         const Table *table, int64_t n_table, const Layer *layers, int64_t n_layers, std::string &error) {
    const auto wrong = [&](int64_t i, const char *what) {
        error = "step " + std::to_string(i) + ": " + what;
        return nullptr;
    };
    if (n_steps < 1 || n_buffers < 1 || n_table < 1 || n_layers < 0) return wrong(0, "an empty program");
    for (int64_t i = 0; i < n_buffers; i++)
        if (buffers[i].width < 1 || buffers[i].width > 1 << 24 || buffers[i].domain < 0 || buffers[i].domain > 1 ||
            buffers[i].kind < 0 || buffers[i].kind > 2)
            return wrong(i, "a malformed buffer");
    const Buffer *output = std::find_if(buffers, buffers + n_buffers, [](const Buffer &b) { return b.kind == 2; });
    if (output == buffers + n_buffers) return wrong(0, "no output");
    for (int64_t i = 0; i < n_buffers; i++)
        if (buffers[i].kind == 2 && (buffers[i].width != output->width || buffers[i].domain != output->domain))
            return wrong(i, "outputs of two shapes");
    for (int64_t i = 0; i < n_layers; i++) {
        const Layer &layer = layers[i];
        const bool attends = layer.kind == 0 && layer.kv_heads > 0 && layer.kv_heads <= 1024 && layer.head_dim > 0 &&
                             layer.head_dim <= 4096 && layer.before >= -1 && layer.after >= -1;
        const bool recurs = layer.kind == 1 && layer.width > 0 && layer.width <= 1 << 20 && layer.taps > 0 && layer.taps <= 64;
        if (!attends && !recurs) return wrong(i, "a malformed layer");
    }
    for (int64_t i = 0; i < n_table; i++) {
        const Table &entry = table[i];
        if (entry.rows < 1 || entry.cols < 1 || !entry.data) return wrong(i, "a malformed weight");
        const uint64_t needed = entry.kind < 0 ? (uint64_t)entry.rows * entry.cols * 4
                                               : (entry.kind < KINDS ? packed_bytes((Kind)entry.kind, entry.rows, entry.cols) : 0);
        if (!needed || entry.bytes < needed) return wrong(i, "a weight with too few bytes");
    }
    const auto plain = [&](int32_t w, int64_t floats) {
        return w >= 0 && w < n_table && table[w].kind < 0 && (int64_t)table[w].rows * table[w].cols == floats;
    };
    const auto layer_of = [&](int32_t i, int32_t kind) { return i >= 0 && i < n_layers && layers[i].kind == kind; };
    for (int64_t i = 0; i < n_steps; i++) {
        const Step &s = steps[i];
        if (s.op < 0 || s.op >= OPS) return wrong(i, "an unknown op");
        const int reads = inputs(s.op);
        for (int k = 0; k < 4; k++) {
            const Slice &slice = k < 3 ? s.in[k] : s.out;
            if ((k < 3 && k >= reads) || (k == 3 && s.op == REMEMBER)) continue;
            if (slice.buffer < 0 || slice.buffer >= n_buffers || slice.offset < 0 || slice.width < 1 ||
                (int64_t)slice.offset + slice.width > buffers[slice.buffer].width)
                return wrong(i, "columns that its buffer does not have");
            const bool quantized = buffers[slice.buffer].kind == 1;
            if (quantized != ((s.op == QUANTIZE && k == 3) || (s.op == LINEAR && k == 0 && s.n[0])))
                return wrong(i, "a buffer of another kind");
        }
        // an operand that is read row by row has as many rows as the result
        const int32_t domain = s.op == REMEMBER ? 0 : buffers[s.out.buffer].domain;
        for (int k = 0; k < reads; k++)
            if (buffers[s.in[k].buffer].domain != (s.op == TAKE_ROWS ? 0 : domain)) return wrong(i, "rows of another domain");
        if (tokens_only(s.op) && domain) return wrong(i, "tokens where rows are wanted");
        const int64_t width = s.out.width, from = reads ? s.in[0].width : 0;
        const bool same = width == from;
        bool right = true;
        switch (s.op) {
        case EMBED: right = s.weights[0] >= 0 && s.weights[0] < n_table && table[s.weights[0]].kind >= 0 &&
                            table[s.weights[0]].cols == width; break;
        case ROPE_TABLE: right = width % 2 == 0 && plain(s.weights[0], width / 2); break;
        case RMS_NORM: right = same && s.n[0] > 0 && width % s.n[0] == 0 && plain(s.weights[0], width / s.n[0]); break;
        case QUANTIZE: right = same && s.out.offset == 0 && width == buffers[s.out.buffer].width && s.in[0].offset == 0 &&
                               from == buffers[s.in[0].buffer].width; break;
        case LINEAR: {
            int64_t rows = 0;
            right = s.in[0].offset == 0 && from == buffers[s.in[0].buffer].width;
            for (const int32_t w : s.weights) {
                if (w < 0) continue;
                if (w >= n_table || table[w].kind < 0 || table[w].cols != from || (s.n[0] == 0) != (table[w].kind <= BF16)) {
                    right = false;
                    break;
                }
                rows += table[w].rows;
            }
            right = right && rows == width;
            if (s.n[1]) {  // with a sketch of the only weight, and the floats that it is read with
                const int32_t w = s.n[1] - 1;
                right = right && w >= 0 && w < n_table && table[w].kind < 0 && s.weights[1] < 0 &&
                        (int64_t)table[w].bytes >= (table[s.weights[0]].rows + TILE - 1) / TILE * sketch_tile_bytes(from) &&
                        s.n[2] > 0 && s.n[2] <= n_table && plain(s.n[2] - 1, from) && s.in[1].buffer >= 0 &&
                        s.in[1].buffer < n_buffers && buffers[s.in[1].buffer].kind == 0 && s.in[1].offset >= 0 &&
                        s.in[1].width == from && (int64_t)s.in[1].offset + from <= buffers[s.in[1].buffer].width &&
                        buffers[s.in[1].buffer].domain == domain && s.out.offset == 0;
            }
            break;
        }
        case ROPE: right = same && s.n[0] > 0 && width % s.n[0] == 0 && s.in[1].width == s.in[2].width &&
                           2 * s.in[1].width <= width / s.n[0]; break;
        case REMEMBER: right = layer_of(s.n[0], 0) && from == (int64_t)layers[s.n[0]].kv_heads * layers[s.n[0]].head_dim &&
                               s.in[1].width == from; break;
        case ATTEND: right = layer_of(s.n[0], 0) && same && s.n[1] > 0 && s.n[1] % layers[s.n[0]].kv_heads == 0 &&
                             width == (int64_t)s.n[1] * layers[s.n[0]].head_dim; break;
        case GEGLU: case ADD: case MUL: right = same && s.in[1].width == width; break;
        case GELU: case SOFTCAP: case TAKE_ROWS: case SCALE: right = same; break;
        case BIAS: case GAIN: right = same && plain(s.weights[0], width); break;
        case REPLACE_ROWS: right = same && s.n[0] > 0 && s.n[0] <= 1 << 24 && plain(s.weights[0], s.n[0]) &&
                                   plain(s.weights[1], s.n[0] * width); break;
        case REPLACE_COLUMNS:
            right = same && s.n[0] > 0 && s.in[1].width == s.n[0] && plain(s.weights[0], s.n[0]);
            for (int32_t k = 0; right && k < s.n[0]; k++) {
                const float id = ((const float *)table[s.weights[0]].data)[k];
                right = id >= 0 && id < (float)width;
            }
            break;
        case CONV1D: right = same && layer_of(s.n[0], 1) && layers[s.n[0]].width == width &&
                             plain(s.weights[0], width * (layers[s.n[0]].taps)) && plain(s.weights[1], width); break;
        case BLOCK_LINEAR: right = same && s.n[0] > 0 && width % s.n[0] == 0 && plain(s.weights[0], width * (width / s.n[0])) &&
                                   plain(s.weights[1], width); break;
        case RG_LRU: right = same && layer_of(s.n[0], 1) && layers[s.n[0]].width == width && plain(s.weights[0], width) &&
                             s.in[1].width == width && s.in[2].width == width; break;
        case PUT_ROWS: right = same; break;
        case LAYER_NORM: right = same && plain(s.weights[0], width) && plain(s.weights[1], width); break;
        case ADD_POSITIONS: right = same && s.n[0] > 0 && plain(s.weights[0], width * s.n[0]); break;
        case ATTEND_WITHIN: right = same && s.n[0] > 0 && s.n[0] <= 1 << 20 && s.n[1] > 0 && width % s.n[1] == 0 &&
                                    width / s.n[1] <= 4096 && s.in[1].width == width && s.in[2].width == width; break;
        }
        if (!right) return wrong(i, "operands that do not fit");
    }
    Executor *made = new Executor;
    made->kernels_ = kernels;
    made->steps_.assign(steps, steps + n_steps);
    made->buffers_.assign(buffers, buffers + n_buffers);
    made->table_.assign(table, table + n_table);
    made->layers_.assign(layers, layers + n_layers);
    made->find_head();
    return made;
}

bool Executor::encodes(int64_t in, int64_t out) const {
    for (const Step &s : steps_)
        if (s.op == EMBED || s.op == ROPE_TABLE || (s.op == PUT_ROWS && s.out.width != in)) return false;
    return shape_.width == out && !shape_.domain && layers_.empty();
}

// The head: the only step that writes the output, but for a cap of it. What it reads is found before it is quantized.
void Executor::find_head() {
    const auto output = [&](const Slice &slice) { return buffers_[slice.buffer].kind == 2; };
    const auto writes = [&](const Step &s) { return s.op != REMEMBER && output(s.out); };
    head_ = std::find_if(steps_.begin(), steps_.end(), writes) - steps_.begin();
    const auto made = std::find_if(buffers_.begin(), buffers_.end(), [](const Buffer &b) { return b.kind == 2; });
    shape_ = {made->width, made->domain, 0, 0};
    if (head_ == steps_.size() || steps_[head_].op != LINEAR || !shape_.domain) return;
    const Step &head = steps_[head_];
    const Slice *read = head.n[1] ? &head.in[1] : &head.in[0];
    if (head.n[0] && !head.n[1]) {
        size_t i = head_;
        while (i && (steps_[i - 1].op != QUANTIZE || steps_[i - 1].out.buffer != head.in[0].buffer)) i--;
        if (!i) return;
        read = &steps_[i - 1].in[0];
    }
    for (size_t i = 0; i < head_; i++)
        for (int k = 0; k < inputs(steps_[i].op); k++)
            if (output(steps_[i].in[k])) return;
    if (buffers_[read->buffer].kind) return;
    read_ = *read;
    shape_.hidden = read->width;
    const bool whole = head.weights[0] >= 0 && table_[head.weights[0]].rows == shape_.width &&
                       std::all_of(head.weights + 1, head.weights + STEP_WEIGHTS, [](int32_t w) { return w < 0; });
    const Step *last = head_ + 1 < steps_.size() ? &steps_[head_ + 1] : nullptr;
    const bool capped = last && last->op == SOFTCAP && output(last->in[0]) && output(last->out) && last->out.offset == 0 &&
                        last->out.width == shape_.width;
    shape_.filters = whole && (capped ? head_ + 2 : head_ + 1) == steps_.size();
}

}  // namespace gk
