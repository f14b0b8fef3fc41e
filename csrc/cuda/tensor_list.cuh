// Which (tensor, chunk) each block owns. The table is a kernel argument: it reaches the device with the launch, so nothing is copied, nothing
// waits, and a CUDA graph keeps its own.
#pragma once

#include "common.cuh"

namespace gradalign::cuda {

// Elements per block: many, so that few partial sums are left; few, so that a small model still fills the device.
constexpr int kChunk = 32768;

// The table takes 4008 bytes at most, all arguments 4 KiB. (More are allowed, and align.cu takes them: it has one launch for a whole model to gain.)
template <int K>
struct TensorList {
  static constexpr int kTensors = 4000 / (8 * K + 24);
  void* data[K][kTensors];
  int64_t size[kTensors];
  // The tensor's first chunk, counted over all launches of an op in segment order, and in this launch.
  int64_t slot[kTensors];
  int first_block[kTensors];
  int segment[kTensors];
  // (2^31 blocks would have more elements than any memory.)
  int num_tensors = 0, num_blocks = 0;

  // Take another tensor, whose addresses follow, and return its place.
  int add(int64_t elements, int64_t first_slot, int64_t of_segment) {
    const int at = num_tensors++;
    size[at] = elements;
    slot[at] = first_slot;
    first_block[at] = num_blocks;
    segment[at] = int(of_segment);
    num_blocks += int(divide_up<int64_t>(elements, kChunk));
    return at;
  }
};

struct Piece {
  int tensor, count;
  int64_t begin, slot;
};

// The elements of a block: the last tensor that does not begin after it, by halving.
template <int K>
__device__ Piece piece_of(const TensorList<K>& list, int block) {
  int tensor = 0;
  for (int last = list.num_tensors - 1; tensor < last;) {
    const int middle = (tensor + last + 1) / 2;
    if (list.first_block[middle] <= block)
      tensor = middle;
    else
      last = middle - 1;
  }
  const int64_t chunk = block - list.first_block[tensor], begin = chunk * kChunk;
  return {tensor, int(min(int64_t(kChunk), list.size[tensor] - begin)), begin, list.slot[tensor] + chunk};
}

}  // namespace gradalign::cuda
