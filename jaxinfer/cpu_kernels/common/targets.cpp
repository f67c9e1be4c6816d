#include "targets.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace jaxinfer {

extern const Kernels portable_kernels;

struct Target {
  const Kernels* kernels;
  bool (*is_here)();
};

static bool everywhere() { return true; }

#if defined(__x86_64__)

extern const Kernels avx512_vnni_kernels, avx2_vnni_kernels, avx2_kernels;

// The compiler's function also asks whether the system keeps the wide registers.
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static bool has_avx2_vnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

static const Target TARGETS[] = {
    {&avx512_vnni_kernels, has_avx512_vnni},
    {&avx2_vnni_kernels, has_avx2_vnni},
    {&avx2_kernels, has_avx2},
    {&portable_kernels, everywhere},
};

#elif defined(__aarch64__)

extern const Kernels neon_dot_kernels;

static bool has_neon_dot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple CPU of 64 bits has it
#endif
}

static const Target TARGETS[] = {
    {&neon_dot_kernels, has_neon_dot},
    {&portable_kernels, everywhere},
};

#else

static const Target TARGETS[] = {{&portable_kernels, everywhere}};

#endif

static std::atomic<const Kernels*> chosen{nullptr};
static std::atomic<int> limit{0};

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (found == nullptr) {
    for (const auto& target : TARGETS)
      if (found == nullptr && target.is_here()) found = target.kernels;
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

int thread_limit() { return limit.load(std::memory_order_relaxed); }

}  // namespace jaxinfer

// The name of the number-th instruction set that this CPU has, best first; null behind the last.
EXPORT const char* jaxinfer_cpu_target(int number) {
  for (const auto& target : jaxinfer::TARGETS)
    if (target.is_here() && number-- == 0) return target.kernels->name;
  return nullptr;
}

// Makes the instruction set of that name compute; false where this CPU has none.
EXPORT bool jaxinfer_cpu_choose(const char* name) {
  for (const auto& target : jaxinfer::TARGETS)
    if (std::strcmp(target.kernels->name, name) == 0 && target.is_here()) {
      jaxinfer::chosen.store(target.kernels, std::memory_order_release);
      return true;
    }
  return false;
}

EXPORT void jaxinfer_cpu_limit_threads(int most) { jaxinfer::limit.store(most); }
