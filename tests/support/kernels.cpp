// The kernels of the instruction set that this is compiled for, under names that ctypes can call.
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/recurrence.h"

using namespace gk;
using namespace gk::GK_ISA;

namespace {
template <class F> void over(const float *x, int64_t n, float *y, F f) {
    in_lanes(n, [&](int64_t i, auto whole, int left) { store(y + i, f(load(x + i, whole, left)), whole, left); });
}
}  // namespace

extern "C" {
void t_exp(const float *x, int64_t n, float *y) { over(x, n, y, [](F16 v) { return exp(v); }); }
void t_expm1(const float *x, int64_t n, float *y) { over(x, n, y, [](F16 v) { return expm1(v); }); }
void t_tanh(const float *x, int64_t n, float *y) { over(x, n, y, [](F16 v) { return tanh(v); }); }
void t_sigmoid(const float *x, int64_t n, float *y) { over(x, n, y, [](F16 v) { return sigmoid(v); }); }
void t_softplus(const float *x, int64_t n, float *y) { over(x, n, y, [](F16 v) { return softplus(v); }); }

void t_rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) { rms_norm(x, weight, eps, n, y); }
void t_rope(float *x, int64_t heads, int64_t head_dim, const float *cos, const float *sin, int64_t half) {
    rope(x, heads, head_dim, cos, sin, half);
}
void t_gelu(const float *x, int64_t n, float *y) { gelu(x, n, y); }
void t_geglu(const float *gate, const float *up, int64_t n, float *y) { geglu(gate, up, n, y); }
void t_softcap(float *x, float cap, int64_t n) { softcap(x, cap, n); }
void t_add(const float *a, const float *b, int64_t n, float *y) { add(a, b, n, y); }
void t_mul(const float *a, const float *b, int64_t n, float *y) { mul(a, b, n, y); }
float t_magnitude(const float *x, int64_t n) { return magnitude(x, n); }
int64_t t_below(const float *x, float least, int64_t n) { return below(x, least, n); }

void t_put_key(const float *k, int64_t head_dim, int64_t slot, uint16_t *page) { put_key(k, head_dim, slot, page); }
void t_put_value(const float *v, int64_t head_dim, int64_t slot, uint16_t *page) { put_value(v, head_dim, slot, page); }
void t_attend(const Attend *a, const Pages *pages, int64_t page0, int64_t page1, bool fresh, const Partial *p,
              void *scratch) {
    attend(*a, *pages, page0, page1, fresh, *p, scratch);
}
void t_merge(const Partial *earlier, const Partial *later, int64_t rows, int64_t head_dim) {
    merge(*earlier, *later, rows, head_dim);
}
void t_finish(const Partial *p, int64_t rows, int64_t head_dim, float *out, int64_t out_stride, int64_t group) {
    finish(*p, rows, head_dim, out, out_stride, group);
}
size_t t_scratch_bytes(int64_t tokens, int64_t group, int64_t head_dim) {
    return scratch_bytes(tokens, group, head_dim);
}

void t_conv1d(const float *x, int64_t tokens, int64_t width, int64_t stride, const float *weight, const float *bias,
              int64_t taps, float *tail, float *y, int64_t channel0, int64_t channel1) {
    conv1d(x, tokens, width, stride, weight, bias, taps, tail, y, channel0, channel1);
}
void t_block_linear(const float *x, int64_t tokens, int64_t blocks, int64_t width, const float *weight,
                    const float *bias, float *y, int64_t block0, int64_t block1) {
    block_linear(x, tokens, blocks, width, weight, bias, y, block0, block1);
}
void t_rg_lru(const float *x, const float *input_gate, const float *recurrent_gate, const float *param, int64_t tokens,
              int64_t width, bool first, float *hidden, float *y, int64_t channel0, int64_t channel1) {
    rg_lru(x, input_gate, recurrent_gate, param, tokens, width, first, hidden, y, channel0, channel1);
}
}
