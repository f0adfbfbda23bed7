// Memory of a stage, of which buffers are taken one after the other.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

namespace fastserve {

inline constexpr size_t HUGE_PAGE = size_t{2} << 20;
#ifdef __SANITIZE_ADDRESS__
inline constexpr size_t GUARD = 64;  // between two buffers, so that an access behind one is found
inline constexpr size_t ROOM_FOR_GUARDS = size_t{1} << 20;
#else
inline constexpr size_t GUARD = 0, ROOM_FOR_GUARDS = 0;
#endif

// Zeroed memory on huge pages where the system has them.
class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept : at_(other.at_), bytes_(other.bytes_), used_(other.used_) {
    other.at_ = nullptr;
  }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(at_, other.at_);
    std::swap(bytes_, other.bytes_);
    std::swap(used_, other.used_);
    return *this;
  }
  explicit Memory(size_t bytes)
      : bytes_((bytes + ROOM_FOR_GUARDS + 2 * HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE) {
    void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    at_ = static_cast<char*>(mapped);
    madvise(at_, bytes_, MADV_HUGEPAGE);
    ASAN_POISON_MEMORY_REGION(at_, bytes_);
  }
  ~Memory() {
    if (!at_) return;
    ASAN_UNPOISON_MEMORY_REGION(at_, bytes_);
    munmap(at_, bytes_);
  }

  template <class T>
  T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (used_ + bytes > bytes_) throw std::bad_alloc();
    char* taken = at_ + used_;
    used_ += bytes + GUARD;
    ASAN_UNPOISON_MEMORY_REGION(taken, bytes);
    return reinterpret_cast<T*>(taken);
  }

 private:
  char* at_ = nullptr;
  size_t bytes_ = 0, used_ = 0;
};

}  // namespace fastserve
