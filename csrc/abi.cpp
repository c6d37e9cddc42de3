// The functions that Python calls by ctypes: plain functions of plain types. Called with the GIL held, as `ctypes.PyDLL`
// does; a run gives the GIL up while it waits for its turn and while it computes, and takes it now and then to let Python
// see a signal. The three functions of Python's stable ABI that this takes are found in the process, so that nothing of
// Python is needed to build.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "executor.h"
#include "kernels/dispatch.h"
#include "weights.h"

extern "C" {
__attribute__((weak)) void *PyEval_SaveThread(void);
__attribute__((weak)) void PyEval_RestoreThread(void *);
__attribute__((weak)) int PyErr_CheckSignals(void);
}

#define GK_API extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string message;
thread_local void *python = nullptr;  // this thread's, while the GIL is given up
thread_local bool signalled = false;
thread_local std::chrono::steady_clock::time_point looked;
thread_local const int32_t *stop_flag = nullptr;  // of this thread's call; set by any other thread

// Asked between regions, and while a call waits for its turn. Python is let in every 20 ms: then a handler of a signal
// runs, and if it raised we stop.
bool keep_on() {
    if (stop_flag && __atomic_load_n(stop_flag, __ATOMIC_RELAXED)) return false;
    const auto now = std::chrono::steady_clock::now();
    if (!python || now - looked < std::chrono::milliseconds(20)) return true;
    looked = now;
    PyEval_RestoreThread(python);
    signalled = PyErr_CheckSignals() != 0;
    python = PyEval_SaveThread();
    return !signalled;
}

}  // namespace

GK_API int32_t gk_version() { return 6; }

// Why the last call of this thread failed.
GK_API const char *gk_error() { return message.c_str(); }

GK_API gk::Executor *gk_executor_new(const gk::Step *steps, int64_t n_steps, const gk::Buffer *buffers, int64_t n_buffers,
                                     const gk::Table *table, int64_t n_table, const gk::Layer *layers, int64_t n_layers) {
    const gk::Kernels *kernels = gk::best_kernels();
    if (!kernels) {
        message = "the kernels that GEMKIT_ISA names are none that this machine has";
        return nullptr;
    }
    return gk::Executor::make(kernels, steps, n_steps, buffers, n_buffers, table, n_table, layers, n_layers, message);
}

// Bytes a second that all threads together read from memory: the best of some passes over more than caches hold.
GK_API double gk_read_limit(int32_t threads) {
    constexpr int64_t FLOATS = 1 << 26, PIECE = 1 << 16;
    const gk::Kernels *kernels = gk::best_kernels();
    const std::vector<float> memory(FLOATS, 1.0f);
    gk::Pool &pool = gk::pool(threads);
    const std::lock_guard turn(pool.turn);
    double best = 0;
    for (int pass = 0; pass < 7; pass++) {
        const auto start = std::chrono::steady_clock::now();
        pool.each(FLOATS / PIECE, [&](int64_t i, int) { kernels->magnitude(memory.data() + i * PIECE, PIECE); });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, FLOATS * sizeof(float) / seconds.count());
    }
    return best;
}

// A whole quantized weight in float32, (rows, cols), from its planes. 0 where its kind has no such shape, or there are no
// kernels. Called without the GIL.
GK_API int32_t gk_dense(int32_t threads, int32_t kind, const gk::Planes *planes, int64_t rows, int64_t cols, float *out) {
    const gk::Kernels *kernels = gk::best_kernels();
    if (!kernels || !gk::packed_bytes((gk::Kind)kind, rows, cols) || !gk::quantized((gk::Kind)kind)) return 0;
    constexpr int64_t PIECE = 1 << 16;  // floats of one item of work
    const int64_t step = std::max<int64_t>(1, PIECE / cols);
    gk::Pool &pool = gk::pool(threads);
    const std::lock_guard turn(pool.turn);
    pool.each((rows + step - 1) / step, [&](int64_t i, int) {
        kernels->dense((gk::Kind)kind, *planes, i * step, std::min(rows, (i + 1) * step), cols, out);
    });
    return 1;
}

GK_API void gk_executor_free(gk::Executor *executor) { delete executor; }

// Of the output: its width, whether it has a row a token (0) or one for each row that was asked for (1); then the width of
// what the head reads, and whether rows of logits can be filtered (0: neither).
GK_API void gk_executor_shape(const gk::Executor *executor, int64_t *out) {
    const gk::Executor::Shape &shape = executor->shape();
    out[0] = shape.width, out[1] = shape.domain, out[2] = shape.hidden, out[3] = shape.filters;
}

// ---- states: as `State` of state.h names these --------------------------------------------------------------------------

GK_API gk::State *gk_state_new(const gk::Executor *executor) {
    return new gk::State(executor->layers().data(), (int32_t)executor->layers().size());
}
GK_API void gk_state_delete(gk::State *state) { delete state; }
GK_API int64_t gk_state_add(gk::State *state) { return state->add(); }
GK_API void gk_state_free(gk::State *state, int64_t slot) { state->free(slot); }
GK_API int64_t gk_state_bytes(const gk::State *state) { return state->bytes(); }
GK_API int64_t gk_state_unique(const gk::State *state, int64_t slot) { return state->unique(state->slot(slot)); }
GK_API int64_t gk_state_needed(const gk::State *state, int64_t slot, int64_t tokens) { return state->needed(slot, tokens); }
GK_API int64_t gk_state_restore(gk::State *state, int64_t slot, const gk::Memory *from, int32_t alien, int64_t keep) {
    return state->restore(slot, *from, alien != 0, keep);
}

GK_API gk::Memory *gk_snapshot_new(const gk::State *state, int64_t slot) { return state->snapshot(slot); }
GK_API void gk_snapshot_delete(gk::State *state, gk::Memory *memory) { state->drop(memory); }
GK_API int64_t gk_snapshot_unique(const gk::State *state, const gk::Memory *memory) { return state->unique(*memory); }
// Its first page of a layer, and how many there are, in `place`; the bytes of one.
GK_API int64_t gk_snapshot_pages(const gk::State *state, const gk::Memory *memory, int32_t layer, int64_t *place) {
    place[0] = state->first_page(*memory, layer), place[1] = state->pages(*memory, layer);
    return (int64_t)state->page_bytes(layer);
}
GK_API void gk_snapshot_get(const gk::State *state, const gk::Memory *memory, int32_t layer, char *out) {
    state->get(*memory, layer, out);
}
GK_API gk::Memory *gk_snapshot_make(const gk::State *state, int64_t length) { return state->make(length); }
GK_API int32_t gk_snapshot_put(gk::State *state, gk::Memory *memory, int32_t layer, int64_t first, int64_t count,
                               const char *data) {
    return state->put(*memory, layer, first, count, data);
}

// ---- runs ---------------------------------------------------------------------------------------------------------------

namespace {

int32_t run(gk::Executor *executor, gk::State &state, int32_t threads, const gk::Executor::Call &call, const int32_t *stop) {
    looked = std::chrono::steady_clock::now();
    signalled = false;
    stop_flag = stop;
    if (PyEval_SaveThread) python = PyEval_SaveThread();
    int32_t result = gk::Executor::STOPPED;
    gk::Pool &pool = gk::pool(threads);
    bool mine = false;
    while (!(mine = pool.turn.try_lock_for(std::chrono::milliseconds(5))) && keep_on()) continue;
    if (mine) {
        const std::lock_guard turn(pool.turn, std::adopt_lock);
        result = executor->run(call, state, pool, keep_on);
    }
    if (python) PyEval_RestoreThread(python);
    python = nullptr;
    stop_flag = nullptr;
    return result;
}

}  // namespace

// 0 done, 1 stopped by the flag or by a signal (then Python's exception is set), 2 out of memory, 3 keys or values beyond
// float16, 4 no such output. `stop`: null, or an int32 that ends this call when it is not 0.
GK_API int32_t gk_run(gk::Executor *executor, gk::State *state, int32_t threads, const gk::Executor::Call *call,
                      const int32_t *stop) {
    return run(executor, *state, threads, *call, stop);
}

// An image tower: the features of each patch, (n_patches, features), from its pixels, (n_patches, pixels). Nothing is
// remembered. Returns as gk_run, or -1 if the program is another.
GK_API int32_t gk_encode(gk::Executor *executor, int32_t threads, const float *patches, int64_t n_patches, int64_t pixels,
                         float *out, int64_t features) {
    if (!executor->encodes(pixels, features)) return -1;
    std::vector<int64_t> rows(n_patches);
    for (int64_t i = 0; i < n_patches; i++) rows[i] = i;
    gk::State none(nullptr, 0);
    gk::Executor::Call call{};
    call.n_tokens = call.n_features = n_patches;
    call.features = patches;
    call.feature_rows = rows.data();
    call.out = out;
    return run(executor, none, threads, call, nullptr);
}

// What a filter left of a row of the last run: how many, and where their ids and logits are until the next.
GK_API int64_t gk_candidates(const gk::Executor *executor, int64_t row, const int64_t **ids, const float **logits) {
    const gk::Candidates &left = executor->candidates()[row];
    *ids = left.ids.data(), *logits = left.logits.data();
    return (int64_t)left.ids.size();
}
