#include "executor.h"

#include "kernels/sketch.h"
#include "sketch.h"
#include "weights.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace gk {

namespace {

constexpr int64_t SEGMENT = 8;  // pages whose softmax is computed apart and merged in order, whoever computes it
constexpr int64_t QUERY_ROWS = 64;  // rows of queries (tokens times heads of a group) of a tile of attention

// Standard deviations that a bound allows the error of a sketch. A wanted row is missed if its own error is larger, and
// larger on one side only: for normal errors with probability 9.9e-10.
constexpr float SLACK = 6.0f;

bool over_rows(int32_t op) {
    switch (op) {
    case LINEAR: case ATTEND: case ATTEND_WITHIN: case SOFTCAP: case CONV1D: case BLOCK_LINEAR: case RG_LRU: return false;
    default: return true;
    }
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

struct Executor::Run {
    const Call &call;
    State &state;
    Pool &pool;
    std::vector<int64_t> span_of;  // of each token
    char *arena;

    float *at(const Executor &executor, const Slice &slice, int64_t row) const {
        const Buffer &buffer = executor.buffers_[slice.buffer];
        float *base = buffer.kind == 2 ? call.logits : (float *)(arena + executor.offsets_[slice.buffer]);
        return base + row * buffer.width + slice.offset;
    }
    int64_t count(const Executor &executor, const Slice &slice) const {
        return executor.buffers_[slice.buffer].domain ? call.n_rows : call.n_tokens;
    }
};

// ---- checking -------------------------------------------------------------------------------------------------------

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
    for (int64_t i = 0; i < n_layers; i++) {
        const Layer &layer = layers[i];
        const bool attends = layer.kind == 0 && layer.kv_heads > 0 && layer.kv_heads <= 1024 && layer.head_dim > 0 &&
                             layer.head_dim <= 4096 && layer.window >= 0;
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
        const int inputs = s.op == EMBED || s.op == ROPE_TABLE ? 0
                           : s.op == ATTEND || s.op == ATTEND_WITHIN || s.op == RG_LRU || s.op == ROPE ? 3
                           : s.op == REMEMBER || s.op == GEGLU || s.op == ADD || s.op == MUL ? 2
                                                                                            : 1;
        for (int k = 0; k < 4; k++) {
            const Slice &slice = k < 3 ? s.in[k] : s.out;
            if ((k < 3 && k >= inputs) || (k == 3 && s.op == REMEMBER)) continue;
            if (slice.buffer < 0 || slice.buffer >= n_buffers || slice.offset < 0 || slice.width < 1 ||
                (int64_t)slice.offset + slice.width > buffers[slice.buffer].width)
                return wrong(i, "columns that its buffer does not have");
            const bool quantized = buffers[slice.buffer].kind == 1;
            if (quantized != ((s.op == QUANTIZE && k == 3) || (s.op == LINEAR && k == 0 && s.n[0])))
                return wrong(i, "a buffer of another kind");
        }
        // whatever is read row by row has as many rows as what is written
        const int32_t domain = s.op == REMEMBER ? 0 : buffers[s.out.buffer].domain;
        for (int k = 0; k < inputs; k++)
            if (buffers[s.in[k].buffer].domain != (s.op == TAKE_ROWS ? 0 : domain)) return wrong(i, "rows of another domain");
        const bool tokens_only = s.op == EMBED || s.op == ROPE_TABLE || s.op == PUT_ROWS || s.op == ATTEND || s.op == ATTEND_WITHIN ||
                                 s.op == ADD_POSITIONS || s.op == CONV1D ||
                                 s.op == BLOCK_LINEAR || s.op == RG_LRU;
        if (tokens_only && domain)
            return wrong(i, "tokens where rows are wanted");
        const int64_t width = s.out.width, from = inputs ? s.in[0].width : 0;
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
        case BIAS: right = same && plain(s.weights[0], width); break;
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
    return made;
}

bool Executor::encodes(int64_t in, int64_t out) const {
    for (const Step &s : steps_)
        if (s.op == EMBED || s.op == ROPE_TABLE || (s.op == PUT_ROWS && s.out.width != in)) return false;
    for (const Buffer &buffer : buffers_)
        if (buffer.kind == 2 && (buffer.width != out || buffer.domain)) return false;
    return layers_.empty();
}

bool Executor::layout(int64_t tokens, int64_t rows) {
    size_t total = 0;
    offsets_.assign(buffers_.size(), 0);
    for (size_t i = 0; i < buffers_.size(); i++) {
        const Buffer &buffer = buffers_[i];
        const int64_t count = buffer.domain ? rows : tokens;
        offsets_[i] = total;
        size_t bytes = buffer.kind == 2 ? 0 : (size_t)count * buffer.width * sizeof(float);
        if (buffer.kind == 1) bytes = activation_bytes(Q4_0, count, buffer.width);
        total += (bytes + 63) / 64 * 64 + 64;
    }
    if (arena_.size() < total + 64) {
        try {
            arena_.clear();
            arena_.resize(total + 64);
        } catch (const std::bad_alloc &) {
            return false;
        }
    }
    return true;
}

// ---- running --------------------------------------------------------------------------------------------------------

Executor::Result Executor::run(const Call &call, State &state, Pool &pool, bool (*keep_on)()) {
    if (!layout(call.n_tokens, call.n_rows)) return NO_MEMORY;
    Run run{call, state, pool, std::vector<int64_t>(call.n_tokens), nullptr};
    run.arena = (char *)(((uintptr_t)arena_.data() + 63) / 64 * 64);
    for (int64_t i = 0; i < call.n_spans; i++) {
        const Span &span = call.spans[i];
        std::fill(run.span_of.begin() + span.first, run.span_of.begin() + span.end, i);
        if (!state.prepare(span.slot, span.position + span.end - span.first)) return NO_MEMORY;
    }
    if ((int)scratch_.size() < pool.threads()) scratch_.resize(pool.threads());
    overflow_ = 0;
    picked_.clear();
    for (size_t i = 0; i < steps_.size();) {
        if (!keep_on()) return STOPPED;
        size_t end = i + 1;
        const double start = call.seconds ? now() : 0;
        const Step &step = steps_[i];
        if (over_rows(step.op)) {
            while (!call.seconds && end < steps_.size() && over_rows(steps_[end].op) && step.op != TAKE_ROWS &&
                   steps_[end].op != TAKE_ROWS && steps_[end].op != PUT_ROWS && step.op != PUT_ROWS)
                end++;
            region(run, i, end);
        } else if (step.op == LINEAR) {
            if (!step.n[1] || !screen(run, step)) linear(run, step);
        } else if (step.op == ATTEND) {
            attend(run, step);
        } else if (step.op == ATTEND_WITHIN) {
            attend_within(run, step);
        } else if (step.op == SOFTCAP) {
            softcap(run, step);
        } else {
            recur(run, step);
        }
        if (call.seconds) call.seconds[i] += now() - start;
        i = end;
    }
    if (overflow_) return TOO_LARGE;
    for (int64_t i = 0; i < call.n_spans; i++) {
        const Span &span = call.spans[i];
        state.commit(span.slot, span.position + span.end - span.first);
    }
    return DONE;
}

void Executor::region(Run &run, size_t first, size_t end) {
    const Step &step = steps_[first];
    const int64_t count = step.op == PUT_ROWS ? run.call.n_features
                                              : run.count(*this, step.op == REMEMBER ? step.in[0] : step.out);
    // rows that are few floats wide are not worth a thread's attention one by one
    const int64_t width = step.op == REMEMBER ? step.in[0].width : step.out.width;
    const int64_t grain = std::max<int64_t>(1, std::min<int64_t>((count + 4 * run.pool.threads() - 1) / (4 * run.pool.threads()),
                                                                 16384 / std::max<int64_t>(1, width) + 1));
    if (count * width < 8192 || count == 1) {  // one row is done before another thread has heard of it
        for (size_t i = first; i < end; i++) rows(run, steps_[i], 0, count);
        return;
    }
    run.pool.each((count + grain - 1) / grain, [&](int64_t item, int) {
        const int64_t row0 = item * grain, row1 = std::min(count, row0 + grain);
        for (size_t i = first; i < end; i++) rows(run, steps_[i], row0, row1);
    });
}

void Executor::rows(Run &run, const Step &s, int64_t row0, int64_t row1) {
    const Call &call = run.call;
    const auto weight = [&](int k) { return (const float *)table_[s.weights[k]].data; };
    if (s.op == QUANTIZE) {
        const Activations a{run.count(*this, s.out), s.out.width, run.at(*this, s.in[0], 0),
                            (uint8_t *)(run.arena + offsets_[s.out.buffer])};
        kernels_->quantize(a, row0, row1);
        return;
    }
    for (int64_t row = row0; row < row1; row++) {
        float *out = s.op == REMEMBER || s.op == PUT_ROWS ? nullptr : run.at(*this, s.out, row);
        const float *a = s.op == EMBED || s.op == ROPE_TABLE || s.op == TAKE_ROWS || s.op == PUT_ROWS
                             ? nullptr
                             : run.at(*this, s.in[0], row);
        switch (s.op) {
        case EMBED: {
            const Table &t = table_[s.weights[0]];
            kernels_->row(Weight{(Kind)t.kind, t.rows, t.cols, (const uint8_t *)t.data}, call.tokens[row], out);
            for (int64_t i = 0; i < s.out.width; i++) out[i] *= s.f[0];
            break;
        }
        case ROPE_TABLE: {
            const Span &span = call.spans[run.span_of[row]];
            const float position = (float)(span.position + row - span.first);
            const int64_t half = s.out.width / 2;
            for (int64_t i = 0; i < half; i++) {
                const float angle = position * weight(0)[i];
                out[i] = std::cos(angle);
                out[half + i] = std::sin(angle);
            }
            break;
        }
        case RMS_NORM: {
            const int64_t n = s.out.width / s.n[0];
            for (int32_t h = 0; h < s.n[0]; h++) kernels_->rms_norm(a + h * n, weight(0), s.f[0], n, out + h * n);
            break;
        }
        case ROPE:
            if (out != a) std::memcpy(out, a, s.out.width * sizeof(float));
            kernels_->rope(out, s.n[0], s.out.width / s.n[0], run.at(*this, s.in[1], row), run.at(*this, s.in[2], row),
                           s.in[1].width);
            break;
        case REMEMBER: {
            const Span &span = call.spans[run.span_of[row]];
            const Layer &layer = layers_[s.n[0]];
            const int64_t position = span.position + row - span.first;
            const float *v = run.at(*this, s.in[1], row);
            constexpr float HALF_MAX = 65504.0f;
            if (!(kernels_->magnitude(a, s.in[0].width) <= HALF_MAX && kernels_->magnitude(v, s.in[1].width) <= HALF_MAX))
                overflow_.store(1, std::memory_order_relaxed);
            for (int32_t h = 0; h < layer.kv_heads; h++) {
                const int64_t page = position / PAGE, at = position % PAGE;
                kernels_->put_key(a + (int64_t)h * layer.head_dim, layer.head_dim, at, run.state.keys(s.n[0], span.slot, page, h));
                kernels_->put_value(v + (int64_t)h * layer.head_dim, layer.head_dim, at,
                                    run.state.values(s.n[0], span.slot, page, h));
            }
            break;
        }
        case GEGLU: kernels_->geglu(a, run.at(*this, s.in[1], row), s.out.width, out); break;
        case GELU: kernels_->gelu(a, s.out.width, out); break;
        case ADD: kernels_->add(a, run.at(*this, s.in[1], row), s.out.width, out); break;
        case MUL: kernels_->mul(a, run.at(*this, s.in[1], row), s.out.width, out); break;
        case BIAS: kernels_->add(a, weight(0), s.out.width, out); break;
        case SCALE:
            for (int64_t i = 0; i < s.out.width; i++) out[i] = a[i] * s.f[0];
            break;
        case LAYER_NORM: kernels_->layer_norm(a, weight(0), weight(1), s.f[0], s.out.width, out); break;
        case ADD_POSITIONS: kernels_->add(a, weight(0) + row % s.n[0] * s.out.width, s.out.width, out); break;
        case TAKE_ROWS:
            std::memcpy(out, run.at(*this, s.in[0], call.rows[row]), s.out.width * sizeof(float));
            break;
        case PUT_ROWS:
            std::memcpy(run.at(*this, s.out, call.feature_rows[row]), call.features + row * s.out.width,
                        s.out.width * sizeof(float));
            break;
        }
    }
}

void Executor::linear(Run &run, const Step &s) {
    const int64_t tokens = run.count(*this, s.in[0]);
    if (!tokens) return;
    const Activations a{tokens, s.in[0].width, s.n[0] ? nullptr : run.at(*this, s.in[0], 0),
                        s.n[0] ? (uint8_t *)(run.arena + offsets_[s.in[0].buffer]) : nullptr};
    struct Part {
        Weight weight;
        int64_t tile0, column;
    } parts[STEP_WEIGHTS];
    int count = 0;
    int64_t tiles = 0, column = 0;
    for (const int32_t w : s.weights) {
        if (w < 0) continue;
        const Table &t = table_[w];
        parts[count++] = {{(Kind)t.kind, t.rows, t.cols, (const uint8_t *)t.data}, tiles, column};
        tiles += (t.rows + TILE - 1) / TILE;
        column += t.rows;
    }
    const int64_t stride = buffers_[s.out.buffer].width;
    float *y = run.at(*this, s.out, 0);
    // About eight turns a thread: fewer leave one idle at the end, more cost their claims. Tiles are multiplied in pairs.
    const int64_t turns = 8 * run.pool.threads(), pairs = (tiles + 1) / 2;
    const int64_t grain = 2 * std::max<int64_t>(1, (pairs + turns - 1) / turns);
    run.pool.each((tiles + grain - 1) / grain, [&](int64_t item, int) {
        int64_t tile = item * grain;
        const int64_t end = std::min(tiles, tile + grain);
        for (int p = 0; p < count && tile < end; p++) {
            const int64_t last = p + 1 < count ? parts[p + 1].tile0 : tiles;
            if (tile >= last) continue;
            const int64_t stop = std::min(end, last);
            kernels_->linear(parts[p].weight, tile - parts[p].tile0, stop - parts[p].tile0, a, y + parts[p].column, stride);
            tile = stop;
        }
    });
}

void Executor::attend(Run &run, const Step &s) {
    const Layer &layer = layers_[s.n[0]];
    const int32_t heads = s.n[1], group = heads / layer.kv_heads, width = layer.head_dim;
    const int64_t tile_tokens = std::max<int64_t>(1, QUERY_ROWS / group);
    struct Item {
        int64_t span, token, tokens, page0, page1;  // of one tile: the pages that it may see
        int64_t segment0, segments;
        size_t partial;  // of its first segment and head
    };
    std::vector<Item> items;
    size_t partial_floats = 0;
    int64_t most_segments = 1;
    for (int64_t i = 0; i < run.call.n_spans; i++) {
        const Span &span = run.call.spans[i];
        for (int64_t t = span.first; t < span.end; t += tile_tokens) {
            Item item{i, t, std::min(tile_tokens, span.end - t), 0, 0, 0, 0, partial_floats};
            const int64_t position = span.position + t - span.first;
            int64_t lo = layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
            int64_t hi = position + item.tokens;  // one past the last key
            if (position < span.prefix) lo = 0, hi = std::max(hi, span.prefix);
            item.page0 = lo / PAGE;
            item.page1 = (hi + PAGE - 1) / PAGE;
            item.segment0 = item.page0 / SEGMENT;
            item.segments = (item.page1 + SEGMENT - 1) / SEGMENT - item.segment0;
            most_segments = std::max(most_segments, item.segments);
            items.push_back(item);
        }
    }
    // Few tiles with much to see are shared out by segments; where there are tiles enough, one thread does all of a tile.
    const int64_t tiles = (int64_t)items.size() * layer.kv_heads;
    const bool split = most_segments > 1 && tiles < 4 * run.pool.threads();
    const int64_t rows = tile_tokens * group;
    const size_t floats = (size_t)rows * (2 + width);  // of one partial
    const size_t held = split ? (size_t)tiles * most_segments * floats : (size_t)run.pool.threads() * 2 * floats;
    if (partials_.size() < held * sizeof(float)) partials_.resize(held * sizeof(float));
    const auto partial = [&](size_t number) {
        float *base = (float *)partials_.data() + number * floats;
        return Partial{base, base + rows, base + 2 * rows};
    };
    const size_t scratch = attend_scratch_bytes((int32_t)tile_tokens, group, width) + 64;
    for (auto &room : scratch_)
        if (room.size() < scratch) room.resize(scratch);

    const auto segment = [&](const Item &item, int32_t head, int64_t number, Partial into, int thread) {
        const Span &span = run.call.spans[item.span];
        const int64_t first = std::max(item.page0, (item.segment0 + number) * SEGMENT);
        const int64_t last = std::min(item.page1, (item.segment0 + number + 1) * SEGMENT);
        const uint16_t *keys[SEGMENT], *values[SEGMENT];
        for (int64_t p = first; p < last; p++) {
            keys[p - first] = run.state.keys(s.n[0], span.slot, p, head);
            values[p - first] = run.state.values(s.n[0], span.slot, p, head);
        }
        const Attend a{run.at(*this, s.in[0], item.token) + (int64_t)head * group * width,
                       buffers_[s.in[0].buffer].width,
                       (int32_t)item.tokens,
                       group,
                       width,
                       span.position + item.token - span.first,
                       layer.window,
                       span.prefix,
                       s.f[0],
                       s.f[1]};
        char *room = scratch_[thread].data();
        room += (64 - (uintptr_t)room % 64) % 64;
        kernels_->attend(a, Pages{keys - first, values - first}, first, last, true, into, room);
    };
    const auto finish = [&](const Item &item, int32_t head, Partial p) {
        kernels_->finish(p, item.tokens * group, width, run.at(*this, s.out, item.token) + (int64_t)head * group * width,
                         buffers_[s.out.buffer].width, group);
    };
    if (split) {
        run.pool.each(tiles * most_segments, [&](int64_t i, int thread) {
            const int64_t number = i % most_segments, tile = i / most_segments;
            const Item &item = items[tile / layer.kv_heads];
            if (number < item.segments) segment(item, (int32_t)(tile % layer.kv_heads), number, partial(i), thread);
        });
        for (int64_t tile = 0; tile < tiles; tile++) {
            const Item &item = items[tile / layer.kv_heads];
            const Partial whole = partial(tile * most_segments);
            for (int64_t number = 1; number < item.segments; number++)
                kernels_->merge(whole, partial(tile * most_segments + number), item.tokens * group, width);
            finish(item, (int32_t)(tile % layer.kv_heads), whole);
        }
        return;
    }
    run.pool.each(tiles, [&](int64_t tile, int thread) {
        const Item &item = items[tile / layer.kv_heads];
        const int32_t head = (int32_t)(tile % layer.kv_heads);
        const Partial whole = partial(2 * thread), next = partial(2 * thread + 1);
        segment(item, head, 0, whole, thread);
        for (int64_t number = 1; number < item.segments; number++) {
            segment(item, head, number, next, thread);
            kernels_->merge(whole, next, item.tokens * group, width);
        }
        finish(item, head, whole);
    });
}

// Every image's rows, and every head of it, by itself. Rows that make no whole image are none.
void Executor::attend_within(Run &run, const Step &s) {
    const int64_t length = s.n[0], heads = s.n[1], head_dim = s.out.width / heads;
    const size_t scratch = attend_within_scratch_bytes(length, (int32_t)head_dim);
    for (auto &room : scratch_)
        if (room.size() < scratch) room.resize(scratch);
    const auto stride = [&](const Slice &slice) { return (int64_t)buffers_[slice.buffer].width; };
    run.pool.each(run.count(*this, s.out) / length * heads, [&](int64_t item, int thread) {
        const int64_t row = item / heads * length, column = item % heads * head_dim;
        kernels_->attend_within({run.at(*this, s.in[0], row) + column, run.at(*this, s.in[1], row) + column,
                                 run.at(*this, s.in[2], row) + column, run.at(*this, s.out, row) + column, stride(s.in[0]),
                                 stride(s.in[1]), stride(s.in[2]), stride(s.out), length, (int32_t)head_dim, s.f[0]},
                                scratch_[thread].data());
    });
}

// The logits that are wanted, without reading all of the table. A sketch of every row gives an upper bound of its logit.
// The exact logits of the rows with the highest bounds give a value that the last wanted row reaches at least; then every
// row is computed whose bound reaches it too. All others are -inf. False where the table has to be read in full.
bool Executor::screen(Run &run, const Step &s) {
    const Call &call = run.call;
    const Table &t = table_[s.weights[0]];
    const int64_t tiles = (t.rows + TILE - 1) / TILE, cols = t.cols;
    if (call.computed)
        for (int64_t r = 0; r < call.n_rows; r++) call.computed[r] = t.rows;
    if (call.n_rows != 1 || !call.wanted || !call.wanted[0].best || call.wanted[0].best > tiles / 8) return false;
    if (pause_) {
        pause_--;
        return false;
    }
    const auto in_vain = [&] {  // the sketch was read for nothing: where that goes on, it is left alone for a while
        if (++misses_ >= 3) misses_ = 0, pause_ = 24;
        return false;
    };
    const Wanted &wanted = call.wanted[0];

    // turned as the table was, and rounded to int8
    const float *x = run.at(*this, s.in[1], 0), *signs = (const float *)table_[s.n[2] - 1].data;
    std::vector<float> turned(cols);
    rotate(x, signs, cols, turned.data());
    float most = 0;
    double squares = 0;
    for (const float value : turned) most = std::max(most, std::fabs(value)), squares += (double)value * value;
    if (!(most > 0) || !std::isfinite(most)) return false;
    std::vector<int8_t> q((cols + 15) / 16 * 16);
    int32_t sum = 0;
    for (int64_t i = 0; i < cols; i++) q[i] = (int8_t)std::lrintf(turned[i] * (127 / most)), sum += q[i];

    bounds_.resize(tiles * TILE);
    best_.resize(tiles);
    const uint8_t *sketch = (const uint8_t *)table_[s.n[1] - 1].data;
    const float slack = SLACK * (float)std::sqrt(squares);
    const int64_t turns = 8 * run.pool.threads(), grain = (tiles + turns - 1) / turns;
    run.pool.each((tiles + grain - 1) / grain, [&](int64_t item, int) {
        const int64_t tile0 = item * grain, tile1 = std::min(tiles, tile0 + grain);
        kernels_->sketch(sketch, tile0, tile1, cols, q.data(), sum, most / 127, slack, bounds_.data(), best_.data());
        std::fill(call.logits + tile0 * TILE, call.logits + std::min<int64_t>(t.rows, tile1 * TILE), -INFINITY);
    });

    const Weight weight{(Kind)t.kind, t.rows, t.cols, (const uint8_t *)t.data};
    const Activations a{1, cols, s.n[0] ? nullptr : run.at(*this, s.in[0], 0),
                        s.n[0] ? (uint8_t *)(run.arena + offsets_[s.in[0].buffer]) : nullptr};
    const auto compute = [&](size_t first) {  // the tiles picked from there on
        const int64_t count = (int64_t)(picked_.size() - first), each = std::max<int64_t>(1, count / turns);
        run.pool.each((count + each - 1) / each, [&](int64_t item, int) {
            for (int64_t i = item * each; i < std::min(count, (item + 1) * each); i++)
                kernels_->linear(weight, picked_[first + i], picked_[first + i] + 1, a, call.logits, buffers_[s.out.buffer].width);
        });
    };
    std::vector<bool> is_kept, is_picked(tiles);
    const auto pick = [&](int64_t tile) {
        if (!is_picked[tile]) is_picked[tile] = true, picked_.push_back(tile);
    };
    if (wanted.kept1 > wanted.kept0) is_kept.resize(t.rows);
    for (int64_t i = wanted.kept0; i < wanted.kept1; i++) is_kept[call.kept[i]] = true, pick(call.kept[i] / TILE);

    // Seeds: more tiles than rows are wanted, since a tile may hold nothing but rows that do not count.
    const size_t seeds = std::min<size_t>(tiles, 8 + wanted.best);
    std::vector<int64_t> order(tiles);
    for (int64_t i = 0; i < tiles; i++) order[i] = i;
    std::nth_element(order.begin(), order.begin() + (int64_t)seeds - 1, order.end(),
                     [&](int64_t i, int64_t k) { return best_[i] > best_[k]; });
    for (size_t i = 0; i < seeds; i++) pick(order[i]);
    compute(0);
    std::vector<float> found;
    for (const int64_t tile : picked_)
        for (int64_t r = tile * TILE; r < std::min<int64_t>(t.rows, (tile + 1) * TILE); r++)
            if (is_kept.empty() || !is_kept[r]) found.push_back(call.logits[r]);
    if ((int64_t)found.size() < wanted.best) return false;
    std::nth_element(found.begin(), found.begin() + wanted.best - 1, found.end(), std::greater<float>());
    float reach = found[wanted.best - 1];
    if (wanted.drop >= 0) {
        const float cap = s.f[0];  // of the step that follows: the drop is meant after it
        const float capped = cap > 0 ? cap * std::tanh(reach / cap) - wanted.drop : reach - wanted.drop;
        if (cap > 0 && capped <= -cap) return in_vain();
        reach = cap > 0 ? cap * std::atanh(capped / cap) : capped;
    }
    if (!std::isfinite(reach)) return false;
    const size_t first = picked_.size();
    for (int64_t tile = 0; tile < tiles; tile++)
        if (best_[tile] >= reach) pick(tile);
    if ((int64_t)picked_.size() > tiles / 2) {  // then reading on is faster than reading here and there
        picked_.clear();
        return in_vain();
    }
    misses_ = 0;
    compute(first);
    if (call.computed) call.computed[0] = (int64_t)picked_.size() * TILE;
    return true;
}

void Executor::softcap(Run &run, const Step &s) {
    if (!picked_.empty()) {  // the rest is -inf, and stays it
        float *logits = run.at(*this, s.out, 0);
        for (const int64_t tile : picked_)
            kernels_->softcap(logits + tile * TILE, s.f[0], std::min<int64_t>(TILE, s.out.width - tile * TILE));
        return;
    }
    constexpr int64_t PIECE = 8192;  // columns: one row of logits is work for all threads
    const int64_t pieces = (s.out.width + PIECE - 1) / PIECE;
    run.pool.each(pieces * run.count(*this, s.out), [&](int64_t item, int) {
        const int64_t row = item / pieces, column = item % pieces * PIECE, count = std::min(PIECE, s.out.width - column);
        const float *in = run.at(*this, s.in[0], row) + column;
        float *out = run.at(*this, s.out, row) + column;
        if (out != in) std::memcpy(out, in, count * sizeof(float));
        kernels_->softcap(out, s.f[0], count);
    });
}

void Executor::recur(Run &run, const Step &s) {
    const auto weight = [&](int k) { return (const float *)table_[s.weights[k]].data; };
    const int64_t width = s.out.width, threads = run.pool.threads();
    if (s.op == BLOCK_LINEAR) {
        const int64_t blocks = s.n[0], tokens = run.call.n_tokens;
        run.pool.each(blocks, [&](int64_t block, int) {
            kernels_->block_linear(run.at(*this, s.in[0], 0), tokens, blocks, width / blocks, weight(0), weight(1),
                                   run.at(*this, s.out, 0), block, block + 1);
        });
        return;
    }
    // channels in runs of whole cache lines
    const int64_t grain = std::max<int64_t>(16, ((width + 2 * threads - 1) / (2 * threads) + 15) / 16 * 16);
    const int64_t pieces = (width + grain - 1) / grain;
    run.pool.each(pieces * run.call.n_spans, [&](int64_t item, int) {
        const Span &span = run.call.spans[item / pieces];
        const int64_t channel0 = item % pieces * grain, channel1 = std::min(width, channel0 + grain);
        const int64_t tokens = span.end - span.first;
        float *out = run.at(*this, s.out, span.first);
        if (s.op == CONV1D) {
            kernels_->conv1d(run.at(*this, s.in[0], span.first), tokens, width, buffers_[s.in[0].buffer].width, weight(0),
                             weight(1), layers_[s.n[0]].taps, run.state.tail(s.n[0], span.slot), out, channel0, channel1);
        } else {
            kernels_->rg_lru(run.at(*this, s.in[0], span.first), run.at(*this, s.in[1], span.first),
                             run.at(*this, s.in[2], span.first), weight(0), tokens, width, span.position == 0,
                             run.state.hidden(s.n[0], span.slot), out, channel0, channel1);
        }
    });
}

}  // namespace gk
