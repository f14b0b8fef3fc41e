// What every CUDA file includes: one door to the device (guard, stream, launch, check) and reductions over a block in a fixed order.
#pragma once

#include "../common.h"

#include <cuda_runtime.h>

#include <climits>
#include <optional>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../philox.h"

namespace gradalign::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// PyTorch's current device and stream while an op runs. Kernels are queued and nothing waits for them, so an op may be called on a side stream
// and captured in a graph.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& first) : index_(device_of(first)), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... arguments) const {
    launch_with_memory(0, kernel, blocks, threads, std::forward<Arguments>(arguments)...);
  }

  // With so many bytes of dynamic shared memory per block.
  template <typename... Parameters, typename... Arguments>
  void launch_with_memory(int bytes, void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... arguments) const {
    launch_as({}, bytes, kernel, blocks, threads, std::forward<Arguments>(arguments)...);
  }

  // All blocks run at once, or none does: they may wait for each other. A launch of more than the device can run at once is an error.
  template <typename... Parameters, typename... Arguments>
  void launch_together(int bytes, void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... arguments) const {
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.attrs = &together;
    config.numAttrs = 1;
    launch_as(config, bytes, kernel, blocks, threads, std::forward<Arguments>(arguments)...);
  }

  int attribute(cudaDeviceAttr of) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, of, index_));
    return value;
  }

 private:
  // PyTorch calls the CUDA kernel of an op where any of its tensors is on one.
  static int32_t device_of(const Tensor& first) {
    STD_TORCH_CHECK(first.is_cuda(), "the op's first tensor must be on a CUDA device, as another one is; found it on the CPU");
    return first.get_device_index();
  }

  template <typename... Parameters, typename... Arguments>
  void launch_as(cudaLaunchConfig_t config, int bytes, void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT_MAX, "a launch takes at most ", INT_MAX, " blocks; found ", blocks);
    // A block gets more than 48 KiB only on demand.
    if (bytes > 48 * 1024) STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(bytes);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_same_device(const Tensor& tensor, const Tensor& expected, const char* what) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == expected.get_device_index(), what,
                  " must be on the same CUDA device as the op's first tensor, cuda:", expected.get_device_index());
}

template <typename T>
constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The larger number, and NaN where there is one.
struct Larger {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b > a || b != b ? b : a;
  }
};

// Combine the lanes' values; lane 0 gets the result. The same tree every time: the same bits on every run.
template <typename T, typename Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = combine(value, __shfl_down_sync(kAllLanes, value, offset));
  return value;
}

// Combine the values of all threads of a block, within warps and then in the order of warps; every thread gets the result.
template <int kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  __shared__ T of_warp[kThreads / kWarp];
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = combine(value, of_warp[warp]);
  // Before the next call writes there.
  __syncthreads();
  return value;
}

}  // namespace gradalign::cuda
