// Packing: from a weight as files or memory have it to its place in a packed model, on all threads.
#pragma once

#include "weights.h"

namespace gk {

// Where the planes of a weight are. Row by row everywhere; of files, at byte `offsets` of open ones.
enum Form : int32_t {
    IN_MEMORY = 0,  // `planes`
    IN_FILES = 1,  // each plane in `files`, in the order of `Planes`; `planes.dense_type` says what a dense one is
    IN_BLOCKS = 2,  // the blocks of a GGUF file, in the first of `files`
};
constexpr int PLANES = 7;

struct Source {
    Planes planes;
    int32_t form;
    int32_t files[PLANES];
    int64_t offsets[PLANES];
};

// Where a packed weight goes: to a file at a byte, or where `memory` is not null, to memory. `signs`, if not null, asks for
// the sketch of the weight too, `sketch` bytes from the same beginning.
struct Target {
    uint8_t *memory;
    int64_t weight, sketch;
    const float *signs;
    int32_t file;
};

// Bytes of a block of a GGUF file of this kind; 0: none is known.
int64_t block_bytes(Kind kind);

// The planes of rows from the blocks that a file has of them, end to end. A plane of n rows begins where the caller says.
void unblock(Kind kind, int64_t rows, int64_t cols, const uint8_t *blocks, const Planes &planes);

}  // namespace gk
