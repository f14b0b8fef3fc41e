// How a parameter's gradients, one per path, lie in memory: whether all can be walked side by side in memory order.
#pragma once

#include <algorithm>
#include <utility>

#include "common.h"

namespace gradalign {

// True when the tensor's elements fill its span of memory, in whatever order of its axes.
inline bool is_dense(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (sizes[axis] == 0) return true;
    if (sizes[axis] > 1) axes.emplace_back(strides[axis], sizes[axis]);
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t axis = 0; axis < sizes.size(); ++axis)
    if (sizes[axis] > 1 && a_strides[axis] != b_strides[axis]) return false;
  return true;
}

// Check two paths' gradients of one parameter against each other; return whether both can be walked in memory order.
inline bool check_paths(const Tensor& first, const Tensor& other) {
  STD_TORCH_CHECK(first.scalar_type() == other.scalar_type(), "the paths' gradients of one parameter must share a dtype; found ",
                  toString(first.scalar_type()), " and ", toString(other.scalar_type()));
  const auto a = first.sizes(), b = other.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), "the paths' gradients of one parameter must share a shape");
  return is_dense(first) && same_layout(first, other);
}

}  // namespace gradalign
