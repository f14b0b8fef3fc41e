// What the ops on gradients share: pairs of paths, accesses of 16 bytes, and how tensors become kernels' arguments.
#pragma once

#include <algorithm>
#include <vector>

#include "../layout.h"
#include "../weigh_options.h"
#include "tensor_list.cuh"

namespace gradalign::cuda {

constexpr int pairs_of(int num_paths) { return num_paths * (num_paths + 1) / 2; }

// Pair (i, j), i <= j, counted by j first: the pairs of fewer paths come first.
__host__ __device__ constexpr int pair_of(int i, int j) { return j * (j + 1) / 2 + i; }

// V neighbours of a gradient, read and written in one access.
template <typename S, int V>
struct alignas(V * sizeof(S)) Vector {
  S v[V];
};

// Numbers that finding the weights of one problem takes: its Gram matrix, the weights and scratch.
constexpr int weigh_numbers(int num_paths) { return num_paths * num_paths + num_paths + weigh_scratch(num_paths); }

// A tensor that is not there, or its contiguous form on the device of `like`.
inline std::optional<Tensor> contiguous_beside(const Tensor& like, const std::optional<Tensor>& tensor, const char* what) {
  if (!tensor) return std::nullopt;
  check_same_device(*tensor, like, what);
  return torch::stable::contiguous(*tensor);
}

struct DevicePaths : Paths {
  DevicePaths(const std::vector<Tensor>& first, const std::vector<Tensor>& others, int64_t paths, int64_t params)
      : Paths(first, others, paths, params) {
    for (const Tensor& tensor : tensors) check_same_device(tensor, tensors[0], "a gradient");
  }

  // Call body(list) for the parameters of one dtype, in the given order, a kernel argument's worth at a time. slots[n] is the number of
  // parameter n's first chunk.
  template <int K, typename Body>
  void for_each_list(ScalarType dtype, const std::vector<int64_t>& order, const std::vector<int64_t>& slots, const std::vector<int64_t>& segments,
                     Body&& body) const {
    TensorList<K> list;
    auto flush = [&] {
      if (list.num_tensors > 0) body(list);
      list.num_tensors = list.num_blocks = 0;
    };
    for (int64_t n : order) {
      const int64_t size = at(0, n).numel();
      if (size == 0 || at(0, n).scalar_type() != dtype) continue;
      if (list.num_tensors == TensorList<K>::kTensors) flush();
      const int place = list.add(size, slots[n], segments[n]);
      // Paths above num_paths repeat path 0.
      for (int64_t k = 0; k < K; ++k) list.data[k][place] = const_cast<void*>(at(k < num_paths ? k : 0, n).const_data_ptr());
    }
    flush();
  }

  // Call body(S{}, K, dtype) for every dtype that occurs. Kernels are built for K = 2, 4 and 8 paths; other numbers take the next one.
  template <typename Body>
  void for_each_dtype(Body&& body) const {
    for (ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double}) {
      if (std::none_of(tensors.begin(), tensors.begin() + num_params, [&](const Tensor& g) { return g.scalar_type() == dtype; })) continue;
      dispatch_floating(dtype, "a gradient", [&](auto type) {
        if (num_paths <= 2) return body(type, std::integral_constant<int, 2>{}, dtype);
        if (num_paths <= 4) return body(type, std::integral_constant<int, 4>{}, dtype);
        return body(type, std::integral_constant<int, 8>{}, dtype);
      });
    }
  }
};

}  // namespace gradalign::cuda
