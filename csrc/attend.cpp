// Attention: divided into tiles of queries, and where these are few, into segments of pages whose softmax is merged.
#include <algorithm>

#include "run.h"

namespace gk {

namespace {

constexpr int64_t SEGMENT = 8;  // pages whose softmax is computed apart and merged in order, whoever computes it
constexpr int64_t QUERY_ROWS = 64;  // rows of queries (tokens times heads of a group) of a tile of attention

}  // namespace

void Executor::attend(Run &run, const Step &s) {
    const Layer &layer = layers_[s.n[0]];
    const int32_t heads = s.n[1], group = heads / layer.kv_heads, width = layer.head_dim;
    const int64_t tile_tokens = std::max<int64_t>(1, QUERY_ROWS / group);
    struct Item {
        int64_t chunk, token, tokens, page0, page1;  // of one tile: the pages that it may see
        int64_t span0, span1;  // the spans that may hold a token of it
        int64_t segment0, segments;
        size_t partial;  // of its first segment and head
    };
    std::vector<Item> items;
    size_t partial_floats = 0;
    int64_t most_segments = 1;
    const auto about = [&](const Item &item, int32_t head) {  // what the kernels are told of a tile
        const Chunk &chunk = run.call.chunks[item.chunk];
        return Attend{run.at(*this, s.in[0], item.token) + (int64_t)head * group * width,
                      buffers_[s.in[0].buffer].width,
                      (int32_t)item.tokens,
                      group,
                      width,
                      chunk.position + item.token - chunk.first,
                      chunk.position + chunk.end - chunk.first,
                      layer.before < 0 ? ALL : layer.before,
                      layer.after < 0 ? ALL : layer.after,
                      run.call.spans + item.span0,
                      item.span1 - item.span0,
                      s.f[0],
                      s.f[1]};
    };
    for (int64_t i = 0; i < run.call.n_chunks; i++) {
        const Chunk &chunk = run.call.chunks[i];
        int64_t span = chunk.span0;
        for (int64_t t = chunk.first; t < chunk.end; t += tile_tokens) {
            Item item{i, t, std::min(tile_tokens, chunk.end - t), 0, 0, 0, 0, 0, 0, partial_floats};
            const int64_t position = chunk.position + t - chunk.first, last = position + item.tokens - 1;
            while (span < chunk.span1 && run.call.spans[span].end <= position) span++;
            item.span0 = item.span1 = span;
            while (item.span1 < chunk.span1 && run.call.spans[item.span1].start <= last) item.span1++;
            const Attend a = about(item, 0);
            item.page0 = visible(a, position).lo / PAGE;
            item.page1 = (visible(a, last).hi + PAGE - 1) / PAGE;
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
        const int64_t slot = run.call.chunks[item.chunk].slot;
        const int64_t first = std::max(item.page0, (item.segment0 + number) * SEGMENT);
        const int64_t last = std::min(item.page1, (item.segment0 + number + 1) * SEGMENT);
        const uint16_t *keys[SEGMENT], *values[SEGMENT];
        for (int64_t p = first; p < last; p++) {
            keys[p - first] = run.state.keys(s.n[0], slot, p, head);
            values[p - first] = run.state.values(s.n[0], slot, p, head);
        }
        char *room = scratch_[thread].data();
        room += (64 - (uintptr_t)room % 64) % 64;
        kernels_->attend(about(item, head), Pages{keys - first, values - first}, first, last, true, into, room);
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

}  // namespace gk
