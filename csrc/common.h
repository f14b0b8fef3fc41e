// What every kernel file includes: PyTorch's stable ABI, checks and dtype dispatch.
#pragma once

#ifdef TORCH_FEATURE_VERSION
#error "csrc/common.h must come before all of PyTorch's headers"
#endif
// Set by setup.py; the headers offer only what this PyTorch version and all later ones have.
#define TORCH_TARGET_VERSION GRADALIGN_TORCH_ABI

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "compiler.h"

namespace gradalign {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type a dtype is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType wide_dtype(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) { return torch::stable::contiguous(torch::stable::to(tensor, dtype)); }

// Call body(T{}) with T the C++ type of a floating dtype.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* what, Body&& body) {
  switch (dtype) {
    case ScalarType::Double: return body(double{});
    case ScalarType::Float: return body(float{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: STD_TORCH_CHECK(false, what, " must be float16, bfloat16, float32 or float64; found ", toString(dtype));
  }
}

}  // namespace gradalign
