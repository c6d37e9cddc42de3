// Which logits of a row a filter leaves, met in any order and by any thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "executor.h"

namespace gk {

// The logits of one row that one thread has met and that may be among those that the filter leaves: all that are not below
// `floor`, which rises as more are met. Ties are all kept, so that the result depends on nothing but the values.
class Selector {
public:
    // n logits of the rows of the table from `first` on
    void take(const Kernels &kernels, const LogitsFilter &filter, const int64_t *always, const float *logits, int64_t first,
              int64_t n) {
        int64_t i = 0;
        while ((i += kernels.below(logits + i, floor_, n - i)) < n)
            for (const int64_t end = std::min<int64_t>(i + 64, n); i < end; i++)
                if (!(logits[i] < floor_)) meet(filter, always, logits[i], first + i);
        const int64_t *end = always + filter.always1, *at = std::lower_bound(always + filter.always0, end, first);
        for (; at < end && *at < first + n; at++) always_.push_back({logits[*at - first], *at});
    }

    // What all selectors of a row leave of it.
    static Candidates merge(const LogitsFilter &filter, Selector *selectors, int64_t count, int64_t stride) {
        Selector all;
        for (int64_t i = 0; i < count; i++) {
            Selector &one = selectors[i * stride];
            all.met_.insert(all.met_.end(), one.met_.begin(), one.met_.end());
            all.always_.insert(all.always_.end(), one.always_.begin(), one.always_.end());
        }
        all.prune(filter);
        all.always_.insert(all.always_.end(), all.met_.begin(), all.met_.end());
        std::sort(all.always_.begin(), all.always_.end(), [](const Met &a, const Met &b) { return a.id < b.id; });
        Candidates left;
        for (const Met &met : all.always_) {
            left.ids.push_back(met.id);
            left.logits.push_back(met.logit);
        }
        return left;
    }

private:
    struct Met {
        float logit;
        int64_t id;
    };

    void meet(const LogitsFilter &filter, const int64_t *always, float logit, int64_t id) {
        if (std::binary_search(always + filter.always0, always + filter.always1, id)) return;
        if (std::isnan(logit)) {  // the caller is to see it, and it has no rank
            always_.push_back({logit, id});
            return;
        }
        met_.push_back({logit, id});
        if (met_.size() >= limit_) prune(filter);
    }

    void prune(const LogitsFilter &filter) {
        const size_t top_n = (size_t)filter.top_n;
        if (met_.size() > top_n) {
            const auto higher = [](const Met &a, const Met &b) { return a.logit > b.logit; };
            std::nth_element(met_.begin(), met_.begin() + filter.top_n - 1, met_.end(), higher);
            floor_ = met_[top_n - 1].logit;
            if (filter.max_gap >= 0) {
                const float most = std::max_element(met_.begin(), met_.begin() + filter.top_n, [](const Met &a, const Met &b) {
                                       return a.logit < b.logit;
                                   })->logit;
                floor_ = std::min(floor_, most - filter.max_gap);
            }
            std::erase_if(met_, [&](const Met &met) { return met.logit < floor_; });
        }
        limit_ = std::max(2 * met_.size(), 4 * top_n + 256);
    }

    float floor_ = -std::numeric_limits<float>::infinity();
    size_t limit_ = 0;
    std::vector<Met> met_, always_;
};

}  // namespace gk
