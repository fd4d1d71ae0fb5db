// Groups of tokens become entries. Channels do not see each other, so each thread takes some of them through all tokens, and
// what a prompt does at once is what decoding does one by one.
#include <algorithm>

#include "api.h"
#include "pool.h"
#include "queue.h"
#include "rows.h"

using namespace dsv4;

namespace {

constexpr int64_t GRAIN = int64_t(1) << 15;  // of value copies; below it one thread is sooner done than two
constexpr int64_t EXP = 5;                   // copies in the time that one candidate's exponential takes
constexpr int64_t LINE = 16;                 // channels of a cache line, which threads do not share

struct Groups {
    const float *kv, *scores, *ape;
    float *pending_kv, *pending_scores;
    int64_t ratio, d, halves;  // halves: 2 with overlap, where rows are [2 * d] and slots 0 .. ratio are the previous group

    int64_t width() const { return halves * d; }
    int64_t before() const { return (halves - 1) * ratio; }

    // Where candidate i keeps its channels: those of the previous group their first half, the others their last.
    int64_t candidate(int64_t i) const { return i * width() + (i < before() ? 0 : (halves - 1) * d); }

    void append(int64_t token, int64_t place, int64_t begin, int64_t end) {
        int64_t from = token * width(), to = (before() + place) * width();
        for (int64_t half = 0; half < halves; ++half) {
            int64_t at = half * d + begin;
            std::copy_n(kv + from + at, end - begin, pending_kv + to + at);
            const float *score = scores + from + at, *shift = ape + place * width() + at;
            float* sum = pending_scores + to + at;
            for (int64_t i = 0; i < end - begin; ++i) sum[i] = score[i] + shift[i];
        }
    }

    // entry = the softmax of the candidates' scores, times their kv.
    void pool(int64_t begin, int64_t end, float* entry) const {
        int64_t count = halves * ratio;
        by_eights(end - begin, [&](int64_t i, auto part) {
            i += begin;
            f32x8 most = load(pending_scores + candidate(0) + i, part);
            for (int64_t c = 1; c < count; ++c) {
                f32x8 score = load(pending_scores + candidate(c) + i, part);
                most = score > most ? score : most;
            }
            f32x8 total = {}, shares = {};
            for (int64_t c = 0; c < count; ++c) {
                f32x8 share = exp(load(pending_scores + candidate(c) + i, part) - most);
                total = fma(share, load(pending_kv + candidate(c) + i, part), total);
                shares += share;
            }
            store(entry + i, total / shares, part);
        });
    }

    // The full group becomes the previous one.
    void move_up(int64_t begin, int64_t end) {
        for (int64_t row = 0; row < before(); ++row) {
            int64_t to = row * width() + begin, from = to + before() * width();  // only the first half is looked back at
            std::copy_n(pending_kv + from, end - begin, pending_kv + to);
            std::copy_n(pending_scores + from, end - begin, pending_scores + to);
        }
    }
};

void compress(const float* kv, const float* scores, const float* ape, float* pending_kv, float* pending_scores,
              int64_t t, int64_t ratio, int64_t d, int64_t halves, int64_t position, float* entries) {
    Groups groups = {kv, scores, ape, pending_kv, pending_scores, ratio, d, halves};
    int64_t first = position % ratio, full = (first + t) / ratio;
    int64_t channels = GRAIN / std::max<int64_t>(1, halves * (t + EXP * full * ratio));
    parallel(d, (channels + LINE) / LINE * LINE, [&](int64_t begin, int64_t end) {
        Groups mine = groups;
        float* entry = entries;
        for (int64_t token = 0, place = first; token < t; ++token) {
            mine.append(token, place, begin, end);
            if (++place < ratio) continue;
            mine.pool(begin, end, entry);
            mine.move_up(begin, end);
            entry += d;
            place = 0;
        }
    });
}

}  // namespace

// kv, scores [t, width], ape [ratio, width], pending_kv and pending_scores [slots, width], width = halves * d and
// slots = halves * ratio -> entries [groups, d]; the pending tensors are brought up to date. With `at`, the position is the number that
// lies there when its turn comes.
DSV4_API void dsv4_compress(const float* kv, const float* scores, const float* ape, float* pending_kv, float* pending_scores,
                            int64_t t, int64_t ratio, int64_t d, int64_t halves, int64_t position, const int64_t* at,
                            float* entries) {
    submit([=] {
        compress(kv, scores, ape, pending_kv, pending_scores, t, ratio, d, halves, at ? *at : position, entries);
    });
}
