#include "state.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace gk {

namespace {

int64_t pages_of(int64_t tokens) { return (tokens + PAGE - 1) / PAGE; }

}  // namespace

State::~State() {
    for (auto &memory : slots_)
        if (memory) clear(*memory);
}

size_t State::page_bytes(int32_t i) const {
    const Layer &layer = layers_[i];
    if (layer.kind == 1) return (size_t)layer.width * layer.taps * sizeof(float);
    return (size_t)2 * PAGE * layer.head_dim * layer.kv_heads * sizeof(uint16_t);
}

// A page of zeros: a position that was never written must not be infinite, since 0 * inf is no number. Or a copy.
Page *State::fresh(int32_t i, const Page *copied) {
    const size_t bytes = page_bytes(i);
    Page *page = new (std::nothrow) Page;
    if (!page) return nullptr;
    page->data = (char *)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!page->data) {
        delete page;
        return nullptr;
    }
    if (copied)
        std::memcpy(page->data, copied->data, bytes);
    else
        std::memset(page->data, 0, bytes);
    held_.fetch_add((int64_t)bytes, std::memory_order_relaxed);
    return page;
}

void State::drop(int32_t i, Page *&page) {
    if (page && page->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::free(page->data);
        delete page;
        held_.fetch_sub((int64_t)page_bytes(i), std::memory_order_relaxed);
    }
    page = nullptr;
}

void State::clear(Memory &memory) {
    for (int32_t i = 0; i < (int32_t)memory.cells.size(); i++) {
        for (Page *&page : memory.cells[i].pages) drop(i, page);
        drop(i, memory.cells[i].next);
    }
    memory.cells.clear();
    memory.length = 0;
}

void State::drop(Memory *memory) {
    clear(*memory);
    delete memory;
}

int64_t State::add() {
    auto memory = std::make_unique<Memory>();
    memory->cells.resize(layers_.size());
    for (int32_t i = 0; i < count(); i++) {
        if (layers_[i].kind != 1) continue;
        Page *page = fresh(i);
        if (!page) {
            clear(*memory);
            return -1;
        }
        memory->cells[i].pages.push_back(page);
    }
    const auto place = std::find(slots_.begin(), slots_.end(), nullptr);
    const int64_t slot = place - slots_.begin();
    if (place == slots_.end()) slots_.emplace_back();
    slots_[slot] = std::move(memory);
    return slot;
}

void State::free(int64_t slot) {
    clear(*slots_[slot]);
    slots_[slot].reset();
}

bool State::prepare(int64_t slot, int64_t end) {
    Memory &memory = *slots_[slot];
    for (int32_t i = 0; i < count(); i++) {
        Memory::Cell &at = memory.cells[i];
        if (layers_[i].kind == 1) {
            if (at.next)
                std::memcpy(at.next->data, at.pages[0]->data, page_bytes(i));
            else if (!(at.next = fresh(i, at.pages[0])))
                return false;
            continue;
        }
        if ((int64_t)at.pages.size() < pages_of(end)) at.pages.resize(pages_of(end), nullptr);
        for (int64_t p = memory.length / PAGE; p < pages_of(end); p++) {
            Page *old = at.pages[p];
            if (old && old->owners.load(std::memory_order_acquire) == 1) continue;
            Page *page = fresh(i, old);
            if (!page) return false;
            drop(i, old);
            at.pages[p] = page;
        }
    }
    return true;
}

void State::commit(int64_t slot, int64_t end) {
    Memory &memory = *slots_[slot];
    for (int32_t i = 0; i < count(); i++) {
        Memory::Cell &at = memory.cells[i];
        if (layers_[i].kind == 1) {
            std::swap(at.pages[0], at.next);
            if (at.next->owners.load(std::memory_order_acquire) > 1) drop(i, at.next);  // a snapshot has it
        } else if (layers_[i].before >= 0) {
            const int64_t needed = end - layers_[i].before;  // by the next token
            for (int64_t p = 0; (p + 1) * PAGE <= needed && p < (int64_t)at.pages.size(); p++)
                if (at.pages[p]) drop(i, at.pages[p]);
        }
    }
    memory.length = end;
}

int64_t State::unique(const Memory &memory) const {
    int64_t total = 0;
    for (int32_t i = 0; i < count(); i++) {
        const auto alone = [](const Page *page) { return page && page->owners.load(std::memory_order_acquire) == 1; };
        const Memory::Cell &at = memory.cells[i];
        total += (int64_t)page_bytes(i) * (std::count_if(at.pages.begin(), at.pages.end(), alone) + alone(at.next));
    }
    return total;
}

int64_t State::needed(int64_t slot, int64_t tokens) const {
    const Memory &memory = *slots_[slot];
    int64_t total = 0;
    for (int32_t i = 0; i < count(); i++) {
        const Memory::Cell &at = memory.cells[i];
        int64_t fresh = layers_[i].kind == 1 && !at.next;
        if (layers_[i].kind == 0)
            for (int64_t p = memory.length / PAGE; p < pages_of(memory.length + tokens); p++) {
                const Page *page = p < (int64_t)at.pages.size() ? at.pages[p] : nullptr;
                fresh += !page || page->owners.load(std::memory_order_acquire) > 1;
            }
        total += fresh * (int64_t)page_bytes(i);
    }
    return total;
}

Memory *State::snapshot(int64_t slot) const {
    const Memory &from = *slots_[slot];
    Memory *made = make(from.length);
    for (int32_t i = 0; i < count(); i++) {
        const auto &pages = from.cells[i].pages;
        const int64_t held = layers_[i].kind == 1 ? 1 : std::min<int64_t>(pages.size(), pages_of(from.length));
        made->cells[i].pages.assign(pages.begin(), pages.begin() + held);
        for (Page *page : made->cells[i].pages)
            if (page) page->owners.fetch_add(1, std::memory_order_relaxed);
    }
    return made;
}

int64_t State::restore(int64_t slot, const Memory &from, bool alien, int64_t keep) {
    Memory &to = *slots_[slot];
    const int64_t border = from.length / PAGE;  // the first page that the slot may have written to since
    for (int32_t i = 0; i < count(); i++) {
        const auto &pages = to.cells[i].pages;
        if (layers_[i].kind == 1) keep = 0;
        for (int64_t p = border; keep && p < pages_of(from.length + keep); p++)
            if (p >= (int64_t)pages.size() || !pages[p]) keep = 0;  // a window has moved past what was to be kept
    }
    Memory made;
    made.length = from.length + keep;
    made.cells.resize(layers_.size());
    for (int32_t i = 0; i < count(); i++) {
        auto &pages = made.cells[i].pages;
        const auto &theirs = from.cells[i].pages;
        pages.assign(theirs.begin(), keep ? theirs.begin() + std::min<int64_t>(border, theirs.size()) : theirs.end());
        if (keep)
            for (int64_t p = border; p < pages_of(made.length); p++) pages.push_back(to.cells[i].pages[p]);
        for (size_t p = 0; p < pages.size(); p++) {
            if (!pages[p]) continue;
            if (!alien) {
                pages[p]->owners.fetch_add(1, std::memory_order_relaxed);
            } else if (!(pages[p] = fresh(i, pages[p]))) {
                pages.resize(p);
                made.cells.resize(i + 1);
                clear(made);
                return -1;
            }
        }
    }
    clear(to);
    to.length = made.length;
    to.cells = std::move(made.cells);
    return to.length;
}

int64_t State::first_page(const Memory &memory, int32_t i) const {
    const auto &pages = memory.cells[i].pages;
    return std::find_if(pages.begin(), pages.end(), [](const Page *page) { return page; }) - pages.begin();
}

int64_t State::pages(const Memory &memory, int32_t i) const {
    return (int64_t)memory.cells[i].pages.size() - first_page(memory, i);
}

void State::get(const Memory &memory, int32_t i, char *out) const {
    for (const Page *page : memory.cells[i].pages) {
        if (!page) continue;
        std::memcpy(out, page->data, page_bytes(i));
        out += page_bytes(i);
    }
}

Memory *State::make(int64_t length) const {
    Memory *made = new Memory;
    made->length = length;
    made->cells.resize(layers_.size());
    return made;
}

bool State::put(Memory &memory, int32_t i, int64_t first, int64_t count, const char *data) {
    const Layer &layer = layers_[i];
    auto &pages = memory.cells[i].pages;
    const int64_t seen = layer.before < 0 ? 0 : std::max<int64_t>(0, memory.length - layer.before);
    if (!pages.empty() || first < 0 || count < 0) return false;
    if (layer.kind == 1 ? first || count != 1 : first > seen / PAGE || first + count != pages_of(memory.length)) return false;
    pages.assign(first, nullptr);
    for (int64_t p = 0; p < count; p++) {
        Page *page = fresh(i);
        if (!page) return false;
        std::memcpy(page->data, data + p * page_bytes(i), page_bytes(i));
        pages.push_back(page);
    }
    return true;
}

uint16_t *State::keys(int32_t i, int64_t slot, int64_t page, int32_t head) const {
    const Page *at = slots_[slot]->cells[i].pages[page];
    return at ? (uint16_t *)at->data + (size_t)2 * head * PAGE * layers_[i].head_dim : nullptr;
}

uint16_t *State::values(int32_t i, int64_t slot, int64_t page, int32_t head) const {
    const Page *at = slots_[slot]->cells[i].pages[page];
    return at ? (uint16_t *)at->data + (size_t)(2 * head + 1) * PAGE * layers_[i].head_dim : nullptr;
}

float *State::hidden(int32_t i, int64_t slot) { return tail(i, slot) + (int64_t)(layers_[i].taps - 1) * layers_[i].width; }

}  // namespace gk
