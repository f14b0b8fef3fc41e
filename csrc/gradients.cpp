// gram, weigh, combine_ and align_ on the CPU. Equivalent to the functions of these names in gradalign/reference.py.
// Work is cut into fixed chunks whose partial sums are added in order: the same bits for every number of threads.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "common.h"
#include "layout.h"
#include "sums.h"
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

// out[i] = w[0] * out[i] + sum over k > 0 of w[k] * g[k-1][i]
template <typename T>
GRADALIGN_INLINE void axpby(T* out, const T* const* others, const double* weights, int64_t num_paths, int64_t begin, int64_t end) {
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

// Inner products of a chunk's pieces, one per pair of paths i <= j: a loop for each number of paths up to kMaxPaths, pair by pair beyond.
template <typename T>
GRADALIGN_INLINE void dot(const T* const* pieces, int64_t num_paths, int64_t count, double* products) {
  switch (num_paths) {
    case 2: return inner_products<2>(pieces, count, products);
    case 3: return inner_products<3>(pieces, count, products);
    case 4: return inner_products<4>(pieces, count, products);
    case 5: return inner_products<5>(pieces, count, products);
    case 6: return inner_products<6>(pieces, count, products);
    case 7: return inner_products<7>(pieces, count, products);
    case 8: return inner_products<8>(pieces, count, products);
  }
  for (int64_t i = 0, pair = 0; i < num_paths; ++i)
    for (int64_t j = i; j < num_paths; ++j, ++pair) products[pair] = inner_product(pieces[i], pieces[j], count);
}

// The compiler clones plain functions, not templates.
#define GRADALIGN_CHUNK(T)                                                                                                                    \
  GRADALIGN_CLONES void dot_chunk(const T* const* pieces, int64_t num_paths, int64_t count, double* products) {                               \
    dot<T>(pieces, num_paths, count, products);                                                                                               \
  }                                                                                                                                           \
  GRADALIGN_CLONES void combine_chunk(T* out, const T* const* others, const double* weights, int64_t num_paths, int64_t begin, int64_t end) { \
    axpby<T>(out, others, weights, num_paths, begin, end);                                                                                    \
  }
GRADALIGN_CHUNK(double)
GRADALIGN_CHUNK(float)
GRADALIGN_CHUNK(Half)
GRADALIGN_CHUNK(BFloat16)
#undef GRADALIGN_CHUNK

struct HostPaths : Paths {
  using Paths::Paths;

  void multiply(const Chunk& chunk, double* products) const {
    dispatch_floating(at(0, chunk.param).scalar_type(), "a gradient", [&](auto type) {
      using T = decltype(type);
      std::vector<const T*> pieces(num_paths);
      for (int64_t k = 0; k < num_paths; ++k) pieces[k] = static_cast<const T*>(at(k, chunk.param).const_data_ptr()) + chunk.begin;
      dot_chunk(pieces.data(), num_paths, chunk.end - chunk.begin, products);
    });
  }

  void add(const double* products, double* matrix) const {
    for (int64_t i = 0, pair = 0; i < num_paths; ++i)
      for (int64_t j = i; j < num_paths; ++j, ++pair) {
        matrix[i * num_paths + j] += products[pair];
        if (i != j) matrix[j * num_paths + i] += products[pair];
      }
  }

  // Path 0's piece becomes the weighted sum of all paths'.
  void combine(const Chunk& chunk, const double* weights) const {
    dispatch_floating(at(0, chunk.param).scalar_type(), "a gradient", [&](auto type) {
      using T = decltype(type);
      std::vector<const T*> pieces(num_paths - 1);
      for (int64_t k = 1; k < num_paths; ++k) pieces[k - 1] = static_cast<const T*>(at(k, chunk.param).const_data_ptr());
      combine_chunk(static_cast<T*>(at(0, chunk.param).mutable_data_ptr()), pieces.data(), weights, num_paths, chunk.begin, chunk.end);
    });
  }
};

Tensor gram(const std::vector<Tensor>& grads, int64_t num_paths, const std::vector<int64_t>& segments, int64_t num_segments) {
  const int64_t num_params = int64_t(segments.size()), pairs = num_paths * (num_paths + 1) / 2;
  const HostPaths paths(grads, {}, num_paths, num_params);
  const std::vector<Chunk> chunks = chunks_of(grads, num_params);
  std::vector<double> partial(chunks.size() * pairs);
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) paths.multiply(chunks[c], &partial[c * pairs]);
  });
  Tensor out = torch::stable::new_zeros(grads[0], {num_segments, num_paths, num_paths}, ScalarType::Double);
  double* g = out.mutable_data_ptr<double>();
  for (size_t c = 0; c < chunks.size(); ++c) paths.add(&partial[c * pairs], g + segments[chunks[c].param] * num_paths * num_paths);
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
    double matrix[kMaxPaths * kMaxPaths], scratch[weigh_scratch(kMaxPaths)];
    const int64_t size = num_paths * num_paths;
    for (int64_t s = begin; s < end; ++s) {
      std::copy_n(source + s * size, size, matrix);
      weigh_paths(int(num_paths), {matrix, 1}, met, moves ? target + s * size : nullptr, options, {found + s * num_paths, 1}, {scratch, 1});
    }
  });
  return {weights, targets};
}

void combine_(const std::vector<Tensor>& out, const std::vector<Tensor>& others, const Tensor& weights, const std::vector<int64_t>& segments) {
  const int64_t num_paths = weights.size(1);
  const Tensor w = torch::stable::contiguous(weights);
  const HostPaths paths(out, others, num_paths, int64_t(out.size()));
  const std::vector<Chunk> chunks = chunks_of(out, paths.num_params);
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) paths.combine(chunks[c], w.const_data_ptr<double>() + segments[chunks[c].param] * num_paths);
  });
  paths.write_back(out);
}

// Each parameter on its own, so that its gradients are still in the cache when they are merged: small parameters side by side, one thread each,
// large ones one after the other, all threads on each. The sums are those of gram, bit for bit.
std::tuple<Tensor, Tensor> align_(const std::vector<Tensor>& out, const std::vector<Tensor>& others, const std::string& method,
                                  const std::optional<Tensor>& rho, const std::optional<Tensor>& order, double beta, bool always, double c) {
  const int64_t num_params = int64_t(out.size()), num_paths = 1 + int64_t(others.size()) / num_params;
  const int64_t pairs = num_paths * (num_paths + 1) / 2, size = num_paths * num_paths;
  const WeighOptions options = weigh_options(method, num_paths, beta, always, c);
  const bool moves = options.method == Weighing::kGradvac;
  const HostPaths paths(out, others, num_paths, num_params);
  const std::optional<Tensor> own_order = order ? std::optional(torch::stable::contiguous(*order)) : std::nullopt;
  const int64_t* met = own_order ? own_order->const_data_ptr<int64_t>() : nullptr;
  Tensor matrices = torch::stable::new_zeros(out[0], {num_params, num_paths, num_paths}, ScalarType::Double);
  Tensor targets = moves ? torch::stable::new_zeros(matrices, {num_params, num_paths, num_paths}) : torch::stable::new_empty(matrices, {0});
  if (moves && rho) torch::stable::copy_(targets, *rho);
  double *g = matrices.mutable_data_ptr<double>(), *target = targets.mutable_data_ptr<double>();

  const std::vector<Chunk> chunks = chunks_of(out, num_params);
  std::vector<int64_t> first(num_params + 1, 0);
  for (const Chunk& chunk : chunks) ++first[chunk.param + 1];
  for (int64_t n = 0; n < num_params; ++n) first[n + 1] += first[n];
  auto weigh_param = [&](int64_t n, double* weights) {
    double scratch[weigh_scratch(kMaxPaths)];
    weigh_paths(int(num_paths), {g + n * size, 1}, met, moves ? target + n * size : nullptr, options, {weights, 1}, {scratch, 1});
  };

  constexpr int64_t kSmall = 8;  // chunks: K = 2 paths of them are 1 MiB in float32
  std::vector<int64_t> small, large;
  for (int64_t n = 0; n < num_params; ++n) (first[n + 1] - first[n] <= kSmall ? small : large).push_back(n);
  torch::stable::parallel_for(0, int64_t(small.size()), 1, [&](int64_t begin, int64_t end) {
    double products[kMaxPaths * (kMaxPaths + 1) / 2], weights[kMaxPaths];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = small[i];
      for (int64_t at = first[n]; at < first[n + 1]; ++at) {
        paths.multiply(chunks[at], products);
        paths.add(products, g + n * size);
      }
      weigh_param(n, weights);
      // Backwards: what was read last is nearest.
      for (int64_t at = first[n + 1]; at-- > first[n];) paths.combine(chunks[at], weights);
    }
  });
  std::vector<double> partial;
  for (int64_t n : large) {
    const int64_t count = first[n + 1] - first[n];
    double weights[kMaxPaths];
    partial.resize(count * pairs);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) paths.multiply(chunks[first[n] + i], &partial[i * pairs]);
    });
    for (int64_t i = 0; i < count; ++i) paths.add(&partial[i * pairs], g + n * size);
    weigh_param(n, weights);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) paths.combine(chunks[first[n] + i], weights);
    });
  }
  paths.write_back(out);
  return {matrices, targets};
}

}  // namespace gradalign

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CPU, m) {
  m.impl("gram", TORCH_BOX(&gradalign::gram));
  m.impl("weigh", TORCH_BOX(&gradalign::weigh));
  m.impl("combine_", TORCH_BOX(&gradalign::combine_));
  m.impl("align_", TORCH_BOX(&gradalign::align_));
}
