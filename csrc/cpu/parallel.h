// Splitting work over OpenMP threads. The number of threads is omp_get_max_threads() of the calling thread,
// which torch.set_num_threads() sets where torch's OpenMP library is the one in the process (import torch
// first).
#pragma once
#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace elastic_decode {

// How many threads `work` is worth, when one thread is worth starting from `work_per_thread`; at least 1, at
// most `most`.
inline int threads_for(std::int64_t work, std::int64_t work_per_thread, std::int64_t most) {
#ifdef _OPENMP
  if (work < 2 * work_per_thread || most < 2 || omp_in_parallel()) return 1;
  const std::int64_t wanted = std::min(work / work_per_thread, most);
  return static_cast<int>(std::min<std::int64_t>(wanted, omp_get_max_threads()));
#else
  (void)work, (void)work_per_thread, (void)most;
  return 1;
#endif
}

// Calls body(begin, end) on `threads` contiguous parts of 0..count, each in a thread of its own.
template <class Body>
inline void parallel_ranges(std::int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t team = omp_get_num_threads();
      const std::int64_t me = omp_get_thread_num();
      const std::int64_t begin = count * me / team;
      const std::int64_t end = count * (me + 1) / team;
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  (void)threads;
  if (count > 0) body(std::int64_t{0}, count);
}

}  // namespace elastic_decode
