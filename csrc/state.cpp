#include "state.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace gk {

State::State(const Layer *layers, int32_t count, int64_t slots, int64_t room)
    : layers_(layers, layers + count), cells_(slots * count), lengths_(slots, 0), room_(room) {
    for (int64_t slot = 0; slot < slots; slot++)
        for (int32_t i = 0; i < count; i++)
            if (layers_[i].kind == 1) {
                cell(i, slot).now.assign(cell_floats(i), 0.0f);
                cell(i, slot).next = cell(i, slot).now;
            }
}

State::~State() {
    for (int64_t slot = 0; slot < slots(); slot++) free(slot);
}

size_t State::page_bytes(const Layer &layer) const {
    return (size_t)2 * PAGE * layer.head_dim * layer.kv_heads * sizeof(uint16_t);
}

int64_t State::cell_floats(int32_t i) const { return (int64_t)layers_[i].width * layers_[i].taps; }

Page *State::fresh(const Layer &layer) {
    Page *page = new (std::nothrow) Page;
    if (!page) return nullptr;
    const size_t bytes = (page_bytes(layer) + 63) / 64 * 64;
    page->data = (uint16_t *)std::aligned_alloc(64, bytes);
    if (!page->data) {
        delete page;
        return nullptr;
    }
    std::memset(page->data, 0, bytes);  // a position that was never written must not be infinite: 0 * inf is no number
    held_ += (int64_t)page_bytes(layer);
    return page;
}

void State::drop(const Layer &layer, Page *&page) {
    if (page && page->owners.fetch_sub(1) == 1) {
        std::free(page->data);
        delete page;
    }
    if (page) held_ -= (int64_t)page_bytes(layer);
    page = nullptr;
}

bool State::prepare(int64_t slot, int64_t end) {
    for (int32_t i = 0; i < (int32_t)layers_.size(); i++) {
        Cell &at = cell(i, slot);
        if (layers_[i].kind == 1) {
            at.next = at.now;
            continue;
        }
        const int64_t first = lengths_[slot] / PAGE, last = (end + PAGE - 1) / PAGE;
        if ((int64_t)at.pages.size() < last) at.pages.resize(last, nullptr);
        for (int64_t p = first; p < last; p++) {
            Page *old = at.pages[p];
            if (old && old->owners.load() == 1) continue;
            Page *page = fresh(layers_[i]);
            if (!page) return false;
            if (old) {
                std::memcpy(page->data, old->data, page_bytes(layers_[i]));
                drop(layers_[i], old);
            }
            at.pages[p] = page;
        }
    }
    return true;
}

void State::commit(int64_t slot, int64_t end) {
    for (int32_t i = 0; i < (int32_t)layers_.size(); i++) {
        Cell &at = cell(i, slot);
        if (layers_[i].kind == 1) {
            at.now.swap(at.next);
        } else if (layers_[i].window) {
            const int64_t needed = end - (layers_[i].window - 1) - room_;  // by the next token, after the longest rollback
            for (int64_t p = 0; (p + 1) * PAGE <= needed && p < (int64_t)at.pages.size(); p++)
                if (at.pages[p]) drop(layers_[i], at.pages[p]);
        }
    }
    lengths_[slot] = end;
}

bool State::rollback(int64_t slot, int64_t length) {
    for (int32_t i = 0; i < (int32_t)layers_.size(); i++) {
        if (layers_[i].kind == 1 || !length) continue;
        const int64_t window = layers_[i].window;
        const int64_t needed = window && length > window - 1 ? length - (window - 1) : 0;
        if (first_page(i, slot) * PAGE > needed) return false;
    }
    lengths_[slot] = length;
    return true;
}

void State::free(int64_t slot) {
    for (int32_t i = 0; i < (int32_t)layers_.size(); i++) {
        Cell &at = cell(i, slot);
        for (Page *&page : at.pages) drop(layers_[i], page);
        at.pages.clear();
        std::fill(at.now.begin(), at.now.end(), 0.0f);
    }
    lengths_[slot] = 0;
}

bool State::fork(int64_t source, int64_t target) {
    if (source == target) return true;
    free(target);
    for (int32_t i = 0; i < (int32_t)layers_.size(); i++) {
        Cell &from = cell(i, source), &to = cell(i, target);
        to.pages = from.pages;
        for (Page *page : to.pages)
            if (page) page->owners.fetch_add(1), held_ += (int64_t)page_bytes(layers_[i]);
        to.now = from.now;
    }
    lengths_[target] = lengths_[source];
    return true;
}

int64_t State::bytes() const {
    int64_t total = held_;
    for (const Cell &at : cells_) total += (int64_t)((at.now.size() + at.next.size()) * sizeof(float));
    return total;
}

uint16_t *State::keys(int32_t i, int64_t slot, int64_t page, int32_t head) const {
    const Page *at = cell(i, slot).pages[page];
    return at ? at->data + (size_t)2 * head * PAGE * layers_[i].head_dim : nullptr;
}

uint16_t *State::values(int32_t i, int64_t slot, int64_t page, int32_t head) const {
    const Page *at = cell(i, slot).pages[page];
    return at ? at->data + (size_t)(2 * head + 1) * PAGE * layers_[i].head_dim : nullptr;
}

int64_t State::first_page(int32_t i, int64_t slot) const {
    const auto &pages = cell(i, slot).pages;
    int64_t p = 0;
    while (p < (int64_t)pages.size() && !pages[p]) p++;
    return p;
}

float *State::hidden(int32_t i, int64_t slot) {
    return cell(i, slot).next.data() + (int64_t)(layers_[i].taps - 1) * layers_[i].width;
}

void State::keep(int32_t i, int64_t slot, const float *values) {
    std::memcpy(cell(i, slot).now.data(), values, cell(i, slot).now.size() * sizeof(float));
}

}  // namespace gk
