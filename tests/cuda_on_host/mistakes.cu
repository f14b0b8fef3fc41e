// Kernels with one mistake each, and without it, for tests/test_cuda_on_host.py and test_cuda_races.py: what finds no mistake here is no evidence
// that there is none.
#include <array>
#include <map>
#include <string>

#include "cuda_pipeline.h"
#include "cuda_runtime.h"

namespace mistakes {

constexpr int kThreads = 96;

// Each thread reads what the next one writes.
template <bool kRight>
__global__ void barrier_kernel(float* data, int) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  if (kRight) __syncthreads();
  data[blockIdx.x * kThreads + threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

// One number for all: the next round must not begin before everyone has read this one's.
template <bool kRight>
__global__ void barrier_after_reading_kernel(float* data, int) {
  __shared__ float of_warp[kThreads / 32];
  float total = 0;
  for (int round = 0; round < 3; ++round) {
    const float sum = __shfl_down_sync(0xFFFFFFFFu, float(threadIdx.x + round), 1);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    for (float value : of_warp) total = 2 * total + value;
    if (kRight) __syncthreads();
  }
  data[blockIdx.x * kThreads + threadIdx.x] = total;
}

template <bool kRight>
__global__ void warp_barrier_kernel(float* data, int) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  if (kRight) __syncwarp();
  data[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x ^ 1];
}

// The second of two copies is still on its way when all but one group have come.
template <bool kRight>
__global__ void copies_kernel(float* data, int) {
  __shared__ float shared[2][kThreads];
  float* const own = data + blockIdx.x * kThreads + threadIdx.x;
  *own = 1;
  for (auto& copy : shared) {
    __pipeline_memcpy_async(copy + threadIdx.x, own, sizeof(float));
    __pipeline_commit();
  }
  __pipeline_wait_prior(kRight ? 0 : 1);
  *own = shared[0][threadIdx.x] + shared[1][threadIdx.x];
}

template <bool kRight>
__global__ void unaligned_copy_kernel(float* data, int) {
  alignas(8) __shared__ float shared[2 * kThreads];
  __pipeline_memcpy_async(shared + 2 * threadIdx.x, data + 2 * threadIdx.x + !kRight, 2 * sizeof(float));
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// What a thread has waited for is there for that thread alone.
template <bool kRight>
__global__ void copies_of_others_kernel(float* data, int) {
  __shared__ float shared[kThreads];
  float* const own = data + blockIdx.x * kThreads + threadIdx.x;
  __pipeline_memcpy_async(shared + threadIdx.x, own, sizeof(float));
  __pipeline_commit();
  __pipeline_wait_prior(0);
  if (kRight) __syncthreads();
  *own = shared[(threadIdx.x + 1) % kThreads];
}

// Exchanging values orders no memory.
template <bool kRight>
__global__ void shuffle_kernel(float* data, int) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  const float zero = __shfl_sync(0xFFFFFFFFu, 0.0f, 0);
  if (kRight) __syncwarp();
  data[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x ^ 1] + zero;
}

// Two threads write to one place, or next to each other.
template <bool kRight>
__global__ void neighbors_kernel(float* data, int) {
  auto* const own = reinterpret_cast<uint16_t*>(data + blockIdx.x * kThreads);
  own[kRight ? threadIdx.x : threadIdx.x / 2] = 1;
}

// Atomics are not to be mixed with other accesses.
template <bool kRight>
__global__ void atomic_kernel(float* data, int) {
  int* const count = reinterpret_cast<int*>(data);
  if (kRight || threadIdx.x > 0)
    atomicAdd(count, 1);
  else
    ++*count;
}

// Thread 0 of the first block hands a number over to thread 0 of each other block, by a flag.
template <typename Before, typename After>
__device__ void hand_over(float* data, Before before, After after) {
  volatile float* const flag = data;
  if (threadIdx.x > 0) return;
  if (blockIdx.x == 0) {
    data[1] = 1;
    before();
    *flag = 1;
  } else {
    while (*flag != 1) __nanosleep(100);
    after();
    data[1 + blockIdx.x] = data[1];
  }
}

template <bool kRight>
__global__ void fence_before_kernel(float* data, int) {
  hand_over(
      data,
      [] {
        if (kRight) __threadfence();
      },
      [] { __threadfence(); });
}

template <bool kRight>
__global__ void fence_after_kernel(float* data, int) {
  hand_over(
      data, [] { __threadfence(); },
      [] {
        if (kRight) __threadfence();
      });
}

template <bool kRight>
__global__ void scope_before_kernel(float* data, int) {
  hand_over(data, [] { kRight ? __threadfence() : __threadfence_block(); }, [] { __threadfence(); });
}

template <bool kRight>
__global__ void scope_after_kernel(float* data, int) {
  hand_over(data, [] { __threadfence(); }, [] { kRight ? __threadfence() : __threadfence_block(); });
}

// Within a block: the last warp to come reads what the others have written, once the lane that knows it has made that known to the others.
template <bool kRight>
__global__ void last_warp_kernel(float* data, int) {
  __shared__ float shared[kThreads / 32];
  __shared__ int come;
  if (threadIdx.x == 0) come = 0;
  __syncthreads();
  int before = 0;
  if (threadIdx.x % 32 == 0) {
    shared[threadIdx.x / 32] = 1;
    __threadfence_block();
    before = atomicAdd(&come, 1);
  }
  if (__shfl_sync(0xFFFFFFFFu, before, 0) != kThreads / 32 - 1) return;
  if (kRight) __threadfence_block();
  __syncwarp();
  if (!kRight) __threadfence_block();
  data[blockIdx.x * kThreads + threadIdx.x] = shared[0] + shared[1] + shared[2];
}

// Blocks have no order, and no block sees what another one is about to write.
template <bool kRight>
__global__ void blocks_kernel(float* data, int) {
  const int own = blockIdx.x * kThreads + threadIdx.x, other = (blockIdx.x + 1) % gridDim.x * kThreads + threadIdx.x;
  data[own] = kRight ? 1.0f : data[other] + 1;
}

// The first block waits for what the last one writes, which may never start before the first has ended.
template <bool kRight>
__global__ void wait_for_block_kernel(float* data, int) {
  if (blockIdx.x == gridDim.x - 1) data[0] = 1;
  if (!kRight && blockIdx.x == 0)
    while (*static_cast<volatile float*>(data) != 1) __nanosleep(100);
}

// Blocks that wait for each other, launched together where they are right: see below.
template <bool kRight>
__global__ void together_kernel(float* data, int) {
  data[blockIdx.x] = 1;
  for (unsigned block = 0; block < gridDim.x; ++block)
    while (static_cast<volatile float*>(data)[block] != 1) __nanosleep(100);
}

template <bool kRight>
__global__ void some_threads_kernel(float*, int) {
  if (kRight || threadIdx.x < 32) __syncthreads();
}

template <bool kRight>
__global__ void two_barriers_kernel(float*, int) {
  if (kRight || threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

template <bool kRight>
__global__ void some_lanes_kernel(float* data, int) {
  if (kRight || threadIdx.x % 32 != 7) data[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, 1.0f, 1);
}

template <bool kRight>
__global__ void outside_of_mask_kernel(float*, int) {
  __syncwarp(kRight ? 0xFFFFFFFFu : 1u);
}

template <bool kRight>
__global__ void beyond_tensor_kernel(float* data, int size) {
  const int n = blockIdx.x * kThreads + threadIdx.x;
  if (kRight ? n < size : n <= size) data[n] = data[n] * 2;
}

struct alignas(16) Four {
  float v[4];
};

template <bool kRight>
__global__ void unaligned_kernel(float* data, int) {
  if (threadIdx.x == 0) *reinterpret_cast<Four*>(data + 4 * blockIdx.x + 2 * !kRight) = Four{};
}

template <bool kRight>
__global__ void beyond_array_kernel(float* data, int) {
  __shared__ float shared[kThreads];
  __shared__ float other[kThreads];
  shared[threadIdx.x + !kRight] = other[threadIdx.x] = 1;
  data[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x];
}

template <bool kRight>
__global__ void beyond_dynamic_memory_kernel(float*, int) {
  float* const memory = static_cast<float*>(cuda_on_host::dynamic_memory());
  memory[threadIdx.x + (kRight ? 0 : kThreads)] = 1;
}

template <bool kRight>
__global__ void unwritten_kernel(float* data, int) {
  __shared__ float shared[kThreads];
  float* const memory = static_cast<float*>(cuda_on_host::dynamic_memory());
  if (kRight) shared[threadIdx.x] = memory[threadIdx.x] = 1;
  data[blockIdx.x * kThreads + threadIdx.x] = (blockIdx.x == 0 ? memory : shared)[threadIdx.x];
}

}  // namespace mistakes

// Launch a kernel on data [size], with kThreads floats of dynamic shared memory or `bytes` where they are not 0; the error's text, empty without one.
extern "C" const char* cuda_on_host_run(const char* name, bool right, int blocks, int bytes, float* data, int size) {
#define KERNEL(name)                                                         \
  {                                                                          \
    #name, { mistakes::name##_kernel<false>, mistakes::name##_kernel<true> } \
  }
  static const std::map<std::string, std::array<void (*)(float*, int), 2>> kernels = {
      KERNEL(barrier),         KERNEL(barrier_after_reading),
      KERNEL(warp_barrier),    KERNEL(blocks),
      KERNEL(wait_for_block),  KERNEL(some_threads),
      KERNEL(two_barriers),    KERNEL(some_lanes),
      KERNEL(outside_of_mask), KERNEL(beyond_tensor),
      KERNEL(beyond_array),    KERNEL(beyond_dynamic_memory),
      KERNEL(unwritten),       KERNEL(copies),
      KERNEL(together),        KERNEL(copies_of_others),
      KERNEL(shuffle),         KERNEL(neighbors),
      KERNEL(atomic),          KERNEL(fence_before),
      KERNEL(fence_after),     KERNEL(scope_before),
      KERNEL(scope_after),     KERNEL(last_warp),
      KERNEL(unaligned_copy),  KERNEL(unaligned),
  };
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(mistakes::kThreads);
  config.dynamicSmemBytes = bytes != 0 ? size_t(bytes) : mistakes::kThreads * sizeof(float);
  cudaLaunchAttribute together{cudaLaunchAttributeCooperative, {1}};
  config.attrs = &together;
  const std::string text = name;
  config.numAttrs = text == "together" ? right : text.find("fence_") == 0 || text.find("scope_") == 0;
  return cudaLaunchKernelEx(&config, kernels.at(name)[right], data, size) == cudaSuccess ? "" : cuda_on_host::last_error().c_str();
}
