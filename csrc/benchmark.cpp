// The kernels against the machine's limits, measured in the same run: reading memory, and adding products of bytes.
//
//     kernels_benchmark [kind,kind,...] [rows x cols,...] [isa,...] [threads,...] [tokens,...]
//
// One line a measurement: the median of several passes, and the best. A pass of few tokens goes through more than 300 MB
// of weights, so that no cache helps. "share": of the memory limit up to 8 tokens, and of the integer limit.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <time.h>

#include "kernels/dispatch.h"
#include "weights.h"

namespace {

double cpu_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Seconds of each of `passes` runs of work(thread) on all threads at once, in ascending order: the processor time of the
// slowest thread, so that threads of others who share the cores do not count (what they read from memory does).
std::vector<double> timed(int threads, int passes, const std::function<void(int)> &work) {
    std::vector<double> seconds((size_t)passes);
    std::mutex lock;
    std::barrier together(threads);
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; thread++)
        pool.emplace_back([&, thread] {
            for (int pass = 0; pass < passes; pass++) {
                together.arrive_and_wait();
                const double start = cpu_seconds();
                work(thread);
                const double took = cpu_seconds() - start;
                const std::lock_guard guard(lock);
                seconds[(size_t)pass] = std::max(seconds[(size_t)pass], took);
            }
        });
    for (auto &thread : pool) thread.join();
    std::sort(seconds.begin(), seconds.end());
    return seconds;
}

uint8_t *memory(size_t bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    if (!std::getenv("SMALL_PAGES")) madvise(p, bytes, MADV_HUGEPAGE);
    return (uint8_t *)p;
}

std::atomic<int> sink;

__attribute__((target("avx2"))) void read_all(const uint8_t *p, size_t bytes) {
    __m256i a[8] = {};
    for (size_t i = 0; i + 256 <= bytes; i += 256)
        for (int j = 0; j < 8; j++) a[j] = _mm256_xor_si256(a[j], _mm256_load_si256((const __m256i *)(p + i) + j));
    for (int j = 1; j < 8; j++) a[0] = _mm256_xor_si256(a[0], a[j]);
    sink += _mm256_extract_epi32(a[0], 0);
}

constexpr int64_t ROUNDS = 4'000'000;
__attribute__((target("avx2"))) double integers_avx2() {  // unsigned by signed bytes, widened each time
    __m256i a[6], x = _mm256_set1_epi8((char)sink.load()), ones = _mm256_set1_epi16(1);
    for (auto &v : a) v = _mm256_setzero_si256();
    for (int64_t i = 0; i < ROUNDS; i++)
#pragma GCC unroll 6
        for (auto &v : a) {
            __m256i w = x;
            asm volatile("" : "+x"(w));
            v = _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
        }
    for (int j = 1; j < 6; j++) a[0] = _mm256_xor_si256(a[0], a[j]);
    sink += _mm256_extract_epi32(a[0], 0);
    return 6.0 * ROUNDS * 64;
}
__attribute__((target("avx512f,avx512vnni"))) double integers_avx512() {
    __m512i x = _mm512_set1_epi32(sink.load());
    for (int64_t i = 0; i < ROUNDS; i++)
#define DOT(n) "vpdpbusd %0, %0, %%zmm" #n "\n\t"
        asm volatile(DOT(20) DOT(21) DOT(22) DOT(23) DOT(24) DOT(25) DOT(26) DOT(27) DOT(28) DOT(29) DOT(30) DOT(31)::"v"(x)
                     : "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
    return 12.0 * ROUNDS * 128;
}

std::vector<std::string> split(const std::string &text) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

const std::vector<std::string> KIND_NAMES = {"F32",  "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                             "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
                                             "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS",
                                             "IQ2_S", "IQ1_S", "IQ1_M"};

double median(const std::vector<double> &v) { return v[v.size() / 2]; }

}  // namespace

int main(int argc, char **argv) {
    const auto arg = [&](int i, const char *otherwise) { return split(argc > i ? argv[i] : otherwise); };
    const auto kinds = arg(1, "Q4_K,Q4_0,Q5_0,Q6_K,Q8_0,BF16"), shapes = arg(2, "9216x2304,2304x9216,2048x640");
    const auto isas = arg(3, "avx512,avx2"), threadses = arg(4, "1,2"), tokenses = arg(5, "1,2,4,8,64,512");
    constexpr size_t WEIGHTS = (size_t)400 << 20;
    uint8_t *weights = memory(WEIGHTS);
    std::mt19937 random(1);
    for (const auto &threads_text : threadses) {
        const int threads = std::stoi(threads_text);
        std::memset(weights, 1, WEIGHTS);
        const auto reads = timed(threads, 9, [&](int thread) {
            read_all(weights + WEIGHTS / threads / 256 * 256 * thread, WEIGHTS / threads / 256 * 256);
        });
        double memory_limit = WEIGHTS / median(reads);
        std::printf("%d threads: reads %.1f GB/s (best %.1f)\n", threads, memory_limit / 1e9, WEIGHTS / reads[0] / 1e9);
        for (const auto &isa : isas) {
            const gk::Kernels *k = gk::kernels_named(isa.c_str());
            if (!k) {
                std::printf("no %s here\n", isa.c_str());
                continue;
            }
            double operations = 0;
            const auto sums = timed(threads, 5, [&](int) { operations = isa == "avx512" ? integers_avx512() : integers_avx2(); });
            const double integer_limit = operations * threads / sums[0];
            std::printf("%s, %d threads: %.0f Gop/s of integers\n", isa.c_str(), threads, integer_limit / 1e9);
            for (const auto &name : kinds)
                for (const auto &shape : shapes) {
                    const auto kind = (gk::Kind)(std::find(KIND_NAMES.begin(), KIND_NAMES.end(), name) - KIND_NAMES.begin());
                    const int64_t rows = std::stoll(shape), cols = std::stoll(shape.substr(shape.find('x') + 1));
                    if (kind == gk::KINDS || !gk::packed_bytes(kind, rows, cols)) continue;
                    const size_t bytes = gk::packed_bytes(kind, rows, cols);
                    const int copies = (int)(WEIGHTS / bytes);
                    // bytes of any value are a weight; only scales must not be infinite, which would not change the speed
                    for (size_t i = 0; i < WEIGHTS; i += 4096) weights[i] = (uint8_t)random();
                    for (const auto &tokens_text : tokenses) {
                        const int64_t tokens = std::stoll(tokens_text);
                        std::vector<float> x(tokens * cols), y(tokens * rows);
                        for (auto &v : x) v = (float)(int32_t)random() * 0x1p-31f;
                        uint8_t *quantized = nullptr;
                        if (const size_t room = gk::activation_bytes(kind, tokens, cols))
                            quantized = memory(room);
                        const gk::Activations a{tokens, cols, x.data(), quantized};
                        if (quantized) k->quantize(a, 0, tokens);
                        const int64_t tiles = (rows + 15) / 16;
                        const int uses = tokens <= 8 ? copies : 1;
                        const auto seconds = timed(threads, tokens <= 8 ? 5 : 9, [&](int thread) {
                            for (int i = 0; i < uses; i++)
                                k->linear({kind, rows, cols, weights + (size_t)i * bytes}, tiles * thread / threads,
                                          tiles * (thread + 1) / threads, a, y.data(), rows);
                        });
                        const double s = median(seconds) / uses, best = seconds[0] / uses;
                        const double ops = 2.0 * rows * cols * tokens;
                        std::printf("%-6s %d threads %-4s %5ldx%-5ld T=%-4ld %8.3f ms (best %8.3f) %6.1f GB/s %6.0f Gop/s",
                                    isa.c_str(), threads, name.c_str(), (long)rows, (long)cols, (long)tokens, s * 1e3,
                                    best * 1e3, bytes / s / 1e9, ops / s / 1e9);
                        if (tokens <= 8) std::printf("  memory %3.0f %%", 100 * bytes / s / memory_limit);
                        std::printf("  integers %3.0f %%\n", 100 * ops / s / integer_limit);
                        std::fflush(stdout);
                    }
                }
        }
    }
}
