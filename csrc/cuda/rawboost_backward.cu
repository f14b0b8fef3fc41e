// Gradients of RawBoost's ops in the waveform on CUDA: lnl_backward, isd_backward, ssi_backward. Equivalent to the functions of these names in
// gradalign/reference.py. The forward's kernels compute again what they did not keep; then each op takes one pass for what a gradient depends on
// in its whole utterance (inner products, where the largest magnitude lies), and one that finishes the samples.
#include "rawboost.cuh"

namespace gradalign::cuda {

// Where the largest magnitude lies: the first position n of several, 2 n, and 1 more where the value is negative.
constexpr int64_t kNowhere = int64_t(1) << 62;

struct Smaller {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return b < a ? b : a; }
};

template <typename T>
__device__ int64_t place_of(T value, T peak, int n) {
  return T(fabs(value)) == peak ? 2 * int64_t(n) + (value < 0) : kNowhere;
}

// What the blocks of an utterance know about grad and v, the argument of cond_norm: dots = sum of grad * v, the peak's place.
struct Slopes {
  double dot;
  int64_t place;
};

// The gradient in cond_norm's result becomes the one in its argument: divided by the peak, less `correction` at the peak's place.
template <typename T>
struct NormBackward {
  __device__ NormBackward(const Slopes& slopes, T peak)
      : divisor(peak > 1 ? peak : T(1)),
        correction(peak > 1 ? (slopes.place % 2 ? -1 : 1) * slopes.dot / (double(peak) * double(peak)) : 0.0),
        at(peak > 1 && slopes.place < kNowhere ? int(slopes.place / 2) : -1) {}
  __device__ T operator()(T grad, int n) const { return grad / divisor - (n == at ? T(correction) : T(0)); }
  T divisor;
  double correction;
  int at;
};

// ----------------------------------------------------------------------------------------------------------------------------- lnl_backward

// One block per (utterance, block of samples), v = z - mean(z): the sums of grad * v and of grad, and the peak's place [B, blocks].
template <typename T>
__global__ __launch_bounds__(kThreads) void lnl_backward_sums_kernel(const T* z, Wave grad, const double* sums, const T* extrema, const int64_t* lengths,
                                                                     int64_t size, int num_samples, int num_tiles, int tile, int num_blocks,
                                                                     double* dots, double* grad_sums, int64_t* places) {
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  const auto [mean, peak] = level_of<T>(sums, extrema, size, b, num_tiles, tile, length);
  double dot = 0, sum = 0;
  int64_t place = kNowhere;
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + int(threadIdx.x);
    if (n >= length) continue;
    const T value = z[b * num_samples + n] - mean;
    const double slope = sample<double>(grad, b, n);
    dot += slope * double(value);
    sum += slope;
    place = Smaller{}(place, place_of(value, peak, n));
  }
  dot = block_reduce<kThreads>(dot, Add{});
  sum = block_reduce<kThreads>(sum, Add{});
  place = block_reduce<kThreads>(place, Smaller{});
  if (threadIdx.x == 0) {
    dots[blockIdx.x] = dot;
    grad_sums[blockIdx.x] = sum;
    places[blockIdx.x] = place;
  }
}

// The gradient in z, in the place of z; 0 beyond the utterance.
template <typename T>
__global__ __launch_bounds__(kThreads) void lnl_backward_center_kernel(Wave grad, const double* sums, const T* extrema, const int64_t* lengths,
                                                                       const double* dots, const double* grad_sums, const int64_t* places, int64_t size,
                                                                       int num_samples, int num_tiles, int tile, int num_blocks, T* z) {
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  const T peak = level_of<T>(sums, extrema, size, b, num_tiles, tile, length).peak;
  Slopes slopes{0, kNowhere};
  double total = 0;
  for (int i = threadIdx.x; i < num_blocks; i += kThreads) {
    slopes.dot += dots[b * num_blocks + i];
    total += grad_sums[b * num_blocks + i];
    slopes.place = Smaller{}(slopes.place, places[b * num_blocks + i]);
  }
  slopes.dot = block_reduce<kThreads>(slopes.dot, Add{});
  total = block_reduce<kThreads>(total, Add{});
  slopes.place = block_reduce<kThreads>(slopes.place, Smaller{});
  const NormBackward<T> through(slopes, peak);
  const T mean = T((total / double(through.divisor) - through.correction) / max(length, 1));
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + int(threadIdx.x);
    if (n < num_samples) z[b * num_samples + n] = n < length ? through(sample<T>(grad, b, n), n) - mean : T(0);
  }
}

// mirrored [rows, P] = filters [rows, P] from their last tap to their first.
template <typename T>
__global__ __launch_bounds__(kThreads) void lnl_backward_mirror_kernel(const T* filters, int num_taps, int64_t total, T* mirrored) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < total) mirrored[i / num_taps * num_taps + num_taps - 1 - i % num_taps] = filters[i];
}

// How much earlier than its output the mirrored filter's window lies: the adjoint of an advance is a delay.
__host__ __device__ inline int adjoint_shift(int num_taps) { return 2 * ((num_taps + 1) / 2) - (num_taps - 1); }

// One block per (utterance, tile): out = sum over i of (i + 1) * x**i * adjoint FIR_i(centered); mirrored [B, N_f, P].
template <typename S, int N>
__global__ __launch_bounds__(Fir<Wide<S>, N>::kThreads) void lnl_backward_kernel(Wave x, const Wide<S>* centered, const Wide<S>* mirrored,
                                                                                const int64_t* lengths, int num_samples, int num_filters, int num_taps,
                                                                                int num_tiles, S* out) {
  using T = Wide<S>;
  using F = Fir<T, N>;
  __shared__ FirShared<T, N> shared;
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * F::kTile, length = length_of(lengths, b, num_samples);
  T total[F::kOutputs], power[F::kOutputs];
#pragma unroll
  for (int r = 0; r < F::kOutputs; ++r) total[r] = 0, power[r] = 1;
  // Tiles beyond the utterance are zeros.
  for (int i = 0; i < num_filters && first < length; ++i) {
    T part[F::kOutputs];
    const T* taps = mirrored + (b * num_filters + i) * num_taps;
    fir<T, N>(taps, 1, num_taps, first - adjoint_shift(num_taps), shared, part, [&](int start, int count) {
      for (int j = threadIdx.x; j < count; j += F::kThreads) {
        const int n = start + j;
        shared.window[F::place(j)] = n >= 0 && n < length ? centered[b * num_samples + n] : T(0);
      }
    });
#pragma unroll
    for (int r = 0; r < F::kOutputs; ++r) {
      const int n = first + int(threadIdx.x) * F::kOutputs + r;
      total[r] += T(i + 1) * power[r] * part[r];
      power[r] *= n < length ? sample<T>(x, b, n) : T(0);
    }
  }
  // Through shared memory: neighbouring threads then write neighbouring addresses.
  __syncthreads();
#pragma unroll
  for (int r = 0; r < F::kOutputs; ++r) shared.window[F::place(threadIdx.x * F::kOutputs + r)] = total[r];
  __syncthreads();
  for (int i = threadIdx.x; i < F::kTile && first + i < num_samples; i += F::kThreads)
    out[b * num_samples + first + i] = first + i < length ? S(shared.window[F::place(i)]) : S(T(0));
}

// `lnl_backward_kernel` by overlap-save; spectra [B, N_f, 4096] of the mirrored filters. The gradient is transformed once, and each branch back.
__global__ __launch_bounds__(Fft::kThreads, 2) void lnl_backward_fft_kernel(Wave x, const float* centered, const float2* spectra, const int64_t* lengths,
                                                                            int num_samples, int num_filters, int num_taps, int num_tiles, float* out) {
  extern __shared__ float2 memory[];
  const Segments segments(num_taps);
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * segments.tile(), length = length_of(lengths, b, num_samples);
  if (first >= length) {
    for (int n = first + int(threadIdx.x); n < min(first + segments.tile(), num_samples); n += Fft::kThreads) out[b * num_samples + n] = 0;
    return;
  }
  const int shifted = first - adjoint_shift(num_taps);
  float2* const samples = fft_segments(segments, shifted, memory, [&](int start, int count, auto put) {
    for (int n = start + int(threadIdx.x); n < start + count; n += Fft::kThreads)
      put(n, n >= 0 && n < length ? centered[b * num_samples + n] : 0.0f);
  });
  const Fft fft;
  float2 v[Fft::kEach];
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) v[r] = samples[threadIdx.x + r * Fft::kThreads];
  fft.forward(v, memory);
  // A thread's bins wait where its samples were.
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) samples[threadIdx.x + r * Fft::kThreads] = v[r];
  const float* const wave = static_cast<const float*>(x.data) + b * x.row_stride;
  float* const result = out + b * num_samples;
  // From the highest power to the lowest, by Horner's rule. The sum lies in `out`, each place its own thread's: beside the transform, the registers
  // would not hold it.
  for (int i = num_filters - 1; i >= 0; --i) {
    // The last transform has been read.
    __syncthreads();
#pragma unroll
    for (int r = 0; r < Fft::kEach; ++r)
      v[r] = times(samples[threadIdx.x + r * Fft::kThreads], spectra[(b * num_filters + i) * Fft::kPoints + r * Fft::kThreads + threadIdx.x]);
    fft.inverse(v, memory);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < Fft::kEach; ++r) memory[threadIdx.x + r * Fft::kThreads] = v[r];
    for (int m = threadIdx.x; m < Fft::kPoints; m += Fft::kThreads) {
      const float2 pair = memory[m];
#pragma unroll
      for (int segment = 0; segment < 2; ++segment) {
        const int n = segments.output(first, segment, m);
        if (m < num_taps - 1 || n >= num_samples) continue;
        const float share = float(i + 1) * (segment == 0 ? pair.x : pair.y), above = i + 1 < num_filters ? result[n] : 0.0f;
        result[n] = n < length ? above * wave[n * x.stride] + share : 0.0f;
      }
    }
  }
}

Tensor lnl_backward(const Tensor& grad, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths) {
  const OnDevice device(x);
  const Batch batch(x, lengths);
  if (x.numel() == 0) return batch.out;
  check_same_device(grad, x, "`grad`");
  check_same_device(filters, x, "`filters`");
  const int num_filters = int(filters.size(1)), num_taps = int(filters.size(2));
  const Tensor bank = contiguous_as(filters, wide_dtype(x));
  Tensor z = torch::stable::new_empty(x, {batch.size, batch.num_samples}, wide_dtype(x));
  Tensor mirrored = torch::stable::new_empty(bank, {batch.size, num_filters, num_taps});
  Tensor totals = torch::stable::new_empty(x, {2, batch.size, batch.num_blocks}, ScalarType::Double);
  Tensor places = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Long);
  const Powers powers = filter_powers(device, x, bank, batch, z);
  double* dots = totals.mutable_data_ptr<double>();
  double* grad_sums = dots + batch.size * batch.num_blocks;
  dispatch_wide(x, [&](auto type) {
    using T = decltype(type);
    const int64_t blocks = batch.size * batch.num_blocks;
    T* center = static_cast<T*>(z.mutable_data_ptr());
    const double* sums = powers.sums.const_data_ptr<double>();
    const T* extrema = static_cast<const T*>(powers.extrema.const_data_ptr());
    device.launch(lnl_backward_sums_kernel<T>, blocks, kThreads, center, wave_of(grad), sums, extrema, batch.lengths, batch.size, batch.num_samples,
                  powers.tiles, powers.tile, batch.num_blocks, dots, grad_sums, places.mutable_data_ptr<int64_t>());
    device.launch(lnl_backward_center_kernel<T>, blocks, kThreads, wave_of(grad), sums, extrema, batch.lengths, dots, grad_sums,
                  places.const_data_ptr<int64_t>(), batch.size, batch.num_samples, powers.tiles, powers.tile, batch.num_blocks, center);
    device.launch(lnl_backward_mirror_kernel<T>, divide_up<int64_t>(bank.numel(), kThreads), kThreads, static_cast<const T*>(bank.const_data_ptr()),
                  num_taps, bank.numel(), static_cast<T*>(mirrored.mutable_data_ptr()));
  });
  if (filter_by_fft(x, num_filters, num_taps)) {
    const Tensor spectrum = spectra(device, mirrored, batch.size * num_filters, num_taps);
    const int tiles = divide_up(batch.num_samples, Segments(num_taps).tile());
    device.launch_with_memory(kFftBytes, lnl_backward_fft_kernel, batch.size * tiles, Fft::kThreads, wave_of(x),
                              static_cast<const float*>(z.const_data_ptr()), static_cast<const float2*>(spectrum.const_data_ptr()), batch.lengths,
                              batch.num_samples, num_filters, num_taps, tiles, static_cast<float*>(batch.out.mutable_data_ptr()));
    return batch.out;
  }
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    constexpr int N = std::is_same_v<T, float> ? 1 : 0;
    using F = Fir<T, N>;
    const int tiles = divide_up(batch.num_samples, F::kTile);
    device.launch(lnl_backward_kernel<S, N>, batch.size * tiles, F::kThreads, wave_of(x), static_cast<const T*>(z.const_data_ptr()),
                  static_cast<const T*>(mirrored.const_data_ptr()), batch.lengths, batch.num_samples, num_filters, num_taps, tiles,
                  static_cast<S*>(batch.out.mutable_data_ptr()));
  });
  return batch.out;
}

// ----------------------------------------------------------------------------------------------------------------------------- isd_backward

// One block per (utterance, block of samples): the gain 1 + g_sd * f; of v = x * gain the sum of grad * v, the peak and its place [B, blocks].
template <typename T>
__global__ __launch_bounds__(kThreads) void isd_backward_sums_kernel(Wave grad, Wave x, const int64_t* lengths, const int64_t* seeds, Wave factor,
                                                                     double p, T g_sd, int num_samples, int num_blocks, T* gains, double* dots,
                                                                     T* peaks, int64_t* places) {
  __shared__ Impulses impulses;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  const bool drawn = factor.data == nullptr;
  if (drawn && first < length) draw_impulses(impulses, uint64_t(seeds[b]), p, first, length);
  T peak = 0;
  double dot = 0;
  for (int i = threadIdx.x; i < kBlock && first + i < length; i += kThreads) {
    const int n = first + i;
    const T gain = 1 + g_sd * (drawn ? T(impulses.f[i]) : sample<T>(factor, b, n));
    gains[b * num_samples + n] = gain;
    const T value = sample<T>(x, b, n) * gain;
    dot += sample<double>(grad, b, n) * double(value);
    peak = Larger{}(peak, T(fabs(value)));
  }
  dot = block_reduce<kThreads>(dot, Add{});
  peak = block_reduce<kThreads>(peak, Larger{});
  int64_t place = kNowhere;
  for (int n = first + threadIdx.x; n < min(first + kBlock, length); n += kThreads)
    place = Smaller{}(place, place_of(sample<T>(x, b, n) * gains[b * num_samples + n], peak, n));
  place = block_reduce<kThreads>(place, Smaller{});
  if (threadIdx.x == 0) {
    dots[blockIdx.x] = dot;
    peaks[blockIdx.x] = peak;
    places[blockIdx.x] = place;
  }
}

// Through cond_norm and the gain. `gains` may be `out`.
template <typename S>
__global__ __launch_bounds__(kThreads) void isd_backward_kernel(Wave grad, const int64_t* lengths, const Wide<S>* gains, const double* dots,
                                                                const Wide<S>* peaks, const int64_t* places, int num_samples, int num_blocks, S* out) {
  using T = Wide<S>;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  T peak = 0;
  Slopes slopes{0, kNowhere};
  for (int i = threadIdx.x; i < num_blocks; i += kThreads) {
    peak = Larger{}(peak, peaks[b * num_blocks + i]);
    slopes.dot += dots[b * num_blocks + i];
  }
  peak = block_reduce<kThreads>(peak, Larger{});
  slopes.dot = block_reduce<kThreads>(slopes.dot, Add{});
  for (int i = threadIdx.x; i < num_blocks; i += kThreads)
    if (peaks[b * num_blocks + i] == peak) slopes.place = Smaller{}(slopes.place, places[b * num_blocks + i]);
  slopes.place = block_reduce<kThreads>(slopes.place, Smaller{});
  const NormBackward<T> through(slopes, peak);
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + int(threadIdx.x);
    if (n < num_samples) out[b * num_samples + n] = n < length ? S(through(sample<T>(grad, b, n), n) * gains[b * num_samples + n]) : S(T(0));
  }
}

Tensor isd_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
                    const std::optional<Tensor>& factor, double p, double g_sd) {
  const OnDevice device(x);
  const Batch batch(x, lengths);
  if (x.numel() == 0) return batch.out;
  check_same_device(grad, x, "`grad`");
  check_same_device(factor ? *factor : *seeds, x, factor ? "`factor`" : "`seeds`");
  std::optional<Tensor> keys;
  if (!factor) keys = torch::stable::contiguous(*seeds);
  Tensor dots = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Double);
  Tensor peaks = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, wide_dtype(x));
  Tensor places = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Long);
  const int64_t blocks = batch.size * batch.num_blocks;
  dispatch_wide(x, [&](auto type) {
    using T = decltype(type);
    device.launch(isd_backward_sums_kernel<T>, blocks, kThreads, wave_of(grad), wave_of(x), batch.lengths,
                  keys ? keys->const_data_ptr<int64_t>() : nullptr, factor ? wave_of(*factor) : Wave{}, p, T(g_sd), batch.num_samples,
                  batch.num_blocks, static_cast<T*>(batch.scratch.mutable_data_ptr()), dots.mutable_data_ptr<double>(),
                  static_cast<T*>(peaks.mutable_data_ptr()), places.mutable_data_ptr<int64_t>());
  });
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    device.launch(isd_backward_kernel<S>, blocks, kThreads, wave_of(grad), batch.lengths, static_cast<const T*>(batch.scratch.const_data_ptr()),
                  dots.const_data_ptr<double>(), static_cast<const T*>(peaks.const_data_ptr()), places.const_data_ptr<int64_t>(), batch.num_samples,
                  batch.num_blocks, static_cast<S*>(batch.out.mutable_data_ptr()));
  });
  return batch.out;
}

// ----------------------------------------------------------------------------------------------------------------------------- ssi_backward

// One block per (utterance, block of samples): the sum of grad * v [B, blocks].
template <typename T>
__global__ __launch_bounds__(kThreads) void ssi_backward_sums_kernel(Wave grad, const T* colored, const int64_t* lengths, int num_samples,
                                                                     int num_blocks, double* dots) {
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  double dot = 0;
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + int(threadIdx.x);
    if (n < length) dot += sample<double>(grad, b, n) * double(colored[b * num_samples + n]);
  }
  dot = block_reduce<kThreads>(dot, Add{});
  if (threadIdx.x == 0) dots[blockIdx.x] = dot;
}

// grad + x * (grad . v) / (|x| |v|) * 10**(-SNR/20); silence has no slope.
template <typename S>
__global__ __launch_bounds__(kThreads) void ssi_backward_kernel(Wave grad, Wave x, const double* dots, const double* squares, const int64_t* lengths,
                                                                const int64_t* seeds, const double* snr_db, double snr_min, double snr_max,
                                                                int64_t size, int num_samples, int num_tiles, int tile, int num_blocks, S* out) {
  using T = Wide<S>;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  const auto [signal, noise] = squares_of(squares, size, b, num_tiles, tile, length);
  double dot = 0;
  for (int i = threadIdx.x; i < num_blocks; i += kThreads) dot += dots[b * num_blocks + i];
  dot = block_reduce<kThreads>(dot, Add{});
  // Two roots, because the product of two small squares may vanish.
  const double slope = dot / (sqrt(signal) * sqrt(noise)) * noise_level(seeds, snr_db, b, snr_min, snr_max);
  const T toward_x = signal > 0 && noise > 0 ? T(slope) : T(0);
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + int(threadIdx.x);
    if (n < num_samples) out[b * num_samples + n] = n < length ? S(sample<T>(grad, b, n) + toward_x * sample<T>(x, b, n)) : S(T(0));
  }
}

Tensor ssi_backward(const Tensor& grad, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
                    const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min, double snr_max) {
  const OnDevice device(x);
  const Batch batch(x, lengths);
  if (x.numel() == 0) return batch.out;
  check_same_device(grad, x, "`grad`");
  check_same_device(filters, x, "`filters`");
  const Noise drawn(x, seeds, noise, snr_db);
  const Colored colored = color_noise(device, x, contiguous_as(filters, wide_dtype(x)), batch, drawn, batch.scratch);
  Tensor dots = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Double);
  const int64_t blocks = batch.size * batch.num_blocks;
  dispatch_wide(x, [&](auto type) {
    using T = decltype(type);
    device.launch(ssi_backward_sums_kernel<T>, blocks, kThreads, wave_of(grad), static_cast<const T*>(batch.scratch.const_data_ptr()), batch.lengths,
                  batch.num_samples, batch.num_blocks, dots.mutable_data_ptr<double>());
  });
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    device.launch(ssi_backward_kernel<S>, blocks, kThreads, wave_of(grad), wave_of(x), dots.const_data_ptr<double>(),
                  colored.squares.const_data_ptr<double>(), batch.lengths, drawn.seeds(), drawn.snr_db(), snr_min, snr_max, batch.size,
                  batch.num_samples, colored.tiles, colored.tile, batch.num_blocks, static_cast<S*>(batch.out.mutable_data_ptr()));
  });
  return batch.out;
}

}  // namespace gradalign::cuda

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CUDA, m) {
  m.impl("lnl_backward", TORCH_BOX(&gradalign::cuda::lnl_backward));
  m.impl("isd_backward", TORCH_BOX(&gradalign::cuda::isd_backward));
  m.impl("ssi_backward", TORCH_BOX(&gradalign::cuda::ssi_backward));
}
