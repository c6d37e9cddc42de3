// The screened head: a coarse copy of the output table says which of its rows can be among those that a filter leaves
// (kernels/sketch.h, executors/native/screening.py). Here it is read.
#include "screening.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "filter.h"
#include "kernels/dispatch.h"
#include "kernels/sketch.h"
#include "run.h"

namespace gk {

namespace {

// Standard deviations that a bound allows the error of a sketch. A row that counts is missed if its own error is larger,
// and larger on one side only: for normal errors with probability 9.9e-10.
constexpr float SLACK = 6.0f;

}  // namespace

void rotate(const float *x, const float *signs, int64_t cols, float *turned) {
    const int64_t block = cols & -cols;
    const float unit = 1 / std::sqrt((float)block);
    for (int64_t i = 0; i < cols; i++) turned[i] = x[i] * signs[i] * unit;
    for (int64_t width = 1; width < block; width *= 2)
        for (int64_t i = 0; i < cols; i += 2 * width)
            for (int64_t k = i; k < i + width; k++) {
                const float a = turned[k], b = turned[k + width];
                turned[k] = a + b, turned[k + width] = a - b;
            }
}

// The candidates of the only row, without reading all of the table. A sketch of every row gives an upper bound of its
// logit. The exact logits of the rows with the highest bounds give a value that the last row that counts reaches at least;
// then every row is computed whose bound reaches it too. False where the table has to be read in full.
bool Executor::screen(Run &run, const Step &s) {
    const Call &call = run.call;
    const Table &t = table_[s.weights[0]];
    const int64_t tiles = (t.rows + TILE - 1) / TILE, cols = t.cols;
    if (call.n_rows != 1 || call.filters[0].top_n > tiles / 8) return false;
    if (pause_) {
        pause_--;
        return false;
    }
    const auto in_vain = [&] {  // the sketch was read for nothing: where that goes on, it is left alone for a while
        if (++misses_ >= 3) misses_ = 0, pause_ = 24;
        return false;
    };
    const LogitsFilter &filter = call.filters[0];

    // turned as the table was, and rounded to int8
    const float *x = run.at(*this, s.in[1], 0), *signs = (const float *)table_[s.n[2] - 1].data;
    std::vector<float> turned(cols);
    rotate(x, signs, cols, turned.data());
    float largest = 0;
    double squares = 0;
    for (const float value : turned) largest = std::max(largest, std::fabs(value)), squares += (double)value * value;
    if (!(largest > 0) || !std::isfinite(largest)) return false;
    std::vector<int8_t> q((cols + 15) / 16 * 16);
    int32_t sum = 0;
    for (int64_t i = 0; i < cols; i++) q[i] = (int8_t)std::lrintf(turned[i] * (127 / largest)), sum += q[i];

    bounds_.resize(tiles * TILE);
    best_.resize(tiles);
    const uint8_t *sketch = (const uint8_t *)table_[s.n[1] - 1].data;
    const float slack = SLACK * (float)std::sqrt(squares);
    const int64_t turns = 8 * run.pool.threads(), grain = (tiles + turns - 1) / turns;
    run.pool.each((tiles + grain - 1) / grain, [&](int64_t item, int) {
        const int64_t tile0 = item * grain, tile1 = std::min(tiles, tile0 + grain);
        kernels_->sketch(sketch, tile0, tile1, cols, q.data(), sum, largest / 127, slack, bounds_.data(), best_.data());
    });

    const Weight weight{(Kind)t.kind, t.rows, t.cols, (const uint8_t *)t.data};
    const Activations a{1, cols, s.n[0] ? nullptr : run.at(*this, s.in[0], 0),
                        s.n[0] ? (uint8_t *)(run.arena + offsets_[s.in[0].buffer]) : nullptr};
    picked_.clear();
    const auto compute = [&](size_t first) {  // the tiles picked from there on, each to its place among the picked
        const int64_t count = (int64_t)(picked_.size() - first), each = std::max<int64_t>(1, count / turns);
        found_.resize(picked_.size() * TILE);
        run.pool.each((count + each - 1) / each, [&](int64_t item, int) {
            for (int64_t i = (int64_t)first + item * each; i < (int64_t)first + std::min(count, (item + 1) * each); i++)
                kernels_->linear(weight, picked_[i], picked_[i] + 1, a, found_.data() + (i - picked_[i]) * TILE, t.rows);
        });
    };
    std::vector<bool> is_picked(tiles);
    const auto pick = [&](int64_t tile) {
        if (!is_picked[tile]) is_picked[tile] = true, picked_.push_back(tile);
    };
    const int64_t *always = call.always + filter.always0, *always_end = call.always + filter.always1;
    for (const int64_t *id = always; id < always_end; id++) pick(*id / TILE);

    // Seeds: more tiles than rows are wanted, since a tile may hold nothing but rows that do not count.
    const size_t seeds = std::min<size_t>(tiles, 8 + filter.top_n);
    std::vector<int64_t> order(tiles);
    for (int64_t i = 0; i < tiles; i++) order[i] = i;
    std::nth_element(order.begin(), order.begin() + (int64_t)seeds - 1, order.end(),
                     [&](int64_t i, int64_t k) { return best_[i] > best_[k]; });
    for (size_t i = 0; i < seeds; i++) pick(order[i]);
    compute(0);
    std::vector<float> counted;
    for (size_t i = 0; i < picked_.size(); i++)
        for (int64_t r = picked_[i] * TILE; r < std::min<int64_t>(t.rows, (picked_[i] + 1) * TILE); r++)
            if (!std::binary_search(always, always_end, r)) counted.push_back(found_[i * TILE + r % TILE]);
    if ((int64_t)counted.size() < filter.top_n) return false;
    std::nth_element(counted.begin(), counted.begin() + filter.top_n - 1, counted.end(), std::greater<float>());
    float reach = counted[filter.top_n - 1];
    const float gap = std::max(0.0f, filter.max_gap), most = cap();
    if (most > 0) {  // the gap is meant after the cap, and so are ties, which it makes of what differs by less than a bit
        const float capped = most * (std::tanh(reach / most) - 1e-6f) - gap;
        if (capped <= -most) return in_vain();
        reach = most * std::atanh(capped / most);
    } else {
        reach -= gap;
    }
    if (!std::isfinite(reach)) return false;
    const size_t first = picked_.size();
    for (int64_t tile = 0; tile < tiles; tile++)
        if (best_[tile] >= reach) pick(tile);
    if ((int64_t)picked_.size() > tiles / 2) return in_vain();  // reading on is faster than reading here and there
    misses_ = 0;
    compute(first);
    Selector selector;
    for (size_t i = 0; i < picked_.size(); i++) {
        const int64_t row = picked_[i] * TILE, n = std::min<int64_t>(TILE, t.rows - row);
        if (most != 0) kernels_->softcap(found_.data() + i * TILE, most, n);
        selector.take(*kernels_, filter, call.always, found_.data() + i * TILE, row, n);
    }
    candidates_[0] = Selector::merge(filter, &selector, 1, 1);
    if (call.computed) call.computed[0] = (int64_t)picked_.size() * TILE;
    return true;
}

}  // namespace gk
