// The module gradalign._C: importing it registers the kernels of this library; build_info() says what it was built with.
#include <pybind11/pybind11.h>

#include <string>

#define GRADALIGN_TEXT_(x) #x
#define GRADALIGN_TEXT(x) GRADALIGN_TEXT_(x)

namespace {

std::string instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return "x86-64-v3 (AVX2)";
  return "x86-64 (SSE2)";
#elif defined(__aarch64__)
  return "aarch64 (NEON)";
#else
  return "the compiler's default";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = GRADALIGN_COMPILER;
  info["flags"] = GRADALIGN_FLAGS;
  info["torch"] = GRADALIGN_TORCH;
  info["torch_abi"] = GRADALIGN_TEXT(GRADALIGN_TORCH_ABI);
  info["instruction_set"] = instruction_set();
#ifdef GRADALIGN_WITH_CUDA
  info["cuda"] = true;
  info["nvcc"] = GRADALIGN_NVCC;
  info["cuda_archs"] = GRADALIGN_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["nvcc"] = pybind11::none();
  info["cuda_archs"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of gradalign; importing this module registers them with PyTorch.";
  m.def("build_info", &build_info, "Return what the extension was built with, as a dict of strings.");
}
