// Rows times columns: the one inner loop of attention and of block-diagonal projections.
#pragma once

#include <type_traits>

#include "simd.h"

namespace gk {
namespace GK_ISA {

// Rows, and registers of columns, that are multiplied at once: as many sums as the registers hold beside the operands.
#if defined(__AVX512F__)
constexpr int ROWS = 8, WIDE = 2;
#else
constexpr int ROWS = 4, WIDE = 1;
#endif

template <int N> using Number = std::integral_constant<int, N>;

// f(Number<n>()) for an n of 1 .. ROWS known only when running.
template <class F, int N = ROWS> inline void with_number(int n, F f, Number<N> most = {}) {
    if constexpr (N > 1) {
        if (n < N) return with_number(n, f, Number<N - 1>());
    }
    f(most);
}

inline F16 widen(const float *p) { return load(p); }
inline F16 widen(const uint16_t *p) { return from_half(p); }

struct Nothing {
    void operator()(int64_t) const {}
};

// c[r][v] = start(r, v), then + a[r, k] * b[k, v] for k = 0 .. depth in this order, then end(r, v, c[r][v]), where
// a[r, k] is at a[r * row_step + k * depth_step] and b[k, v] are 16 columns at b + k * b_step + 16 v. each(k) comes
// before every step. A sum knows nothing of the other rows and columns.
template <int R, int V, class Cell, class RowStep, class DepthStep, class Start, class End, class Each = Nothing>
inline void product(const float *a, RowStep row_step, DepthStep depth_step, const Cell *b, int64_t b_step,
                    int64_t depth, Start start, End end, Each each = {}) {
    F16 c[R][V], wide[V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) c[r][v] = start(r, v);
    for (int64_t k = 0; k < depth; k++, a += depth_step, b += b_step) {
        each(k);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) wide[v] = widen(b + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const F16 x = all(a[r * row_step]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) c[r][v] = fma(x, wide[v], c[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) end(r, v, c[r][v]);
}

}  // namespace GK_ISA
}  // namespace gk
