// What a model remembers of sequences: pages of float16 keys and values for layers that attend, a row of inputs and a
// hidden state for layers that recur. Forks share pages until one of them writes.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/table.h"

namespace gk {

struct Layer {  // all the same size, so that Python hands over an array
    int32_t kind;  // 0: attends, 1: recurs
    int32_t kv_heads, head_dim, window;  // window 0: everything
    int32_t width, taps;
};

// PAGE positions of all key/value heads of a layer: for each head its keys (head_dim, PAGE), then its values (PAGE, head_dim).
struct Page {
    std::atomic<int> owners{1};
    uint16_t *data;
};

class State {
public:
    State(const Layer *layers, int32_t count, int64_t slots, int64_t room);
    ~State();
    State(const State &) = delete;

    int64_t slots() const { return (int64_t)lengths_.size(); }

    // Make room for positions up to `end`, in memory that no other sequence sees. False where memory ran out.
    bool prepare(int64_t slot, int64_t end);
    // All layers have the positions up to `end`: they count. Pages that no window reaches again are given back.
    void commit(int64_t slot, int64_t end);
    // Forget what is after `length`; false if a layer has dropped what the next token must see.
    bool rollback(int64_t slot, int64_t length);
    void free(int64_t slot);
    bool fork(int64_t source, int64_t target);
    int64_t bytes() const;

    const Layer &layer(int32_t i) const { return layers_[i]; }
    uint16_t *keys(int32_t layer, int64_t slot, int64_t page, int32_t head) const;
    uint16_t *values(int32_t layer, int64_t slot, int64_t page, int32_t head) const;
    int64_t first_page(int32_t layer, int64_t slot) const;
    // Recurrent layers compute into what counts only after `commit`.
    float *tail(int32_t layer, int64_t slot) { return cell(layer, slot).next.data(); }
    float *hidden(int32_t layer, int64_t slot);
    int64_t cell_floats(int32_t layer) const;
    // What a recurrent layer holds now, for marks and files; and to put it back.
    const float *kept(int32_t layer, int64_t slot) { return cell(layer, slot).now.data(); }
    void keep(int32_t layer, int64_t slot, const float *values);

private:
    struct Cell {  // one layer of one sequence
        std::vector<Page *> pages;  // by page number; null before the first that is held
        std::vector<float> now, next;
    };
    Cell &cell(int32_t layer, int64_t slot) { return cells_[slot * (int64_t)layers_.size() + layer]; }
    const Cell &cell(int32_t layer, int64_t slot) const { return cells_[slot * (int64_t)layers_.size() + layer]; }
    size_t page_bytes(const Layer &layer) const;
    Page *fresh(const Layer &layer);
    void drop(const Layer &layer, Page *&page);

    std::vector<Layer> layers_;
    std::vector<Cell> cells_;
    std::vector<int64_t> lengths_;
    int64_t room_;
    int64_t held_ = 0;  // bytes of pages
};

}  // namespace gk
