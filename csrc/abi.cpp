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

GK_API int32_t gk_version() { return 4; }

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

GK_API gk::State *gk_state_new(const gk::Executor *executor, int64_t slots, int64_t room) {
    return new gk::State(executor->layers().data(), (int32_t)executor->layers().size(), slots, room);
}
GK_API void gk_state_free(gk::State *state) { delete state; }
GK_API int32_t gk_state_rollback(gk::State *state, int64_t slot, int64_t length) { return state->rollback(slot, length); }
GK_API int32_t gk_state_fork(gk::State *state, int64_t source, int64_t target) { return state->fork(source, target); }
GK_API void gk_state_clear(gk::State *state, int64_t slot) { state->free(slot); }
GK_API int64_t gk_state_bytes(const gk::State *state) { return state->bytes(); }
GK_API const float *gk_state_kept(gk::State *state, int32_t layer, int64_t slot) { return state->kept(layer, slot); }
GK_API int64_t gk_state_cell(const gk::State *state, int32_t layer) { return state->cell_floats(layer); }
GK_API void gk_state_keep(gk::State *state, int32_t layer, int64_t slot, const float *values) {
    state->keep(layer, slot, values);
}

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
// float16. `stop`: null, or an int32 that ends this call when it is not 0.
GK_API int32_t gk_run(gk::Executor *executor, gk::State *state, int32_t threads, const int64_t *tokens, int64_t n_tokens,
                      const gk::Span *spans, int64_t n_spans, const int64_t *rows, int64_t n_rows, const float *features,
                      const int64_t *feature_rows, int64_t n_features, float *logits, const gk::Executor::Wanted *wanted,
                      const int64_t *kept, int64_t *computed, double *seconds, const int32_t *stop) {
    const gk::Executor::Call call{tokens,       n_tokens,   spans,  n_spans, rows, n_rows,   features,
                                  feature_rows, n_features, logits, wanted,  kept, computed, seconds};
    return run(executor, *state, threads, call, stop);
}

// An image tower: the features of each patch, (n_patches, features), from its pixels, (n_patches, pixels). Nothing is
// remembered. Returns as gk_run, or -1 if the program is another.
GK_API int32_t gk_encode(gk::Executor *executor, int32_t threads, const float *patches, int64_t n_patches, int64_t pixels,
                         float *out, int64_t features) {
    if (!executor->encodes(pixels, features)) return -1;
    std::vector<int64_t> rows(n_patches);
    for (int64_t i = 0; i < n_patches; i++) rows[i] = i;
    gk::State none(nullptr, 0, 1, 0);
    const gk::Executor::Call call{nullptr,     n_patches, nullptr, 0,       nullptr, 0,       patches,
                                  rows.data(), n_patches, out,     nullptr, nullptr, nullptr, nullptr};
    return run(executor, none, threads, call, nullptr);
}
