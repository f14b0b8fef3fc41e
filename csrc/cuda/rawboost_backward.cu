// Gradients of RawBoost's ops in the waveform on CUDA: lnl_backward, isd_backward, ssi_backward. Equivalent to the functions of these names in
// gradalign/reference.py. The forward's kernels compute again what they did not keep; then each op takes one pass for what a gradient depends on
// in its whole utterance (inner products, where the largest magnitude lies), and one that finishes the samples.
#include "rawboost.cuh"

namespace gradalign::cuda {

// A place is 2 n for position n, and 1 more where the value there is negative: the smallest of several is the first. This one is behind all.
constexpr int64_t kNowhere = int64_t(1) << 62;

struct Smaller {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return b < a ? b : a; }
};

// The place of a value at position n, where its magnitude is the peak.
template <typename T>
__device__ int64_t place_of(T value, T peak, int n) {
  return T(fabs(value)) == peak ? 2 * int64_t(n) + (value < 0) : kNowhere;
}

// What the blocks of an utterance know about grad and v, the argument of cond_norm: the sum of grad * v, the peak's place.
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
__global__ __launch_bounds__(kThreads) void lnl_backward_sums_kernel(const T* z, Wave grad, PowerTiles<T> powers, Rows rows, int num_blocks,
                                                                     double* dots, double* grad_sums, int64_t* places) {
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
  __shared__ Extent<T> extent;
  double slope[kEach];
  block_samples(grad, b, length, first, slope);
  extent.find(powers, b, length);
  __syncthreads();
  const auto [mean, peak] = extent.level(length);
  double dot = 0, sum = 0;
  int64_t place = kNowhere;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int n = first + int(threadIdx.x) + r * kThreads;
    if (n >= length) continue;
    const T value = z[b * rows.num_samples + n] - mean;
    dot += slope[r] * double(value);
    sum += slope[r];
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
__global__ __launch_bounds__(kThreads) void lnl_backward_center_kernel(Wave grad, PowerTiles<T> powers, Rows rows, int num_blocks, const double* dots,
                                                                       const double* grad_sums, const int64_t* places, T* z) {
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
  __shared__ Extent<T> extent;
  extent.find(powers, b, length);
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
  // The reductions' barriers lie between.
  const NormBackward<T> through(slopes, extent.level(length).peak);
  const T mean = T((total / double(through.divisor) - through.correction) / max(length, 1));
  T v[kEach];
  block_samples(grad, b, length, first, v);
#pragma unroll
  for (int r = 0; r < kEach; ++r) v[r] = through(v[r], first + int(threadIdx.x) + r * kThreads) - mean;
  store_block(z, b, rows.num_samples, length, first, v);
}

// mirrored [rows, P] = filters [rows, P] from their last tap to their first.
template <typename T>
__global__ __launch_bounds__(kThreads) void lnl_backward_mirror_kernel(const T* filters, int num_taps, int64_t total, T* mirrored) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < total) mirrored[i / num_taps * num_taps + num_taps - 1 - i % num_taps] = filters[i];
}

// How much earlier than its output the mirrored filter's window lies: the adjoint of an advance is a delay.
__host__ __device__ inline int adjoint_shift(int num_taps) { return 2 * ((num_taps + 1) / 2) - (num_taps - 1); }

template <typename T>
__device__ T sample(const Wave& wave, int64_t b, int n) {
  T value;
  with_stored(wave, [&](auto stored) {
    using S = decltype(stored);
    value = T(Wide<S>(static_cast<const S*>(wave.data)[b * wave.row_stride + n * wave.stride]));
  });
  return value;
}

// One block per (utterance, tile): out = sum over i of (i + 1) * x**i * adjoint FIR_i(centered); mirrored [B, N_f, P].
template <typename S, int N>
__global__ __launch_bounds__(Fir<Wide<S>, N>::kThreads) void lnl_backward_kernel(Wave x, const Wide<S>* centered, const Wide<S>* mirrored, Rows rows,
                                                                                 int num_filters, int num_taps, int num_tiles, S* out) {
  using T = Wide<S>;
  using F = Fir<T, N>;
  __shared__ FirShared<T, N> shared;
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * F::kTile, num_samples = rows.num_samples, length = rows.length(b);
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
#pragma unroll
  for (int r = 0; r < F::kOutputs; ++r)
    if (first + int(threadIdx.x) * F::kOutputs + r >= length) total[r] = 0;
  store_tile<T, N>(total, shared, out + b * num_samples, first, num_samples);
}

// `lnl_backward_kernel` by overlap-save; spectra [B, N_f, 4096] of the mirrored filters. The gradient is transformed once, and each branch back.
__global__ __launch_bounds__(Fft::kThreads, 2) void lnl_backward_fft_kernel(Wave x, const float* centered, const float2* spectra, Rows rows,
                                                                            int num_filters, int num_taps, int num_tiles, float* out) {
  extern __shared__ float2 memory[];
  const Segments segments(num_taps);
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * segments.tile(), num_samples = rows.num_samples, length = rows.length(b);
  if (first >= length) {
    for (int n = first + int(threadIdx.x); n < min(first + segments.tile(), num_samples); n += Fft::kThreads) out[b * num_samples + n] = 0;
    return;
  }
  const int shifted = first - adjoint_shift(num_taps);
  float2* const samples = fft_segments(segments, shifted, memory, [&](int start, int count, auto put) {
    for (int n = start + int(threadIdx.x); n < start + count; n += Fft::kThreads) put(n, n >= 0 && n < length ? centered[b * num_samples + n] : 0.0f);
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
    // Each thread's own, in a loop over shared memory: unrolled over registers, it spills.
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

// Writes what `lnl_backward` returns into batch.out.
void through_lnl(const Batch& batch, const Tensor& grad, const Tensor& x, const Tensor& filters) {
  const OnDevice device(x);
  check_same_device(grad, x, "`grad`");
  const Bank bank(filters, x);
  const int num_filters = bank.per_utterance, num_taps = bank.num_taps;
  const Tensor z = batch.new_samples();
  const Bank mirrored(torch::stable::new_empty(bank.taps, {batch.size, num_filters, num_taps}), x);
  const Tensor totals = torch::stable::new_empty(x, {2, batch.size, batch.num_blocks}, ScalarType::Double);
  const Tensor places = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Long);
  const Powers powers = filter_powers(device, x, bank, num_filters, batch, z);
  double* const dots = totals.mutable_data_ptr<double>();
  double* const grad_sums = dots + batch.blocks();
  dispatch_wide(x, [&](auto type) {
    using T = decltype(type);
    T* const center = z.mutable_data_ptr<T>();
    device.launch(lnl_backward_sums_kernel<T>, batch.blocks(), kThreads, center, wave_of(grad), powers.parts<T>(), batch.rows(), batch.num_blocks,
                  dots, grad_sums, places.mutable_data_ptr<int64_t>());
    device.launch(lnl_backward_center_kernel<T>, batch.blocks(), kThreads, wave_of(grad), powers.parts<T>(), batch.rows(), batch.num_blocks, dots,
                  grad_sums, places.const_data_ptr<int64_t>(), center);
    device.launch(lnl_backward_mirror_kernel<T>, divide_up<int64_t>(bank.taps.numel(), kThreads), kThreads, bank.data<T>(), num_taps,
                  int64_t(bank.taps.numel()), mirrored.taps.mutable_data_ptr<T>());
  });
  if (x.scalar_type() == ScalarType::Float && filter_by_fft(x, num_filters, num_taps, 0)) {
    const Tensor spectrum = spectra(device, mirrored, 0, num_filters);
    const int tiles = divide_up(batch.num_samples, Segments(num_taps).tile());
    device.launch_with_memory(kFftBytes, lnl_backward_fft_kernel, batch.size * tiles, Fft::kThreads, wave_of(x), z.const_data_ptr<float>(),
                              static_cast<const float2*>(spectrum.const_data_ptr()), batch.rows(), num_filters, num_taps, tiles,
                              batch.out.mutable_data_ptr<float>());
    return;
  }
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    constexpr int N = std::is_same_v<T, float> ? 1 : 0;
    using F = Fir<T, N>;
    const int tiles = divide_up(batch.num_samples, F::kTile);
    device.launch(lnl_backward_kernel<S, N>, batch.size * tiles, F::kThreads, wave_of(x), z.const_data_ptr<T>(), mirrored.data<T>(), batch.rows(),
                  num_filters, num_taps, tiles, batch.out.mutable_data_ptr<S>());
  });
}

Tensor lnl_backward(const Tensor& grad, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths) {
  return in_parts(x, [&](const Part& part, const Tensor& out) {
    const Tensor own = part(x);
    through_lnl(Batch(own, part(lengths), out), part(grad), own, part(filters));
  });
}

// ----------------------------------------------------------------------------------------------------------------------------- isd_backward

// One block per (utterance, block of samples): the gain 1 + g_sd * f; of v = x * gain the sum of grad * v, the peak and its place [B, blocks].
template <typename T>
__global__ __launch_bounds__(kThreads) void isd_backward_sums_kernel(Wave grad, Wave x, Impulses impulses, T g_sd, Rows rows, int num_blocks,
                                                                     T* gains, double* dots, T* peaks, int64_t* places) {
  __shared__ Factors factors;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
  T v[kEach], gain[kEach], slope[kEach];
  block_samples(x, b, length, first, v);
  block_samples(grad, b, length, first, slope);
  block_factors(impulses, b, length, first, factors, gain);
  T peak = 0;
  double dot = 0;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    gain[r] = 1 + g_sd * gain[r];
    v[r] *= gain[r];
    dot += double(slope[r]) * double(v[r]);
    peak = Larger{}(peak, T(fabs(v[r])));
  }
  store_block(gains, b, rows.num_samples, length, first, gain);
  dot = block_reduce<kThreads>(dot, Add{});
  peak = block_reduce<kThreads>(peak, Larger{});
  int64_t place = kNowhere;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int n = first + int(threadIdx.x) + r * kThreads;
    if (n < length) place = Smaller{}(place, place_of(v[r], peak, n));
  }
  place = block_reduce<kThreads>(place, Smaller{});
  if (threadIdx.x == 0) {
    dots[blockIdx.x] = dot;
    peaks[blockIdx.x] = peak;
    places[blockIdx.x] = place;
  }
}

// Through cond_norm and the gain. `gains` may be `out`.
template <typename S>
__global__ __launch_bounds__(kThreads) void isd_backward_kernel(Wave grad, const Wide<S>* gains, const double* dots, const Wide<S>* peaks,
                                                                const int64_t* places, Rows rows, int num_blocks, S* out) {
  using T = Wide<S>;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
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
  T v[kEach];
  block_samples(grad, b, length, first, v);
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int n = first + int(threadIdx.x) + r * kThreads;
    if (n < length) v[r] = through(v[r], n) * gains[b * rows.num_samples + n];
  }
  store_block(out, b, rows.num_samples, length, first, v);
}

// Writes what `isd_backward` returns into batch.out.
void through_isd(const Batch& batch, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& seeds, const std::optional<Tensor>& factor,
                 double p, double g_sd) {
  const OnDevice device(x);
  check_same_device(grad, x, "`grad`");
  const Marked marked(device, x, batch, seeds, factor, p);
  const Tensor scratch = batch.scratch();
  const Tensor dots = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Double);
  const Tensor peaks = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, wide_dtype(x));
  const Tensor places = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Long);
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    T* const gains = scratch.mutable_data_ptr<T>();
    device.launch(isd_backward_sums_kernel<T>, batch.blocks(), kThreads, wave_of(grad), wave_of(x), marked.impulses(), T(g_sd), batch.rows(),
                  batch.num_blocks, gains, dots.mutable_data_ptr<double>(), peaks.mutable_data_ptr<T>(), places.mutable_data_ptr<int64_t>());
    device.launch(isd_backward_kernel<S>, batch.blocks(), kThreads, wave_of(grad), gains, dots.const_data_ptr<double>(), peaks.const_data_ptr<T>(),
                  places.const_data_ptr<int64_t>(), batch.rows(), batch.num_blocks, batch.out.mutable_data_ptr<S>());
  });
}

Tensor isd_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
                    const std::optional<Tensor>& factor, double p, double g_sd) {
  return in_parts(x, [&](const Part& part, const Tensor& out) {
    const Tensor own = part(x);
    through_isd(Batch(own, part(lengths), out), part(grad), own, part(seeds), part(factor), p, g_sd);
  });
}

// ----------------------------------------------------------------------------------------------------------------------------- ssi_backward

// One block per (utterance, block of samples): the sum of grad * v [B, blocks].
template <typename T>
__global__ __launch_bounds__(kThreads) void ssi_backward_sums_kernel(Wave grad, const T* colored, Rows rows, int num_blocks, double* dots) {
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
  T v[kEach];
  block_samples(grad, b, length, first, v);
  double dot = 0;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int n = first + int(threadIdx.x) + r * kThreads;
    if (n < length) dot += double(v[r]) * double(colored[b * rows.num_samples + n]);
  }
  dot = block_reduce<kThreads>(dot, Add{});
  if (threadIdx.x == 0) dots[blockIdx.x] = dot;
}

// grad + x * (grad . v) / (|x| |v|) * 10**(-SNR/20); silence has no slope.
template <typename S>
__global__ __launch_bounds__(kThreads) void ssi_backward_kernel(Wave grad, Wave x, Tiles<double> dots, Tiles<double> signal, Tiles<double> noise,
                                                                NoiseLevel noise_level, Rows rows, int num_blocks, S* out) {
  using T = Wide<S>;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
  T v[kEach], wave[kEach];
  block_samples(grad, b, length, first, v);
  block_samples(x, b, length, first, wave);
  __shared__ double own, square, dot;
  combine_tiles(0, signal, b, length, 0.0, Add{}, own);
  combine_tiles(1, noise, b, length, 0.0, Add{}, square);
  combine_tiles(2, dots, b, length, 0.0, Add{}, dot);
  __syncthreads();
  // Two roots, because the product of two small squares may vanish.
  const double slope = dot / (sqrt(own) * sqrt(square)) * noise_level(b);
  const T toward_x = own > 0 && square > 0 ? T(slope) : T(0);
#pragma unroll
  for (int r = 0; r < kEach; ++r) v[r] += toward_x * wave[r];
  store_block(out, b, rows.num_samples, length, first, v);
}

// Writes what `ssi_backward` returns into batch.out.
void through_ssi(const Batch& batch, const Tensor& grad, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& seeds,
                 const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min, double snr_max) {
  const OnDevice device(x);
  check_same_device(grad, x, "`grad`");
  const std::optional<Noise> drawn(std::in_place, x, seeds, noise, snr_db, snr_min, snr_max);
  const Tensor samples = batch.scratch();
  const Colored colored = color_noise(device, x, Bank(filters, x), batch, *drawn, samples, true);
  const Tensor dots = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    device.launch(ssi_backward_sums_kernel<T>, batch.blocks(), kThreads, wave_of(grad), samples.const_data_ptr<T>(), batch.rows(), batch.num_blocks,
                  dots.mutable_data_ptr<double>());
    const Tiles<double> of_dots{dots.const_data_ptr<double>(), kBlock, batch.num_blocks};
    device.launch(ssi_backward_kernel<S>, batch.blocks(), kThreads, wave_of(grad), wave_of(x), of_dots, colored.signal(), colored.noise(),
                  NoiseLevel(drawn), batch.rows(), batch.num_blocks, batch.out.mutable_data_ptr<S>());
  });
}

Tensor ssi_backward(const Tensor& grad, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths,
                    const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min,
                    double snr_max) {
  return in_parts(x, [&](const Part& part, const Tensor& out) {
    const Tensor own = part(x);
    through_ssi(Batch(own, part(lengths), out), part(grad), own, part(filters), part(seeds), part(noise), part(snr_db), snr_min, snr_max);
  });
}

}  // namespace gradalign::cuda

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CUDA, m) {
  m.impl("lnl_backward", TORCH_BOX(&gradalign::cuda::lnl_backward));
  m.impl("isd_backward", TORCH_BOX(&gradalign::cuda::isd_backward));
  m.impl("ssi_backward", TORCH_BOX(&gradalign::cuda::ssi_backward));
}
