// What RawBoost's ops and their gradients share on CUDA: waveforms, the filters of a tile, and what an op on [B, T] allocates.
#pragma once

#include "common.cuh"

#include "../bijection.h"
#include "fft.cuh"

namespace gradalign::cuda {

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) { return torch::stable::contiguous(torch::stable::to(tensor, dtype)); }

// A [B, T] tensor of any strides and floating dtype.
struct Wave {
  const void* data;
  int64_t row_stride, stride;
  ScalarType dtype;
};

inline Wave wave_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.scalar_type()}; }

// Sample n of row b. The dtype is the same for a whole launch, so the branch costs less than a kernel per dtype costs to build.
template <typename T>
__device__ T sample(const Wave& wave, int64_t b, int n) {
  const int64_t at = b * wave.row_stride + n * wave.stride;
  switch (wave.dtype) {
    case ScalarType::Double: return T(static_cast<const double*>(wave.data)[at]);
    case ScalarType::Half: return T(float(static_cast<const Half*>(wave.data)[at]));
    case ScalarType::BFloat16: return T(float(static_cast<const BFloat16*>(wave.data)[at]));
    default: return T(static_cast<const float*>(wave.data)[at]);
  }
}

// An utterance's own length.
__device__ __forceinline__ int length_of(const int64_t* lengths, int64_t b, int num_samples) {
  return lengths == nullptr ? num_samples : int(min(max(lengths[b], int64_t(0)), int64_t(num_samples)));
}

// How a block of 128 threads filters: each thread keeps kOutputs neighbouring outputs in registers and slides a window of the signal past them.
// N is the number of branches: at 5 and 1 (float32) the taps lie in shared memory, at 0 any number of branches reads them through the cache.
template <typename T, int N>
struct Fir {
  static constexpr int kThreads = 128;
  // Per tap of 5 branches, 8 outputs cost 40 multiply-adds and about 2 shared-memory accesses; one branch needs 16 outputs to hide them.
  static constexpr int kOutputs = N == 1 ? 16 : sizeof(T) == 4 ? 8 : 4;
  static constexpr int kTile = kThreads * kOutputs;
  // Taps per step of the window.
  static constexpr int kStep = N == 0 ? 4 : 8;
  // Taps per pass over shared memory: the published filters, at most 491 taps, take one.
  static constexpr int kTaps = 512;
  // Shared memory has 32 banks of 4 bytes. Threads read 16 bytes each, kOutputs apart; 4 words of padding per 32 put them in different banks.
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

// Store the threads' outputs from `first` on to row [T] through shared memory: neighbouring threads then write neighbouring addresses.
template <typename T, int N>
__device__ void store_tile(const T (&z)[Fir<T, N>::kOutputs], FirShared<T, N>& shared, T* row, int first, int length) {
  using F = Fir<T, N>;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < F::kOutputs; r += 4)
    *reinterpret_cast<Four<T>*>(&shared.window[F::place(threadIdx.x * F::kOutputs + r)]) = {z[r], z[r + 1], z[r + 2], z[r + 3]};
  __syncthreads();
  for (int i = threadIdx.x; i < F::kTile && first + i < length; i += F::kThreads) row[first + i] = shared.window[F::place(i)];
}

// Long float32 utterances are filtered by overlap-save: a block takes two neighbouring segments, one in the real and one in the imaginary part (the
// filters are real, so the two never mix), adds the branches as spectra and transforms back once. At 491 taps, a fortieth of the direct form's
// multiply-adds.
struct Segments {
  explicit __host__ __device__ Segments(int num_taps) : num_taps(num_taps), hop(Fft::kPoints - num_taps + 1) {}
  // Outputs per segment, per block.
  int num_taps, hop;
  __host__ __device__ int tile() const { return 2 * hop; }
  // Output of a block's segment 0 or 1 that point m holds; points below num_taps - 1 hold none.
  __device__ int output(int first, int segment, int m) const { return first + segment * hop + m - (num_taps - 1); }
};

// Bytes of shared memory: a block's samples and the transform's exchange.
constexpr int kFftBytes = int(sizeof(float2)) * (Fft::kPoints + Fft::kShared);

// True when the spectra of num_filters filters take at most two of the utterance's own sizes.
inline bool filter_by_fft(const Tensor& x, int64_t num_filters, int64_t num_taps) {
  return x.scalar_type() == ScalarType::Float && num_taps <= Fft::kPoints / 4 && x.size(1) >= num_filters * Fft::kPoints;
}

// Put the two segments of a block's signal into shared memory, where point m lies at the returned address + m.
// fill(start, count, put) calls put(n, s[n]) for the samples start .. start + count - 1 of the signal, 0 outside the utterance.
template <typename Fill>
__device__ float2* fft_segments(const Segments& segments, int first, float2* memory, Fill&& fill) {
  constexpr int kPoints = Fft::kPoints;
  float2* const samples = memory + Fft::kShared;
  // Output n meets samples n + (P+1)/2 - k; a segment begins with the one of k = P - 1.
  const int start = first + (segments.num_taps + 1) / 2 - (segments.num_taps - 1);
  fill(start, kPoints + segments.hop, [&](int n, float value) {
    const int m = n - start;
    if (m >= 0 && m < kPoints) samples[m].x = value;
    if (m >= segments.hop && m < kPoints + segments.hop) samples[m - segments.hop].y = value;
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

// Elementwise kernels: samples per block, a few per thread, neighbouring threads on neighbouring samples.
constexpr int kThreads = 256;
constexpr int kBlock = 2048;

inline bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Float; }

inline ScalarType wide_dtype(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Call body(T{}) with T the type that x is computed in.
template <typename Body>
void dispatch_wide(const Tensor& x, Body&& body) {
  if (x.scalar_type() == ScalarType::Double) return body(double{});
  return body(float{});
}

// What the ops on [B, T] share: the result like x, unfinished samples in the dtype of computation (in the result itself where that is its
// dtype), and the lengths.
struct Batch {
  explicit Batch(const Tensor& x, const std::optional<Tensor>& lengths_)
      : size(x.size(0)), num_samples(int(x.size(1))), num_blocks(divide_up(num_samples, kBlock)), out(torch::stable::new_empty(x, {size, num_samples})),
        scratch(is_wide(x) || x.numel() == 0 ? out : torch::stable::new_empty(x, {size, num_samples}, ScalarType::Float)) {
    STD_TORCH_CHECK(x.size(1) < INT_MAX - (1 << 16), "an utterance may have fewer than 2^31 - 2^16 samples; found ", x.size(1));
    if (!lengths_) return;
    check_same_device(*lengths_, x, "`lengths`");
    own = torch::stable::contiguous(*lengths_);
    lengths = own->const_data_ptr<int64_t>();
  }
  int64_t size;
  int num_samples, num_blocks;
  Tensor out, scratch;
  std::optional<Tensor> own;
  const int64_t* lengths = nullptr;
};

// --------------------------------------------------------------------------------------------------------------- what the forward computes

// Spectra [rows, 4096, 2] of filters [rows, P] in the order of Fft, divided by the number of points.
Tensor spectra(const OnDevice& device, const Tensor& filters, int64_t rows, int num_taps);

// What tiles of so many samples know about z [B, T]: sums [B, tiles], extrema [2, B, tiles] (the largest, the smallest).
struct Powers {
  Tensor sums, extrema;
  int tile, tiles;
};

// z [B, T] = sum over i of FIR_i(x**i), in the dtype of computation; bank [B, N_f, P] in it too.
Powers filter_powers(const OnDevice& device, const Tensor& x, const Tensor& bank, const Batch& batch, const Tensor& z);

// The mean of an utterance's z, and the largest magnitude of z - mean.
template <typename T>
struct Level {
  T mean, peak;
};

template <typename T>
__device__ Level<T> level_of(const double* sums, const T* extrema, int64_t size, int64_t b, int num_tiles, int tile, int length) {
  double sum = 0;
  T high = -INFINITY, low = -INFINITY;
  for (int i = threadIdx.x; i < divide_up(length, tile); i += kThreads) {
    sum += sums[b * num_tiles + i];
    high = Larger{}(high, extrema[b * num_tiles + i]);
    low = Larger{}(low, -extrema[(size + b) * num_tiles + i]);
  }
  const T mean = T(block_reduce<kThreads>(sum, Add{}) / max(length, 1));
  return {mean, Larger{}(block_reduce<kThreads>(high, Larger{}) - mean, block_reduce<kThreads>(low, Larger{}) + mean)};
}

// The impulses of a block of samples: f [kBlock], drawn from the utterance's seed.
struct Impulses {
  Bijection pi;
  uint32_t wanted;
  int num_chosen;
  uint16_t chosen[kBlock];
  float f[kBlock];
};

inline __device__ void draw_impulses(Impulses& shared, uint64_t seed, double p, int first, int length) {
  const int own = min(kBlock, length - first);
  if (threadIdx.x == 0) {
    shared.pi = make_bijection(seed, uint32_t(length));
    shared.wanted = uint32_t(floor(double(length) * (uniform(philox(seed, kStreamIsdBeta, 0).w[0], 0.0, p) / 100)));
    shared.num_chosen = 0;
  }
  __syncthreads();
  const Bijection pi = shared.pi;
  const uint32_t wanted = shared.wanted;
  for (int i = threadIdx.x; i < own; i += kThreads) {
    shared.f[i] = 0;
    // The order of the list varies from run to run, what is computed for each of its entries does not.
    if (permute(pi, uint32_t(first + i)) < wanted) shared.chosen[atomicAdd(&shared.num_chosen, 1)] = uint16_t(i);
  }
  __syncthreads();
  // A few samples in a hundred are chosen: gathered first, so that no warp draws for one lane alone.
  for (int i = threadIdx.x; i < shared.num_chosen; i += kThreads) {
    const Words words = philox(seed, kStreamIsdFactor, uint64_t(first + shared.chosen[i]));
    shared.f[shared.chosen[i]] = impulse_factor(words.w[0], words.w[1]);
  }
  __syncthreads();
}

// Where an op's random numbers come from: the seeds or, before them, what is given.
struct Noise {
  Noise(const Tensor& x, const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db) {
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
  const double* snr_db() const { return levels ? levels->const_data_ptr<double>() : nullptr; }
  std::optional<Tensor> keys, levels;
  Wave given{};
};

// The sums of squares of x and of the filtered noise in tiles of so many samples: squares [2, B, tiles].
struct Colored {
  Tensor squares;
  int tile, tiles;
};

// colored [B, T] = FIR(noise), in the dtype of computation; bank [B, P] in it too.
Colored color_noise(const OnDevice& device, const Tensor& x, const Tensor& bank, const Batch& batch, const Noise& noise, const Tensor& colored);

// |x|**2 and |v|**2 of an utterance, from its tiles.
struct Squares {
  double signal, noise;
};

inline __device__ Squares squares_of(const double* squares, int64_t size, int64_t b, int num_tiles, int tile, int length) {
  double signal = 0, noise = 0;
  for (int i = threadIdx.x; i < divide_up(length, tile); i += kThreads) {
    signal += squares[b * num_tiles + i];
    noise += squares[(size + b) * num_tiles + i];
  }
  return {block_reduce<kThreads>(signal, Add{}), block_reduce<kThreads>(noise, Add{})};
}

// 10**(-SNR/20), the signal-to-noise ratio given or drawn from the seed.
inline __device__ double noise_level(const int64_t* seeds, const double* snr_db, int64_t b, double snr_min, double snr_max) {
  return exp10(-(snr_db != nullptr ? snr_db[b] : uniform(philox(uint64_t(seeds[b]), kStreamSsiSnr, 0).w[0], snr_min, snr_max)) / 20);
}

}  // namespace gradalign::cuda
