#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "run.h"

namespace gk {

namespace {

bool over_rows(int32_t op) {
    switch (op) {
    case LINEAR: case ATTEND: case ATTEND_WITHIN: case SOFTCAP: case CONV1D: case BLOCK_LINEAR: case RG_LRU: return false;
    default: return true;
    }
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

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

Executor::Result Executor::run(const Call &call, State &state, Pool &pool, bool (*keep_on)()) {
    if (!layout(call.n_tokens, call.n_rows)) return NO_MEMORY;
    Run run{call, state, pool, std::vector<int64_t>(call.n_tokens), nullptr};
    run.arena = (char *)(((uintptr_t)arena_.data() + 63) / 64 * 64);
    for (int64_t i = 0; i < call.n_chunks; i++) {
        const Chunk &chunk = call.chunks[i];
        std::fill(run.chunk_of.begin() + chunk.first, run.chunk_of.begin() + chunk.end, i);
        if (!state.prepare(chunk.slot, chunk.position + chunk.end - chunk.first)) return NO_MEMORY;
    }
    if ((int)scratch_.size() < pool.threads()) scratch_.resize(pool.threads());
    overflow_ = 0;
    candidates_.clear();
    const bool filtered = call.filters && std::any_of(call.filters, call.filters + call.n_rows,
                                                      [](const LogitsFilter &filter) { return filter.top_n > 0; });
    if ((filtered && !shape_.filters) || (call.hidden && !shape_.hidden)) return NO_SUCH_OUTPUT;
    if (call.computed)
        for (int64_t r = 0; r < call.n_rows; r++) call.computed[r] = call.hidden ? 0 : shape_.width;
    const size_t last = call.hidden ? head_ : filtered ? head_ + 1 : steps_.size();
    for (size_t i = 0; i < last;) {
        if (!keep_on()) return STOPPED;
        size_t end = i + 1;
        const double start = call.seconds ? now() : 0;
        const Step &step = steps_[i];
        if (over_rows(step.op)) {
            while (!call.seconds && end < last && over_rows(steps_[end].op) && step.op != TAKE_ROWS &&
                   steps_[end].op != TAKE_ROWS && steps_[end].op != PUT_ROWS && step.op != PUT_ROWS)
                end++;
            region(run, i, end);
        } else if (step.op == LINEAR) {
            filtered && i == head_ ? filter(run) : linear(run, step);
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
    if (call.hidden)
        for (int64_t r = 0; r < call.n_rows; r++)
            std::memcpy(call.out + r * read_.width, run.at(*this, read_, r), read_.width * sizeof(float));
    if (overflow_) return TOO_LARGE;
    for (int64_t i = 0; i < call.n_chunks; i++) {
        const Chunk &chunk = call.chunks[i];
        state.commit(chunk.slot, chunk.position + chunk.end - chunk.first);
    }
    return DONE;
}

void Executor::region(Run &run, size_t first, size_t end) {
    const Step &step = steps_[first];
    const int64_t count = step.op == PUT_ROWS ? run.call.n_features
                                              : run.count(*this, step.op == REMEMBER ? step.in[0] : step.out);
    // narrow rows are handed out several at a time
    const int64_t width = step.op == REMEMBER ? step.in[0].width : step.out.width;
    const int64_t grain = std::max<int64_t>(1, std::min<int64_t>((count + 4 * run.pool.threads() - 1) / (4 * run.pool.threads()),
                                                                 16384 / std::max<int64_t>(1, width) + 1));
    if (count * width < 8192 || count == 1) {  // too little work to be worth waking a thread
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
            const Chunk &chunk = call.chunks[run.chunk_of[row]];
            const float position = (float)(chunk.position + row - chunk.first);
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
            const Chunk &chunk = call.chunks[run.chunk_of[row]];
            const Layer &layer = layers_[s.n[0]];
            const int64_t position = chunk.position + row - chunk.first;
            const float *v = run.at(*this, s.in[1], row);
            constexpr float HALF_MAX = 65504.0f;
            if (!(kernels_->magnitude(a, s.in[0].width) <= HALF_MAX && kernels_->magnitude(v, s.in[1].width) <= HALF_MAX))
                overflow_.store(1, std::memory_order_relaxed);
            for (int32_t h = 0; h < layer.kv_heads; h++) {
                const int64_t page = position / PAGE, at = position % PAGE;
                kernels_->put_key(a + (int64_t)h * layer.head_dim, layer.head_dim, at, run.state.keys(s.n[0], chunk.slot, page, h));
                kernels_->put_value(v + (int64_t)h * layer.head_dim, layer.head_dim, at,
                                    run.state.values(s.n[0], chunk.slot, page, h));
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
        case GAIN: kernels_->mul(a, weight(0), s.out.width, out); break;
        case REPLACE_ROWS: case REPLACE_COLUMNS: {  // for a few tokens, whose ids are ascending floats
            if (out != a) std::memcpy(out, a, s.out.width * sizeof(float));
            const float *ids = weight(0), *end = ids + s.n[0];
            const auto replace = [&](float &x, float with) { x = s.f[0] == 1 ? with : x + s.f[0] * (with - x); };
            if (s.op == REPLACE_ROWS) {
                const float token = (float)call.tokens[row];  // exact below 2^24, which no vocabulary reaches
                const float *found = std::lower_bound(ids, end, token);
                if (found == end || *found != token) break;
                const float *with = weight(1) + (found - ids) * s.out.width;
                for (int64_t i = 0; i < s.out.width; i++) replace(out[i], with[i]);
            } else {
                const float *with = run.at(*this, s.in[1], row);
                for (int32_t i = 0; i < s.n[0]; i++) replace(out[(int64_t)ids[i]], with[i]);
            }
            break;
        }
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

void Executor::softcap(Run &run, const Step &s) {
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
    run.pool.each(pieces * run.call.n_chunks, [&](int64_t item, int) {
        const Chunk &chunk = run.call.chunks[item / pieces];
        const int64_t channel0 = item % pieces * grain, channel1 = std::min(width, channel0 + grain);
        const int64_t tokens = chunk.end - chunk.first;
        float *out = run.at(*this, s.out, chunk.first);
        if (s.op == CONV1D) {
            kernels_->conv1d(run.at(*this, s.in[0], chunk.first), tokens, width, buffers_[s.in[0].buffer].width, weight(0),
                             weight(1), layers_[s.n[0]].taps, run.state.tail(s.n[0], chunk.slot), out, channel0, channel1);
        } else {
            kernels_->rg_lru(run.at(*this, s.in[0], chunk.first), run.at(*this, s.in[1], chunk.first),
                             run.at(*this, s.in[2], chunk.first), weight(0), tokens, width, chunk.position == 0,
                             run.state.hidden(s.n[0], chunk.slot), out, channel0, channel1);
        }
    });
}

}  // namespace gk
