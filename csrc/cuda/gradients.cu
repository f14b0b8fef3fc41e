// gram, weigh and combine_ on CUDA. Equivalent to the functions of these names in gradalign/reference.py.
//
// gram and combine_ walk over the gradients of a whole model in few launches: one for each dtype and table of tensors (tensor_list.cuh), with a block
// for each chunk of a parameter, in all paths at once. Both are bound by memory: each gradient is read once, in 16-byte accesses where its address
// allows, several of them on their way in each thread. gram's blocks leave their sums in memory, and a second kernel adds those of a segment. Which
// thread adds what depends on sizes and alignment alone, and nothing is added by atomics: the same bits on every run.
//
// weigh has one thread per segment: a Gram matrix is a few dozen numbers, and its problem one chain of operations.
#include <algorithm>
#include <numeric>
#include <string>

#include "gradients.cuh"

namespace gradalign::cuda {

constexpr int kThreads = 256;

// Independent loads of each path in flight per thread: 8 of 16 bytes in all hide the memory's latency at the occupancy that their registers leave.
template <int K>
constexpr int kInFlight = 8 / K;

// Call body(i, vector width, how many vectors, `stride` apart) until the thread has seen its share of `count` elements. `aligned` says that
// 16-byte accesses are allowed.
template <typename S, int K, typename Body>
__device__ void walk(int count, bool aligned, Body&& body) {
  constexpr int kVector = 16 / sizeof(S);
  auto run = [&](auto width, int begin, int end) {
    constexpr int V = decltype(width)::value, kStride = kThreads * V, U = kInFlight<K>;
    int i = begin + int(threadIdx.x) * V;
    for (; i + (U - 1) * kStride + V <= end; i += U * kStride) body(i, width, std::integral_constant<int, U>{});
    for (; i + V <= end; i += kStride) body(i, width, std::integral_constant<int, 1>{});
  };
  const int whole = aligned ? count / kVector * kVector : 0;
  run(std::integral_constant<int, kVector>{}, 0, whole);
  run(std::integral_constant<int, 1>{}, whole, count);
}

// True when every path's gradient of a tensor allows 16-byte accesses; chunks begin at multiples of 16 bytes.
template <int K>
__device__ bool aligned(const TensorList<K>& list, int tensor, int num_paths) {
  uintptr_t bits = 0;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (k < num_paths) bits |= reinterpret_cast<uintptr_t>(list.data[k][tensor]);
  return bits % 16 == 0;
}

// ----------------------------------------------------------------------------------------------------------------------------------- gram

// One block per chunk: the inner products of its K paths' pieces -> partials [pairs, slots]. A thread adds its share of the products in float32
// (float64 for float64 gradients); from there on everything is float64. Paths above num_paths repeat path 0, which the cache serves, and their sums
// are left out.
template <typename S, int K>
__global__ __launch_bounds__(kThreads) void gram_kernel(const __grid_constant__ TensorList<K> list, int num_paths, int64_t num_slots,
                                                        double* partials) {
  using T = Wide<S>;
  constexpr int kPairs = pairs_of(K), kWarps = kThreads / kWarp;
  __shared__ double of_warp[kPairs][kWarps];
  const Piece piece = piece_of(list, blockIdx.x);
  const S* data[K];
#pragma unroll
  for (int k = 0; k < K; ++k) data[k] = static_cast<const S*>(list.data[k][piece.tensor]) + piece.begin;
  T sums[kPairs] = {};
  walk<S, K>(piece.count, aligned(list, piece.tensor, num_paths), [&](int i, auto width, auto times) {
    constexpr int V = decltype(width)::value, U = decltype(times)::value;
    Vector<S, V> g[U][K];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int k = 0; k < K; ++k) g[u][k] = *reinterpret_cast<const Vector<S, V>*>(data[k] + i + u * kThreads * V);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int b = 0; b < K; ++b)
#pragma unroll
          for (int a = 0; a <= b; ++a) sums[pair_of(a, b)] += T(g[u][a].v[v]) * T(g[u][b].v[v]);
  });
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const double sum = warp_reduce(double(sums[pair]), Add{});
    if (threadIdx.x % kWarp == 0) of_warp[pair][warp] = sum;
  }
  __syncthreads();
  if (int(threadIdx.x) < pairs_of(num_paths)) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warp[threadIdx.x][w];
    partials[threadIdx.x * num_slots + piece.slot] = total;
  }
}

// Segments per launch of gram_sum_kernel, whose bounds are a kernel argument: 4 KiB with the others.
constexpr int kSegments = 960;

struct Bounds {
  // Segment `first` + s has the slots bound[s] .. bound[s + 1] - 1.
  int first, count;
  int bound[kSegments + 1];
};

// One block per (segment, pair): partials [pairs, slots] -> gram [S, K, K], always in the same order.
__global__ __launch_bounds__(kThreads) void gram_sum_kernel(const double* partials, const __grid_constant__ Bounds bounds, int num_paths,
                                                            int64_t num_slots, double* gram) {
  const int s = blockIdx.x % bounds.count, pair = blockIdx.x / bounds.count;
  double sum = 0;
  for (int slot = bounds.bound[s] + int(threadIdx.x); slot < bounds.bound[s + 1]; slot += kThreads) sum += partials[pair * num_slots + slot];
  sum = block_reduce<kThreads>(sum, Add{});
  if (threadIdx.x > 0) return;
  int j = 0;
  while (pair_of(0, j + 1) <= pair) ++j;
  const int i = pair - pair_of(0, j);
  double* matrix = gram + int64_t(bounds.first + s) * num_paths * num_paths;
  matrix[i * num_paths + j] = sum;
  matrix[j * num_paths + i] = sum;
}

// ------------------------------------------------------------------------------------------------------------------------------------ weigh

// Segments per block. Their numbers lie in shared memory: 192 bytes each of two paths, up to 1920 of more.
constexpr int weigh_threads(int num_paths) { return num_paths <= 2 ? 128 : 16; }

// One thread per segment: gram [S, K, K] -> weights [S, K] and, for GradVac, targets [S, K, K] from rho (nullptr: zeros).
// Without the bound of 4 blocks ptxas settles for fewer registers and spills.
__global__ __launch_bounds__(128, 4) void weigh_kernel(const double* gram, const double* rho, const int64_t* order, int num_paths,
                                                       int64_t num_segments, const WeighOptions options, double* weights, double* targets) {
  extern __shared__ double numbers[];
  const int64_t s = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= num_segments) return;
  const int size = num_paths * num_paths;
  const Numbers matrix{numbers + threadIdx.x, int(blockDim.x)}, found = matrix.from(size), scratch = found.from(num_paths);
  const bool moves = options.method == Weighing::kGradvac;
  double* target = moves ? targets + s * size : nullptr;
  GRADALIGN_LOOP
  for (int i = 0; i < size; ++i) {
    matrix[i] = gram[s * size + i];
    if (moves) target[i] = rho ? rho[s * size + i] : 0.0;
  }
  weigh_paths(num_paths, matrix, order, target, options, found, scratch);
  GRADALIGN_LOOP
  for (int k = 0; k < num_paths; ++k) weights[s * num_paths + k] = found[k];
}

// --------------------------------------------------------------------------------------------------------------------------------- combine_

// One block per chunk: out = w[s, 0] * out + sum over k > 0 of w[s, k] * g_k in place; weights [S, num_paths].
template <typename S, int K>
__global__ __launch_bounds__(kThreads) void combine_kernel(const __grid_constant__ TensorList<K> list, int num_paths, const double* weights) {
  using T = Wide<S>;
  const Piece piece = piece_of(list, blockIdx.x);
  S* data[K];
  T w[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    data[k] = static_cast<S*>(list.data[k][piece.tensor]) + piece.begin;
    w[k] = k < num_paths ? T(weights[int64_t(list.segment[piece.tensor]) * num_paths + k]) : T(0);
  }
  walk<S, K>(piece.count, aligned(list, piece.tensor, num_paths), [&](int i, auto width, auto times) {
    constexpr int V = decltype(width)::value, U = decltype(times)::value;
    Vector<S, V> g[U][K];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k < num_paths) g[u][k] = *reinterpret_cast<const Vector<S, V>*>(data[k] + i + u * kThreads * V);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T total = w[0] * T(g[u][0].v[v]);
#pragma unroll
        for (int k = 1; k < K; ++k)
          if (k < num_paths) total += w[k] * T(g[u][k].v[v]);
        g[u][0].v[v] = S(total);
      }
      *reinterpret_cast<Vector<S, V>*>(data[0] + i + u * kThreads * V) = g[u][0];
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------------------- launchers

Tensor gram(const std::vector<Tensor>& grads, int64_t num_paths, const std::vector<int64_t>& segments, int64_t num_segments) {
  const OnDevice device(grads[0]);
  const int64_t num_params = int64_t(segments.size());
  const DevicePaths paths(grads, {}, num_paths, num_params);

  // Slots are counted in segment order, so that a segment's partial sums are neighbours.
  std::vector<int64_t> order(num_params), slots(num_params), bounds(num_segments + 1);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return segments[a] < segments[b]; });
  int64_t num_slots = 0;
  for (int64_t n : order) {
    slots[n] = num_slots;
    num_slots += divide_up<int64_t>(paths.at(0, n).numel(), kChunk);
    bounds[segments[n] + 1] = num_slots;
  }
  for (int64_t s = 0; s < num_segments; ++s) bounds[s + 1] = std::max(bounds[s], bounds[s + 1]);

  Tensor out = torch::stable::new_empty(grads[0], {num_segments, num_paths, num_paths}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(grads[0], {pairs_of(int(num_paths)), num_slots}, ScalarType::Double);
  paths.for_each_dtype([&](auto type, auto built, ScalarType dtype) {
    using S = decltype(type);
    constexpr int K = decltype(built)::value;
    paths.for_each_list<K>(dtype, order, slots, segments, [&](const TensorList<K>& list) {
      device.launch(gram_kernel<S, K>, list.num_blocks, kThreads, list, int(num_paths), num_slots, partials.mutable_data_ptr<double>());
    });
  });
  for (int64_t first = 0; first < num_segments; first += kSegments) {
    Bounds part{int(first), int(std::min<int64_t>(kSegments, num_segments - first)), {}};
    for (int s = 0; s <= part.count; ++s) part.bound[s] = int(bounds[first + s]);
    device.launch(gram_sum_kernel, int64_t(part.count) * pairs_of(int(num_paths)), kThreads, partials.const_data_ptr<double>(), part, int(num_paths),
                  num_slots, out.mutable_data_ptr<double>());
  }
  return out;
}

std::tuple<Tensor, Tensor> weigh(const Tensor& gram, const std::string& method, const std::optional<Tensor>& rho, const std::optional<Tensor>& order,
                                 double beta, bool always, double c) {
  const OnDevice device(gram);
  const int64_t num_segments = gram.size(0), num_paths = gram.size(1);
  const WeighOptions options = weigh_options(method, num_paths, beta, always, c);
  const bool moves = options.method == Weighing::kGradvac;
  const Tensor matrices = torch::stable::contiguous(gram);
  const std::optional<Tensor> old = contiguous_beside(gram, rho, "`rho`"), met = contiguous_beside(gram, order, "`order`");
  Tensor weights = torch::stable::new_empty(gram, {num_segments, num_paths});
  Tensor targets = moves ? torch::stable::new_empty(gram, {num_segments, num_paths, num_paths}) : torch::stable::new_empty(gram, {0});
  const int threads = weigh_threads(int(num_paths));
  device.launch_with_memory(int(threads * weigh_numbers(int(num_paths)) * sizeof(double)), weigh_kernel, divide_up<int64_t>(num_segments, threads),
                            threads, matrices.const_data_ptr<double>(), old ? old->const_data_ptr<double>() : nullptr,
                            met ? met->const_data_ptr<int64_t>() : nullptr, int(num_paths), num_segments, options, weights.mutable_data_ptr<double>(),
                            targets.mutable_data_ptr<double>());
  return {weights, targets};
}

void combine_(const std::vector<Tensor>& out, const std::vector<Tensor>& others, const Tensor& weights, const std::vector<int64_t>& segments) {
  const int64_t num_params = int64_t(segments.size()), num_paths = weights.size(1);
  const OnDevice device(out[0]);
  check_same_device(weights, out[0], "`weights`");
  const DevicePaths paths(out, others, num_paths, num_params);
  const Tensor w = torch::stable::contiguous(weights);
  std::vector<int64_t> order(num_params), slots(num_params);
  std::iota(order.begin(), order.end(), 0);
  paths.for_each_dtype([&](auto type, auto built, ScalarType dtype) {
    using S = decltype(type);
    constexpr int K = decltype(built)::value;
    paths.for_each_list<K>(dtype, order, slots, segments, [&](const TensorList<K>& list) {
      device.launch(combine_kernel<S, K>, list.num_blocks, kThreads, list, int(num_paths), w.const_data_ptr<double>());
    });
  });
  paths.write_back(out);
}

}  // namespace gradalign::cuda

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gradalign::cuda::gram));
  m.impl("weigh", TORCH_BOX(&gradalign::cuda::weigh));
  m.impl("combine_", TORCH_BOX(&gradalign::cuda::combine_));
}
