// What races.h says, with vector clocks: FastTrack (Flanagan and Freund, 2009), where every read counts, and with the scopes of PTX's fences.
#include "races.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>

// The library's own memory, where no kernel writes.
extern "C" char __ehdr_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

namespace cuda_on_host {

bool finds_races = false;
History* history_ = nullptr;

// -------------------------------------------------------------------------------------------------------------------------------------- clocks

std::vector<uint32_t>& Clock::clocks(uint32_t block) {
  for (auto& [known, clocks] : blocks_)
    if (known == block) return clocks;
  return blocks_.emplace_back(block, std::vector<uint32_t>()).second;
}

uint32_t& Clock::of(uint32_t block, size_t thread) {
  std::vector<uint32_t>& found = clocks(block);
  if (thread >= found.size()) found.resize(thread + 1);
  return found[thread];
}

uint32_t Clock::get(uint32_t block, size_t thread) const {
  for (const auto& [known, clocks] : blocks_)
    if (known == block) return thread < clocks.size() ? clocks[thread] : 0;
  return 0;
}

void Clock::join(const Clock& other) {
  for (const auto& [block, theirs] : other.blocks_) {
    std::vector<uint32_t>& ours = clocks(block);
    if (ours.size() < theirs.size()) ours.resize(theirs.size());
    for (size_t i = 0; i < theirs.size(); ++i) ours[i] = std::max(ours[i], theirs[i]);
  }
}

namespace {

std::shared_ptr<const Clock> joined(const std::shared_ptr<const Clock>& a, const std::shared_ptr<const Clock>& b) {
  if (!a || !b) return a ? a : b;
  auto both = std::make_shared<Clock>(*a);
  both->join(*b);
  return both;
}

// What comes from here on is not ordered before what others have learned so far.
void tick(History& thread) { ++thread.now.of(thread.block, thread.thread); }

// ------------------------------------------------------------------------------------------------------------------------------------- accesses

Shadow of_device;

Shadow* shadow_of(const History& self, uintptr_t address) {
  const Range library{&__ehdr_start, size_t(&_end - &__ehdr_start)};
  if (self.stack.has(address) || library.has(address)) return nullptr;
  return self.shared->statics.has(address) || self.shared->dynamic.has(address) ? &self.shared->shadow : &of_device;
}

uint32_t place_of(const void* code) { return uint32_t(static_cast<const char*>(code) - &__ehdr_start); }

// Where in the sources: the file and line of the innermost function that is not this folder's stand-in for one of CUDA's.
std::string line_of(uint32_t code) {
  Dl_info info;
  char command[4200], line[4096];
  std::string found = "?";
  if (dladdr(&__ehdr_start, &info) == 0) return found;
  // The call before the address to which it returns.
  snprintf(command, sizeof command, "addr2line -i -e '%s' %#x", info.dli_fname, code - 1);
  FILE* const lines = popen(command, "r");
  while (lines != nullptr && fgets(line, sizeof line, lines) != nullptr) {
    const std::string text(line, strcspn(line, " \n"));
    found = text.substr(text.rfind('/') + 1);
    if (text.find("csrc/") != text.npos || found.find(".cu:") != found.npos) break;
  }
  if (lines != nullptr) pclose(lines);
  return found;
}

[[noreturn]] void fail(const History& self, const Access& now, const Access& before) {
  const auto copies = [&](const Access& access) { return access.thread >= self.num_threads; };
  std::string text = copies(now) ? now.writes ? "copies to" : "copies from" : now.writes ? "writes" : "reads";
  text += std::string(" what ") + (copies(before) ? "a copy of " : "") + "thread " + std::to_string(before.thread % self.num_threads) + " of block " +
          std::to_string(before.block) + (before.writes ? " wrote" : " read") + ", and nothing orders them (" + line_of(now.code) + " after " +
          line_of(before.code) + ")";
  fail_in_thread(text);
}

// An access to some bytes of a word.
void access_word(const History& self, Shadow::Word& word, const Access& now) {
  const auto comes_before = [&](const Access& before) { return self.now.get(before.block, before.thread) >= before.clock; };
  const auto covers = [](const Access& a, const Access& b) { return (b.bytes & ~a.bytes) == 0; };
  const auto is_last = [&](const std::vector<Access>& list) {
    return !list.empty() && list.back().block == now.block && list.back().thread == now.thread && list.back().clock == now.clock &&
           list.back().atomic == now.atomic && covers(list.back(), now) && comes_before(list.back());
  };
  if (is_last(now.writes ? word.writes : word.reads) && (!now.writes || word.reads.empty())) return;
  const auto check = [&](const std::vector<Access>& list) {
    for (const Access& before : list)
      if ((before.bytes & now.bytes) != 0 && !(before.atomic && now.atomic) && !comes_before(before)) fail(self, now, before);
  };
  // What comes before `now`: whatever is not ordered after that is not ordered after `now`, either.
  const auto forget = [&](std::vector<Access>& list) {
    const auto replaced = [&](const Access& before) { return covers(now, before) && (before.atomic || !now.atomic) && comes_before(before); };
    list.erase(std::remove_if(list.begin(), list.end(), replaced), list.end());
  };
  check(word.writes);
  if (now.writes) {
    check(word.reads);
    forget(word.reads);
    forget(word.writes);
    word.writes.push_back(now);
    return;
  }
  // What all threads read is a long list: it is cleared when it is full, and grows where that does not halve it.
  if (word.reads.size() == word.reads.capacity()) {
    forget(word.reads);
    if (2 * word.reads.size() > word.reads.capacity()) word.reads.reserve(2 * word.reads.capacity());
  }
  word.reads.push_back(now);
}

void access(const History& self, Shadow& shadow, uintptr_t address, size_t bytes, Access now) {
  for (const uintptr_t end = address + bytes; address < end;) {
    const uintptr_t first = address % 8, count = std::min<uintptr_t>(8 - first, end - address), word = address / 8;
    std::unique_ptr<Shadow::Word[]>& page = shadow.pages[word / Shadow::kWordsPerPage];
    if (!page) page = std::make_unique<Shadow::Word[]>(Shadow::kWordsPerPage);
    now.bytes = uint8_t(((1u << count) - 1) << first);
    access_word(self, page[word % Shadow::kWordsPerPage], now);
    address += count;
  }
}

enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite, kAtomicChange };

void note(const volatile void* memory, size_t bytes, Kind kind, const void* code) {
  if (history_ == nullptr) return;
  const uintptr_t address = uintptr_t(memory);
  History& self = *history_;
  Shadow* const shadow = shadow_of(self, address);
  if (shadow == nullptr) return;
  const bool reads = kind == Kind::kRead || kind == Kind::kAtomicRead, atomic = kind != Kind::kRead && kind != Kind::kWrite;
  access(self, *shadow, address, bytes, {self.block, self.thread, 0, !reads, atomic, self.now.get(self.block, self.thread), place_of(code)});
  if (!atomic) return;
  std::vector<Shadow::Published>& all = shadow->published[address];
  if (kind != Kind::kAtomicWrite) {
    for (const Shadow::Published& from : all) {
      if (from.to_device) self.from_device.join(*from.to_device);
      if (from.to_block && from.block == self.block) self.from_block.join(*from.to_block);
    }
  }
  if (kind == Kind::kAtomicRead) return;
  // Who reads what an atomic has changed reads from those, too, who have written before.
  if (kind == Kind::kAtomicWrite) all.clear();
  for (Shadow::Published& from : all) {
    if (from.block != self.block) continue;
    from.to_device = joined(from.to_device, self.to_device);
    from.to_block = joined(from.to_block, self.to_block);
    return;
  }
  all.push_back({self.to_device, self.to_block, self.block});
}

}  // namespace

// ----------------------------------------------------------------------------------------------------------------------------- what orders them

History begin(uint32_t block, size_t thread, size_t num_threads, Range stack, SharedMemory& shared) {
  History history{block, uint16_t(thread), uint16_t(num_threads), stack, &shared, {}, {}, {}, {}, {}};
  tick(history);
  return history;
}

void meet(const std::vector<History*>& threads) {
  Clock all;
  for (const History* thread : threads) all.join(thread->now);
  for (History* thread : threads) {
    thread->now = all;
    tick(*thread);
  }
}

void fence(bool device) {
  if (history_ == nullptr) return;
  History& self = *history_;
  self.now.join(self.from_block);
  if (device) self.now.join(self.from_device);
  self.to_block = std::make_shared<const Clock>(self.now);
  if (device) self.to_device = self.to_block;
  tick(self);
}

void copy_beside(void* to, const void* from, size_t bytes, size_t group, const void* code) {
  const History& self = *history_;
  Access now{self.block, uint16_t(self.num_threads + self.thread), 0, false, false, uint32_t(group), place_of(code)};
  access(self, *shadow_of(self, uintptr_t(from)), uintptr_t(from), bytes, now);
  now.writes = true;
  access(self, *shadow_of(self, uintptr_t(to)), uintptr_t(to), bytes, now);
}

void wait_for_copies(size_t groups) {
  uint32_t& done = history_->now.of(history_->block, history_->num_threads + history_->thread);
  done = std::max(done, uint32_t(groups));
}

void end_launch() {
  history_ = nullptr;
  of_device = {};
}

}  // namespace cuda_on_host

// -------------------------------------------------------------------------------------------------------------- what -fsanitize=thread calls

extern "C" {

void __tsan_init() { cuda_on_host::finds_races = true; }

#define HERE __builtin_return_address(0)
#define ACCESS(name, bytes, kind) \
  void __tsan_##name(void* memory) { cuda_on_host::note(memory, bytes, cuda_on_host::Kind::kind, HERE); }
#define ACCESSES(bytes)                                      \
  ACCESS(read##bytes, bytes, kRead)                          \
  ACCESS(write##bytes, bytes, kWrite)                        \
  ACCESS(unaligned_read##bytes, bytes, kRead)                \
  ACCESS(unaligned_write##bytes, bytes, kWrite)              \
  ACCESS(volatile_read##bytes, bytes, kAtomicRead)           \
  ACCESS(volatile_write##bytes, bytes, kAtomicWrite)         \
  ACCESS(unaligned_volatile_read##bytes, bytes, kAtomicRead) \
  ACCESS(unaligned_volatile_write##bytes, bytes, kAtomicWrite)

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

// Atomic operations; int stands for any type of 32 bits.
#define CHANGE(name)                                                        \
  int __tsan_atomic32_##name(int* memory, int value, int) {                 \
    cuda_on_host::note(memory, 4, cuda_on_host::Kind::kAtomicChange, HERE); \
    return __atomic_##name(memory, value, __ATOMIC_SEQ_CST);                \
  }
CHANGE(fetch_add)
CHANGE(fetch_or)

// The launchers'.
char __tsan_atomic8_load(const char* memory, int) { return __atomic_load_n(memory, __ATOMIC_SEQ_CST); }
void __tsan_vptr_update(void**, void*) {}

void __tsan_read_range(void* memory, long bytes) { cuda_on_host::note(memory, size_t(bytes), cuda_on_host::Kind::kRead, HERE); }
void __tsan_write_range(void* memory, long bytes) { cuda_on_host::note(memory, size_t(bytes), cuda_on_host::Kind::kWrite, HERE); }
}
