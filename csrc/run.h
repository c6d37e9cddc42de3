// One run of an executor: its call, and where its buffers are.
#pragma once

#include "executor.h"

namespace gk {

struct Executor::Run {
    const Call &call;
    State &state;
    Pool &pool;
    std::vector<int64_t> chunk_of;  // of each token
    char *arena;

    float *at(const Executor &executor, const Slice &slice, int64_t row) const {
        const Buffer &buffer = executor.buffers_[slice.buffer];
        float *base = buffer.kind == 2 ? call.out : (float *)(arena + executor.offsets_[slice.buffer]);
        return base + row * buffer.width + slice.offset;
    }
    int64_t count(const Executor &executor, const Slice &slice) const {
        return executor.buffers_[slice.buffer].domain ? call.n_rows : call.n_tokens;
    }
};

}  // namespace gk
