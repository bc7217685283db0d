// The exact GELU, in place.
#include <cmath>

#include "common.h"
#include "parallel.h"

namespace ospo {

void gelu(float* x, int64_t count, int threads) {
    checked_product("gelu: count", {count});
    const int team = team_size(threads, count, count, 1 << 12);
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t i = 0; i < count; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
}

}  // namespace ospo
