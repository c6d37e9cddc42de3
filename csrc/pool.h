// The threads of the process: one pool, work claimed item by item, so that a core that is taken away delays one item.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace gk {

// A mutex that can be waited for a while, so that a caller can look at signals and stop flags in between. Not a
// std::timed_mutex: ThreadSanitizer does not see the call that it is locked by.
class Turn {
public:
    void lock() {
        std::unique_lock guard(mutex_);
        free_.wait(guard, [this] { return !taken_; });
        taken_ = true;
    }
    bool try_lock_for(std::chrono::milliseconds time) {
        std::unique_lock guard(mutex_);
        const bool mine = free_.wait_until(guard, std::chrono::system_clock::now() + time, [this] { return !taken_; });
        if (mine) taken_ = true;
        return mine;
    }
    void unlock() {
        {
            const std::lock_guard guard(mutex_);
            taken_ = false;
        }
        free_.notify_one();
    }

private:
    std::mutex mutex_;
    std::condition_variable free_;
    bool taken_ = false;
};

class Pool {
public:
    using Work = void (*)(void *context, int64_t item, int thread);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool &) = delete;

    int threads() const { return (int)workers_.size() + 1; }

    // work(context, 0 .. items - 1, thread) on all threads, the caller's included, which is thread 0. Returns when all
    // items are done. One caller at a time: hold `turn`.
    void run(int64_t items, Work work, void *context);

    template <class F> void each(int64_t items, F &&f) {
        run(items, [](void *context, int64_t item, int thread) { (*(F *)context)(item, thread); }, &f);
    }

    Turn turn;

private:
    void worker(int thread);
    bool claim(uint64_t &seen, int64_t &item);

    // One word says all that a claim has to agree on: which job (24 bits), how many items it has (20), the next (20).
    // A thread that comes late to a job finds another number or nothing left, and touches nothing of it.
    std::atomic<uint64_t> job_{0};
    std::atomic<int64_t> done_{0};
    std::atomic<uint32_t> bell_{0};  // rung for every job and to quit; sleepers wait on it
    std::atomic<int> asleep_{0};
    std::atomic<bool> quit_{false};
    Work work_ = nullptr;
    void *context_ = nullptr;
    std::vector<std::thread> workers_;
};

// The pool of this process with so many threads. It is made anew in a child after fork, whose threads exist in the parent
// alone.
Pool &pool(int threads);

}  // namespace gk
