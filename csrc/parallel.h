// Sizes, scratch memory and threads of the functions that run on the host. An exception that leaves a parallel region
// ends the process, so all of this is checked and allocated before the region. An error is std::invalid_argument, which
// Python sees as ValueError, or std::bad_alloc, which it sees as MemoryError.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ospo {

[[noreturn]] inline void refuse(const std::string& name, const std::string& got, const std::string& expected) {
    throw std::invalid_argument(name + " is " + got + ", expected " + expected);
}

// Refuse a value below `low` or above `high`. Names are of the form "function: argument".
inline void check_range(const char* name, int64_t value, int64_t low, int64_t high = INT64_MAX) {
    if (value >= low && value <= high) return;
    const std::string least = std::to_string(low);
    refuse(name, std::to_string(value), high == INT64_MAX ? least + " or more" : least + " to " + std::to_string(high));
}

// The product of sizes. Refuses a negative one, and products that are no number of elements of an array. Elements have
// at most 16 bytes here, so that offsets within an array cannot overflow either.
inline int64_t checked_product(const char* name, std::initializer_list<int64_t> sizes) {
    constexpr int64_t MAX_ELEMENTS = INT64_MAX / 16;
    int64_t product = 1;
    bool fits = true, empty = false;
    for (const int64_t size : sizes) {
        fits = fits && size >= 0;
        empty = empty || size == 0;
        if (fits && size > 0) fits = !__builtin_mul_overflow(product, size, &product) && product <= MAX_ELEMENTS;
    }
    if (fits) return empty ? 0 : product;
    std::string got;
    for (const int64_t size : sizes) got += (got.empty() ? "" : " x ") + std::to_string(size);
    refuse(name, got, "sizes of 0 or more with a product of at most " + std::to_string(MAX_ELEMENTS));
}

// The number of threads for `parts` independent parts: one for a single part, else all. A runtime may end the threads
// that a smaller team leaves out and start them for the next one. A number of threads far above that of the processors
// gains nothing, and a runtime that cannot start a thread ends the process.
inline int team_size(int threads, int64_t parts) {
#ifdef _OPENMP
    static const int max_threads = 4 * omp_get_num_procs();
    return parts > 1 ? std::max(1, std::min(threads, max_threads)) : 1;
#else
    (void)threads, (void)parts;
    return 1;
#endif
}

// The same where the work of all parts, a product of sizes, pays for several threads only above `min_work`.
inline int team_size(int threads, int64_t parts, int64_t work, int64_t min_work) {
    return work > min_work ? team_size(threads, parts) : 1;
}

// Uninitialized memory for each thread of a team, from the start of a cache line on.
template <class T>
class ThreadScratch {
  public:
    // `count` elements for each of `team` threads.
    ThreadScratch(const char* name, int team, int64_t count)
        : distance_(checked_product(name, {count / PER_LINE + 1, PER_LINE})),
          memory_(new T[static_cast<size_t>(checked_product(name, {team, distance_}) + PER_LINE)]) {
        // Loads of whole vectors cross no cache line, and threads share none.
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        begin_ = memory_.get() + ((address + 63) / 64 * 64 - address) / sizeof(T);
    }

    // The part of the calling thread.
    T* get() const {
#ifdef _OPENMP
        return begin_ + omp_get_thread_num() * distance_;
#else
        return begin_;
#endif
    }

  private:
    static constexpr int64_t PER_LINE = 64 / sizeof(T);
    int64_t distance_;  // elements from thread to thread
    std::unique_ptr<T[]> memory_;
    T* begin_;
};

}  // namespace ospo
