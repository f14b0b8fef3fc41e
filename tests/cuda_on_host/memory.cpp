// PyTorch's CPU memory between two pages that nobody may touch, filled with NaN: what is read or written beyond a tensor, or read before it is
// written, shows.
#include <c10/core/CPUAllocator.h>

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
std::mutex mutex;

Fenced* take(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = idle.find(round_up(bytes, Fenced::kPage));
  if (found == idle.end()) return new Fenced(bytes);
  Fenced* const memory = found->second.release();
  idle.erase(found);
  return memory;
}

void give_back(void* context) {
  if (context == nullptr) return;
  std::unique_ptr<Fenced> memory(static_cast<Fenced*>(context));
  const std::lock_guard<std::mutex> lock(mutex);
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

}  // namespace cuda_on_host
