// The screened head: a coarse copy of the output table says which of its rows can be among those that a filter leaves
// (kernels/sketch.h, executors/native/screening.py). Here it is made, and read.
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

// The spacing of four levels that leaves the least of a normal variable, in its standard deviations
// (J. Max, Quantizing for minimum distortion, 1960, table II).
constexpr float SPACING = 0.9957f;

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

void make_sketch(const Weight &table, const float *signs, uint8_t *out, int64_t tile0, int64_t tile1) {
    const Kernels *kernels = best_kernels();
    const int64_t cols = table.cols, padded = (cols + 15) / 16 * 16;
    std::vector<float> row(cols), turned(padded);
    std::vector<uint8_t> codes(padded);
    for (int64_t tile = tile0; tile < tile1; tile++) {
        uint8_t *at = out + tile * sketch_tile_bytes(cols);
        std::memset(at, 0, sketch_tile_bytes(cols));
        for (int64_t r = 0; r < TILE && tile * TILE + r < table.rows; r++) {
            kernels->row(table, tile * TILE + r, row.data());
            rotate(row.data(), signs, cols, turned.data());
            double squares = 0;
            for (int64_t i = 0; i < cols; i++) squares += (double)turned[i] * turned[i];
            if (!(squares > 0)) continue;  // a row of zeros: scale and error are zero
            const float per_spacing = 1 / (SPACING * (float)std::sqrt(squares / (double)cols));
            double along = 0;
            for (int64_t i = 0; i < cols; i++) {
                codes[i] = (uint8_t)std::clamp(std::floor(turned[i] * per_spacing + 2.0f), 0.0f, 3.0f);
                along += (double)turned[i] * ((double)codes[i] - 1.5);
            }
            // Levels that are nearest to a row are shorter than it, and a product with what it points to comes out too small.
            // The scale that makes what is left orthogonal to the row itself does not err on the rows that matter.
            const uint16_t scale = portable::float_to_half((float)(squares / along));
            const float exact = portable::half_to_float(scale);
            double left = 0;
            for (int64_t i = 0; i < cols; i++) {
                const double rest = turned[i] - exact * ((double)codes[i] - 1.5);
                left += rest * rest;
                at[64 + i / 16 * 64 + 4 * r + i % 4] |= (uint8_t)(codes[i] << 2 * (i % 16 / 4));
            }
            // rounded up: a bound must not be too small
            const uint16_t error = portable::float_to_half((float)std::sqrt(left / (double)cols) * (1 + 0x1p-10f));
            std::memcpy(at + 2 * r, &scale, 2);
            std::memcpy(at + 32 + 2 * r, &error, 2);
        }
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
        selector.take(filter, call.always, found_.data() + i * TILE, row, n);
    }
    candidates_[0] = Selector::merge(filter, &selector, 1, 1);
    if (call.computed) call.computed[0] = (int64_t)picked_.size() * TILE;
    return true;
}

}  // namespace gk

extern "C" __attribute__((visibility("default"))) int32_t gk_make_sketch(int32_t kind, const uint8_t *packed, int64_t rows,
                                                                        int64_t cols, const float *signs, uint8_t *out,
                                                                        int64_t tile0, int64_t tile1) {
    if (!gk::best_kernels()) return 0;
    gk::make_sketch({(gk::Kind)kind, rows, cols, packed}, signs, out, tile0, tile1);
    return 1;
}
