// Work that is shared with the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>

#include "targets.h"
#include "xla/ffi/api/ffi.h"

namespace jaxinfer {

// Waking a thread costs as long as reading some hundred kilobytes.
constexpr int64_t LEAST_BYTES = 1 << 17;

// Calls `work(first, last)` for ranges that make up [0, count), bounds being multiples of `unit`.
//
// `bytes` is what all of it reads. The caller takes ranges like every other thread and waits only
// for those that others have begun: where the pool is busy, or its threads wait in calls of their
// own, the caller does everything, so that nothing can wait for ever.
template <class Work>
void split(xla::ffi::ThreadPool& pool, int64_t count, int64_t unit, int64_t bytes, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, finished{0};
  };
  const int64_t units = (count + unit - 1) / unit;
  int64_t threads = std::min({pool.num_threads(), units, bytes / LEAST_BYTES});
  if (const int limit = thread_limit()) threads = std::min<int64_t>(threads, limit);
  if (threads < 2) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
  const int64_t ranges = std::min({units, 4 * threads, std::max(threads, bytes / LEAST_BYTES)});
  const auto shared = std::make_shared<Shared>();
  // a thread that comes late looks at nothing but `shared`
  const auto take = [shared, ranges, units, unit, count, &work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < ranges;) {
      work(units * i / ranges * unit, std::min(count, units * (i + 1) / ranges * unit));
      shared->finished.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(std::decay_t<decltype(take)>(take));
  take();
  for (int spins = 0; shared->finished.load(std::memory_order_acquire) < ranges; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace jaxinfer
