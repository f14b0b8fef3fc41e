// What RawBoost's ops and their gradients share on CUDA, in this order: how a waveform is read; how a block filters a tile of it, directly (`fir`)
// and by overlap-save (`fft_filter`); blocks of samples, for elementwise kernels; what an op on [B, T] allocates; what a pass leaves in memory for
// the next one to add up; ISD's impulses.
#pragma once

#include "common.cuh"

#include "../bijection.h"
#include "fft.cuh"

namespace gradalign::cuda {

// A [B, T] tensor of any strides and floating dtype.
struct Wave {
  const void* data;
  int64_t row_stride, stride;
  ScalarType dtype;
};

inline Wave wave_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.scalar_type()}; }

// Call body(S{}) with S the type a waveform is stored in. The dtype is the same for a whole launch, so the branch costs less than a kernel per
// dtype costs to build.
template <typename Body>
__device__ void with_stored(const Wave& wave, Body&& body) {
  switch (wave.dtype) {
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: return body(float{});
  }
}

// Call put(n, s[n]) for every kThreads-th sample from start + thread on, below `end`, of row b: 0 outside [0, length). Several loads are on their
// way at a time, and none waits behind the branch on the dtype.
template <typename T, int kThreads, typename Put>
__device__ void own_samples(const Wave& wave, int64_t b, int length, int start, int end, Put&& put) {
  constexpr int kInFlight = sizeof(T) == 4 ? 8 : 4;
  with_stored(wave, [&](auto stored) {
    using S = decltype(stored);
    const S* const row = static_cast<const S*>(wave.data) + b * wave.row_stride;
    const int last = min(end, length);
    for (int from = start + int(threadIdx.x); from < end; from += kInFlight * kThreads) {
      T v[kInFlight];
      // The common case computes no address per sample.
      if (wave.stride == 1 && from >= 0 && from + (kInFlight - 1) * kThreads < last) {
        const S* const at = row + from;
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) v[r] = T(Wide<S>(at[r * kThreads]));
      } else {
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
          const int n = from + r * kThreads;
          v[r] = n >= 0 && n < last ? T(Wide<S>(row[n * wave.stride])) : T(0);
        }
      }
#pragma unroll
      for (int r = 0; r < kInFlight; ++r)
        if (from + r * kThreads < end) put(from + r * kThreads, v[r]);
    }
  });
}

// The utterances of a batch [B, T].
struct Rows {
  // Their own lengths [B]; null where all have T.
  const int64_t* lengths;
  int num_samples;
  __device__ int length(int64_t b) const { return lengths == nullptr ? num_samples : int(min(max(lengths[b], int64_t(0)), int64_t(num_samples))); }
};

// How a block of 128 threads filters: each thread keeps kOutputs neighbouring outputs in registers and slides a window of the signal past them.
// N is the number of branches: at 5 and 1 (float32) the taps lie in shared memory, at 0 any number of branches reads them through the cache.
template <typename T, int N>
struct Fir {
  static constexpr int kThreads = 128;
  // Per tap, 5 branches of 8 outputs cost 40 multiply-adds and 1.5 accesses to shared memory, one branch of 16 outputs 16 and 0.5.
  static constexpr int kOutputs = N == 1 ? 16 : sizeof(T) == 4 ? 8 : 4;
  static constexpr int kTile = kThreads * kOutputs;
  // Taps per step of the window.
  static constexpr int kStep = N == 0 ? 4 : 8;
  // Taps per pass over shared memory: the published filters, at most 491 taps, take one.
  static constexpr int kTaps = 512;
  // Shared memory has 32 banks of 4 bytes. Threads read 16 bytes each, kOutputs apart; 4 places of padding per 32 put them in different banks (of
  // float64, two in one).
  static constexpr int kWindow = (kTile + kTaps) / 32 * 36;
  __device__ static int place(int i) { return i + (i >> 5 << 2); }
};

// Four neighbours, read from shared memory in 16-byte accesses.
template <typename T>
struct alignas(16) Four {
  T v[4];
};

template <typename T, int N>
struct FirShared {
  alignas(16) T window[Fir<T, N>::kWindow];
  // Branches 1..4 of a tap are one 16-byte access, branch 5 of four taps another; one branch needs the latter alone.
  Four<T> low[N == 5 ? Fir<T, N>::kTaps : 1];
  alignas(16) T high[N == 0 ? 4 : Fir<T, N>::kTaps];
};

// z[r] = sum over branches i and taps k of b_i[k] * s[n + (P+1)/2 - k]^(i+1) for the outputs n = first + kOutputs * thread + r.
// `filters` [N_f, P] of this utterance; fill(start, count) puts samples start .. start + count - 1 of the signal, 0 outside the utterance, into
// shared.window. By Horner's rule a tap costs one multiply-add per branch and output, and no power is ever stored.
template <typename T, int N, typename Fill>
__device__ void fir(const T* filters, int num_filters, int num_taps, int first, FirShared<T, N>& shared, T (&z)[Fir<T, N>::kOutputs], Fill&& fill) {
  using F = Fir<T, N>;
  constexpr int kOutputs = F::kOutputs, kStep = F::kStep;
  // Zeros around short filters cost nothing: the first and the last tap, in the order j = P - 1 - k, that any branch uses.
  int lowest = num_taps, highest = -1;
  for (int i = 0; i < num_filters; ++i)
    for (int j = threadIdx.x; j < num_taps; j += F::kThreads)
      if (filters[i * num_taps + num_taps - 1 - j] != 0) lowest = min(lowest, j), highest = max(highest, j);
  lowest = -block_reduce<F::kThreads>(-lowest, Larger{});
  highest = block_reduce<F::kThreads>(highest, Larger{});

#pragma unroll
  for (int r = 0; r < kOutputs; ++r) z[r] = 0;
  for (int begin = lowest; begin <= highest; begin += F::kTaps) {
    const int count = divide_up(min(F::kTaps, highest + 1 - begin), kStep) * kStep;
    // The last pass has been read.
    __syncthreads();
    // Output n meets sample n + (P+1)/2 - k = n + j - (P-1) + (P+1)/2.
    fill(first + begin - (num_taps - 1) + (num_taps + 1) / 2, F::kTile + count);
    if constexpr (N > 0) {
      for (int j = threadIdx.x; j < count; j += F::kThreads) {
        const int k = num_taps - 1 - (begin + j);
        auto tap = [&](int i) { return k >= 0 && i < num_filters ? filters[i * num_taps + k] : T(0); };
        if constexpr (N == 5) {
          shared.low[j] = {tap(0), tap(1), tap(2), tap(3)};
          shared.high[j] = tap(4);
        } else {
          shared.high[j] = tap(0);
        }
      }
    }
    __syncthreads();

    // Samples j .. j + kOutputs + kStep - 1 of the thread's window.
    T w[kOutputs + kStep];
    const int base = threadIdx.x * kOutputs;
    auto load = [&](int at, int to) {
      const Four<T> four = *reinterpret_cast<const Four<T>*>(&shared.window[F::place(base + at)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[to + i] = four.v[i];
    };
#pragma unroll
    for (int i = 0; i < kOutputs; i += 4) load(i, i);
    for (int j = 0; j < count; j += kStep) {
#pragma unroll
      for (int i = 0; i < kStep; i += 4) load(j + kOutputs + i, kOutputs + i);
      if constexpr (N == 0) {
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
          const int k = num_taps - 1 - (begin + j + u);
          T h[kOutputs];
#pragma unroll
          for (int r = 0; r < kOutputs; ++r) h[r] = 0;
          for (int i = num_filters - 1; i >= 0; --i) {
            // The same address for all threads: one access.
            const T b = k >= 0 ? filters[i * num_taps + k] : T(0);
#pragma unroll
            for (int r = 0; r < kOutputs; ++r) h[r] = (h[r] + b) * w[r + u];
          }
#pragma unroll
          for (int r = 0; r < kOutputs; ++r) z[r] += h[r];
        }
      } else {
#pragma unroll
        for (int group = 0; group < kStep; group += 4) {
          const Four<T> high = *reinterpret_cast<const Four<T>*>(&shared.high[j + group]);
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            if constexpr (N == 5) {
              const Four<T> low = shared.low[j + group + u];
#pragma unroll
              for (int r = 0; r < kOutputs; ++r) {
                const T s = w[r + group + u];
                z[r] += s * (low.v[0] + s * (low.v[1] + s * (low.v[2] + s * (low.v[3] + s * high.v[u]))));
              }
            } else {
#pragma unroll
              for (int r = 0; r < kOutputs; ++r) z[r] += high.v[u] * w[r + group + u];
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) w[r] = w[r + kStep];
    }
  }
}

// Store the threads' outputs from `first` on, below `end`, to row [T] through shared memory: neighbouring threads then write neighbouring addresses.
template <typename T, int N, typename S>
__device__ void store_tile(const T (&z)[Fir<T, N>::kOutputs], FirShared<T, N>& shared, S* row, int first, int end) {
  using F = Fir<T, N>;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < F::kOutputs; r += 4)
    *reinterpret_cast<Four<T>*>(&shared.window[F::place(threadIdx.x * F::kOutputs + r)]) = {z[r], z[r + 1], z[r + 2], z[r + 3]};
  __syncthreads();
  for (int i = threadIdx.x; i < F::kTile && first + i < end; i += F::kThreads) row[first + i] = S(shared.window[F::place(i)]);
}

// Long float32 utterances are filtered by overlap-save: a block takes two neighbouring segments, one in the real and one in the imaginary part (the
// filters are real, so the two never mix), adds the branches as spectra and transforms back once. With five filters of 491 taps, a fourteenth of the
// direct form's floating-point instructions.
struct Segments {
  explicit __host__ __device__ Segments(int num_taps) : num_taps(num_taps), hop(Fft::kPoints - num_taps + 1) {}
  // `hop` outputs per segment, tile() per block.
  int num_taps, hop;
  __host__ __device__ int tile() const { return 2 * hop; }
  // Output of a block's segment 0 or 1 that point m holds; points below num_taps - 1 hold none.
  __device__ int output(int first, int segment, int m) const { return first + segment * hop + m - (num_taps - 1); }
};

// Bytes of shared memory: a block's samples and the transform's exchange.
constexpr int kFftBytes = int(sizeof(float2)) * (Fft::kPoints + Fft::kShared);

// Put the two segments of a block's signal into shared memory, where point m lies at the returned address + m.
// fill(start, count, put) calls put(n, s[n]) for the samples start .. start + count - 1 of the signal, 0 outside the utterance.
template <typename Fill>
__device__ float2* fft_segments(const Segments& segments, int first, float2* memory, Fill&& fill) {
  constexpr int kPoints = Fft::kPoints;
  float2* const samples = memory + Fft::kShared;
  // Output n meets samples n + (P+1)/2 - k; a segment begins with the one of k = P - 1.
  const int start = first + (segments.num_taps + 1) / 2 - (segments.num_taps - 1);
  fill(start, kPoints + segments.hop, [&](int n, float value) {
    const int m = n - start, later = m - segments.hop;
    if (unsigned(m) < kPoints) samples[m].x = value;
    if (unsigned(later) < kPoints) samples[later].y = value;
  });
  __syncthreads();
  return samples;
}

// z[r] = the block's outputs at point threadIdx.x + 256 * r, see Segments. `spectra` [N_f, 4096] of this utterance; for `fill` see fft_segments.
template <typename Fill>
__device__ void fft_filter(const float2* spectra, int num_filters, const Segments& segments, int first, float2* memory, float2 (&z)[Fft::kEach],
                           Fill&& fill) {
  constexpr int kPoints = Fft::kPoints;
  const float2* const samples = fft_segments(segments, first, memory, fill);
  const Fft fft;
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) z[r] = {0, 0};
  for (int i = 0; i < num_filters; ++i) {
    float2 v[Fft::kEach];
    // Powers of four points at a time: of all at once, the registers would not hold the samples.
#pragma unroll
    for (int group = 0; group < Fft::kEach; group += 4) {
      float2 s[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) v[group + r] = s[r] = samples[threadIdx.x + (group + r) * Fft::kThreads];
#pragma unroll 1
      for (int power = 0; power < i; ++power)
#pragma unroll
        for (int r = 0; r < 4; ++r) v[group + r] = {v[group + r].x * s[r].x, v[group + r].y * s[r].y};
    }
    fft.forward(v, memory);
#pragma unroll
    for (int r = 0; r < Fft::kEach; ++r) z[r] = plus(z[r], times(v[r], spectra[i * kPoints + r * Fft::kThreads + threadIdx.x]));
  }
  fft.inverse(z, memory);
}

// Elementwise kernels: samples per block, 8 per thread, which are all on their way at a time. A thread's samples of the block that begins at `first`
// are first + threadIdx.x + r * kThreads: neighbouring threads are on neighbouring samples.
constexpr int kThreads = 256;
constexpr int kBlock = 2048;
constexpr int kEach = kBlock / kThreads;

// A thread's samples of a block of row b, 0 from `length` on.
template <typename T>
__device__ void block_samples(const Wave& wave, int64_t b, int length, int first, T (&v)[kEach]) {
  with_stored(wave, [&](auto stored) {
    using S = decltype(stored);
    const int own = first + int(threadIdx.x);
    const S* const at = static_cast<const S*>(wave.data) + b * wave.row_stride + own * wave.stride;
    // The common case has nothing to ask or to compute per sample.
    if (wave.stride == 1 && first + kBlock <= length) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) v[r] = T(Wide<S>(at[r * kThreads]));
    } else {
#pragma unroll
      for (int r = 0; r < kEach; ++r) v[r] = own + r * kThreads < length ? T(Wide<S>(at[r * kThreads * wave.stride])) : T(0);
    }
  });
}

// Store a thread's samples of a block to `out` [B, T], 0 from `length` on.
template <typename S>
__device__ void store_block(S* out, int64_t b, int num_samples, int length, int first, const Wide<S> (&v)[kEach]) {
  const int own = first + int(threadIdx.x);
  S* const at = out + b * num_samples + own;
  if (first + kBlock <= length) {
#pragma unroll
    for (int r = 0; r < kEach; ++r) at[r * kThreads] = S(v[r]);
  } else {
#pragma unroll
    for (int r = 0; r < kEach; ++r)
      if (own + r * kThreads < num_samples) at[r * kThreads] = S(own + r * kThreads < length ? v[r] : Wide<S>(0));
  }
}

inline bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Float; }

// Return body(T{}) with T the type that x is computed in.
template <typename Body>
auto dispatch_wide(const Tensor& x, Body&& body) {
  if (x.scalar_type() == ScalarType::Double) return body(double{});
  return body(float{});
}

// What the ops on [B, T] share: the result like x, and the lengths.
struct Batch {
  Batch(const Tensor& x, const std::optional<Tensor>& lengths, const Tensor& out)
      : size(x.size(0)), num_samples(int(x.size(1))), num_blocks(divide_up(num_samples, kBlock)), out(out) {
    STD_TORCH_CHECK(x.size(1) < INT_MAX - (1 << 16), "an utterance may have fewer than 2^31 - 2^16 samples; found ", x.size(1));
    if (!lengths) return;
    check_same_device(*lengths, x, "`lengths`");
    own = torch::stable::contiguous(*lengths);
  }
  Rows rows() const { return {own ? own->const_data_ptr<int64_t>() : nullptr, num_samples}; }
  int64_t blocks() const { return size * num_blocks; }
  // Unfinished samples in the dtype of computation: the result itself where that is its dtype.
  Tensor scratch() const { return is_wide(out) ? out : new_samples(); }
  Tensor new_samples() const { return torch::stable::new_empty(out, {size, num_samples}, wide_dtype(out)); }

  int64_t size;
  int num_samples, num_blocks;
  Tensor out;
  std::optional<Tensor> own;
};

// Some of a batch's utterances: their rows of a tensor.
struct Part {
  int64_t first, size;
  Tensor operator()(Tensor tensor) const { return size == tensor.size(0) ? tensor : torch::stable::narrow(tensor, 0, first, size); }
  std::optional<Tensor> operator()(const std::optional<Tensor>& tensor) const {
    if (!tensor) return {};
    return (*this)(*tensor);
  }
};

// The result, like x [B, T], of run(part, its rows of the result). In half precision samples in the dtype of computation take two batches' worth of
// memory: so there half of the utterances take their turn at a time.
template <typename Run>
Tensor in_parts(const Tensor& x, Run&& run) {
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (x.numel() == 0) return out;
  const int64_t size = is_wide(x) ? x.size(0) : divide_up<int64_t>(x.size(0), 2);
  for (int64_t first = 0; first < x.size(0); first += size) {
    const Part part{first, std::min(size, x.size(0) - first)};
    run(part, part(out));
  }
  return out;
}

// Filters [B, F, P], or [B, P] of one filter each, in the dtype that x is computed in.
struct Bank {
  Bank(const Tensor& filters, const Tensor& x)
      : taps(contiguous_as(filters, wide_dtype(x))),
        per_utterance(filters.dim() == 3 ? int(filters.size(1)) : 1),
        num_taps(int(filters.size(filters.dim() - 1))) {
    check_same_device(filters, x, "`filters`");
  }
  template <typename T>
  const T* data() const {
    return taps.const_data_ptr<T>();
  }
  Tensor taps;
  int per_utterance, num_taps;
};

// --------------------------------------------------------------------------------------------------------------- what the forward computes

// Numbers that tiles of so many samples know about their utterance: of [B, tiles].
template <typename T>
struct Tiles {
  const T* of;
  int tile, count;
};

// One warp of the block combines what an utterance's tiles know, if there are any; `found`, in shared memory, holds the result after the next
// barrier. A block has a few such numbers to find: each by a warp of its own, at the same time, they cost less than a reduction over the block each.
template <typename T, typename Combine>
__device__ void combine_tiles(int warp, const Tiles<T>& tiles, int64_t b, int length, T start, Combine combine, T& found) {
  if (int(threadIdx.x) / kWarp != warp || tiles.of == nullptr) return;
  for (int i = threadIdx.x % kWarp; i < divide_up(length, tiles.tile); i += kWarp) start = combine(start, tiles.of[b * tiles.count + i]);
  start = warp_reduce(start, combine);
  if (threadIdx.x % kWarp == 0) found = start;
}

// What the tiles of z, the sum of filtered powers, know [B, tiles]: their sums, the largest z and the largest -z.
template <typename T>
struct PowerTiles {
  const double* sums;
  const T *above, *below;
  int tile, count;
};

// The mean of an utterance's z, and the largest magnitude of z - mean.
template <typename T>
struct Level {
  T mean, peak;
  __device__ T divisor() const { return peak > 1 ? peak : T(1); }
};

// What the level of an utterance is made of, in shared memory.
template <typename T>
struct Extent {
  double sum;
  T above, below;
  // By the first three warps; a barrier goes before `level`.
  __device__ void find(const PowerTiles<T>& tiles, int64_t b, int length) {
    combine_tiles(0, Tiles<double>{tiles.sums, tiles.tile, tiles.count}, b, length, 0.0, Add{}, sum);
    combine_tiles(1, Tiles<T>{tiles.above, tiles.tile, tiles.count}, b, length, T(-INFINITY), Larger{}, above);
    combine_tiles(2, Tiles<T>{tiles.below, tiles.tile, tiles.count}, b, length, T(-INFINITY), Larger{}, below);
  }
  __device__ Level<T> level(int length) const {
    const T mean = T(sum / max(length, 1));
    return {mean, Larger{}(above - mean, below + mean)};
  }
};

// What `filter_powers` leaves. Kernels write it as a `PowersOut` and read it as a `PowerTiles`.
struct Powers {
  // z [B, T], and of its tiles the sums [B, tiles] and extrema [2, B, tiles].
  Tensor z, sums, extrema;
  int tile, tiles;

  template <typename T>
  PowerTiles<T> parts() const {
    const T* above = extrema.const_data_ptr<T>();
    return {sums.const_data_ptr<double>(), above, above + extrema.numel() / 2, tile, tiles};
  }
};

// Spectra [B, count, 4096, 2] of each utterance's filters from `first` on, in the order of Fft, divided by the number of points.
Tensor spectra(const OnDevice& device, const Bank& bank, int first, int count);

// Whether num_filters filters filter x by overlap-save: where a segment loses at most a quarter of its points, and where memory allows. The spectra,
// 2 * 4096 numbers per filter and utterance, and the `beside` numbers per sample that lie beside the result may be two per sample in all.
inline bool filter_by_fft(const Tensor& x, int num_filters, int num_taps, int beside) {
  return x.scalar_type() != ScalarType::Double && num_taps <= Fft::kPoints / 4 && x.size(1) * (2 - beside) >= 2 * int64_t(num_filters) * Fft::kPoints;
}

// z [B, T] = sum over i of FIR_i(x**i) by the bank's first num_filters filters, in the dtype of computation.
Powers filter_powers(const OnDevice& device, const Tensor& x, const Bank& bank, int num_filters, const Batch& batch, const Tensor& z);

// Where SSI's random numbers come from: the seeds or, before them, what is given.
struct Noise {
  Noise(const Tensor& x, const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min,
        double snr_max)
      : snr_min(snr_min), snr_max(snr_max) {
    check_same_device(noise ? *noise : *seeds, x, noise ? "`noise`" : "`seeds`");
    if (noise) {
      check_same_device(*snr_db, x, "`snr_db`");
      levels = contiguous_as(*snr_db, ScalarType::Double);
      given = wave_of(*noise);
    } else {
      keys = torch::stable::contiguous(*seeds);
    }
  }
  const int64_t* seeds() const { return keys ? keys->const_data_ptr<int64_t>() : nullptr; }

  std::optional<Tensor> keys, levels;
  Wave given{};
  double snr_min, snr_max;
};

// 10**(-SNR/20), the signal-to-noise ratio given [B] or drawn from the seeds [B].
struct NoiseLevel {
  explicit NoiseLevel(const std::optional<Noise>& noise) {
    if (!noise) return;
    seeds = noise->seeds(), snr_db = noise->levels ? noise->levels->const_data_ptr<double>() : nullptr;
    snr_min = noise->snr_min, snr_max = noise->snr_max;
  }
  __device__ double operator()(int64_t b) const {
    return exp10(-(snr_db != nullptr ? snr_db[b] : uniform(philox(uint64_t(seeds[b]), kStreamSsiSnr, 0).w[0], snr_min, snr_max)) / 20);
  }
  const int64_t* seeds = nullptr;
  const double* snr_db = nullptr;
  double snr_min = 0, snr_max = 0;
};

// The filtered noise [B, T], and the sums of squares of x and of it in tiles of so many samples [2, B, tiles]. Kernels write it as a `NoiseOut`.
struct Colored {
  Tensor samples, squares;
  int tile, tiles;

  Tiles<double> signal() const { return {squares.const_data_ptr<double>(), tile, tiles}; }
  Tiles<double> noise() const { return {squares.const_data_ptr<double>() + squares.numel() / 2, tile, tiles}; }
};

// samples [B, T] = FIR(noise) by the bank's last filter, in the dtype of computation; x's squares are found where `signal` says so.
Colored color_noise(const OnDevice& device, const Tensor& x, const Bank& bank, const Batch& batch, const Noise& noise, const Tensor& samples,
                    bool signal);

// ------------------------------------------------------------------------------------------------------------------------------ impulses

// Where ISD's factor f comes from: given [B, T] or, where its data is null, drawn from seeds [B] at the positions that are marked, one bit per
// sample in rows of `words`; 0 where there are neither.
struct Impulses {
  Wave factor;
  const int64_t* seeds;
  const uint32_t* marks;
  int64_t words;
};

// Marks the positions that are drawn, so that the bijection is walked for the few that are chosen only, by their rank.
class Marked {
 public:
  Marked(const OnDevice& device, const Tensor& x, const Batch& batch, const std::optional<Tensor>& seeds, const std::optional<Tensor>& factor,
         double p);
  Impulses impulses() const {
    if (!marks_) return {given_, nullptr, nullptr, 0};
    return {Wave{}, keys_->const_data_ptr<int64_t>(), static_cast<const uint32_t*>(marks_->const_data_ptr()), marks_->size(1)};
  }

 private:
  Wave given_{};
  std::optional<Tensor> keys_, marks_;
};

// The factors of a block of samples, in shared memory.
struct Factors {
  int num_chosen;
  uint16_t chosen[kBlock];
  float f[kBlock];
};

// Draw the factors of the kBlock samples of utterance b from `first` on; no sample beyond it is marked.
inline __device__ void draw_factors(const Impulses& impulses, int64_t b, int first, Factors& shared) {
  if (threadIdx.x == 0) shared.num_chosen = 0;
#pragma unroll
  for (int r = 0; r < kEach; ++r) shared.f[threadIdx.x + r * kThreads] = 0;
  __syncthreads();
  const int64_t word = first / 32 + int(threadIdx.x);
  if (threadIdx.x < kBlock / 32 && word < impulses.words) {
    uint32_t marks = impulses.marks[b * impulses.words + word];
    // The order of the list varies from run to run, what is computed for each of its entries does not.
    int at = marks == 0 ? 0 : atomicAdd(&shared.num_chosen, __popc(marks));
    for (; marks != 0; marks &= marks - 1) shared.chosen[at++] = uint16_t(32 * threadIdx.x + __ffs(int(marks)) - 1);
  }
  __syncthreads();
  // A few samples in a hundred are chosen: gathered first, so that no warp draws for one lane alone.
  for (int i = threadIdx.x; i < shared.num_chosen; i += kThreads) {
    const Words words = philox(uint64_t(impulses.seeds[b]), kStreamIsdFactor, uint64_t(first + shared.chosen[i]));
    shared.f[shared.chosen[i]] = impulse_factor(words.w[0], words.w[1]);
  }
  __syncthreads();
}

// A thread's factors f of a block of samples.
template <typename T>
__device__ void block_factors(const Impulses& impulses, int64_t b, int length, int first, Factors& shared, T (&f)[kEach]) {
  if (impulses.marks != nullptr) draw_factors(impulses, b, first, shared);
  if (impulses.factor.data != nullptr) return block_samples(impulses.factor, b, length, first, f);
#pragma unroll
  for (int r = 0; r < kEach; ++r) f[r] = impulses.marks != nullptr ? T(shared.f[threadIdx.x + r * kThreads]) : T(0);
}

}  // namespace gradalign::cuda
