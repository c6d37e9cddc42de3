// The KV cache: pages of float16 keys and values for layers that attend, one page of inputs and hidden state for layers
// that recur. A sequence is a slot, which grows, or a snapshot, which never changes. They share pages, and a page that is
// shared is copied before it is written.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/table.h"

namespace gk {

struct Layer {  // all the same size, so that Python hands over an array
    int32_t kind;  // 0: attends, 1: recurs
    int32_t kv_heads, head_dim;
    int32_t before, after;  // tokens that a token sees before and after itself; -1: all
    int32_t width, taps;
};

// Of a layer that attends: PAGE positions of all key/value heads, for each head its keys (head_dim, PAGE), then its values
// (PAGE, head_dim). Of one that recurs: (taps, width) float32, the last inputs and then the hidden state.
struct Page {
    std::atomic<int> owners{1};
    char *data = nullptr;
};

// What is remembered of one sequence.
struct Memory {
    struct Cell {  // of one layer
        std::vector<Page *> pages;  // by page number; null before the first that is held. One, where the layer recurs
        Page *next = nullptr;  // where a recurrent layer computes what counts only after `commit`
    };
    int64_t length = 0;  // tokens
    std::vector<Cell> cells;
};

class State {
public:
    State(const Layer *layers, int32_t count) : layers_(layers, layers + count) {}
    ~State();
    State(const State &) = delete;

    int64_t add();  // a new, empty slot: its number; -1 where memory ran out
    void free(int64_t slot);

    // Make room for positions up to `end`, in pages of its own. False where memory ran out.
    bool prepare(int64_t slot, int64_t end);
    // All layers have the positions up to `end`: they count. Pages that no window reaches again are given back.
    void commit(int64_t slot, int64_t end);

    int64_t bytes() const { return held_.load(std::memory_order_relaxed); }  // of slots and snapshots, a shared page once
    int64_t unique(const Memory &memory) const;  // bytes that dropping it would give back
    int64_t needed(int64_t slot, int64_t tokens) const;  // bytes that `prepare` would take for this many more

    // Snapshots are dropped by `drop`, from any thread, at any time.
    Memory *snapshot(int64_t slot) const;
    void drop(Memory *memory);
    // Put a snapshot in place of what `slot` holds; of the tokens that the slot has computed since the snapshot was taken of
    // it, `keep` stay if every layer has them. `alien`: the snapshot is of another state, whose pages are copied.
    // The length, or -1 where memory ran out and nothing has changed.
    int64_t restore(int64_t slot, const Memory &from, bool alien, int64_t keep);

    // For files: the pages of a layer of a snapshot, from the first that it needs; and a snapshot made from such.
    int64_t first_page(const Memory &memory, int32_t layer) const;
    int64_t pages(const Memory &memory, int32_t layer) const;
    void get(const Memory &memory, int32_t layer, char *out) const;
    Memory *make(int64_t length) const;
    // False where these are not the pages that a sequence of its length needs, or memory ran out.
    bool put(Memory &memory, int32_t layer, int64_t first, int64_t count, const char *data);

    const Layer &layer(int32_t i) const { return layers_[i]; }
    const Memory &slot(int64_t slot) const { return *slots_[slot]; }
    size_t page_bytes(int32_t layer) const;
    uint16_t *keys(int32_t layer, int64_t slot, int64_t page, int32_t head) const;
    uint16_t *values(int32_t layer, int64_t slot, int64_t page, int32_t head) const;
    // Of a recurrent layer, what it computes into: the last inputs, the hidden state behind them.
    float *tail(int32_t layer, int64_t slot) { return (float *)slots_[slot]->cells[layer].next->data; }
    float *hidden(int32_t layer, int64_t slot);

private:
    int32_t count() const { return (int32_t)layers_.size(); }
    Page *fresh(int32_t layer, const Page *copied = nullptr);
    void drop(int32_t layer, Page *&page);
    void clear(Memory &memory);

    std::vector<Layer> layers_;
    std::vector<std::unique_ptr<Memory>> slots_;  // null: the number is free
    std::atomic<int64_t> held_{0};  // bytes of pages
};

}  // namespace gk
