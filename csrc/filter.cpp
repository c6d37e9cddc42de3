// The head where rows have a filter: by tiles of the table, of which each row keeps what its filter may leave. No array of
// all logits is made for such rows, and a single one is screened first (screening.cpp).
#include "filter.h"

#include <cstring>

#include "run.h"

namespace gk {

void Executor::filter(Run &run) {
    constexpr int64_t BLOCK_TILES = 64;  // 1,024 rows of the table at a time: the logits of a few rows stay in the cache
    const Call &call = run.call;
    const Step &s = steps_[head_];
    candidates_.resize(call.n_rows);
    if (s.n[1] && screen(run, s)) return;
    const Table &t = table_[s.weights[0]];
    const Weight weight{(Kind)t.kind, t.rows, t.cols, (const uint8_t *)t.data};
    const int64_t rows = call.n_rows, threads = run.pool.threads(), columns = BLOCK_TILES * TILE;
    const Activations a{rows, t.cols, s.n[0] ? nullptr : run.at(*this, s.in[0], 0),
                        s.n[0] ? (uint8_t *)(run.arena + offsets_[s.in[0].buffer]) : nullptr};
    std::vector<int64_t> full(rows);  // of a row without a filter: its place in the output
    for (int64_t r = 0, place = 0; r < rows; r++) full[r] = call.filters[r].top_n ? -1 : place++;
    std::vector<Selector> selectors(threads * rows);
    std::vector<std::vector<float>> logits(threads);
    const int64_t tiles = (t.rows + TILE - 1) / TILE;
    run.pool.each((tiles + BLOCK_TILES - 1) / BLOCK_TILES, [&](int64_t block, int thread) {
        const int64_t tile = block * BLOCK_TILES, first = tile * TILE, n = std::min<int64_t>(columns, t.rows - first);
        logits[thread].resize(rows * columns);
        kernels_->linear(weight, tile, std::min(tiles, tile + BLOCK_TILES), a, logits[thread].data() - first, columns);
        for (int64_t r = 0; r < rows; r++) {
            float *row = logits[thread].data() + r * columns;
            if (cap() != 0) kernels_->softcap(row, cap(), n);
            if (full[r] < 0)
                selectors[thread * rows + r].take(*kernels_, call.filters[r], call.always, row, first, n);
            else
                std::memcpy(call.out + full[r] * shape_.width + first, row, n * sizeof(float));
        }
    });
    for (int64_t r = 0; r < rows; r++)
        if (full[r] < 0) candidates_[r] = Selector::merge(call.filters[r], &selectors[r], threads, rows);
}

}  // namespace gk
