// PyTorch's CPU memory between two pages that nobody may touch, filled with NaN: what is read or written beyond a tensor, or read before it is
// written, shows.
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "fenced.h"

namespace cuda_on_host {
namespace {

// Up to 15 bytes lie between a tensor's end and the fence, so that its first element allows wide accesses, as on a GPU.
constexpr size_t kAlignment = 16;

// What is free, by its room, while fences are wanted: the system takes longer to map memory than most ops to fill it.
std::multimap<size_t, std::unique_ptr<Fenced>> idle;
bool wanted = false;
// What is in use, and how many bytes were at most since somebody asked.
std::map<const Fenced*, size_t> used;
size_t bytes_in_use = 0, peak_bytes = 0;
std::mutex mutex;

Fenced* take(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = idle.find(round_up(bytes, Fenced::kPage));
  Fenced* const memory = found == idle.end() ? new Fenced(bytes) : found->second.release();
  if (found != idle.end()) idle.erase(found);
  used[memory] = bytes;
  bytes_in_use += bytes;
  peak_bytes = std::max(peak_bytes, bytes_in_use);
  return memory;
}

void give_back(void* context) {
  if (context == nullptr) return;
  std::unique_ptr<Fenced> memory(static_cast<Fenced*>(context));
  const std::lock_guard<std::mutex> lock(mutex);
  bytes_in_use -= used[memory.get()];
  used.erase(memory.get());
  if (wanted) idle.emplace(memory->room(), std::move(memory));
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, nullptr, &give_back, cpu};
    Fenced* const memory = take(size);
    memset(memory->begin(), 0xFF, memory->room());
    return {memory->last(round_up(size, kAlignment)), memory, &give_back, cpu};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// PyTorch allocates so until it is told not to; what was allocated stays.
extern "C" void cuda_on_host_fence_memory(bool fence) {
  static Allocator allocator;
  static c10::Allocator* usual = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (fence == wanted) return;
  wanted = fence;
  if (fence) usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(fence ? &allocator : usual);
  if (!fence) idle.clear();
}

// The most bytes of tensors at a time since the last call, beyond those that were there then.
extern "C" uint64_t cuda_on_host_peak_bytes() {
  static size_t before = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t found = peak_bytes > before ? peak_bytes - before : 0;
  before = peak_bytes = bytes_in_use;
  return found;
}

}  // namespace cuda_on_host
