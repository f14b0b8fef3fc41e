// What the ops on gradients share: pairs of paths, accesses of 16 bytes, and how tensors become kernels' arguments.
#pragma once

#include <algorithm>
#include <vector>

#include "../layout.h"
#include "../weigh_options.h"
#include "tensor_list.cuh"

namespace gradalign::cuda {

// Kernels are built for 2, 4 and 8 paths; other numbers take the next one.
constexpr int kMaxPaths = 8;

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

// What both ops walk: parameter n's gradient of path k is tensors[k * num_params + n], and all paths lie alike in memory.
struct Paths {
  std::vector<Tensor> tensors;
  int64_t num_paths, num_params;

  const Tensor& at(int64_t k, int64_t n) const { return tensors[k * num_params + n]; }

  // Copy the paths of the parameters that cannot be walked in memory order.
  void make_walkable() {
    for (int64_t n = 0; n < num_params; ++n) {
      bool in_memory_order = true;
      for (int64_t k = 0; k < num_paths; ++k) {
        check_same_device(at(k, n), tensors[0], "a gradient");
        in_memory_order = check_paths(at(0, n), at(k, n)) && in_memory_order;
      }
      for (int64_t k = 0; !in_memory_order && k < num_paths; ++k) tensors[k * num_params + n] = torch::stable::contiguous(at(k, n));
    }
  }

  // Bring what was merged in a copy to where it belongs.
  void write_back(const std::vector<Tensor>& out) const {
    for (int64_t n = 0; n < num_params; ++n) {
      if (at(0, n).const_data_ptr() == out[n].const_data_ptr()) continue;
      Tensor destination = out[n];
      torch::stable::copy_(destination, at(0, n));
    }
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
      // A launch takes fewer than 2^31 blocks; a single tensor of so many chunks would not fit into any memory.
      if (list.num_tensors == TensorList<K>::kTensors || list.num_blocks + divide_up<int64_t>(size, kChunk) > INT_MAX) flush();
      const int place = list.add(size, slots[n], segments[n]);
      for (int64_t k = 0; k < K; ++k) list.data[k][place] = const_cast<void*>(at(k < num_paths ? k : 0, n).const_data_ptr());
    }
    flush();
  }

  // Call body(S{}, K) for every dtype that occurs, with K the number of paths that kernels are built for.
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
    for (int64_t n = 0; n < num_params; ++n) dispatch_floating(at(0, n).scalar_type(), "a gradient", [](auto) {});
  }
};

}  // namespace gradalign::cuda
