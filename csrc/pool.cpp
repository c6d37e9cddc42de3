#include "pool.h"

#include <signal.h>
#include <unistd.h>

#include <map>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gk {

namespace {

// A wait of about 50 us before a thread sleeps: jobs follow one another within microseconds while a model runs, and waking
// a sleeper takes longer than most of them.
constexpr int SPINS = 2000;

constexpr uint64_t FIELD = (1u << 20) - 1;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

Pool::Pool(int threads) {
    sigset_t all, before;  // signals are for the threads of Python
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { worker(i); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Pool::~Pool() {
    quit_ = true;
    bell_.fetch_add(1);
    bell_.notify_all();
    for (auto &worker : workers_) worker.join();
}

bool Pool::claim(uint64_t &seen, int64_t &item) {
    uint64_t job = job_.load(std::memory_order_acquire);
    for (;;) {
        const uint64_t next = job & FIELD, items = job >> 20 & FIELD;
        if (next >= items) return false;
        if (job_.compare_exchange_weak(job, job + 1, std::memory_order_acq_rel)) {
            seen = job >> 40;
            item = (int64_t)next;
            return true;
        }
    }
}

void Pool::run(int64_t items, Work work, void *context) {
    if (workers_.empty() || items <= 1) {
        for (int64_t i = 0; i < items; i++) work(context, i, 0);
        return;
    }
    for (int64_t first = 0; first < items; first += FIELD) {  // a job has at most 2^20 - 1 items
        const int64_t count = items - first < (int64_t)FIELD ? items - first : (int64_t)FIELD;
        struct Part {
            Work work;
            void *context;
            int64_t first;
        } part{work, context, first};
        work_ = [](void *p, int64_t item, int thread) {
            const Part &of = *(Part *)p;
            of.work(of.context, of.first + item, thread);
        };
        context_ = &part;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t number = ((job_.load(std::memory_order_relaxed) >> 40) + 1) & 0xFFFFFF;
        job_.store(number << 40 | (uint64_t)count << 20, std::memory_order_release);
        bell_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) bell_.notify_all();
        uint64_t seen;
        int64_t item;
        while (claim(seen, item)) {
            work_(context_, item, 0);
            done_.fetch_add(1, std::memory_order_release);
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++) {
            if (spins < SPINS) {
                pause();
            } else {
                std::this_thread::yield();  // the thread that holds an item may need this core
            }
        }
    }
}

void Pool::worker(int thread) {
    for (;;) {
        const uint32_t heard = bell_.load(std::memory_order_seq_cst);
        if (quit_) return;
        uint64_t seen;
        int64_t item;
        while (claim(seen, item)) {  // an item in hand keeps its job, and so `work_` and `context_`, in place
            work_(context_, item, thread);
            done_.fetch_add(1, std::memory_order_release);
        }
        int spins = 0;
        while (bell_.load(std::memory_order_relaxed) == heard && spins < SPINS) pause(), spins++;
        if (spins < SPINS) continue;
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        bell_.wait(heard, std::memory_order_seq_cst);
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
}

Pool &pool(int threads) {
    static std::mutex lock;
    static std::map<int, Pool *> *pools = nullptr;  // never destroyed: others may hold one, and sleeping threads cost nothing
    static pid_t owner = 0;
    if (owner && owner != getpid()) {  // the lock, too, may have been held by a thread that does not exist here
        new (&lock) std::mutex;
        pools = nullptr;
    }
    const std::lock_guard<std::mutex> guard(lock);
    if (!pools) {
        pools = new std::map<int, Pool *>;
        owner = getpid();
    }
    Pool *&found = (*pools)[threads];
    if (!found) found = new Pool(threads);
    return *found;
}

}  // namespace gk
