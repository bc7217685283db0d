// Otsu's threshold of one map on the CPU, for otsu.cpp and object_masks.cpp.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace ospo {

// Buffers of one histogram. A thread reuses them for all its maps.
struct OtsuWorkspace {
    float *counts, *weight1, *weight2, *mass1, *mass2, *variance;  // (bins)
    float* edges;                                                  // (bins + 1)
    int* index;                                                    // (cells)
};

// The buffers of all threads of a team. Refuses numbers of bins that are not from 1 to 65536, as
// ospo_fast/ops/otsu.py does.
class OtsuWorkspaces {
  public:
    OtsuWorkspaces(int team, int bins, int64_t cells)
        : bins_(bins), floats_("otsu: bins", team, checked_bins(bins) * 7 + 1), index_("otsu: cells", team, cells) {}

    // Those of the calling thread.
    OtsuWorkspace get() const {
        float* const x = floats_.get();
        const int64_t n = bins_;
        return {x, x + n, x + 2 * n, x + 3 * n, x + 4 * n, x + 5 * n, x + 6 * n, index_.get()};
    }

  private:
    static int64_t checked_bins(int bins) {
        check_range("otsu: bins", bins, 1, 1 << 16);
        return bins;
    }
    int64_t bins_;
    ThreadScratch<float> floats_;
    ThreadScratch<int> index_;
};

// Smallest and largest cell; false if a cell or their range is not finite.
bool finite_extrema(const float* map, int64_t cells, float* low, float* high);

// The threshold of a map with these extrema; NaN if the range is too small for the bins.
float otsu(const float* map, int64_t cells, float low, float high, int bins, const OtsuWorkspace& space);

}  // namespace ospo
