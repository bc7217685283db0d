// One new token per row: rotary embedding, write to the KV cache, and attention to the positions of its cache slot.
#include <algorithm>
#include <limits>

#include "common.h"
#include "parallel.h"
#include "simd.h"

namespace ospo {
namespace {

constexpr int64_t kMaxVecs = 16;  // head_dim up to 256
constexpr int64_t kPrefetch = 16;  // positions ahead: caches of many rows come from memory

// x·cos + shift(x)·sin, with x shifted by half its width. The sine holds the sign of rotate_half.
OSPO_INLINE void rotate(const float* x, const float* cos, const float* sin, float scale, float* out, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        out[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * scale;
        out[i + half] = (x[i + half] * cos[i + half] + x[i] * sin[i + half]) * scale;
    }
}

// softmax(q·K)·V over `count` positions. VECS = head_dim / 16, or 0 to take it from width.
template <int VECS>
OSPO_INLINE void attend(const float* q, const float* keys, const float* values, int64_t count, int64_t width,
                        float* scores, float* out) {
    const int64_t vecs = VECS ? VECS : width / kLanes;
    Vec query[VECS ? VECS : kMaxVecs], acc[VECS ? VECS : kMaxVecs][2];
    for (int64_t i = 0; i < vecs; ++i) query[i] = load(q + i * kLanes);
    float max = -std::numeric_limits<float>::infinity();
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {  // four positions share the instructions that add up the lanes
        Vec product[4];
        for (int64_t i = 0; i < 4 * vecs; ++i) __builtin_prefetch(keys + (t + kPrefetch) * width + i * kLanes);
        for (int64_t j = 0; j < 4; ++j) product[j] = query[0] * load(keys + (t + j) * width);
        for (int64_t i = 1; i < vecs; ++i)
            for (int64_t j = 0; j < 4; ++j) product[j] += query[i] * load(keys + (t + j) * width + i * kLanes);
        const Vec4 four = sums(product[0], product[1], product[2], product[3]);
        std::memcpy(scores + t, &four, sizeof four);
    }
    for (; t < count; ++t) {
        Vec product = query[0] * load(keys + t * width);
        for (int64_t i = 1; i < vecs; ++i) product += query[i] * load(keys + t * width + i * kLanes);
        scores[t] = sum(product);
    }
    for (t = 0; t < count; ++t) max = scores[t] > max ? scores[t] : max;
    Vec total{};
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (t = count; t < padded; ++t) scores[t] = -std::numeric_limits<float>::infinity();
    for (t = 0; t < padded; t += kLanes) {
        const Vec p = exp(load(scores + t) - max);
        total += p;
        store(scores + t, p);
    }
    const float inverse = 1.0f / sum(total);  // before the values, whose weighted sum could overflow without it
    for (t = 0; t < padded; t += kLanes) store(scores + t, load(scores + t) * inverse);
    for (int64_t i = 0; i < vecs; ++i) acc[i][0] = acc[i][1] = Vec{};
    for (t = 0; t + 2 <= count; t += 2) {
        for (int64_t i = 0; i < 2 * vecs; ++i) __builtin_prefetch(values + (t + kPrefetch) * width + i * kLanes);
        for (int64_t i = 0; i < vecs; ++i) {
            acc[i][0] += scores[t] * load(values + t * width + i * kLanes);
            acc[i][1] += scores[t + 1] * load(values + (t + 1) * width + i * kLanes);
        }
    }
    if (t < count)
        for (int64_t i = 0; i < vecs; ++i) acc[i][0] += scores[t] * load(values + t * width + i * kLanes);
    for (int64_t i = 0; i < vecs; ++i) store(out + i * kLanes, acc[i][0] + acc[i][1]);
}

OSPO_INLINE void write_new(const float* k, const float* v, const float* cos, const float* sin, float* keys,
                           float* values, int64_t position, int64_t width) {
    rotate(k, cos, sin, 1.0f, keys + position * width, width);
    std::copy(v, v + width, values + position * width);
}

OSPO_FMA_CLONES void store_head(const float* k, const float* v, const float* cos, const float* sin, float* keys,
                                float* values, int64_t position, int64_t width) {
    write_new(k, v, cos, sin, keys, values, position, width);
}

OSPO_FMA_CLONES void attend_head(const float* q, const float* k, const float* v, const float* cos, const float* sin,
                                 float scale, float* keys, float* values, int64_t position, bool stored,
                                 int64_t queries, int64_t width, float* scores, float* out) {
    if (!stored) write_new(k, v, cos, sin, keys, values, position, width);
    float query[kMaxVecs * kLanes];
    for (int64_t i = 0; i < queries; ++i) {
        rotate(q + i * width, cos, sin, scale, query, width);
        switch (width / kLanes) {
            case 2: attend<2>(query, keys, values, position + 1, width, scores, out + i * width); break;
            case 4: attend<4>(query, keys, values, position + 1, width, scores, out + i * width); break;
            case 8: attend<8>(query, keys, values, position + 1, width, scores, out + i * width); break;
            default: attend<0>(query, keys, values, position + 1, width, scores, out + i * width);
        }
    }
}

}  // namespace

void decode_attention(const float* qkv, const float* cos, const float* sin, float* keys, float* values,
                      const int64_t* slots, const int64_t* lengths, float* out, int64_t rows, int64_t heads,
                      int64_t kv_heads, int64_t width, int64_t slot_count, int64_t positions, int64_t slot_stride,
                      int64_t head_stride, float scale, bool shared_slots, int threads) {
    check_range("decode_attention: width", width, kLanes, kMaxVecs * kLanes);
    check_range("decode_attention: width % 16", width % kLanes, 0, 0);
    check_range("decode_attention: kv_heads", kv_heads, 1, heads);
    check_range("decode_attention: heads % kv_heads", heads % kv_heads, 0, 0);
    checked_product("decode_attention: rows x heads x width", {rows, heads, 3, width});
    checked_product("decode_attention: slots x kv_heads x positions x width", {slot_count, kv_heads, positions, width});
    int64_t max_length = 0;
    for (int64_t row = 0; row < rows; ++row) {
        if (lengths[row] < 0) continue;
        check_range("decode_attention: slots", slots[row], 0, slot_count - 1);
        check_range("decode_attention: lengths", lengths[row], 0, positions - 1);
        max_length = std::max(max_length, lengths[row] + 1);
    }
    const int64_t group = heads / kv_heads, row_width = (heads + 2 * kv_heads) * width;
    const int team = team_size(threads, rows * kv_heads);
    const ThreadScratch<float> scratch("decode_attention: lengths", team, max_length + kLanes);
#pragma omp parallel num_threads(team)
    {
        float* const scores = scratch.get();
        if (shared_slots) {  // a row reads keys and values of others: store all of them first
#pragma omp for schedule(static)
            for (int64_t item = 0; item < rows * kv_heads; ++item) {
                const int64_t row = item / kv_heads, head = item % kv_heads, position = lengths[row];
                if (position < 0) continue;
                const float* k = qkv + row * row_width + (heads + head) * width;
                const int64_t cache = slots[row] * slot_stride + head * head_stride;
                store_head(k, k + kv_heads * width, cos + position * width, sin + position * width, keys + cache,
                           values + cache, position, width);
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * kv_heads; ++item) {
            const int64_t row = item / kv_heads, head = item % kv_heads, position = lengths[row];
            float* to = out + (row * heads + head * group) * width;
            if (position < 0) {
                std::fill(to, to + group * width, 0.0f);
                continue;
            }
            const float* q = qkv + row * row_width;
            const int64_t cache = slots[row] * slot_stride + head * head_stride;
            attend_head(q + head * group * width, q + (heads + head) * width, q + (heads + kv_heads + head) * width,
                        cos + position * width, sin + position * width, scale, keys + cache, values + cache, position,
                        shared_slots, group, width, scores, to);
        }
    }
}

}  // namespace ospo
