// Finds data races, in sources that are compiled with -fsanitize=thread: two accesses to a byte, at least one of them a write and not both atomic,
// that nothing orders. What does is CUDA's memory model: program order, barriers, and a fence before an atomic write together with a fence after an
// atomic read that reads from it. Which of two accesses happens to come first does not matter, so that a single run finds what its path has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cuda_on_host {

// A vector clock: how far each thread has come, of those blocks that are known. A block of n threads has n clocks more: its threads' asynchronous
// copies run beside them.
class Clock {
 public:
  uint32_t& of(uint32_t block, size_t thread);
  uint32_t get(uint32_t block, size_t thread) const;
  void join(const Clock& other);

 private:
  std::vector<uint32_t>& clocks(uint32_t block);
  std::vector<std::pair<uint32_t, std::vector<uint32_t>>> blocks_;
};

struct Access {
  uint32_t block;
  uint16_t thread;
  // Which of a word's eight bytes.
  uint8_t bytes;
  bool writes : 1, atomic : 1;
  uint32_t clock;
  // Where in the library.
  uint32_t code;
};

// What is known of some memory.
struct Shadow {
  // Accesses that are not known to come before a later one of the same kind.
  struct Word {
    std::vector<Access> reads, writes;
  };
  static constexpr size_t kWordsPerPage = 512;
  std::unordered_map<uintptr_t, std::unique_ptr<Word[]>> pages;

  // What whoever reads an atomic's value learns: what had come before the last fence of its writer, of either scope.
  struct Published {
    std::shared_ptr<const Clock> to_device, to_block;
    uint32_t block;
  };
  std::unordered_map<uintptr_t, std::vector<Published>> published;
};

struct Range {
  bool has(uintptr_t address) const { return address - uintptr_t(begin) < bytes; }
  const char* begin;
  size_t bytes;
};

// A block's: __shared__ variables, which lie where another block's may have lain before, and dynamic memory.
struct SharedMemory {
  Range statics, dynamic;
  Shadow shadow;
};

// What is ordered before a thread's next access.
struct History {
  uint32_t block;
  uint16_t thread, num_threads;
  // Its own variables, which nobody else sees.
  Range stack;
  SharedMemory* shared;
  Clock now;
  // What had come before its last fence, by the fence's scope.
  std::shared_ptr<const Clock> to_device, to_block;
  // What the atomics that it has read have published, which waits for a fence of at least that scope.
  Clock from_device, from_block;
};

// Set where sources that tell of their accesses are loaded: only then is what follows called.
extern bool finds_races;
// Whose accesses these are, nullptr outside of kernels.
extern History* history_;

History begin(uint32_t block, size_t thread, size_t num_threads, Range stack, SharedMemory& shared);
// A barrier of these threads.
void meet(const std::vector<History*>& threads);
// A copy in the running thread's group of this number, counted from 1, issued at `code`.
void copy_beside(void* to, const void* from, size_t bytes, size_t group, const void* code);
// The running thread has waited for so many of its groups.
void wait_for_copies(size_t groups);
void end_launch();

// runtime.cpp's: ends the launch.
[[noreturn]] void fail_in_thread(const std::string& text);

}  // namespace cuda_on_host
