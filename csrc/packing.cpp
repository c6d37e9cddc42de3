#include "packing.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <unistd.h>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/simd.h"
#include "kernels/sketch.h"
#include "pool.h"

namespace gk {

namespace {

// ---- the blocks of GGUF files (the block structures of ggml-common.h in https://github.com/ggml-org/ggml) ---------------

// Codes of `BITS` bits, packed over SPAN elements in the file (element e in byte e % n at bit BITS * (e / n), where n bytes
// hold SPAN of them), to planes, which are packed over 32. `count` elements.
template <int BITS, int SPAN> void respan(const uint8_t *from, uint8_t *to, int count) {
    constexpr int OLD = SPAN * BITS / 8, NEW = 4 * BITS, MASK = (1 << BITS) - 1;
    for (int span = 0; span < count / SPAN; span++, from += OLD)
        for (int run = 0; run < SPAN / 32; run++, to += NEW)
            for (int k = 0; k < NEW; k++) {
                int byte = 0;
                for (int i = 0; i < 8 / BITS; i++) {
                    const int first = run * 32 + i * NEW;  // of a stretch that lies in the file at one bit
                    byte |= (from[first % OLD + k] >> (BITS * (first / OLD)) & MASK) << (BITS * i);
                }
                to[k] = (uint8_t)byte;
            }
}

// 32 bits, one an element in the file's order.
void respan_bits(const uint8_t *from, uint8_t *to) {
    uint32_t bits;
    std::memcpy(&bits, from, 4);
    for (int k = 0; k < 4; k++) {
        uint32_t byte = 0;
        for (int i = 0; i < 8; i++) byte |= (bits >> (4 * i + k) & 1) << i;
        to[k] = (uint8_t)byte;
    }
}

// Files add the minimum of Q4_1 and Q5_1, and subtract that of the K kinds.
void negated(const uint8_t *from, uint8_t *to) { to[0] = from[0], to[1] = from[1] ^ 0x80; }

// Q4_K, Q5_K: low 6 bits of S0..3, above them the high 2 bits of S4..7; the same of M; low 4 bits of S4..7, of M4..7.
void six_bits(const uint8_t *p, uint8_t *scales, uint8_t *mins) {
    for (int j = 0; j < 4; j++) {
        scales[j] = p[j] & 63, scales[4 + j] = (uint8_t)((p[8 + j] & 15) | (p[j] >> 6) << 4);
        mins[j] = p[4 + j] & 63, mins[4 + j] = (uint8_t)(p[8 + j] >> 4 | (p[4 + j] >> 6) << 4);
    }
}

// Q3_K: low 4 bits of S0..7, of S8..15; then the high 2 bits of S0..3 and so on. Stored around 32.
void six_bits_signed(const uint8_t *p, uint8_t *scales) {
    for (int j = 0; j < 16; j++)
        scales[j] = (uint8_t)((j < 8 ? p[j] & 15 : p[j - 8] >> 4) | (p[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32;
}

// IQ4_XS: eight scales of 6 bits around 32; the high 2 bits of S0..3, of S4..7, then the low 4 bits, two a byte.
void six_bits_halved(const uint8_t *p, uint8_t *scales) {
    for (int j = 0; j < 8; j++) scales[j] = (uint8_t)((p[2 + j / 2] >> (j % 2 * 4) & 15) | (p[j / 4] >> (j % 4 * 2) & 3) << 4) - 32;
}

struct Row {  // where the next block's parts go
    uint8_t *codes, *high, *scales, *mins, *super_scales, *super_mins;

    void copy(uint8_t *&to, const uint8_t *from, int n) { std::memcpy(to, from, (size_t)n), to += n; }
};

template <Kind K> void unblock_one(const uint8_t *b, Row &to) {
    constexpr bool minimum = K == Q4_1 || K == Q5_1, five = K == Q5_0 || K == Q5_1;
    if constexpr (K == Q8_0) {
        to.copy(to.scales, b, 2), to.copy(to.codes, b + 2, 32);
    } else if constexpr (K == Q4_0 || K == IQ4_NL || minimum || five) {
        to.copy(to.scales, b, 2), b += 2;
        if (minimum) negated(b, to.mins), to.mins += 2, b += 2;
        if (five) respan_bits(b, to.high), to.high += 4, b += 4;
        to.copy(to.codes, b, 16);
    } else if constexpr (K == Q2_K) {
        for (int j = 0; j < 16; j++) to.scales[j] = b[j] & 15, to.mins[j] = b[j] >> 4;
        respan<2, 128>(b + 16, to.codes, 256);
        to.copy(to.super_scales, b + 80, 2), to.copy(to.super_mins, b + 82, 2);
        to.scales += 16, to.mins += 16, to.codes += 64;
    } else if constexpr (K == Q3_K) {
        respan<1, 256>(b, to.high, 256), respan<2, 128>(b + 32, to.codes, 256);
        six_bits_signed(b + 96, to.scales);
        to.copy(to.super_scales, b + 108, 2);
        to.scales += 16, to.high += 32, to.codes += 64;
    } else if constexpr (K == Q4_K || K == Q5_K) {
        to.copy(to.super_scales, b, 2), to.copy(to.super_mins, b + 2, 2);
        six_bits(b + 4, to.scales, to.mins);
        if (K == Q5_K) respan<1, 256>(b + 16, to.high, 256), to.high += 32, b += 32;
        respan<4, 64>(b + 16, to.codes, 256);
        to.scales += 8, to.mins += 8, to.codes += 128;
    } else if constexpr (K == IQ4_XS) {
        to.copy(to.super_scales, b, 2);
        six_bits_halved(b + 2, to.scales);
        to.scales += 8;
        to.copy(to.codes, b + 8, 128);
    } else {
        static_assert(K == Q6_K);
        respan<4, 128>(b, to.codes, 256), respan<2, 128>(b + 128, to.high, 256);
        to.copy(to.scales, b + 192, 16), to.copy(to.super_scales, b + 208, 2);
        to.codes += 128, to.high += 64;
    }
}

template <Kind K> void unblock_all(int64_t blocks, const uint8_t *from, const Planes &p) {
    Row to = {(uint8_t *)p.codes, (uint8_t *)p.high, (uint8_t *)p.scales,
              (uint8_t *)p.mins, (uint8_t *)p.super_scales, (uint8_t *)p.super_mins};
    for (int64_t i = 0; i < blocks; i++) unblock_one<K>(from + i * block_bytes(K), to);
}

// ---- planes --------------------------------------------------------------------------------------------------------------

// Bytes of a row of each plane, in the order of `Planes`; 0 of one that the kind does not have.
struct Widths {
    int64_t of[PLANES] = {};

    Widths(Kind kind, int64_t cols, int32_t dense_type) {
        const Format f = format(kind);
        if (!f.group) {
            of[6] = cols * (dense_type == DENSE_F32 ? 4 : 2);
            return;
        }
        const int64_t scale = cols / f.group * (f.super ? 1 : 2), super = f.super ? cols / 256 * 2 : 0;
        of[0] = cols * f.low / 8, of[1] = cols * f.high / 8;
        of[2] = scale, of[3] = f.minima ? scale : 0, of[4] = super, of[5] = f.minima ? super : 0;
    }

    int64_t total() const {
        int64_t sum = 0;
        for (const int64_t width : of) sum += round64(width);
        return sum;
    }

    // One array after the other, of `rows` rows each; every one begins at a multiple of 64 bytes.
    Planes place(uint8_t *memory, int64_t rows, int32_t dense_type) const {
        void *at[PLANES];
        for (int i = 0; i < PLANES; i++) at[i] = memory, memory += round64(of[i]) * rows;
        return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], dense_type};
    }

    Planes from_row(const Planes &p, int64_t row) const {
        const auto move = [&](void *plane, int i) -> void * { return plane ? (uint8_t *)plane + row * of[i] : nullptr; };
        return {move(p.codes, 0), move(p.high, 1), move(p.scales, 2), move(p.mins, 3),
                move(p.super_scales, 4), move(p.super_mins, 5), move(p.dense, 6), p.dense_type};
    }
};

// ---- files -----------------------------------------------------------------------------------------------------------------

// 0, or the number of the error; -1 where the file ends before.
int read_all(int file, uint8_t *to, int64_t count, int64_t offset) {
    while (count) {
        const ssize_t n = pread(file, to, (size_t)count, offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n ? errno : -1;
        to += n, offset += n, count -= n;
    }
    return 0;
}

int write_all(int file, const uint8_t *from, int64_t count, int64_t offset) {
    while (count) {
        const ssize_t n = pwrite(file, from, (size_t)count, offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n ? errno : ENOSPC;
        from += n, offset += n, count -= n;
    }
    return 0;
}

// The sum over 64-bit words of word i times 2 i + 1, modulo 2^64: a change of one word changes it for certain, pieces of a
// weight can be summed in any order, and NumPy says it in one line (packfile.py).
uint64_t checksum(const uint8_t *data, int64_t bytes, int64_t offset) {
    uint64_t sum = 0, factor = (uint64_t)(offset / 8) * 2 + 1;
    for (int64_t i = 0; i < bytes; i += 8, factor += 2) {
        uint64_t word;
        std::memcpy(&word, data + i, 8);
        sum += word * factor;
    }
    return sum;
}

// ---- one weight ------------------------------------------------------------------------------------------------------------

enum Result : int32_t { PACKED = 0, NOT_PACKABLE = 1, CANNOT_READ = 2, CANNOT_WRITE = 3 };

struct Job {
    Kind kind;
    int64_t rows, cols;
    const Source &source;
    const Target &target;
    const Kernels *kernels;
    Widths widths;
    int64_t tile, sketch_tile, tiles;  // bytes of a tile, and of its sketch; tiles of an item of work
    std::atomic<int32_t> result{PACKED}, error{0};
    std::atomic<uint64_t> sums[2] = {};

    void fail(int32_t what, int32_t number) {
        int32_t none = PACKED;
        if (result.compare_exchange_strong(none, what)) error = number;
    }

    bool read(int plane, uint8_t *to, int64_t width, int64_t row, int64_t n) {
        const int number = read_all(source.files[plane], to, width * n, source.offsets[plane] + width * row);
        if (number) fail(CANNOT_READ, number);
        return !number;
    }

    // The planes of rows row .. row + n: where they are, or in `memory`, which has room for them.
    bool planes(int64_t row, int64_t n, uint8_t *memory, Planes &out) {
        const int32_t dense_type = source.planes.dense_type;
        if (source.form == IN_MEMORY) {
            out = widths.from_row(source.planes, row);
            return true;
        }
        out = widths.place(memory, n, dense_type);
        if (source.form == IN_BLOCKS) {
            uint8_t *blocks = memory + widths.total() * n;
            const int64_t width = cols / block_columns(kind) * block_bytes(kind);
            if (!read(0, blocks, width, row, n)) return false;
            unblock(kind, n, cols, blocks, out);
            return true;
        }
        void *const at[PLANES] = {out.codes, out.high, out.scales, out.mins, out.super_scales, out.super_mins, out.dense};
        for (int i = 0; i < PLANES; i++)
            if (widths.of[i] && !read(i, (uint8_t *)at[i], widths.of[i], row, n)) return false;
        return true;
    }

    static int64_t block_columns(Kind kind) { return format(kind).super ? 256 : 32; }

    int64_t room() const {
        const int64_t blocks = source.form == IN_BLOCKS ? cols / block_columns(kind) * block_bytes(kind) : 0;
        return (widths.total() + blocks) * tiles * TILE;
    }

    bool put(int which, int64_t at, const uint8_t *data, int64_t bytes, int64_t offset) {
        sums[which].fetch_add(checksum(data, bytes, offset), std::memory_order_relaxed);
        if (target.memory) {
            if (target.memory + at + offset != data) std::memcpy(target.memory + at + offset, data, (size_t)bytes);
            return true;
        }
        const int number = write_all(target.file, data, bytes, at + offset);
        if (number) fail(CANNOT_WRITE, number);
        return !number;
    }

    // Tiles tile0 .. tile1 of the weight and of its sketch.
    void run(int64_t tile0, int64_t tile1, uint8_t *memory, uint8_t *packed, uint8_t *sketches, float *floats) {
        const int64_t row = tile0 * TILE, n = std::min(rows, tile1 * TILE) - row;
        Planes given;
        if (!planes(row, n, memory, given)) return;
        if (target.memory) packed = target.memory + target.weight + tile0 * tile;
        if (!pack(kind, n, cols, given, packed, 0, n)) return fail(NOT_PACKABLE, 0);
        if (!put(0, target.weight, packed, (tile1 - tile0) * tile, tile0 * tile) || !target.signs) return;
        for (int64_t i = 0; i < tile1 - tile0; i++) {
            const int64_t in_tile = std::min<int64_t>(TILE, n - i * TILE);
            side_by_side(widths.from_row(given, i * TILE), in_tile, packed + i * tile, floats);
            kernels->make_sketch(floats, target.signs, cols, sketches + i * sketch_tile);
        }
        put(1, target.sketch, sketches, (tile1 - tile0) * sketch_tile, tile0 * sketch_tile);
    }

    // The numbers of a tile, 16 of a column side by side, in the first part of `floats`.
    void side_by_side(const Planes &p, int64_t in_tile, const uint8_t *packed, float *floats) {
        if (kind == F32) {
            std::memcpy(floats, packed, (size_t)(cols * TILE) * sizeof(float));
        } else if (kind == BF16) {
            for (int64_t i = 0; i < cols * TILE; i++) {
                uint16_t half;
                std::memcpy(&half, packed + 2 * i, 2);
                const uint32_t bits = (uint32_t)half << 16;
                std::memcpy(&floats[i], &bits, 4);
            }
        } else {
            float *dense = floats + cols * TILE;
            std::memset(dense + in_tile * cols, 0, (size_t)((TILE - in_tile) * cols) * sizeof(float));
            kernels->dense(kind, p, 0, in_tile, cols, dense);
            for (int64_t first = 0; first < cols; first += 16)  // squares, so that both sides stay in the nearest cache
                for (int r = 0; r < TILE; r++)
                    for (int64_t c = first; c < std::min(first + 16, cols); c++) floats[c * TILE + r] = dense[r * cols + c];
        }
    }
};

}  // namespace

int64_t block_bytes(Kind kind) {
    switch (kind) {
        case Q4_0: return 18;
        case Q4_1: return 20;
        case Q5_0: return 22;
        case Q5_1: return 24;
        case Q8_0: return 34;
        case Q2_K: return 84;
        case Q3_K: return 110;
        case Q4_K: return 144;
        case Q5_K: return 176;
        case Q6_K: return 210;
        case IQ4_NL: return 18;
        case IQ4_XS: return 136;
        default: return 0;
    }
}

void unblock(Kind kind, int64_t rows, int64_t cols, const uint8_t *blocks, const Planes &planes) {
    const int64_t count = rows * cols / (format(kind).super ? 256 : 32);
    switch (kind) {
        case Q4_0: return unblock_all<Q4_0>(count, blocks, planes);
        case Q4_1: return unblock_all<Q4_1>(count, blocks, planes);
        case Q5_0: return unblock_all<Q5_0>(count, blocks, planes);
        case Q5_1: return unblock_all<Q5_1>(count, blocks, planes);
        case Q8_0: return unblock_all<Q8_0>(count, blocks, planes);
        case Q2_K: return unblock_all<Q2_K>(count, blocks, planes);
        case Q3_K: return unblock_all<Q3_K>(count, blocks, planes);
        case Q4_K: return unblock_all<Q4_K>(count, blocks, planes);
        case Q5_K: return unblock_all<Q5_K>(count, blocks, planes);
        case Q6_K: return unblock_all<Q6_K>(count, blocks, planes);
        case IQ4_NL: return unblock_all<IQ4_NL>(count, blocks, planes);
        case IQ4_XS: return unblock_all<IQ4_XS>(count, blocks, planes);
        default: return;
    }
}

}  // namespace gk

#define GK_API extern "C" __attribute__((visibility("default")))

GK_API int64_t gk_block_bytes(int32_t kind) { return gk::block_bytes((gk::Kind)kind); }

// Rows row0 to row1 (row0 a multiple of 16; row1 too, or the last) of a weight, packed to their place. Adds the checksums of
// what was written to sums[0], and of the sketch to sums[1]. 0: done; 1: as `gk::pack`; 2: the source cannot be read; 3: the
// target cannot be written; `error` is the system's number for these, or -1 where a source ends before.
GK_API int32_t gk_pack(int32_t threads, int32_t kind, int64_t rows, int64_t cols, const gk::Source *source,
                       const gk::Target *target, int64_t row0, int64_t row1, uint64_t *sums, int32_t *error) {
    using namespace gk;
    const Kernels *kernels = best_kernels();
    const Kind k = (Kind)kind;
    const bool whole = 0 <= row0 && row0 <= row1 && row1 <= rows && row0 % TILE == 0 && (row1 % TILE == 0 || row1 == rows);
    if (!kernels || !whole || !packed_bytes(k, rows, cols)) return NOT_PACKABLE;
    if (source->form == IN_BLOCKS && !block_bytes(k)) return NOT_PACKABLE;
    constexpr int64_t PIECE = 1 << 18;  // bytes of packed tiles of an item of work: with its planes, within a core's cache
    const int64_t tile = tile_bytes(k, cols), sketch_tile = target->signs ? sketch_tile_bytes(cols) : 0;
    Job job{k, rows, cols, *source, *target, kernels, Widths(k, cols, source->planes.dense_type), tile, sketch_tile,
            std::max<int64_t>(1, PIECE / tile)};
    const int64_t tile0 = row0 / TILE, tile1 = (row1 + TILE - 1) / TILE;
    Pool &pool = gk::pool(threads);
    const std::lock_guard turn(pool.turn);
    struct Scratch {
        std::unique_ptr<uint8_t[]> memory, packed, sketches;
        std::unique_ptr<float[]> floats;
    };
    std::vector<Scratch> scratch((size_t)pool.threads());
    const auto room = [](auto &pointer, int64_t n) {  // of the thread that uses it
        if (!pointer) pointer.reset(new std::remove_reference_t<decltype(pointer[0])>[(size_t)n]);
        return pointer.get();
    };
    pool.each((tile1 - tile0 + job.tiles - 1) / job.tiles, [&](int64_t item, int thread) {
        if (job.result) return;
        Scratch &mine = scratch[(size_t)thread];
        uint8_t *memory = source->form == IN_MEMORY ? nullptr : room(mine.memory, job.room());
        uint8_t *packed = target->memory ? nullptr : room(mine.packed, tile * job.tiles);
        uint8_t *sketches = target->signs ? room(mine.sketches, sketch_tile * job.tiles) : nullptr;
        float *floats = target->signs ? room(mine.floats, 2 * cols * TILE) : nullptr;
        const int64_t first = tile0 + item * job.tiles;
        job.run(first, std::min(tile1, first + job.tiles), memory, packed, sketches, floats);
    });
    for (int i = 0; i < 2; i++) sums[i] += job.sums[i];
    *error = job.error;
    return job.result;
}
