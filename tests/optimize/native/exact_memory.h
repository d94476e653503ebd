// The allocator of the driver's vectors: with GUARDED an out-of-bounds access ends the process, else the sanitizers see
// it.
#pragma once

#ifdef GUARDED
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <memory>

#ifdef GUARDED
// Memory that ends where an inaccessible page begins, because no sanitizer sees what AMX loads and stores. The linker
// substitutes these for aligned_alloc and free. A page before the memory holds its length.
constexpr size_t PAGE = 4096;
extern "C" void* __wrap_aligned_alloc(size_t, size_t n) noexcept {
  const size_t whole = (n + PAGE - 1) / PAGE * PAGE;
  char* at = (char*)mmap(nullptr, whole + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED || mprotect(at + PAGE + whole, PAGE, PROT_NONE) != 0) return nullptr;
  *(size_t*)at = whole + 2 * PAGE;
  return at + PAGE + whole - n;
}
extern "C" void __wrap_free(void* p) noexcept {
  char* page = (char*)((uintptr_t)p / PAGE * PAGE);
  if (p != nullptr) munmap(page - PAGE, *(size_t*)(page - PAGE));
}
template <typename T>
struct Exact {
  using value_type = T;
  T* allocate(size_t n) { return (T*)__wrap_aligned_alloc(0, n * sizeof(T)); }
  void deallocate(T* p, size_t) { __wrap_free(p); }
  bool operator==(const Exact&) const { return true; }
};
#else
template <typename T>
using Exact = std::allocator<T>;
#endif
