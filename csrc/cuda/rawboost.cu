// RawBoost on CUDA: notch_draws, notch_bank, lnl, isd, ssi. Equivalent to the functions of these names in gradalign/reference.py.
// B utterances of T samples, N_f filters of N_b bands and P taps. An utterance is cut into tiles, one per block; what a tile knows about its
// utterance (sums, extrema) is stored per tile, and a second kernel adds the tiles in order and finishes the samples.
#include <algorithm>

#include "../notch.h"
#include "rawboost.cuh"

namespace gradalign::cuda {

// ---------------------------------------------------------------------------------------------------------------------------- notch_draws

// Filters per launch: their table is a kernel argument, which reaches the device without a copy of its own.
constexpr int kFilterTable = 64;

struct FilterTable {
  uint32_t number[kFilterTable];
  double min_gain_db[kFilterTable], max_gain_db[kFilterTable];
};

// One thread per band: seeds [B] -> center_hz, width_hz, taps [B, N_f, N_b], gain_db [B, N_f], of the `count` filters from `first`.
// Equivalent to `reference.notch_draws`.
__global__ void notch_draws_kernel(const int64_t* seeds, const __grid_constant__ FilterTable table, NotchRanges ranges, int first, int count,
                                   int num_filters, int num_bands, int64_t total, double* center_hz, double* width_hz, int64_t* taps, double* gain_db) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= total) return;
  const int band = int(thread % num_bands), f = int(thread / num_bands % count);
  const int64_t b = thread / num_bands / count, row = b * num_filters + first + f;
  const NotchDraw draw = draw_notch(uint64_t(seeds[b]), table.number[f], uint32_t(band), ranges);
  center_hz[row * num_bands + band] = draw.center_hz;
  width_hz[row * num_bands + band] = draw.width_hz;
  taps[row * num_bands + band] = draw.taps;
  if (band == 0) gain_db[row] = draw.gain * (table.max_gain_db[f] - table.min_gain_db[f]) + table.min_gain_db[f];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> notch_draws(const Tensor& seeds, const std::vector<int64_t>& filters, const std::vector<double>& min_gain_db,
                                                       const std::vector<double>& max_gain_db, int64_t num_bands, double min_center_hz,
                                                       double max_center_hz, double min_width_hz, double max_width_hz, double min_taps,
                                                       double max_taps) {
  constexpr int kThreads = 128;
  const OnDevice device(seeds);
  const int64_t batch = seeds.size(0), num_filters = int64_t(filters.size());
  const Tensor keys = torch::stable::contiguous(seeds);
  Tensor center_hz = torch::stable::new_empty(seeds, {batch, num_filters, num_bands}, ScalarType::Double);
  Tensor width_hz = torch::stable::new_empty(seeds, {batch, num_filters, num_bands}, ScalarType::Double);
  Tensor taps = torch::stable::new_empty(seeds, {batch, num_filters, num_bands}, ScalarType::Long);
  Tensor gain_db = torch::stable::new_empty(seeds, {batch, num_filters}, ScalarType::Double);
  const NotchRanges ranges{min_center_hz, max_center_hz, min_width_hz, max_width_hz, min_taps, max_taps};
  for (int64_t first = 0; first < num_filters; first += kFilterTable) {
    const int64_t count = std::min<int64_t>(kFilterTable, num_filters - first), total = batch * count * num_bands;
    FilterTable table{};
    for (int64_t f = 0; f < count; ++f) {
      table.number[f] = uint32_t(filters[first + f]);
      table.min_gain_db[f] = min_gain_db[first + f];
      table.max_gain_db[f] = max_gain_db[first + f];
    }
    device.launch(notch_draws_kernel, divide_up<int64_t>(total, kThreads), kThreads, keys.const_data_ptr<int64_t>(), table, ranges, int(first), int(count),
                  int(num_filters), int(num_bands), total, center_hz.mutable_data_ptr<double>(), width_hz.mutable_data_ptr<double>(),
                  taps.mutable_data_ptr<int64_t>(), gain_db.mutable_data_ptr<double>());
  }
  return {center_hz, width_hz, taps, gain_db};
}

// ----------------------------------------------------------------------------------------------------------------------------- notch_bank

constexpr int kBankThreads = 256;
// The bands' half taps and two halves of the bank, 751 numbers with the published ranges, stay in shared memory up to here (16 KiB).
constexpr int kBankShared = 2048;

// One block per bank: center_hz, width_hz, taps [B*N_f, N_b], gain_db [B*N_f] -> out [B*N_f, P]. Equivalent to `reference.notch_bank`.
// Everything is symmetric about the middle tap, so only taps m >= 0 are kept. `workspace` [B*N_f, N_b * (most_reach + 1) + 2 * (P/2 + 1)] is
// there only for what is too large for shared memory.
template <typename S>
__global__ __launch_bounds__(kBankThreads) void notch_bank_kernel(const double* center_hz, const double* width_hz, const int64_t* taps,
                                                                  const double* gain_db, double sample_rate, int num_bands, int num_taps,
                                                                  int most_reach, double* workspace, S* out) {
  __shared__ double shared[kBankShared];
  const int64_t row = blockIdx.x;
  const int middle = num_taps / 2, stride = most_reach + 1;
  double* half_taps = workspace == nullptr ? shared : workspace + row * (int64_t(num_bands) * stride + 2 * (middle + 1));
  double* bank = half_taps + num_bands * stride;
  double* next = bank + middle + 1;

  // Every thread keeps the same frequencies of the response for all bands: |H| is the product of the bands' amplitude responses.
  constexpr int kEach = kResponsePoints / kBankThreads;
  double cos_w[kEach], response[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    cos_w[j] = cos_pi(double(threadIdx.x + j * kBankThreads) / kResponsePoints);
    response[j] = 1;
  }
  int reach = 0;
  for (int n = threadIdx.x; n <= middle; n += kBankThreads) bank[n] = n == 0 ? 1 : 0;
  for (int i = 0; i < num_bands; ++i) {
    const int64_t at = row * num_bands + i;
    const NotchBand band = notch_band(center_hz[at], width_hz[at], taps[at], sample_rate);
    // No tap beyond the row, whatever the counts say.
    const int band_reach = min(max(band.reach, 0), most_reach);
    double* tap = half_taps + i * stride;
    double sum = 0;
    for (int m = threadIdx.x; m <= band_reach; m += kBankThreads) {
      tap[m] = notch_tap(band, m);
      sum += m == 0 ? tap[m] : 2 * tap[m];
    }
    sum = block_reduce<kBankThreads>(sum, Add{});
    for (int m = threadIdx.x; m <= band_reach; m += kBankThreads) tap[m] /= sum;
    __syncthreads();
    double band_response[kEach];
    symmetric_response<kEach>(tap, band_reach, cos_w, band_response);
#pragma unroll
    for (int j = 0; j < kEach; ++j) response[j] *= band_response[j];
    // bank holds taps 0..reach and zeros above; next becomes its convolution with the band.
    for (int n = threadIdx.x; n <= middle; n += kBankThreads) {
      double total = tap[0] * bank[n];
      for (int m = 1; m <= band_reach; ++m) total += tap[m] * (bank[abs(n - m)] + (n + m <= reach ? bank[n + m] : 0));
      next[n] = total;
    }
    reach += band_reach;
    __syncthreads();
    double* last = bank;
    bank = next;
    next = last;
  }

  double peak = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) peak = Larger{}(peak, fabs(response[j]));
  const double scale = exp10(gain_db[row] / 20) / block_reduce<kBankThreads>(peak, Larger{});
  for (int n = threadIdx.x; n < num_taps; n += kBankThreads) {
    const int m = abs(n - middle);
    out[row * num_taps + n] = S(Wide<S>(m <= reach ? scale * bank[m] : 0));
  }
}

Tensor notch_bank(const Tensor& center_hz, const Tensor& width_hz, const Tensor& taps, const Tensor& gain_db, double sample_rate, int64_t num_taps,
                  ScalarType dtype) {
  const OnDevice device(center_hz);
  const int64_t batch = center_hz.size(0), num_filters = center_hz.size(1), num_bands = center_hz.size(2), rows = batch * num_filters;
  Tensor out = torch::stable::new_empty(center_hz, {batch, num_filters, num_taps}, dtype);
  if (center_hz.numel() == 0) return torch::stable::zero_(out);
  check_same_device(width_hz, center_hz, "`width_hz`");
  check_same_device(taps, center_hz, "`taps`");
  check_same_device(gain_db, center_hz, "`gain_db`");
  const Tensor centers = contiguous_as(center_hz, ScalarType::Double), widths = contiguous_as(width_hz, ScalarType::Double);
  const Tensor counts = torch::stable::contiguous(taps), gains = contiguous_as(gain_db, ScalarType::Double);
  const int64_t most_reach = (num_taps - 1) / (2 * num_bands), numbers = num_bands * (most_reach + 1) + 2 * (num_taps / 2 + 1);
  std::optional<Tensor> workspace;
  if (numbers > kBankShared) workspace = torch::stable::new_empty(center_hz, {rows, numbers}, ScalarType::Double);
  dispatch_floating(dtype, "dtype", [&](auto type) {
    using S = decltype(type);
    device.launch(notch_bank_kernel<S>, rows, kBankThreads, centers.const_data_ptr<double>(), widths.const_data_ptr<double>(),
                  counts.const_data_ptr<int64_t>(), gains.const_data_ptr<double>(), sample_rate, int(num_bands), int(num_taps), int(most_reach),
                  workspace ? workspace->mutable_data_ptr<double>() : nullptr, static_cast<S*>(out.mutable_data_ptr()));
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------------- the filters

// One block per filter: filters [rows, P] -> spectra [rows, 4096] in the order of Fft, divided by the number of points.
__global__ __launch_bounds__(Fft::kThreads) void spectra_kernel(const float* filters, int num_taps, float2* spectra) {
  __shared__ float2 exchange[Fft::kShared];
  const int64_t row = blockIdx.x;
  const Fft fft;
  float2 v[Fft::kEach];
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) {
    const int k = threadIdx.x + r * Fft::kThreads;
    v[r] = {k < num_taps ? filters[row * num_taps + k] / Fft::kPoints : 0.0f, 0.0f};
  }
  fft.forward(v, exchange);
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) spectra[row * Fft::kPoints + r * Fft::kThreads + threadIdx.x] = v[r];
}

Tensor spectra(const OnDevice& device, const Tensor& filters, int64_t rows, int num_taps) {
  Tensor out = torch::stable::new_empty(filters, {rows, Fft::kPoints, 2}, ScalarType::Float);
  device.launch(spectra_kernel, rows, Fft::kThreads, filters.const_data_ptr<float>(), num_taps, static_cast<float2*>(out.mutable_data_ptr()));
  return out;
}

// ------------------------------------------------------------------------------------------------------------------------------------ lnl

// One block per (utterance, tile): z [B, T] = sum over i of FIR_i(x**i), and the tile's sum and extrema [B, tiles].
// Equivalent to `reference.lnl` before its mean and norm.
template <typename T, int N>
__global__ __launch_bounds__(Fir<T, N>::kThreads) void lnl_kernel(Wave x, const T* filters, const int64_t* lengths, int num_samples, int num_filters,
                                                                  int num_taps, int num_tiles, T* z, double* sums, T* largest, T* smallest) {
  using F = Fir<T, N>;
  __shared__ FirShared<T, N> shared;
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * F::kTile, length = length_of(lengths, b, num_samples);
  // Tiles beyond the utterance are never asked for.
  if (first >= length) return;
  T value[F::kOutputs];
  fir<T, N>(filters + b * num_filters * num_taps, num_filters, num_taps, first, shared, value, [&](int start, int count) {
    for (int i = threadIdx.x; i < count; i += F::kThreads) {
      const int n = start + i;
      shared.window[F::place(i)] = n >= 0 && n < length ? sample<T>(x, b, n) : T(0);
    }
  });
  double sum = 0;
  T high = -INFINITY, low = -INFINITY;
#pragma unroll
  for (int r = 0; r < F::kOutputs; ++r) {
    if (first + int(threadIdx.x) * F::kOutputs + r >= length) continue;
    sum += double(value[r]);
    high = Larger{}(high, value[r]);
    low = Larger{}(low, -value[r]);
  }
  sum = block_reduce<F::kThreads>(sum, Add{});
  high = block_reduce<F::kThreads>(high, Larger{});
  low = block_reduce<F::kThreads>(low, Larger{});
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    largest[blockIdx.x] = high;
    smallest[blockIdx.x] = -low;
  }
  store_tile<T, N>(value, shared, z + b * num_samples, first, length);
}

// `lnl_kernel` by overlap-save; spectra [B, N_f, 4096].
__global__ __launch_bounds__(Fft::kThreads, 2) void lnl_fft_kernel(Wave x, const float2* spectra, const int64_t* lengths, int num_samples,
                                                                   int num_filters, int num_taps, int num_tiles, float* z, double* sums,
                                                                   float* largest, float* smallest) {
  extern __shared__ float2 memory[];
  const Segments segments(num_taps);
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * segments.tile(), length = length_of(lengths, b, num_samples);
  // Tiles beyond the utterance are never asked for.
  if (first >= length) return;
  float2 value[Fft::kEach];
  fft_filter(spectra + b * num_filters * Fft::kPoints, num_filters, segments, first, memory, value, [&](int start, int count, auto put) {
    for (int n = start + int(threadIdx.x); n < start + count; n += Fft::kThreads) put(n, n >= 0 && n < length ? sample<float>(x, b, n) : 0.0f);
  });
  double sum = 0;
  float high = -INFINITY, low = -INFINITY;
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) {
    const int m = threadIdx.x + r * Fft::kThreads;
#pragma unroll
    for (int segment = 0; segment < 2; ++segment) {
      const int n = segments.output(first, segment, m);
      if (m < num_taps - 1 || n >= length) continue;
      const float v = segment == 0 ? value[r].x : value[r].y;
      z[b * num_samples + n] = v;
      sum += double(v);
      high = Larger{}(high, v);
      low = Larger{}(low, -v);
    }
  }
  sum = block_reduce<Fft::kThreads>(sum, Add{});
  high = block_reduce<Fft::kThreads>(high, Larger{});
  low = block_reduce<Fft::kThreads>(low, Larger{});
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    largest[blockIdx.x] = high;
    smallest[blockIdx.x] = -low;
  }
}

// cond_norm(z - mean(z)) from the tiles' sums and extrema: the peak is the farther of max - mean and mean - min. `z` may be `out`.
template <typename S>
__global__ __launch_bounds__(kThreads) void lnl_finish_kernel(const Wide<S>* z, const double* sums, const Wide<S>* extrema, const int64_t* lengths,
                                                              int64_t size, int num_samples, int num_tiles, int tile, int num_blocks, S* out) {
  using T = Wide<S>;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  const auto [mean, peak] = level_of<T>(sums, extrema, size, b, num_tiles, tile, length);
  const T divisor = peak > 1 ? peak : T(1);
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + threadIdx.x;
    if (n < num_samples) out[b * num_samples + n] = n < length ? S((z[b * num_samples + n] - mean) / divisor) : S(T(0));
  }
}

Powers filter_powers(const OnDevice& device, const Tensor& x, const Tensor& bank, const Batch& batch, const Tensor& z) {
  const int num_filters = int(bank.size(1)), num_taps = int(bank.size(2));
  auto run = [&](auto type, int tile, auto&& filter) {
    using T = decltype(type);
    const int tiles = divide_up(batch.num_samples, tile);
    Tensor sums = torch::stable::new_empty(x, {batch.size, tiles}, ScalarType::Double);
    Tensor extrema = torch::stable::new_empty(x, {2, batch.size, tiles}, wide_dtype(x));
    T* largest = static_cast<T*>(extrema.mutable_data_ptr());
    filter(tiles, static_cast<T*>(z.mutable_data_ptr()), sums.mutable_data_ptr<double>(), largest, largest + batch.size * tiles);
    return Powers{sums, extrema, tile, tiles};
  };
  auto run_direct = [&](auto type, auto branches) {
    using T = decltype(type);
    constexpr int N = decltype(branches)::value;
    using F = Fir<T, N>;
    return run(type, F::kTile, [&](int tiles, T* out, double* sums, T* largest, T* smallest) {
      device.launch(lnl_kernel<T, N>, batch.size * tiles, F::kThreads, wave_of(x), static_cast<const T*>(bank.const_data_ptr()), batch.lengths,
                    batch.num_samples, num_filters, num_taps, tiles, out, sums, largest, smallest);
    });
  };
  if (filter_by_fft(x, num_filters, num_taps)) {
    const Tensor spectrum = spectra(device, bank, batch.size * num_filters, num_taps);
    return run(float{}, Segments(num_taps).tile(), [&](int tiles, float* out, double* sums, float* largest, float* smallest) {
      device.launch_with_memory(kFftBytes, lnl_fft_kernel, batch.size * tiles, Fft::kThreads, wave_of(x),
                                static_cast<const float2*>(spectrum.const_data_ptr()), batch.lengths, batch.num_samples, num_filters, num_taps, tiles,
                                out, sums, largest, smallest);
    });
  }
  if (x.scalar_type() == ScalarType::Double) return run_direct(double{}, std::integral_constant<int, 0>{});
  if (num_filters > 5) return run_direct(float{}, std::integral_constant<int, 0>{});
  return run_direct(float{}, std::integral_constant<int, 5>{});
}

Tensor lnl(const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths) {
  const OnDevice device(x);
  const Batch batch(x, lengths);
  if (x.numel() == 0) return batch.out;
  check_same_device(filters, x, "`filters`");
  const Powers powers = filter_powers(device, x, contiguous_as(filters, wide_dtype(x)), batch, batch.scratch);
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    device.launch(lnl_finish_kernel<S>, batch.size * batch.num_blocks, kThreads, static_cast<const T*>(batch.scratch.const_data_ptr()),
                  powers.sums.const_data_ptr<double>(), static_cast<const T*>(powers.extrema.const_data_ptr()), batch.lengths, batch.size,
                  batch.num_samples, powers.tiles, powers.tile, batch.num_blocks, static_cast<S*>(batch.out.mutable_data_ptr()));
  });
  return batch.out;
}

// ------------------------------------------------------------------------------------------------------------------------------------ isd

// One block per (utterance, block of samples): y [B, T] = x + g_sd * x * f, and the block's peak [B, blocks]; f is `factor` [B, T] or, where its
// data is null, drawn from seeds [B]. Equivalent to `reference.isd` before its norm.
template <typename T>
__global__ __launch_bounds__(kThreads) void isd_kernel(Wave x, const int64_t* lengths, const int64_t* seeds, Wave factor, double p, T g_sd,
                                                       int num_samples, int num_blocks, T* y, T* peaks) {
  __shared__ Impulses impulses;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  const int own = min(kBlock, length - first);
  const bool drawn = factor.data == nullptr;
  if (drawn && own > 0) draw_impulses(impulses, uint64_t(seeds[b]), p, first, length);
  T peak = 0;
  for (int i = threadIdx.x; i < own; i += kThreads) {
    const T value = sample<T>(x, b, first + i);
    const T distorted = value * (1 + g_sd * (drawn ? T(impulses.f[i]) : sample<T>(factor, b, first + i)));
    y[b * num_samples + first + i] = distorted;
    peak = Larger{}(peak, T(fabs(distorted)));
  }
  peak = block_reduce<kThreads>(peak, Larger{});
  if (threadIdx.x == 0) peaks[blockIdx.x] = peak;
}

// cond_norm(y) from the blocks' peaks. `y` may be `out`.
template <typename S>
__global__ __launch_bounds__(kThreads) void isd_finish_kernel(const Wide<S>* y, const Wide<S>* peaks, const int64_t* lengths, int num_samples,
                                                              int num_blocks, S* out) {
  using T = Wide<S>;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  T peak = 0;
  for (int i = threadIdx.x; i < num_blocks; i += kThreads) peak = Larger{}(peak, peaks[b * num_blocks + i]);
  peak = block_reduce<kThreads>(peak, Larger{});
  // Nothing to divide, and every sample is where it belongs.
  if (std::is_same_v<S, T> && !(peak > 1) && first + kBlock <= length) return;
  const T divisor = peak > 1 ? peak : T(1);
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + threadIdx.x;
    if (n < num_samples) out[b * num_samples + n] = n < length ? S(y[b * num_samples + n] / divisor) : S(T(0));
  }
}

Tensor isd(const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds, const std::optional<Tensor>& factor, double p,
           double g_sd) {
  const OnDevice device(x);
  const Batch batch(x, lengths);
  if (x.numel() == 0) return batch.out;
  // A given factor goes before the seeds, as in the reference.
  check_same_device(factor ? *factor : *seeds, x, factor ? "`factor`" : "`seeds`");
  std::optional<Tensor> keys;
  if (!factor) keys = torch::stable::contiguous(*seeds);
  dispatch_wide(x, [&](auto type) {
    using T = decltype(type);
    Tensor peaks = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, wide_dtype(x));
    device.launch(isd_kernel<T>, batch.size * batch.num_blocks, kThreads, wave_of(x), batch.lengths, keys ? keys->const_data_ptr<int64_t>() : nullptr,
                  factor ? wave_of(*factor) : Wave{}, p, T(g_sd), batch.num_samples, batch.num_blocks, static_cast<T*>(batch.scratch.mutable_data_ptr()),
                  static_cast<T*>(peaks.mutable_data_ptr()));
    dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
      using S = decltype(stored);
      if constexpr (std::is_same_v<Wide<S>, T>)
        device.launch(isd_finish_kernel<S>, batch.size * batch.num_blocks, kThreads, static_cast<const T*>(batch.scratch.const_data_ptr()),
                      static_cast<const T*>(peaks.const_data_ptr()), batch.lengths, batch.num_samples, batch.num_blocks,
                      static_cast<S*>(batch.out.mutable_data_ptr()));
    });
  });
  return batch.out;
}

// ------------------------------------------------------------------------------------------------------------------------------------ ssi

// Call put(n, s[n]) for the samples start .. start + count - 1 (and up to three more at either end) of the noise of utterance b, 0 outside it: from
// `noise` [B, T] or, where its data is null, drawn from the utterance's seed.
template <typename T, int kThreads, typename Put>
__device__ void white_noise(const Wave& noise, const int64_t* seeds, int64_t b, int length, int start, int count, Put&& put) {
  if (noise.data != nullptr) {
    for (int n = start + int(threadIdx.x); n < start + count; n += kThreads) put(n, n >= 0 && n < length ? sample<T>(noise, b, n) : T(0));
    return;
  }
  // Philox gives four samples at a time; the shift rounds down, also below 0, where every sample is 0.
  for (int quad = (start >> 2) + int(threadIdx.x); 4 * quad < start + count; quad += kThreads) {
    float v[4] = {};
    if (quad >= 0) {
      const Words words = philox(uint64_t(seeds[b]), kStreamSsiNoise, uint64_t(quad));
      box_muller(words.w[0], words.w[1], &v[0], &v[1]);
      box_muller(words.w[2], words.w[3], &v[2], &v[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) put(4 * quad + i, 4 * quad + i < length ? T(v[i]) : T(0));
  }
}

// One block per (utterance, tile): v [B, T] = FIR(noise), and the tile's sums of squares of x and v [B, tiles]. The noise is `noise` [B, T] or,
// where its data is null, drawn from seeds [B] inside the tile and never stored. Equivalent to the first half of `reference.ssi`. The squares are
// float64: those of samples below 1e-23 would vanish in float32.
template <typename T, int N>
__global__ __launch_bounds__(Fir<T, N>::kThreads) void ssi_kernel(Wave x, Wave noise, const int64_t* seeds, const T* filters, const int64_t* lengths,
                                                                  int num_samples, int num_taps, int num_tiles, T* colored, double* signal_squares,
                                                                  double* noise_squares) {
  using F = Fir<T, N>;
  __shared__ FirShared<T, N> shared;
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * F::kTile, length = length_of(lengths, b, num_samples);
  // Tiles beyond the utterance are never asked for.
  if (first >= length) return;
  T value[F::kOutputs];
  fir<T, N>(filters + b * num_taps, 1, num_taps, first, shared, value, [&](int start, int count) {
    white_noise<T, F::kThreads>(noise, seeds, b, length, start, count, [&](int n, T v) {
      if (n >= start && n < start + count) shared.window[F::place(n - start)] = v;
    });
  });
  double signal = 0, square = 0;
  for (int i = threadIdx.x; i < F::kTile && first + i < length; i += F::kThreads) {
    const double v = double(sample<T>(x, b, first + i));
    signal += v * v;
  }
#pragma unroll
  for (int r = 0; r < F::kOutputs; ++r)
    if (first + int(threadIdx.x) * F::kOutputs + r < length) square += double(value[r]) * double(value[r]);
  signal = block_reduce<F::kThreads>(signal, Add{});
  square = block_reduce<F::kThreads>(square, Add{});
  if (threadIdx.x == 0) {
    signal_squares[blockIdx.x] = signal;
    noise_squares[blockIdx.x] = square;
  }
  store_tile<T, N>(value, shared, colored + b * num_samples, first, length);
}

// `ssi_kernel` by overlap-save; spectra [B, 4096].
__global__ __launch_bounds__(Fft::kThreads, 2) void ssi_fft_kernel(Wave x, Wave noise, const int64_t* seeds, const float2* spectra, const int64_t* lengths,
                                                                   int num_samples, int num_taps, int num_tiles, float* colored,
                                                                   double* signal_squares, double* noise_squares) {
  extern __shared__ float2 memory[];
  const Segments segments(num_taps);
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * segments.tile(), length = length_of(lengths, b, num_samples);
  // Tiles beyond the utterance are never asked for.
  if (first >= length) return;
  float2 value[Fft::kEach];
  fft_filter(spectra + b * Fft::kPoints, 1, segments, first, memory, value, [&](int start, int count, auto put) {
    white_noise<float, Fft::kThreads>(noise, seeds, b, length, start, count, put);
  });
  double signal = 0, square = 0;
  for (int i = threadIdx.x; i < segments.tile() && first + i < length; i += Fft::kThreads) {
    const double v = double(sample<float>(x, b, first + i));
    signal += v * v;
  }
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) {
    const int m = threadIdx.x + r * Fft::kThreads;
#pragma unroll
    for (int segment = 0; segment < 2; ++segment) {
      const int n = segments.output(first, segment, m);
      if (m < num_taps - 1 || n >= length) continue;
      const float v = segment == 0 ? value[r].x : value[r].y;
      colored[b * num_samples + n] = v;
      square += double(v) * double(v);
    }
  }
  signal = block_reduce<Fft::kThreads>(signal, Add{});
  square = block_reduce<Fft::kThreads>(square, Add{});
  if (threadIdx.x == 0) {
    signal_squares[blockIdx.x] = signal;
    noise_squares[blockIdx.x] = square;
  }
}

// x + v * |x| / |v| * 10**(-SNR/20) from the tiles' sums of squares; silence stays silence. `colored` may be `out`.
template <typename S>
__global__ __launch_bounds__(kThreads) void ssi_finish_kernel(Wave x, const Wide<S>* colored, const double* squares, const int64_t* lengths,
                                                              const int64_t* seeds, const double* snr_db, double snr_min, double snr_max, int64_t size,
                                                              int num_samples, int num_tiles, int tile, int num_blocks, S* out) {
  using T = Wide<S>;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = length_of(lengths, b, num_samples);
  const auto [signal, noise] = squares_of(squares, size, b, num_tiles, tile, length);
  const T scale = noise > 0 ? T(sqrt(signal) / sqrt(noise) * noise_level(seeds, snr_db, b, snr_min, snr_max)) : T(0);
#pragma unroll
  for (int i = 0; i < kBlock; i += kThreads) {
    const int n = first + i + threadIdx.x;
    if (n < num_samples) out[b * num_samples + n] = n < length ? S(sample<T>(x, b, n) + scale * colored[b * num_samples + n]) : S(T(0));
  }
}

Colored color_noise(const OnDevice& device, const Tensor& x, const Tensor& bank, const Batch& batch, const Noise& noise, const Tensor& colored) {
  const int num_taps = int(bank.size(1));
  const bool by_fft = filter_by_fft(x, 1, num_taps);
  std::optional<Colored> found;
  dispatch_wide(x, [&](auto type) {
    using T = decltype(type);
    constexpr int N = std::is_same_v<T, float> ? 1 : 0;
    using F = Fir<T, N>;
    const int tile = by_fft ? Segments(num_taps).tile() : F::kTile, tiles = divide_up(batch.num_samples, tile);
    Tensor squares = torch::stable::new_empty(x, {2, batch.size, tiles}, ScalarType::Double);
    double* signal_squares = squares.mutable_data_ptr<double>();
    double* noise_squares = signal_squares + batch.size * tiles;
    if (by_fft) {
      const Tensor spectrum = spectra(device, bank, batch.size, num_taps);
      device.launch_with_memory(kFftBytes, ssi_fft_kernel, batch.size * tiles, Fft::kThreads, wave_of(x), noise.given, noise.seeds(),
                                static_cast<const float2*>(spectrum.const_data_ptr()), batch.lengths, batch.num_samples, num_taps, tiles,
                                static_cast<float*>(colored.mutable_data_ptr()), signal_squares, noise_squares);
    } else {
      device.launch(ssi_kernel<T, N>, batch.size * tiles, F::kThreads, wave_of(x), noise.given, noise.seeds(),
                    static_cast<const T*>(bank.const_data_ptr()), batch.lengths, batch.num_samples, num_taps, tiles,
                    static_cast<T*>(colored.mutable_data_ptr()), signal_squares, noise_squares);
    }
    found.emplace(Colored{squares, tile, tiles});
  });
  return *found;
}

Tensor ssi(const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
           const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min, double snr_max) {
  const OnDevice device(x);
  const Batch batch(x, lengths);
  if (x.numel() == 0) return batch.out;
  check_same_device(filters, x, "`filters`");
  const Noise drawn(x, seeds, noise, snr_db);
  const Colored colored = color_noise(device, x, contiguous_as(filters, wide_dtype(x)), batch, drawn, batch.scratch);
  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    device.launch(ssi_finish_kernel<S>, batch.size * batch.num_blocks, kThreads, wave_of(x), static_cast<const Wide<S>*>(batch.scratch.const_data_ptr()),
                  colored.squares.const_data_ptr<double>(), batch.lengths, drawn.seeds(), drawn.snr_db(), snr_min, snr_max, batch.size,
                  batch.num_samples, colored.tiles, colored.tile, batch.num_blocks, static_cast<S*>(batch.out.mutable_data_ptr()));
  });
  return batch.out;
}

}  // namespace gradalign::cuda

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CUDA, m) {
  m.impl("notch_draws", TORCH_BOX(&gradalign::cuda::notch_draws));
  m.impl("notch_bank", TORCH_BOX(&gradalign::cuda::notch_bank));
  m.impl("lnl", TORCH_BOX(&gradalign::cuda::lnl));
  m.impl("isd", TORCH_BOX(&gradalign::cuda::isd));
  m.impl("ssi", TORCH_BOX(&gradalign::cuda::ssi));
}
