// Memory between two pages that nobody may touch.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace cuda_on_host {

class Fenced {
 public:
  explicit Fenced(size_t bytes) : room_((bytes + kPage - 1) / kPage * kPage) {
    void* base = mmap(nullptr, room_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    first_ = static_cast<char*>(base) + kPage;
    if (mprotect(first_, room_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  Fenced(const Fenced&) = delete;
  ~Fenced() { munmap(first_ - kPage, room_ + 2 * kPage); }

  // Whole pages.
  size_t room() const { return room_; }
  char* begin() const { return first_; }
  // So many bytes that end where the second fence begins.
  char* last(size_t bytes) const { return first_ + room_ - bytes; }

  static constexpr size_t kPage = 4096;

 private:
  char* first_;
  size_t room_;
};

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace cuda_on_host
