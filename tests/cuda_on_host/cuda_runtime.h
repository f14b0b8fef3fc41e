// CUDA on the host: what csrc/cuda sees in the place of the toolkit's <cuda_runtime.h> when g++ compiles it for the CPU, so that tests run the
// kernels without a GPU. A block's threads are fibers on one thread of the CPU, which take turns where CUDA lets threads wait for each other;
// runtime.cpp says in which order.
//
// Only what the sources use is here; what is missing is a compile error, and an intrinsic is a line or two.
#pragma once

// Before <cmath>, which would hide their float overloads in std.
#include <math.h>
#include <stdlib.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// The library's thread-local storage lies in one piece and holds nothing else: the running block's shared memory, which runtime.cpp fills with NaN
// before a block and exchanges where blocks take turns. `extern __shared__` is replaced in the text.
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) double2 {
  double x, y;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ------------------------------------------------------------------------------------------------------------------------------- host's side

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_host {

// Where in the sources a thread waits, and in which intrinsic.
struct Place {
  const char *what, *file;
  int line;
};

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& run_thread);
cudaError_t allow_dynamic_memory(const void* kernel, int bytes);
// What went wrong in the last launch that returned an error.
const std::string& last_error();

void wait_for_block(Place place);
// Wait for the lanes of `mask`; each gives 8 bytes, and `bytes` become those of the lane `from`. Only a barrier orders their accesses to memory.
void wait_for_warp(unsigned mask, char (&bytes)[8], unsigned from, bool is_barrier, Place place);
void let_others_run(Place place);
void fence(bool device);
unsigned lane();
void* dynamic_memory();

}  // namespace cuda_on_host

// The whole grid runs here and now.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  return cuda_on_host::launch(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, parameters); });
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return cuda_on_host::allow_dynamic_memory(reinterpret_cast<const void*>(kernel), value);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

// ---------------------------------------------------------------------------------------------------------------------------- PyTorch's side

// CPU tensors are what lies on the device. The headers call these two functions by name; the others are theirs only with a CUDA toolkit.
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_create_device_guard cuda_on_host_create_device_guard

inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

inline int32_t torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  if (error != cudaSuccess) *message = strdup(cuda_on_host::last_error().c_str());
  return 0;
}

inline void torch_c10_cuda_free_error_msg(char* message) { free(message); }

// ------------------------------------------------------------------------------------------------------------------------------ device's side

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::wait_for_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  char nothing[8] = {};
  cuda_on_host::wait_for_warp(mask, nothing, cuda_on_host::lane(), true, {"__syncwarp", file, line});
}

namespace cuda_on_host {

template <typename T>
T shuffle(unsigned mask, T value, unsigned from, Place place) {
  static_assert(sizeof(T) <= 8);
  char bytes[8] = {};
  memcpy(bytes, &value, sizeof(T));
  wait_for_warp(mask, bytes, from, false, place);
  memcpy(&value, bytes, sizeof(T));
  return value;
}

}  // namespace cuda_on_host

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_on_host::shuffle(mask, value, from, {"__shfl_sync", file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const unsigned lane = cuda_on_host::lane(), from = lane + offset;
  return cuda_on_host::shuffle(mask, value, from < 32 ? from : lane, {"__shfl_down_sync", file, line});
}

inline void __nanosleep(unsigned, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::let_others_run({"__nanosleep", file, line});
}

// Fibers take turns only where they wait: nothing comes between, and everyone sees all that was written. Fences are there for races.h alone.
inline void __threadfence() { cuda_on_host::fence(true); }
inline void __threadfence_block() { cuda_on_host::fence(false); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "of floating numbers, CUDA's min and max pass NaN over");
  return b < a ? b : a;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "of floating numbers, CUDA's min and max pass NaN over");
  return a < b ? b : a;
}

inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = 3.14159265358979323846 * remainder(double(x), 2.0);
  *sine = float(sin(angle));
  *cosine = float(cos(angle));
}
