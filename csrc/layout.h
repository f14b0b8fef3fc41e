// The gradients of several paths, and how they lie in memory: a parameter's are walked side by side in memory order.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

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

inline std::string shape_of(const Tensor& tensor) {
  std::string shape;
  for (const int64_t size : tensor.sizes()) shape += (shape.empty() ? "[" : ", ") + std::to_string(size);
  return (shape.empty() ? "[" : shape) + "]";
}

// Check two paths' gradients of one parameter against each other; return whether both can be walked in memory order.
inline bool check_paths(const Tensor& first, const Tensor& other) {
  dispatch_floating(first.scalar_type(), "a gradient", [](auto) {});
  STD_TORCH_CHECK(first.scalar_type() == other.scalar_type(), "the paths' gradients of one parameter must share a dtype; found ",
                  toString(first.scalar_type()), " and ", toString(other.scalar_type()));
  const auto a = first.sizes(), b = other.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()),
                  "the paths' gradients of one parameter must share a shape; found ", shape_of(first), " and ", shape_of(other));
  return is_dense(first) && same_layout(first, other);
}

// Parameter n's gradient of path k is tensors[k * num_params + n]. All are checked before anything is written, and those of a parameter that cannot
// be walked in memory order are replaced by contiguous copies.
struct Paths {
  std::vector<Tensor> tensors;
  int64_t num_paths, num_params;

  Paths(std::vector<Tensor> first, const std::vector<Tensor>& others, int64_t paths, int64_t params)
      : tensors(std::move(first)), num_paths(paths), num_params(params) {
    tensors.insert(tensors.end(), others.begin(), others.end());
    for (int64_t n = 0; n < num_params; ++n) {
      bool in_memory_order = true;
      for (int64_t k = 0; k < num_paths; ++k) in_memory_order = check_paths(at(0, n), at(k, n)) && in_memory_order;
      for (int64_t k = 0; !in_memory_order && k < num_paths; ++k) tensors[k * num_params + n] = torch::stable::contiguous(at(k, n));
    }
  }

  const Tensor& at(int64_t k, int64_t n) const { return tensors[k * num_params + n]; }

  // Bring what was merged in a copy to where it belongs.
  void write_back(const std::vector<Tensor>& out) const {
    for (int64_t n = 0; n < num_params; ++n) {
      if (at(0, n).const_data_ptr() == out[n].const_data_ptr()) continue;
      Tensor destination = out[n];
      torch::stable::copy_(destination, at(0, n));
    }
  }
};

}  // namespace gradalign
