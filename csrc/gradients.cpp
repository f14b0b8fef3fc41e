// gram, weigh and combine_ on the CPU. Equivalent to the functions of these names in gradalign/reference.py.
// Work is cut into fixed chunks whose partial sums are added in order: the same bits for every number of threads.
#include <algorithm>

#include "common.h"
#include "layout.h"
#include "philox.h"
#include "weigh_options.h"

namespace gradalign {

// Elements per chunk: K paths' pieces stay in the second-level cache while every pair of them is multiplied.
constexpr int64_t kChunk = 16384;

struct Chunk {
  int64_t param, begin, end;
};

std::vector<Chunk> chunks_of(const std::vector<Tensor>& params, int64_t num_params) {
  std::vector<Chunk> chunks;
  for (int64_t n = 0; n < num_params; ++n)
    for (int64_t begin = 0, size = params[n].numel(); begin < size; begin += kChunk) chunks.push_back({n, begin, std::min(begin + kChunk, size)});
  return chunks;
}

template <typename T>
GRADALIGN_HD double dot(const T* a, const T* b, int64_t count) {
  constexpr int kSums = 16;
  double partial[kSums] = {}, total = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int j = 0; j < kSums; ++j) partial[j] += double(a[i + j]) * double(b[i + j]);
  for (; i < count; ++i) partial[i % kSums] += double(a[i]) * double(b[i]);
  for (int j = 0; j < kSums; ++j) total += partial[j];
  return total;
}

// out[i] = w[0] * out[i] + sum over k > 0 of w[k] * g[k-1][i]
template <typename T>
GRADALIGN_HD void axpby(T* out, const T* const* others, const double* weights, int64_t num_paths, int64_t begin, int64_t end) {
  constexpr int kBlock = 256;
  Wide<T> sum[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, end - first);
    for (int64_t i = 0; i < count; ++i) sum[i] = Wide<T>(weights[0]) * Wide<T>(out[first + i]);
    for (int64_t k = 1; k < num_paths; ++k)
      for (int64_t i = 0; i < count; ++i) sum[i] += Wide<T>(weights[k]) * Wide<T>(others[k - 1][first + i]);
    for (int64_t i = 0; i < count; ++i) out[first + i] = T(sum[i]);
  }
}

// The compiler clones plain functions, not templates.
#define GRADALIGN_CHUNK(T)                                                                                                                     \
  GRADALIGN_CLONES double dot_chunk(const T* a, const T* b, int64_t count) { return dot<T>(a, b, count); }                                     \
  GRADALIGN_CLONES void combine_chunk(T* out, const T* const* others, const double* weights, int64_t num_paths, int64_t begin, int64_t end) {  \
    axpby<T>(out, others, weights, num_paths, begin, end);                                                                                     \
  }
GRADALIGN_CHUNK(double)
GRADALIGN_CHUNK(float)
GRADALIGN_CHUNK(Half)
GRADALIGN_CHUNK(BFloat16)
#undef GRADALIGN_CHUNK

Tensor gram(const std::vector<Tensor>& grads, int64_t num_paths, const std::vector<int64_t>& segments, int64_t num_segments) {
  const int64_t num_params = int64_t(segments.size()), pairs = num_paths * (num_paths + 1) / 2;
  std::vector<Tensor> flat = grads;
  for (int64_t n = 0; n < num_params; ++n) {
    bool in_memory_order = true;
    for (int64_t k = 0; k < num_paths; ++k) in_memory_order = check_paths(grads[n], grads[k * num_params + n]) && in_memory_order;
    for (int64_t k = 0; !in_memory_order && k < num_paths; ++k) flat[k * num_params + n] = torch::stable::contiguous(grads[k * num_params + n]);
  }
  const std::vector<Chunk> chunks = chunks_of(grads, num_params);
  std::vector<double> partial(chunks.size() * pairs);
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      dispatch_floating(flat[chunk.param].scalar_type(), "a gradient", [&](auto type) {
        using T = decltype(type);
        auto piece = [&](int64_t k) { return static_cast<const T*>(flat[k * num_params + chunk.param].const_data_ptr()) + chunk.begin; };
        for (int64_t i = 0, pair = 0; i < num_paths; ++i)
          for (int64_t j = i; j < num_paths; ++j, ++pair) partial[c * pairs + pair] = dot_chunk(piece(i), piece(j), chunk.end - chunk.begin);
      });
    }
  });
  Tensor out = torch::stable::new_zeros(grads[0], {num_segments, num_paths, num_paths}, ScalarType::Double);
  double* g = out.mutable_data_ptr<double>();
  for (size_t c = 0; c < chunks.size(); ++c) {
    double* matrix = g + segments[chunks[c].param] * num_paths * num_paths;
    for (int64_t i = 0, pair = 0; i < num_paths; ++i)
      for (int64_t j = i; j < num_paths; ++j, ++pair) {
        matrix[i * num_paths + j] += partial[c * pairs + pair];
        if (i != j) matrix[j * num_paths + i] += partial[c * pairs + pair];
      }
  }
  return out;
}

std::tuple<Tensor, Tensor> weigh(const Tensor& gram, const std::string& method, const std::optional<Tensor>& rho, const std::optional<Tensor>& order,
                                 double beta, bool always, double c) {
  const int64_t num_segments = gram.size(0), num_paths = gram.size(1);
  const WeighOptions options = weigh_options(method, num_paths, beta, always, c);
  const bool moves = options.method == Weighing::kGradvac;
  const Tensor matrices = torch::stable::contiguous(gram);
  const std::optional<Tensor> own_order = order ? std::optional(torch::stable::contiguous(*order)) : std::nullopt;
  Tensor weights = torch::stable::new_empty(gram, {num_segments, num_paths});
  Tensor targets = moves ? torch::stable::new_zeros(gram, {num_segments, num_paths, num_paths}) : torch::stable::new_empty(gram, {0});
  if (moves && rho) torch::stable::copy_(targets, *rho);
  const int64_t* met = own_order ? own_order->const_data_ptr<int64_t>() : nullptr;
  const double* source = matrices.const_data_ptr<double>();
  double *found = weights.mutable_data_ptr<double>(), *target = targets.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, num_segments, num_paths > 2 ? 16 : 1024, [&](int64_t begin, int64_t end) {
    double matrix[kWeighPaths * kWeighPaths], scratch[weigh_scratch(kWeighPaths)];
    const int64_t size = num_paths * num_paths;
    for (int64_t s = begin; s < end; ++s) {
      std::copy_n(source + s * size, size, matrix);
      weigh_paths(int(num_paths), {matrix, 1}, met, moves ? target + s * size : nullptr, options, {found + s * num_paths, 1}, {scratch, 1});
    }
  });
  return {weights, targets};
}

void combine_(const std::vector<Tensor>& out, const std::vector<Tensor>& others, const Tensor& weights, const std::vector<int64_t>& segments) {
  const int64_t num_params = int64_t(segments.size()), num_paths = weights.size(1);
  Tensor w = torch::stable::contiguous(weights);
  std::vector<Tensor> target = out, source = others;
  for (int64_t n = 0; n < num_params; ++n) {
    bool in_memory_order = is_dense(out[n]);
    for (int64_t k = 0; k + 1 < num_paths; ++k) in_memory_order = check_paths(out[n], others[k * num_params + n]) && in_memory_order;
    if (in_memory_order) continue;
    target[n] = torch::stable::contiguous(out[n]);
    for (int64_t k = 0; k + 1 < num_paths; ++k) source[k * num_params + n] = torch::stable::contiguous(others[k * num_params + n]);
  }
  const std::vector<Chunk> chunks = chunks_of(out, num_params);
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      dispatch_floating(target[chunk.param].scalar_type(), "a gradient", [&](auto type) {
        using T = decltype(type);
        std::vector<const T*> pieces(num_paths - 1);
        for (int64_t k = 0; k + 1 < num_paths; ++k) pieces[k] = static_cast<const T*>(source[k * num_params + chunk.param].const_data_ptr());
        combine_chunk(static_cast<T*>(target[chunk.param].mutable_data_ptr()), pieces.data(),
                      w.const_data_ptr<double>() + segments[chunk.param] * num_paths, num_paths, chunk.begin, chunk.end);
      });
    }
  });
  for (int64_t n = 0; n < num_params; ++n) {
    if (target[n].get() == out[n].get() || target[n].const_data_ptr() == out[n].const_data_ptr()) continue;
    Tensor destination = out[n];
    torch::stable::copy_(destination, target[n]);
  }
}

}  // namespace gradalign

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CPU, m) {
  m.impl("gram", TORCH_BOX(&gradalign::gram));
  m.impl("weigh", TORCH_BOX(&gradalign::weigh));
  m.impl("combine_", TORCH_BOX(&gradalign::combine_));
}
