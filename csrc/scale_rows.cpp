// The backward of token_logprobs: out[i] = scales[i] · dhidden[packed_row[i]], with zeros where packed_row[i] < 0.
#include <cstring>

#include "common.h"
#include "half.h"
#include "parallel.h"

namespace ospo {
namespace {

OSPO_CLONES void scale_row(const void* from, float factor, void* to, Dtype dtype, int64_t n) {
    with_type(dtype, [&](auto type) __attribute__((always_inline)) {
        scale(static_cast<const decltype(type)*>(from), factor, static_cast<decltype(type)*>(to), n);
    });
}

}  // namespace

void scale_rows(const void* dhidden, const int64_t* packed_row, const float* scales, void* out, Dtype dtype,
                int64_t rows, int64_t width, int threads) {
    checked_product("scale_rows: rows x width", {rows, width});
    for (int64_t r = 0; r < rows; ++r) check_range("scale_rows: packed_row", packed_row[r], INT64_MIN, rows - 1);
    const int64_t bytes = width * size_of(dtype);
    const int team = team_size(threads, rows);
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t r = 0; r < rows; ++r) {
        char* const to = static_cast<char*>(out) + r * bytes;
        if (packed_row[r] < 0 || scales[r] == 0.0f) {
            std::memset(to, 0, bytes);  // not 0 · dhidden, which may be NaN
        } else {
            scale_row(static_cast<const char*>(dhidden) + packed_row[r] * bytes, scales[r], to, dtype, width);
        }
    }
}

}  // namespace ospo
