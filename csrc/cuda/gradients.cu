// gram, weigh, combine_ and align_ on CUDA. Equivalent to the functions of these names in gradalign/reference.py.
// gram, combine_ and align_ are bound by memory: each gradient is read once, in 16-byte accesses where its address allows.
#include <algorithm>
#include <numeric>
#include <string>

#include "../layout.h"
#include "../weigh_options.h"
#include "tensor_list.cuh"

namespace gradalign::cuda {

constexpr int kThreads = 256;
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

// Independent loads in flight per thread: about 8 of 16 bytes hide the memory's latency at the occupancy that their registers leave.
template <int K>
constexpr int kInFlight = K == 2 ? 4 : K == 4 ? 2 : 1;

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

// The inner products of K paths' pieces -> partials[pair * stride]. A thread adds its share of the products in float32 (float64 for float64
// gradients); from there on everything is float64, added in a fixed order. Paths above num_paths repeat path 0, which the cache serves, and
// their sums are left out.
template <typename S, int K>
__device__ void multiply(const S* const (&data)[K], int count, bool is_aligned, int num_paths, double* partials, int64_t stride) {
  using T = Wide<S>;
  constexpr int kPairs = pairs_of(K), kWarps = kThreads / kWarp;
  __shared__ double of_warp[kPairs][kWarps];
  T sums[kPairs] = {};
  walk<S, K>(count, is_aligned, [&](int i, auto width, auto times) {
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
    partials[threadIdx.x * stride] = total;
  }
}

// One block per chunk -> partials [pairs, slots].
template <typename S, int K>
__global__ __launch_bounds__(kThreads) void gram_kernel(const __grid_constant__ TensorList<K> list, int num_paths, int64_t num_slots,
                                                        double* partials) {
  const Piece piece = piece_of(list, blockIdx.x);
  const S* data[K];
#pragma unroll
  for (int k = 0; k < K; ++k) data[k] = static_cast<const S*>(list.data[k][piece.tensor]) + piece.begin;
  multiply<S, K>(data, piece.count, aligned(list, piece.tensor, num_paths), num_paths, partials + piece.slot, num_slots);
}

// Segments per launch of gram_sum_kernel, whose bounds are a kernel argument.
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

// Segments per block: as many as their numbers leave shared memory for.
constexpr int weigh_threads(int num_paths) { return num_paths <= 2 ? 128 : 16; }

// Numbers per segment in shared memory: its Gram matrix, weights and scratch.
constexpr int weigh_numbers(int num_paths) { return num_paths * num_paths + num_paths + weigh_scratch(num_paths); }

// One thread per segment: gram [S, K, K] -> weights [S, K] and, for GradVac, targets [S, K, K] from rho (nullptr: zeros).
__global__ __launch_bounds__(128, 4) void weigh_kernel(const double* gram, const double* rho, const int64_t* order, int num_paths, int64_t num_segments,
                                                    const WeighOptions options, double* weights, double* targets) {
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

// Path 0's piece becomes the weighted sum of all paths' pieces; weights [num_paths] are read here, past the first-level cache.
template <typename S, int K>
__device__ void combine(S* const (&data)[K], int count, bool is_aligned, int num_paths, const double* weights) {
  using T = Wide<S>;
  T w[K];
#pragma unroll
  for (int k = 0; k < K; ++k) w[k] = k < num_paths ? T(__ldcg(weights + k)) : T(0);
  walk<S, K>(count, is_aligned, [&](int i, auto width, auto times) {
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

// One block per chunk: out = w[s, 0] * out + sum over k > 0 of w[s, k] * g_k in place; weights [S, num_paths]. Equivalent to
// `reference.combine_`.
template <typename S, int K>
__global__ __launch_bounds__(kThreads) void combine_kernel(const __grid_constant__ TensorList<K> list, int num_paths, const double* weights) {
  const Piece piece = piece_of(list, blockIdx.x);
  S* data[K];
#pragma unroll
  for (int k = 0; k < K; ++k) data[k] = static_cast<S*>(list.data[k][piece.tensor]) + piece.begin;
  combine<S, K>(data, piece.count, aligned(list, piece.tensor, num_paths), num_paths, weights + int64_t(list.segment[piece.tensor]) * num_paths);
}

// ----------------------------------------------------------------------------------------------------------------------------------- align_

// Elements per item, that is per block: few, so that what all running blocks hold is a part of the second-level cache.
constexpr int kAlignChunk = 4096;
// Blocks per multiprocessor at least: as many as the registers of merging and weighing allow.
template <typename S, int K>
constexpr int kAlignBlocks = K == 8 ? 1 : K == 4 || sizeof(S) == 2 ? 2 : 3;
// Items of other tensors between the last product of a tensor and its first merge, so that nobody waits for the sum.
constexpr int kAlignLag = 256;

// Tensors, and the order in which their items are drawn: runs of one tensor's chunks, first to be multiplied, later to be merged.
template <int K>
struct AlignList {
  static constexpr int kTensors = 4000 / (8 * K + 28);
  void* data[K][kTensors];
  int64_t size[kTensors];
  // The tensor's place among all parameters, and its first slot in this launch's partial sums.
  int param[kTensors], first_slot[kTensors];
  // Run r begins with item first_item[r]; run[r] is 2 * tensor, plus 1 for merging.
  int first_item[2 * kTensors];
  short run[2 * kTensors];
  int num_tensors = 0, num_runs = 0, num_items = 0, num_slots = 0;

  static int64_t chunks_of(int64_t elements) { return elements == 0 ? 1 : divide_up<int64_t>(elements, kAlignChunk); }

  int add(int64_t elements, int64_t of_param) {
    const int at = num_tensors++;
    size[at] = elements;
    param[at] = int(of_param);
    first_slot[at] = num_slots;
    num_slots += int(chunks_of(elements));
    return at;
  }

  void add_run(int tensor, int merging) {
    run[num_runs] = short(2 * tensor + merging);
    first_item[num_runs++] = num_items;
    num_items += int(chunks_of(size[tensor]));
  }

  // Lay out the items: each tensor is merged kAlignLag items after its last product.
  void schedule() {
    int ready_at[kTensors], merged = 0;
    for (int t = 0; t < num_tensors; ++t) {
      add_run(t, 0);
      ready_at[t] = num_items + kAlignLag;
      while (merged <= t && ready_at[merged] <= num_items) add_run(merged++, 1);
    }
    while (merged < num_tensors) add_run(merged++, 1);
  }
};

template <int K>
struct AlignBuffers {
  // Zero at the start: the next item, then per tensor how many of its chunks are multiplied, then per tensor whether its weights are there.
  int* counters;
  // Scratch [pairs, slots] and [params, num_paths]; results [params, num_paths, num_paths].
  double *partials, *weights, *gram, *targets;
  const int64_t* order;
};

// Each block draws an item, in order. Whoever has multiplied a tensor's last chunk adds up its sums, in a fixed order, and finds its weights;
// whoever is to merge a chunk waits for them. Nobody waits for an item that is not drawn yet: all of a tensor's products are drawn before any
// of its merges, by blocks that run and do not wait themselves. So it does not matter how many blocks run at once, nor in which order they
// start.
template <typename S, int K>
__global__ __launch_bounds__(kThreads, kAlignBlocks<S, K>) void align_kernel(const __grid_constant__ AlignList<K> list, int num_paths, const WeighOptions options,
                                                         const AlignBuffers<K> buffers) {
  __shared__ int drawn;
  __shared__ bool is_last;
  __shared__ double numbers[weigh_numbers(K)];
  int* const multiplied = buffers.counters + 1;
  int* const ready = multiplied + list.num_tensors;
  if (threadIdx.x == 0) drawn = atomicAdd(buffers.counters, 1);
  __syncthreads();
  const int item = drawn;
  int run = 0;
  for (int last = list.num_runs - 1; run < last;) {
    const int middle = (run + last + 1) / 2;
    if (list.first_item[middle] <= item)
      run = middle;
    else
      last = middle - 1;
  }
  const int tensor = list.run[run] / 2, param = list.param[tensor];
  const bool merging = list.run[run] % 2;
  const int num_chunks = list.size[tensor] == 0 ? 1 : int(divide_up<int64_t>(list.size[tensor], kAlignChunk));
  // Backwards when merging: what was read last is in the cache for certain.
  const int chunk = merging ? num_chunks - 1 - (item - list.first_item[run]) : item - list.first_item[run];
  const int64_t begin = int64_t(chunk) * kAlignChunk;
  const int count = int(min(int64_t(kAlignChunk), list.size[tensor] - begin));
  uintptr_t bits = 0;
  S* data[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    data[k] = static_cast<S*>(list.data[k][tensor]) + begin;
    if (k < num_paths) bits |= reinterpret_cast<uintptr_t>(data[k]);
  }
  if (merging) {
    if (threadIdx.x == 0) {
      while (*static_cast<volatile int*>(ready + tensor) == 0) __nanosleep(100);
      __threadfence();
    }
    __syncthreads();
    combine<S, K>(data, count, bits % 16 == 0, num_paths, buffers.weights + int64_t(param) * num_paths);
    return;
  }
  const S* sources[K];
#pragma unroll
  for (int k = 0; k < K; ++k) sources[k] = data[k];
  double* const partials = buffers.partials + list.first_slot[tensor];
  multiply<S, K>(sources, count, bits % 16 == 0, num_paths, partials + chunk, list.num_slots);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(multiplied + tensor, 1) == num_chunks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const Numbers matrix{numbers, 1}, found = matrix.from(num_paths * num_paths), scratch = found.from(num_paths);
  GRADALIGN_LOOP
  for (int j = 0; j < num_paths; ++j)
    GRADALIGN_LOOP
    for (int i = 0; i <= j; ++i) {
      double sum = 0;
      const double* const own = partials + int64_t(pair_of(i, j)) * list.num_slots;
      GRADALIGN_LOOP
      for (int slot = threadIdx.x; slot < num_chunks; slot += kThreads) sum += __ldcg(own + slot);
      sum = block_reduce<kThreads>(sum, Add{});
      if (threadIdx.x == 0) matrix[i * num_paths + j] = matrix[j * num_paths + i] = sum;
    }
  if (threadIdx.x > 0) return;
  const int size = num_paths * num_paths;
  double* const target = options.method == Weighing::kGradvac ? buffers.targets + int64_t(param) * size : nullptr;
  weigh_paths<(K > 2)>(num_paths, matrix, buffers.order, target, options, found, scratch);
  GRADALIGN_LOOP
  for (int i = 0; i < size; ++i) buffers.gram[int64_t(param) * size + i] = matrix[i];
  GRADALIGN_LOOP
  for (int k = 0; k < num_paths; ++k) buffers.weights[int64_t(param) * num_paths + k] = found[k];
  __threadfence();
  atomicExch(ready + tensor, 1);
}

// ---------------------------------------------------------------------------------------------------------------------------------- launchers

void check_paths_and_segments(const Tensor& first, int64_t num_paths, const std::vector<int64_t>& segments, int64_t num_segments) {
  STD_TORCH_CHECK(first.is_cuda(), "gradients must be on a CUDA device");
  STD_TORCH_CHECK(num_paths >= 1 && num_paths <= kMaxPaths, "the number of paths must be 1 to ", kMaxPaths, "; found ", num_paths);
  for (int64_t s : segments) STD_TORCH_CHECK(s >= 0 && s < num_segments, "segments must be in [0, ", num_segments, "); found ", s);
}

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

Tensor gram(const std::vector<Tensor>& grads, int64_t num_paths, const std::vector<int64_t>& segments, int64_t num_segments) {
  check_paths_and_segments(grads[0], num_paths, segments, num_segments);
  const OnDevice device(grads[0]);
  const int64_t num_params = int64_t(segments.size());
  Paths paths{grads, num_paths, num_params};
  paths.make_walkable();

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
  STD_TORCH_CHECK(num_slots <= INT_MAX, "gradients of at most 2^46 elements are taken");
  for (int64_t s = 0; s < num_segments; ++s) bounds[s + 1] = std::max(bounds[s], bounds[s + 1]);

  Tensor out = torch::stable::new_empty(grads[0], {num_segments, num_paths, num_paths}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(grads[0], {pairs_of(int(num_paths)), num_slots}, ScalarType::Double);
  double* partial = partials.mutable_data_ptr<double>();
  paths.for_each_dtype([&](auto type, auto built, ScalarType dtype) {
    using S = decltype(type);
    constexpr int K = decltype(built)::value;
    paths.for_each_list<K>(dtype, order, slots, segments, [&](const TensorList<K>& list) {
      device.launch(gram_kernel<S, K>, list.num_blocks, kThreads, list, int(num_paths), num_slots, partial);
    });
  });
  for (int64_t first = 0; first < num_segments; first += kSegments) {
    Bounds some{int(first), int(std::min<int64_t>(kSegments, num_segments - first)), {}};
    for (int s = 0; s <= some.count; ++s) some.bound[s] = int(bounds[first + s]);
    device.launch(gram_sum_kernel, int64_t(some.count) * pairs_of(int(num_paths)), kThreads, static_cast<const double*>(partial), some, int(num_paths),
                  num_slots, out.mutable_data_ptr<double>());
  }
  return out;
}

std::tuple<Tensor, Tensor> weigh(const Tensor& gram, const std::string& method, const std::optional<Tensor>& rho, const std::optional<Tensor>& order,
                                 double beta, bool always, double c) {
  STD_TORCH_CHECK(gram.is_cuda(), "`gram` must be on a CUDA device");
  const OnDevice device(gram);
  const int64_t num_segments = gram.size(0), num_paths = gram.size(1);
  const WeighOptions options = weigh_options(method, num_paths, beta, always, c);
  const bool moves = options.method == Weighing::kGradvac;
  const auto own = [&](const std::optional<Tensor>& tensor, const char* what) {
    if (!tensor) return std::optional<Tensor>();
    check_same_device(*tensor, gram, what);
    return std::optional(torch::stable::contiguous(*tensor));
  };
  const Tensor matrices = torch::stable::contiguous(gram);
  const std::optional<Tensor> old = own(rho, "`rho`"), met = own(order, "`order`");
  Tensor weights = torch::stable::new_empty(gram, {num_segments, num_paths});
  Tensor targets = moves ? torch::stable::new_empty(gram, {num_segments, num_paths, num_paths}) : torch::stable::new_empty(gram, {0});
  const int threads = weigh_threads(int(num_paths));
  device.launch_with_memory(int(threads * weigh_numbers(int(num_paths)) * sizeof(double)), weigh_kernel, divide_up<int64_t>(num_segments, threads), threads,
                            matrices.const_data_ptr<double>(), old ? old->const_data_ptr<double>() : nullptr,
                            met ? met->const_data_ptr<int64_t>() : nullptr, int(num_paths), num_segments, options, weights.mutable_data_ptr<double>(),
                            targets.mutable_data_ptr<double>());
  return {weights, targets};
}

void combine_(const std::vector<Tensor>& out, const std::vector<Tensor>& others, const Tensor& weights, const std::vector<int64_t>& segments) {
  const int64_t num_params = int64_t(segments.size()), num_paths = weights.size(1);
  if (num_params == 0) return;
  check_paths_and_segments(out[0], num_paths, segments, weights.size(0));
  check_same_device(weights, out[0], "`weights`");
  const OnDevice device(out[0]);
  Paths paths{out, num_paths, num_params};
  paths.tensors.insert(paths.tensors.end(), others.begin(), others.end());
  paths.make_walkable();
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

std::tuple<Tensor, Tensor> align_(const std::vector<Tensor>& out, const std::vector<Tensor>& others, const std::string& method,
                                  const std::optional<Tensor>& rho, const std::optional<Tensor>& order, double beta, bool always, double c) {
  const int64_t num_params = int64_t(out.size()), num_paths = 1 + int64_t(others.size()) / num_params;
  STD_TORCH_CHECK(out[0].is_cuda(), "gradients must be on a CUDA device");
  const WeighOptions options = weigh_options(method, num_paths, beta, always, c);
  const OnDevice device(out[0]);
  Paths paths{out, num_paths, num_params};
  paths.tensors.insert(paths.tensors.end(), others.begin(), others.end());
  paths.make_walkable();

  Tensor gram = torch::stable::new_empty(out[0], {num_params, num_paths, num_paths}, ScalarType::Double);
  Tensor weights = torch::stable::new_empty(gram, {num_params, num_paths});
  Tensor targets = torch::stable::new_empty(gram, {0});
  if (options.method == Weighing::kGradvac) {
    targets = rho ? torch::stable::clone(torch::stable::contiguous(*rho)) : torch::stable::new_zeros(gram, {num_params, num_paths, num_paths});
    check_same_device(targets, out[0], "`rho`");
  }
  std::optional<Tensor> met;
  if (order) {
    check_same_device(*order, out[0], "`order`");
    met = torch::stable::contiguous(*order);
  }
  paths.for_each_dtype([&](auto type, auto built, ScalarType dtype) {
    using S = decltype(type);
    constexpr int K = decltype(built)::value;
    using List = AlignList<K>;
    List list;
    auto flush = [&] {
      if (list.num_tensors == 0) return;
      list.schedule();
      Tensor counters = torch::stable::new_zeros(gram, {1 + 2 * list.num_tensors}, ScalarType::Int);
      Tensor partials = torch::stable::new_empty(gram, {pairs_of(int(num_paths)), list.num_slots});
      const AlignBuffers<K> buffers{counters.mutable_data_ptr<int>(),     partials.mutable_data_ptr<double>(),
                                    weights.mutable_data_ptr<double>(),   gram.mutable_data_ptr<double>(),
                                    targets.mutable_data_ptr<double>(),   met ? met->const_data_ptr<int64_t>() : nullptr};
      device.launch(align_kernel<S, K>, list.num_items, kThreads, list, int(num_paths), options, buffers);
      list = List();
    };
    for (int64_t n = 0; n < num_params; ++n) {
      const Tensor& first = paths.at(0, n);
      if (first.scalar_type() != dtype) continue;
      const int64_t chunks = List::chunks_of(first.numel());
      STD_TORCH_CHECK(chunks <= INT_MAX / 4, "a gradient of at most 2^41 elements is taken");
      // A launch takes fewer than 2^31 items, of which each chunk is two.
      if (list.num_tensors == List::kTensors || list.num_slots + chunks > INT_MAX / 4) flush();
      const int place = list.add(first.numel(), n);
      for (int64_t k = 0; k < K; ++k) list.data[k][place] = const_cast<void*>(paths.at(k < num_paths ? k : 0, n).const_data_ptr());
    }
    flush();
  });
  paths.write_back(out);
  return {gram, targets};
}

}  // namespace gradalign::cuda

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gradalign::cuda::gram));
  m.impl("weigh", TORCH_BOX(&gradalign::cuda::weigh));
  m.impl("combine_", TORCH_BOX(&gradalign::cuda::combine_));
  m.impl("align_", TORCH_BOX(&gradalign::cuda::align_));
}
