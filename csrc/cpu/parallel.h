// Splitting work over threads. How many: omp_get_max_threads() of the calling thread, which
// torch.set_num_threads() sets where torch's OpenMP library is the one in the process (import torch first).
//
// The threads are our own, not an OpenMP team: a team's barrier waits for every member, and on a machine that
// others use too a member that is not running costs a scheduler's time slice, milliseconds, for work of
// microseconds. Here a thread that is not there takes no part: whoever runs takes the next piece.
#pragma once
#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace elastic_decode {

using RangeFunction = void (*)(const void* body, std::int64_t begin, std::int64_t end);

// Calls function(body, begin, end) for pieces of 0..count of `piece` each (the last may be shorter), in the
// calling thread and up to `threads - 1` others; returns when all are done. Nested calls, and calls while
// another thread's is under way, run in the calling thread alone.
void run_pieces(std::int64_t count, std::int64_t piece, int threads, RangeFunction function,
                const void* body);

// Whether the calling thread is taking part in run_pieces.
bool in_pieces();

// How many threads `work` is worth, when one thread is worth starting from `work_per_thread`; at least 1, at
// most `most`.
inline int threads_for(std::int64_t work, std::int64_t work_per_thread, std::int64_t most) {
#ifdef _OPENMP
  if (work < 2 * work_per_thread || most < 2 || in_pieces()) return 1;
  const std::int64_t wanted = std::min(work / work_per_thread, most);
  return static_cast<int>(std::min<std::int64_t>(wanted, omp_get_max_threads()));
#else
  (void)work, (void)work_per_thread, (void)most;
  return 1;
#endif
}

// Calls body(begin, end) on pieces of 0..count, by up to `threads` threads. What a piece computes must not
// depend on where it begins or ends. `piece` 0: four pieces a thread.
template <class Body>
inline void parallel_ranges(std::int64_t count, int threads, const Body& body, std::int64_t piece = 0) {
  if (count <= 0) return;
  if (threads <= 1) {
    body(std::int64_t{0}, count);
    return;
  }
  if (piece == 0) piece = std::max<std::int64_t>(1, (count + 4 * threads - 1) / (4 * threads));
  run_pieces(
      count, piece, threads,
      [](const void* call, std::int64_t begin, std::int64_t end) {
        (*static_cast<const Body*>(call))(begin, end);
      },
      &body);
}

}  // namespace elastic_decode
