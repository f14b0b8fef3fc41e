// align_ on CUDA: each parameter merged with weights of its own. Equivalent to `reference.align_`.
//
// Nothing of a parameter can be merged before all of it is read, and gram, weigh and combine_ in turn read it twice: 5 values per parameter of two
// paths. Here it is read once, 3 values, and kept on the chip until its weights are there. One block per multiprocessor stays to the end. It takes
// every gridDim.x-th item, 12 to 15 KiB, of all there are, through a queue that each step moves by one item. With six places in shared memory, four
// of them for items on their way, and four in registers, step 12 is
//
//             on their way   in shared memory, multiplied   in registers   merged and written
//   before    11 10 9 8      7 6                            5 4 3 2        1 0
//   after     12 11 10 9     8 7                            6 5 4 3        2 1 0
//
// where 12 comes to the place that 6 has left.
//
// The queue has 23 places for two paths in float32 on an H100, 46 MB on all multiprocessors, where XLS-R's largest parameters have 34 MB. What does
// not fit is read a second time. What a thread has read it multiplies and merges itself, so that no place needs a barrier.
//
// A parameter's inner products are added up per block, and each block that sees that all have delivered theirs adds those up and finds the weights
// for itself, in the same order as all: nobody waits for another's weights. A warp of its own does so, while the others move data.
//
// Blocks wait for each other, so all must run: a cooperative launch. Nobody locks up: in every block all of a parameter's products come before its
// first merge (`Mover::kept`), so that they wait for the weights of parameters before it alone.
//
// No float is added by atomics: a thread adds its products item by item, a block those of its warps in their order, and each block those of all
// blocks in the same order as the others: the same bits on every device of as many multiprocessors.
#include <cuda_pipeline.h>

#include <algorithm>
#include <string>

#include "gradients.cuh"

namespace gradalign::cuda {

// A block has 1024 / K threads, which fill a multiprocessor's four parts evenly and leave a thread 128 registers of two paths, of more 255: a warp
// that finds weights, and these, which move data, 16 bytes of each path of an item.
template <int K>
constexpr int kMovers = 1024 / K - kWarp;
template <int K>
constexpr int kItemBytes = kMovers<K> * 16 * K;
template <typename S>
constexpr int kVector = 16 / sizeof(S);
template <typename S, int K>
constexpr int kItem = kMovers<K> * kVector<S>;
// Items on their way (cp.async) while an older one is multiplied.
constexpr int kAhead = 4;
// Places in shared memory at most; an H100 has room for 15 to 18.
constexpr int kMaxPlaces = 20;
// Places in registers, as many as leave enough of those to work with: kRows rows, which take the items in turn, of kRow places, on which an item
// moves by one when another one comes. So the loop over the items is unrolled by rows alone: by places its code would be kRow times as long.
template <int K>
constexpr int kRows = K == 8 ? 2 : 4;
template <typename S, int K>
constexpr int kRow = K == 8 || sizeof(S) == 8 ? 1 : 2;
template <typename S, int K>
constexpr int kRegisterPlaces = kRows<K> * kRow<S, K>;

// The tensors of a launch.
template <int K>
struct AlignList {
  // Kernel arguments may take 32,764 bytes (from CUDA 12.1 and sm_70 on).
  static constexpr int kTensors = 32000 / (8 * K + 21);
  void* data[K][kTensors];
  int64_t size[kTensors];
  // The tensor's place among all parameters, its first item (2^31 of 12 KiB would fit no memory), and its first slot in this launch's partial sums:
  // one per block that has items of it.
  int param[kTensors], first_item[kTensors + 1] = {}, first_slot[kTensors];
  // True when every path's gradient allows 16-byte accesses.
  bool aligned[kTensors];
  int num_tensors = 0, num_slots = 0;

  __host__ __device__ int num_items() const { return first_item[num_tensors]; }
  __device__ int items_of(int tensor) const { return first_item[tensor + 1] - first_item[tensor]; }
  // The block's place among those that have items of the tensor: item i is block i % gridDim.x's.
  __device__ int rank(int tensor) const {
    const int first = first_item[tensor] % int(gridDim.x), block = int(blockIdx.x);
    return block - first + (block < first ? int(gridDim.x) : 0);
  }
};

struct AlignBuffers {
  // Per tensor, zero at the start: how many blocks have delivered their sums.
  int* delivered;
  // Scratch [pairs, slots]; results [params, num_paths, num_paths].
  double *partials, *gram, *targets;
  // GradVac's targets before, nullptr: zeros.
  const double* rho;
  const int64_t* order;
};

// What a block's warps tell each other of its tensors, which are numbered as the block comes to them. What changes hands, and by which number:
//
//   sums       every mover warp's to the one that comes last                 come
//   room       for sums, from that one to all, kSums tensors later           emptied
//   partials   that one's, in every block, to every block's weighing warp    AlignBuffers::delivered
//   weights    the weighing warp's to every mover                            weighed
//
// Who gives is done with the memory, fences and raises the number; who takes sees the number, fences and goes to the memory. Where lane 0 does so for
// its warp, __syncwarp stands between it and the other lanes.
template <typename S, int K>
struct Board {
  static constexpr int kWarps = kMovers<K> / kWarp;
  // The sums of tensor n, in place n % kSums; how many warps have ever come there, and how often it was emptied.
  static constexpr int kSums = 4;
  double sums[kSums][pairs_of(K)][kWarps];
  int come[kSums];
  volatile int emptied[kSums];
  // The weights of tensor n in place n % kWeights, for n < weighed. Their room has no number of its own: when a tensor's partials are taken, all
  // warps have multiplied its last item, so that fewer tensors before it than there are places in the queue have anything left to be merged.
  static constexpr int kWeights = 32;
  static_assert(kWeights >= kMaxPlaces + kRegisterPlaces<S, K>);
  Wide<S> weights[kWeights][K];
  volatile int weighed;
  double numbers[weigh_numbers(K)], target[K * K];
  // The order in which more than two paths meet each other.
  int64_t order[K > 2 ? K * K : 1];
};

// The compiler leaves accesses to memory on their side of it. The toolkit's functions for asynchronous copies do not tell it that they access or wait
// for memory: they count on a barrier behind them.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

// A block's own items, in order. Of a tensor with more than `kept` the first ones come twice: to be multiplied, and, after the others, to be read
// again and merged. With 3 kept, a tensor's items 0 to 4 come as 0 1 2 3 4 1 0: the first five are multiplied, the last five merged.
template <int K>
class Walk {
 public:
  __device__ Walk(const AlignList<K>& list, int kept) : list_(list), kept_(kept * int(gridDim.x)) { enter(int(blockIdx.x)); }

  // Among all tensors, and among those of which the block has items.
  int tensor = 0, number = -1;

  __device__ bool ended() const { return tensor == list_.num_tensors; }

  __device__ void next() {
    if (again_) {
      item_ -= int(gridDim.x);
    } else if (!is_last()) {
      item_ += int(gridDim.x);
      return;
    } else {
      // Backwards: the cache has for certain what was read last.
      next_ = item_ + int(gridDim.x);
      again_ = true;
      item_ -= kept_;
    }
    if (item_ < list_.first_item[tensor]) next_tensor();
  }
  // Where only a tensor's first item is looked at.
  __device__ void next_tensor() {
    if (!again_) next_ = item_ + divide_up(list_.first_item[tensor + 1] - item_, int(gridDim.x)) * int(gridDim.x);
    enter(next_);
  }

  // Whether the item comes to be multiplied, as its tensor's last one, and to be merged.
  __device__ bool is_multiplied() const { return !again_; }
  __device__ bool is_last() const { return !again_ && item_ + int(gridDim.x) >= list_.first_item[tensor + 1]; }
  __device__ bool is_merged() const { return again_ || item_ + kept_ >= list_.first_item[tensor + 1]; }

  // This thread's first element, and how many from there to the tensor's end, as far as the thread has them.
  template <typename S>
  __device__ int64_t begin() const {
    return int64_t(item_ - list_.first_item[tensor]) * kItem<S, K> + int(threadIdx.x) * kVector<S>;
  }
  template <typename S>
  __device__ int left(int64_t begin) const {
    return int(min(list_.size[tensor] - begin, int64_t(kVector<S>)));
  }

 private:
  // Go to the tensor that has this item, which is not before this one.
  __device__ void enter(int item) {
    item_ = item;
    again_ = false;
    ++number;
    int last = list_.num_tensors;
    GRADALIGN_LOOP
    while (tensor < last) {
      const int middle = (tensor + last) / 2;
      if (list_.first_item[middle + 1] <= item)
        tensor = middle + 1;
      else
        last = middle;
    }
  }

  const AlignList<K>& list_;
  const int kept_;
  // The item, whether it comes the second time, and then the next tensor's first.
  int item_, next_;
  bool again_;
};

// What the threads that move data do.
template <typename S, int K>
class Mover {
 public:
  using T = Wide<S>;
  // A thread's 16 bytes of an item, of one path, and as they are held: four registers, whatever the dtype.
  using Part = Vector<S, kVector<S>>;
  using Registers = Vector<unsigned, 4>;

  __device__ Mover(const AlignList<K>& list, int num_paths, int num_places, const AlignBuffers& buffers, Board<S, K>& board, Part* places)
      : list_(list),
        num_paths_(num_paths),
        num_places_(num_places),
        buffers_(buffers),
        board_(board),
        places_(places + threadIdx.x),
        read_(list, kept()),
        multiplied_(list, kept()),
        merged_(list, kept()) {}

  // Each row takes a step of the queue: the oldest item of its registers is merged, the oldest one of shared memory comes there, the next one is on
  // its way to where that was, and the one that has arrived is multiplied.
  __device__ void run() {
    Registers held[kRows<K>][kRow<S, K>][K];
    int oldest = 0, arrived = num_places_ - kAhead;
    // Steps until there is a first one.
    int until_merge = num_places_ + kRegisterPlaces<S, K>, until_multiply = kAhead;
#pragma unroll 1
    while (!merged_.ended()) {
#pragma unroll
      for (auto& row : held) {
        if (until_merge > 0)
          --until_merge;
        else
          merge(row[kRow<S, K> - 1]);
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int i = kRow<S, K> - 1; i > 0; --i) row[i][k] = row[i - 1][k];
          row[0][k] = *reinterpret_cast<const Registers*>(at(oldest, k));
        }
        keep_order();
        read(oldest);
        if (until_multiply > 0)
          --until_multiply;
        else
          multiply(arrived);
        if (++oldest == num_places_) oldest = 0;
        if (++arrived == num_places_) arrived = 0;
      }
    }
  }

 private:
  // Items of one tensor that stay until they are merged: so many that the last one is multiplied, kAhead steps after it is read, one step before the
  // first one is merged, as many steps after it is read as the queue has places.
  __device__ int kept() const { return num_places_ + kRegisterPlaces<S, K> - kAhead; }
  // This thread's part of a place.
  __device__ Part* at(int place, int k) const { return places_ + (place * K + k) * kMovers<K>; }

  // Begin to read the next item into a place.
  __device__ void read(int place) {
    if (!read_.ended()) {
      const int64_t begin = read_.template begin<S>();
      const int left = read_.template left<S>(begin);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k >= num_paths_) break;
        const S* const from = static_cast<const S*>(list_.data[k][read_.tensor]) + begin;
        if (left == kVector<S> && list_.aligned[read_.tensor]) {
          __pipeline_memcpy_async(at(place, k), from, sizeof(Part));
        } else {
          // All are read before the first is written, so that their latencies overlap.
          Part part;
#pragma unroll
          for (int v = 0; v < kVector<S>; ++v) part.v[v] = v < left ? from[v] : S(0.0f);
          *at(place, k) = part;
        }
      }
      read_.next();
    }
    __pipeline_commit();
  }

  // Multiply what was read into the place kAhead steps ago.
  __device__ void multiply(int place) {
    if (multiplied_.ended()) return;
    __pipeline_wait_prior(kAhead);
    keep_order();
    if (multiplied_.is_multiplied()) {
      add_products(place);
      if (multiplied_.is_last()) deliver();
    }
    multiplied_.next();
  }

  __device__ void add_products(int place) {
    Part g[K];
    // What is added up for paths above num_paths is left out.
#pragma unroll
    for (int k = 0; k < K; ++k) g[k] = *at(place, k);
#pragma unroll
    for (int b = 0; b < K; ++b)
#pragma unroll
      for (int a = 0; a <= b; ++a) {
        T sum = 0;
#pragma unroll
        for (int v = 0; v < kVector<S>; ++v) sum += T(g[a].v[v]) * T(g[b].v[v]);
        sums_[pair_of(a, b)] += double(sum);
      }
  }

  // The tensor's sums over this block's items -> partials. Whichever warp comes last adds up all warps'.
  __device__ void deliver() {
    using Its = Board<S, K>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int place = multiplied_.number % Its::kSums, turn = multiplied_.number / Its::kSums;
    if (lane == 0) {
      while (board_.emptied[place] != turn) __nanosleep(20);
      // Room is taken: the sums that were here have been read.
      __threadfence_block();
    }
    // What the lanes have read of older weights comes before lane 0's next fence, and so before anyone takes partials: see kWeights.
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < pairs_of(K); ++pair) {
      const double sum = warp_reduce(sums_[pair], Add{});
      if (lane == 0) board_.sums[place][pair][warp] = sum;
      sums_[pair] = 0;
    }
    int before = 0;
    if (lane == 0) {
      // Sums are given.
      __threadfence_block();
      before = atomicAdd(board_.come + place, 1);
    }
    if (__shfl_sync(kAllLanes, before, 0) != (turn + 1) * Its::kWarps - 1) return;
    // Sums are taken, by lane 0 for all lanes.
    __threadfence_block();
    __syncwarp();
    GRADALIGN_LOOP
    for (int pair = lane; pair < pairs_of(num_paths_); pair += kWarp) {
      double total = 0;
      GRADALIGN_LOOP
      for (int w = 0; w < Its::kWarps; ++w) total += board_.sums[place][pair][w];
      buffers_.partials[int64_t(pair) * list_.num_slots + list_.first_slot[multiplied_.tensor] + list_.rank(multiplied_.tensor)] = total;
    }
    __syncwarp();
    if (lane != 0) return;
    // Room and partials are given, by lane 0 for all lanes. The latter to other blocks: a fence of the device.
    __threadfence();
    board_.emptied[place] = turn + 1;
    atomicAdd(buffers_.delivered + multiplied_.tensor, 1);
  }

  // Path 0's elements become the weighted sum of all paths', as soon as the tensor's weights are there.
  __device__ void merge(const Registers (&held)[K]) {
    if (merged_.ended()) return;
    if (merged_.is_merged()) {
      if (merged_.number >= weighed_) {
        while ((weighed_ = board_.weighed) <= merged_.number) __nanosleep(20);
        // Weights are taken, those of all tensors below weighed_.
        __threadfence_block();
      }
      write_merged(held, board_.weights[merged_.number % Board<S, K>::kWeights]);
    }
    merged_.next();
  }

  __device__ void write_merged(const Registers (&held)[K], const T* weights) {
    T total[kVector<S>];
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) total[v] = weights[0] * element(held[0], v);
#pragma unroll
    for (int k = 1; k < K; ++k) {
      if (k >= num_paths_) break;
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v) total[v] += weights[k] * element(held[k], v);
    }
    const int64_t begin = merged_.template begin<S>();
    const int left = merged_.template left<S>(begin);
    S* const to = static_cast<S*>(list_.data[0][merged_.tensor]) + begin;
    if (left == kVector<S> && list_.aligned[merged_.tensor]) {
      Part part;
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v) part.v[v] = S(total[v]);
      *reinterpret_cast<Part*>(to) = part;
    } else {
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v)
        if (v < left) to[v] = S(total[v]);
    }
  }

  __device__ static T element(const Registers& registers, int v) {
    S value;
    if constexpr (sizeof(S) == 2) {
      const auto bits = uint16_t(registers.v[v / 2] >> 16 * (v % 2));
      memcpy(&value, &bits, sizeof value);
    } else {
      memcpy(&value, registers.v + v * sizeof(S) / 4, sizeof value);
    }
    return T(value);
  }

  const AlignList<K>& list_;
  const int num_paths_, num_places_;
  const AlignBuffers& buffers_;
  Board<S, K>& board_;
  Part* const places_;
  // Which item is read, multiplied and merged next; tensors known to have weights; the thread's sums over the items of `multiplied_`'s tensor.
  Walk<K> read_, multiplied_, merged_;
  int weighed_ = 0;
  double sums_[pairs_of(K)] = {};
};

// What the blocks have delivered of a tensor, added up by a warp: its Gram matrix, which lane 0 writes.
template <int K>
__device__ void add_partials(const AlignList<K>& list, int num_paths, const AlignBuffers& buffers, int tensor, int blocks, const Numbers& matrix) {
  // Slots per lane that are read at once: of two paths those of 160 blocks, more than an H100 has.
  constexpr int kAtOnce = K == 2 ? 5 : K == 4 ? 2 : 1;
  const int lane = threadIdx.x % kWarp;
  double sums[pairs_of(K)] = {};
  for (int first = lane; first < blocks; first += kAtOnce * kWarp) {
    // All are read before the first is added, so that their latencies overlap.
    double read[kAtOnce][pairs_of(K)];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int pair = 0; pair < pairs_of(K); ++pair) {
        read[i][pair] = 0;
        if (first + i * kWarp < blocks && pair < pairs_of(num_paths))
          read[i][pair] = __ldcg(buffers.partials + int64_t(pair) * list.num_slots + list.first_slot[tensor] + first + i * kWarp);
      }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int pair = 0; pair < pairs_of(K); ++pair) sums[pair] += read[i][pair];
  }
#pragma unroll
  for (int j = 0; j < K; ++j)
#pragma unroll
    for (int i = 0; i <= j; ++i) {
      const double sum = warp_reduce(sums[pair_of(i, j)], Add{});
      if (lane == 0 && j < num_paths) matrix[i * num_paths + j] = matrix[j * num_paths + i] = sum;
    }
}

// What the weighing warp, the last one, does: the weights of the block's tensors, one after the other.
template <typename S, int K>
__device__ void find_weights(const AlignList<K>& list, int num_paths, const WeighOptions& options, const AlignBuffers& buffers, Board<S, K>& board) {
  const int lane = threadIdx.x % kWarp, size = num_paths * num_paths;
  const bool moves = options.method == Weighing::kGradvac;
  const bool meets = K > 2 && buffers.order != nullptr;
  for (int i = lane; meets && i < size; i += kWarp) board.order[i] = buffers.order[i];
  const Numbers matrix{board.numbers, 1}, found = matrix.from(size), scratch = found.from(num_paths);
  for (Walk<K> walk(list, 0); !walk.ended(); walk.next_tensor()) {
    const int tensor = walk.tensor, blocks = min(list.items_of(tensor), int(gridDim.x));
    if (lane == 0) {
      while (*static_cast<volatile int*>(buffers.delivered + tensor) != blocks) __nanosleep(20);
      // Partials are taken, and with them room for weights.
      __threadfence();
    }
    __syncwarp();
    const int64_t place = int64_t(list.param[tensor]) * size;
    for (int i = lane; moves && i < size; i += kWarp) board.target[i] = buffers.rho ? buffers.rho[place + i] : 0.0;
    add_partials(list, num_paths, buffers, tensor, blocks, matrix);
    __syncwarp();
    if (lane != 0) continue;
    weigh_paths<(K > 2)>(num_paths, matrix, meets ? board.order : nullptr, moves ? board.target : nullptr, options, found, scratch);
    GRADALIGN_LOOP
    for (int k = 0; k < num_paths; ++k) board.weights[walk.number % Board<S, K>::kWeights][k] = Wide<S>(found[k]);
    // Weights are given.
    __threadfence_block();
    board.weighed = walk.number + 1;
    if (list.rank(tensor) > 0) continue;
    GRADALIGN_LOOP
    for (int i = 0; i < size; ++i) {
      buffers.gram[place + i] = matrix[i];
      if (moves) buffers.targets[place + i] = board.target[i];
    }
  }
}

template <typename S, int K>
__global__ __launch_bounds__(kMovers<K> + kWarp, 1) void align_kernel(const __grid_constant__ AlignList<K> list, int num_paths, int num_places,
                                                                      const __grid_constant__ WeighOptions options,
                                                                      const __grid_constant__ AlignBuffers buffers) {
  extern __shared__ double2 memory[];
  __shared__ Board<S, K> board;
  if (threadIdx.x < Board<S, K>::kSums) {
    board.emptied[threadIdx.x] = 0;
    board.come[threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) board.weighed = 0;
  __syncthreads();
  if (threadIdx.x < kMovers<K>)
    Mover<S, K>(list, num_paths, num_places, buffers, board, reinterpret_cast<Vector<S, kVector<S>>*>(memory)).run();
  else
    find_weights<S, K>(list, num_paths, options, buffers, board);
}

std::tuple<Tensor, Tensor> align_(const std::vector<Tensor>& out, const std::vector<Tensor>& others, const std::string& method,
                                  const std::optional<Tensor>& rho, const std::optional<Tensor>& order, double beta, bool always, double c) {
  const int64_t num_params = int64_t(out.size()), num_paths = 1 + int64_t(others.size()) / num_params;
  const WeighOptions options = weigh_options(method, num_paths, beta, always, c);
  const OnDevice device(out[0]);
  const DevicePaths paths(out, others, num_paths, num_params);

  const bool moves = options.method == Weighing::kGradvac;
  const std::optional<Tensor> old = contiguous_beside(out[0], rho, "`rho`"), met = contiguous_beside(out[0], order, "`order`");
  Tensor gram = torch::stable::new_empty(out[0], {num_params, num_paths, num_paths}, ScalarType::Double);
  Tensor targets = moves ? torch::stable::new_empty(gram, {num_params, num_paths, num_paths}) : torch::stable::new_empty(gram, {0});
  const int multiprocessors = device.attribute(cudaDevAttrMultiProcessorCount);
  const int most_bytes = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  paths.for_each_dtype([&](auto type, auto built, ScalarType dtype) {
    using S = decltype(type);
    constexpr int K = decltype(built)::value;
    using List = AlignList<K>;
    constexpr int kBytes = kItemBytes<K>, kElements = kItem<S, K>, kThreads = kMovers<K> + kWarp, kBoard = int(sizeof(Board<S, K>));
    const int num_places = std::min(kMaxPlaces, (most_bytes - kBoard) / kBytes);
    STD_TORCH_CHECK(num_places > kAhead, "align_ needs ", (kAhead + 1) * kBytes + kBoard, " bytes of shared memory per block; found ", most_bytes);
    List list;
    auto flush = [&] {
      const int64_t num_tensors = list.num_tensors;
      if (num_tensors == 0) return;
      Tensor delivered = torch::stable::new_zeros(gram, {num_tensors}, ScalarType::Int);
      Tensor partials = torch::stable::new_empty(gram, {pairs_of(int(num_paths)), list.num_slots});
      const AlignBuffers buffers{delivered.mutable_data_ptr<int>(),
                                 partials.mutable_data_ptr<double>(),
                                 gram.mutable_data_ptr<double>(),
                                 targets.mutable_data_ptr<double>(),
                                 moves && old ? old->const_data_ptr<double>() : nullptr,
                                 met ? met->const_data_ptr<int64_t>() : nullptr};
      device.launch_together(num_places * kBytes, align_kernel<S, K>, std::min(multiprocessors, list.num_items()), kThreads, list, int(num_paths),
                             num_places, options, buffers);
      list = List();
    };
    for (int64_t n = 0; n < num_params; ++n) {
      const Tensor& first = paths.at(0, n);
      if (first.scalar_type() != dtype) continue;
      // An empty parameter has an item too, and with it its weights.
      const int64_t size = first.numel(), items = std::max<int64_t>(1, divide_up<int64_t>(size, kElements));
      if (list.num_tensors == List::kTensors) flush();
      const int at = list.num_tensors++;
      list.size[at] = size;
      list.param[at] = int(n);
      list.first_item[at + 1] = list.first_item[at] + int(items);
      list.first_slot[at] = list.num_slots;
      list.num_slots += int(std::min<int64_t>(items, multiprocessors));
      uintptr_t bits = 0;
      for (int64_t k = 0; k < num_paths; ++k) {
        list.data[k][at] = const_cast<void*>(paths.at(k, n).const_data_ptr());
        bits |= reinterpret_cast<uintptr_t>(list.data[k][at]);
      }
      list.aligned[at] = bits % 16 == 0;
    }
    flush();
  });
  paths.write_back(out);
  return {gram, targets};
}

}  // namespace gradalign::cuda

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CUDA, m) { m.impl("align_", TORCH_BOX(&gradalign::cuda::align_)); }
