// Memory of a call, which its thread keeps for the next one.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace jaxinfer {

// At least `count` numbers, aligned to a cache line; each `Tag` is a place of its own.
template <class T, class Tag>
T* scratch(std::size_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t held = 0;
  const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
  if (bytes > held) {
    memory.reset(std::aligned_alloc(64, bytes));
    held = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  return static_cast<T*>(memory.get());
}

}  // namespace jaxinfer
