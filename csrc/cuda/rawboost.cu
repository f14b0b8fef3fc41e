// RawBoost on CUDA: notch_bank, notch_filters, lnl, isd, ssi and rawboost, the chain of the three. Equivalent to the functions of these names in
// gradalign/reference.py.
// B utterances of T samples, N_f filters of N_b bands and P taps. What depends on a whole utterance (a mean, a peak, a norm) cuts the chain into
// passes over the samples: the filters (`filter_powers`, `color_noise`, for long utterances both in one launch), the impulses (`isd_kernel`, which
// also takes LnL's mean and norm on the way), and what is left (`rawboost_finish_kernel`). A pass has one block per tile or block of samples of an
// utterance, stores what it knows about the utterance, and the next one adds that up, in a fixed order: the same bits on every run.
#include <algorithm>

#include "../notch.h"
#include "../steps.h"
#include "rawboost.cuh"

namespace gradalign::cuda {

// ----------------------------------------------------------------------------------------------------------------------------- notch banks

// Filters per launch: their table is a kernel argument, which reaches the device without a copy of its own.
constexpr int kFilterTable = 64;

struct FilterTable {
  uint32_t number[kFilterTable];
  double min_gain_db[kFilterTable], max_gain_db[kFilterTable];
};

// Where a launch's banks come from: center_hz, width_hz, taps [rows, N_b] and gain_db [rows] or, where those are null, drawn from seeds [B]. The
// launch has `count` of each utterance's num_filters filters, from `first` on.
struct NotchSource {
  const double *center_hz, *width_hz, *gain_db;
  const int64_t *taps, *seeds;
  NotchRanges ranges;
  int first, count, num_filters;
};

constexpr int kBankThreads = 256;
constexpr int kBankHalf = kBankThreads / 2;
static_assert(kResponsePairs % kBankHalf == 0);
constexpr int kBandsAtOnce = kBankThreads / kWarp;
// A bank's numbers, 1448 with the published ranges, stay in shared memory up to here (16 KiB).
constexpr int kBankShared = 2048;

// A bank's numbers: taps -half..half - 1 of the bank so far, as many of the next one, and the taps 0..most_reach and a zero of kBandsAtOnce bands.
struct BankLayout {
  BankLayout(int64_t taps, int64_t bands)
      : num_taps(int(taps)),
        num_bands(int(bands)),
        most_reach((num_taps - 1) / (2 * num_bands)),
        stride(most_reach + 2),
        half((num_taps / 2 + most_reach + 4) / 2 * 2),
        numbers((4 * int64_t(half) + int64_t(std::min(num_bands, kBandsAtOnce)) * stride + 1) / 2 * 2) {}

  // `half` has room for the zeros that a band meets beyond the bank. It and `numbers` are even: taps are read in pairs.
  int num_taps, num_bands, most_reach, stride, half;
  int64_t numbers;
};

// next = the convolution of the bank, which is 0 beyond `reach`, with a band. A thread makes the taps 2t and 2t + 1, from two taps of the band at a
// time: what the one needs of the bank for a tap, the other needs for the next.
__device__ void convolve(const double* tap, int band_reach, const double* bank, int reach, double* next) {
  for (int t = threadIdx.x; 2 * t <= reach + band_reach; t += kBankHalf) {
    const double2* const pair = reinterpret_cast<const double2*>(bank) + t;
    double left = pair->x, right = pair->y;
    double first = tap[0] * left, second = tap[0] * right;
#pragma unroll 4
    for (int i = 1; i <= (band_reach + 1) / 2; ++i) {
      const double2 below = pair[-i], above = pair[i];
      first += tap[2 * i - 1] * (below.y + right);
      second += tap[2 * i - 1] * (left + above.x);
      first += tap[2 * i] * (below.x + above.x);
      second += tap[2 * i] * (below.y + above.y);
      left = below.x;
      right = above.y;
    }
    next[2 * t] = next[-2 * t] = first;
    next[2 * t + 1] = next[-2 * t - 1] = second;
  }
}

// One block per bank -> out [rows, P]. Equivalent to `reference.notch_bank` and `reference.notch_filters`. For kBandsAtOnce bands at a time a thread
// each finds their edges, and a warp each their taps. Then, band after band, half of the threads convolve the bank so far with the band's taps, while
// the other half multiplies the bank's response by the band's.
// `workspace` [rows, numbers] is there only for what is too large for shared memory. At three blocks per multiprocessor, 64 utterances' 6 banks each
// run at once on an H100.
template <typename S, bool kInShared>
__global__ __launch_bounds__(kBankThreads, 3) void notch_bank_kernel(const NotchSource source, const __grid_constant__ FilterTable table,
                                                                     double sample_rate, const BankLayout layout, double* workspace, S* out) {
  alignas(16) __shared__ double shared[kInShared ? kBankShared : 2];
  __shared__ NotchBand bands[kBandsAtOnce];
  __shared__ double level;
  const int64_t b = blockIdx.x / source.count;
  const int f = int(blockIdx.x % source.count);
  const int64_t row = b * source.num_filters + source.first + f;
  const bool drawn = source.seeds != nullptr;
  double* const numbers = kInShared ? shared : workspace + row * layout.numbers;
  double* bank = numbers + layout.half;
  double* next = bank + 2 * layout.half;
  double* const half_taps = next + layout.half;
  for (int n = threadIdx.x; n < 4 * layout.half; n += kBankThreads) numbers[n] = n == layout.half ? 1 : 0;

  // A thread keeps its frequencies for all bands: the bank's response is the product of the bands' responses.
  constexpr int kEach = kResponsePairs / kBankHalf;
  const bool convolves = threadIdx.x < kBankHalf;
  double cos_w[kEach], response[2 * kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    cos_w[j] = convolves ? 0 : cos_pi(double(threadIdx.x - kBankHalf + 1 + j * kBankHalf) / (2 * kResponsePairs));
    response[2 * j] = response[2 * j + 1] = 1;
  }
  int reach = 0;
  for (int first = 0; first < layout.num_bands; first += kBandsAtOnce) {
    const int count = min(kBandsAtOnce, layout.num_bands - first), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (threadIdx.x < count) {
      NotchBand band;
      if (drawn) {
        const NotchDraw draw = draw_notch(uint64_t(source.seeds[b]), table.number[f], uint32_t(first + threadIdx.x), source.ranges);
        band = notch_band(draw.center_hz, draw.width_hz, draw.taps, sample_rate);
      } else {
        const int64_t at = row * layout.num_bands + first + threadIdx.x;
        band = notch_band(source.center_hz[at], source.width_hz[at], source.taps[at], sample_rate);
      }
      // A band longer than its room in the bank is designed for that room.
      band.reach = min(max(band.reach, 0), layout.most_reach);
      bands[threadIdx.x] = band;
    }
    __syncthreads();
    if (warp < count) {
      const NotchBand band = bands[warp];
      double* const tap = half_taps + warp * layout.stride;
      double sum = 0;
      for (int m = lane; m <= band.reach + 1; m += kWarp) {
        tap[m] = m <= band.reach ? notch_tap(band, m) : 0;
        sum += m == 0 ? tap[m] : 2 * tap[m];
      }
      const double scale = 1 / __shfl_sync(kAllLanes, warp_reduce(sum, Add{}), 0);
      for (int m = lane; m <= band.reach; m += kWarp) tap[m] *= scale;
    }
    // The last warp has no band of the published five.
    if (first == 0 && threadIdx.x == kBankThreads - 1) {
      double gain_db;
      if (drawn) {
        const double gain = draw_notch(uint64_t(source.seeds[b]), table.number[f], 0, source.ranges).gain;
        gain_db = gain * (table.max_gain_db[f] - table.min_gain_db[f]) + table.min_gain_db[f];
      } else {
        gain_db = source.gain_db[row];
      }
      level = exp10(gain_db / 20);
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const double* const tap = half_taps + i * layout.stride;
      if (convolves) {
        convolve(tap, bands[i].reach, bank, reach, next);
      } else {
        double band_response[2 * kEach];
        symmetric_response<kEach>(tap, bands[i].reach, cos_w, band_response, band_response + kEach);
#pragma unroll
        for (int j = 0; j < 2 * kEach; ++j) response[j] *= band_response[j];
      }
      reach += bands[i].reach;
      __syncthreads();
      double* const last = bank;
      bank = next;
      next = last;
    }
  }

  double peak = 1;
#pragma unroll
  for (int j = 0; j < 2 * kEach; ++j) peak = Larger{}(peak, fabs(response[j]));
  const double scale = level / block_reduce<kBankThreads>(peak, Larger{});
  for (int n = threadIdx.x; n < layout.num_taps; n += kBankThreads)
    out[row * layout.num_taps + n] = S(Wide<S>(scale * bank[n - layout.num_taps / 2]));
}

// Design the banks of `source` for each of `batch` utterances into out [B, num_filters, P].
void design_banks(const OnDevice& device, NotchSource source, const FilterTable& table, double sample_rate, int64_t batch, int64_t num_bands,
                  const Tensor& out) {
  const BankLayout layout(out.size(2), num_bands);
  dispatch_floating(out.scalar_type(), "dtype", [&](auto type) {
    using S = decltype(type);
    S* const to = out.mutable_data_ptr<S>();
    if (layout.numbers <= kBankShared)
      return device.launch(notch_bank_kernel<S, true>, batch * source.count, kBankThreads, source, table, sample_rate, layout, nullptr, to);
    const Tensor workspace = torch::stable::new_empty(out, {out.size(0) * out.size(1), layout.numbers}, ScalarType::Double);
    device.launch(notch_bank_kernel<S, false>, batch * source.count, kBankThreads, source, table, sample_rate, layout,
                  workspace.mutable_data_ptr<double>(), to);
  });
}

Tensor notch_bank(const Tensor& center_hz, const Tensor& width_hz, const Tensor& taps, const Tensor& gain_db, double sample_rate, int64_t num_taps,
                  ScalarType dtype) {
  const OnDevice device(center_hz);
  const int64_t batch = center_hz.size(0), num_filters = center_hz.size(1), num_bands = center_hz.size(2);
  Tensor out = torch::stable::new_empty(center_hz, {batch, num_filters, num_taps}, dtype);
  if (center_hz.numel() == 0) return torch::stable::zero_(out);
  check_same_device(width_hz, center_hz, "`width_hz`");
  check_same_device(taps, center_hz, "`taps`");
  check_same_device(gain_db, center_hz, "`gain_db`");
  const Tensor centers = contiguous_as(center_hz, ScalarType::Double), widths = contiguous_as(width_hz, ScalarType::Double);
  const Tensor counts = torch::stable::contiguous(taps), gains = contiguous_as(gain_db, ScalarType::Double);
  const NotchSource source{centers.const_data_ptr<double>(),
                           widths.const_data_ptr<double>(),
                           gains.const_data_ptr<double>(),
                           counts.const_data_ptr<int64_t>(),
                           nullptr,
                           {},
                           0,
                           int(num_filters),
                           int(num_filters)};
  design_banks(device, source, FilterTable{}, sample_rate, batch, num_bands, out);
  return out;
}

Tensor notch_filters(const Tensor& seeds, const std::vector<int64_t>& filters, const std::vector<double>& min_gain_db,
                     const std::vector<double>& max_gain_db, int64_t num_bands, double min_center_hz, double max_center_hz, double min_width_hz,
                     double max_width_hz, double min_taps, double max_taps, double sample_rate, int64_t num_taps, ScalarType dtype) {
  const OnDevice device(seeds);
  const int64_t batch = seeds.size(0), num_filters = int64_t(filters.size());
  const Tensor keys = torch::stable::contiguous(seeds);
  Tensor out = torch::stable::new_empty(seeds, {batch, num_filters, num_taps}, dtype);
  const NotchRanges ranges{min_center_hz, max_center_hz, min_width_hz, max_width_hz, min_taps, max_taps};
  for (int64_t first = 0; first < num_filters; first += kFilterTable) {
    const int64_t count = std::min<int64_t>(kFilterTable, num_filters - first);
    FilterTable table{};
    for (int64_t f = 0; f < count; ++f) {
      table.number[f] = uint32_t(filters[first + f]);
      table.min_gain_db[f] = min_gain_db[first + f];
      table.max_gain_db[f] = max_gain_db[first + f];
    }
    const NotchSource source{nullptr, nullptr, nullptr, nullptr, keys.const_data_ptr<int64_t>(), ranges, int(first), int(count), int(num_filters)};
    design_banks(device, source, table, sample_rate, batch, num_bands, out);
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------------- the filters

// One block per filter: filters [B, F, P] -> spectra [B, count, 4096] of those from `first` on, in the order of Fft, divided by the number of points.
__global__ __launch_bounds__(Fft::kThreads) void spectra_kernel(const float* filters, int per_utterance, int num_taps, int first, int count,
                                                                float2* spectra) {
  __shared__ float2 exchange[Fft::kShared];
  const float* const taps = filters + (int64_t(blockIdx.x / count) * per_utterance + first + blockIdx.x % count) * num_taps;
  const Fft fft;
  float2 v[Fft::kEach];
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) {
    const int k = threadIdx.x + r * Fft::kThreads;
    v[r] = {k < num_taps ? taps[k] / Fft::kPoints : 0.0f, 0.0f};
  }
  fft.forward(v, exchange);
#pragma unroll
  for (int r = 0; r < Fft::kEach; ++r) spectra[int64_t(blockIdx.x) * Fft::kPoints + r * Fft::kThreads + threadIdx.x] = v[r];
}

Tensor spectra(const OnDevice& device, const Bank& bank, int first, int count) {
  const int64_t batch = bank.taps.size(0);
  Tensor out = torch::stable::new_empty(bank.taps, {batch, count, Fft::kPoints, 2}, ScalarType::Float);
  device.launch(spectra_kernel, batch * count, Fft::kThreads, bank.data<float>(), bank.per_utterance, bank.num_taps, first, count,
                static_cast<float2*>(out.mutable_data_ptr()));
  return out;
}

// Where a pass of filtered powers puts its samples, and what a tile knows of them [B, tiles]: their sum, the largest and the largest negated one.
template <typename T>
struct PowersOut {
  T* z;
  double* sums;
  T *above, *below;
};

// Where a pass of filtered noise puts its samples, and the tiles' sums of squares of x and of them [B, tiles].
template <typename T>
struct NoiseOut {
  T* colored;
  double *signal_squares, *noise_squares;
};

// What a thread knows of the samples it has filtered. NaN shows in the sum alone.
template <typename T>
struct PowerSums {
  T sum = 0, above = -INFINITY, below = -INFINITY;
  __device__ void add(T v) {
    sum += v;
    above = fmax(above, v);
    below = fmax(below, -v);
  }
  template <int kThreads>
  __device__ void store(const PowersOut<T>& out, int64_t tile) {
    const double total = block_reduce<kThreads>(double(sum), Add{});
    above = block_reduce<kThreads>(above, Larger{});
    below = block_reduce<kThreads>(below, Larger{});
    if (threadIdx.x > 0) return;
    out.sums[tile] = total;
    out.above[tile] = above;
    out.below[tile] = below;
  }
};

// The squares of the thread's samples of x and of `square`, that of the filtered noise, of a tile; x may be null (its squares are not asked for).
// They are float64: those of samples below 1e-23 would vanish in float32.
template <typename T, int kThreads>
__device__ void store_squares(const Wave& x, int64_t b, int first, int end, double square, const NoiseOut<T>& out, int64_t tile) {
  double signal = 0;
  if (x.data != nullptr) own_samples<T, kThreads>(x, b, end, first, end, [&](int, T v) { signal += double(v) * double(v); });
  signal = block_reduce<kThreads>(signal, Add{});
  square = block_reduce<kThreads>(square, Add{});
  if (threadIdx.x > 0) return;
  out.signal_squares[tile] = signal;
  out.noise_squares[tile] = square;
}

// `own_samples` of the noise of utterance b (and of up to three more samples at either end): `noise` [B, T] or, where its data is null, drawn from
// the utterance's seed.
template <typename T, int kThreads, typename Put>
__device__ void white_noise(const Wave& noise, const int64_t* seeds, int64_t b, int length, int start, int end, Put&& put) {
  if (noise.data != nullptr) return own_samples<T, kThreads>(noise, b, length, start, end, put);
  // Philox gives four samples at a time; the shift rounds down, also below 0, where every sample is 0.
  for (int quad = (start >> 2) + int(threadIdx.x); 4 * quad < end; quad += kThreads) {
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

// One block per (utterance, tile): z = sum over i of FIR_i(x**i) by the first num_filters of filters [B, F, P].
// Equivalent to `reference.lnl` before its mean and norm. Eight blocks per multiprocessor leave a thread 64 registers; any number of branches (N = 0)
// takes more.
template <typename T, int N>
__global__ __launch_bounds__(Fir<T, N>::kThreads, N == 0 ? 4 : 8) void lnl_kernel(Wave x, const T* filters, int per_utterance, int num_filters,
                                                                                  int num_taps, Rows rows, int num_tiles, PowersOut<T> out) {
  using F = Fir<T, N>;
  __shared__ FirShared<T, N> shared;
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * F::kTile, length = rows.length(b);
  // Tiles beyond the utterance are never asked for.
  if (first >= length) return;
  T value[F::kOutputs];
  fir<T, N>(filters + b * per_utterance * num_taps, num_filters, num_taps, first, shared, value, [&](int start, int count) {
    own_samples<T, F::kThreads>(x, b, length, start, start + count, [&](int n, T v) { shared.window[F::place(n - start)] = v; });
  });
  PowerSums<T> sums;
#pragma unroll
  for (int r = 0; r < F::kOutputs; ++r)
    if (first + int(threadIdx.x) * F::kOutputs + r < length) sums.add(value[r]);
  sums.template store<F::kThreads>(out, blockIdx.x);
  store_tile<T, N>(value, shared, out.z + b * rows.num_samples, first, length);
}

// One block per (utterance, tile): v = FIR(noise) by the last of filters [B, F, P]; noise that is drawn is never stored.
// Equivalent to the first half of `reference.ssi`.
template <typename T, int N>
__global__ __launch_bounds__(Fir<T, N>::kThreads) void ssi_kernel(Wave x, Wave noise, const int64_t* seeds, const T* filters, int per_utterance,
                                                                  int num_taps, Rows rows, int num_tiles, NoiseOut<T> out) {
  using F = Fir<T, N>;
  __shared__ FirShared<T, N> shared;
  const int64_t b = blockIdx.x / num_tiles;
  const int first = int(blockIdx.x % num_tiles) * F::kTile, length = rows.length(b);
  if (first >= length) return;
  T value[F::kOutputs];
  fir<T, N>(filters + ((b + 1) * per_utterance - 1) * num_taps, 1, num_taps, first, shared, value, [&](int start, int count) {
    white_noise<T, F::kThreads>(noise, seeds, b, length, start, start + count, [&](int n, T v) {
      if (n >= start && n < start + count) shared.window[F::place(n - start)] = v;
    });
  });
  double square = 0;
#pragma unroll
  for (int r = 0; r < F::kOutputs; ++r)
    if (first + int(threadIdx.x) * F::kOutputs + r < length) square += double(value[r]) * double(value[r]);
  store_squares<T, F::kThreads>(x, b, first, min(first + F::kTile, length), square, out, blockIdx.x);
  store_tile<T, N>(value, shared, out.colored + b * rows.num_samples, first, length);
}

// `lnl_kernel` and `ssi_kernel` by overlap-save, in one launch, so that the short blocks of the noise fill the gaps that the others leave at the
// end: the first power_blocks blocks filter powers of x by num_filters filters, the rest the noise by the last of spectra [B, F, 4096].
__global__ __launch_bounds__(Fft::kThreads, 2) void filter_fft_kernel(Wave x, Wave noise, const int64_t* seeds, const float2* spectra,
                                                                      int per_utterance, int num_filters, int num_taps, Rows rows, int num_tiles,
                                                                      int power_blocks, PowersOut<float> powers, Wave signal,
                                                                      NoiseOut<float> colored) {
  extern __shared__ float2 memory[];
  const Segments segments(num_taps);
  const bool is_noise = int(blockIdx.x) >= power_blocks;
  const int tile = int(blockIdx.x) - (is_noise ? power_blocks : 0);
  const int64_t b = tile / num_tiles;
  const int first = tile % num_tiles * segments.tile(), length = rows.length(b);
  // Tiles beyond the utterance are never asked for.
  if (first >= length) return;
  float2 value[Fft::kEach];
  const float2* const own = spectra + (is_noise ? (b + 1) * per_utterance - 1 : b * per_utterance) * Fft::kPoints;
  fft_filter(own, is_noise ? 1 : num_filters, segments, first, memory, value, [&](int start, int count, auto put) {
    if (is_noise)
      white_noise<float, Fft::kThreads>(noise, seeds, b, length, start, start + count, put);
    else
      own_samples<float, Fft::kThreads>(x, b, length, start, start + count, put);
  });
  float* const row = (is_noise ? colored.colored : powers.z) + b * rows.num_samples;
  auto store = [&](auto&& know) {
#pragma unroll
    for (int r = 0; r < Fft::kEach; ++r) {
      const int m = threadIdx.x + r * Fft::kThreads;
      if (m < num_taps - 1) continue;
#pragma unroll
      for (int segment = 0; segment < 2; ++segment) {
        const int n = segments.output(first, segment, m);
        const float v = segment == 0 ? value[r].x : value[r].y;
        if (n < length) row[n] = v, know(v);
      }
    }
  };
  if (is_noise) {
    double square = 0;
    store([&](float v) { square += double(v) * double(v); });
    store_squares<float, Fft::kThreads>(signal, b, first, min(first + segments.tile(), length), square, colored, tile);
  } else {
    PowerSums<float> sums;
    store([&](float v) { sums.add(v); });
    sums.store<Fft::kThreads>(powers, tile);
  }
}

Powers new_powers(const Batch& batch, int tile, const Tensor& z) {
  const int tiles = divide_up(batch.num_samples, tile);
  return {z, torch::stable::new_empty(z, {batch.size, tiles}, ScalarType::Double), torch::stable::new_empty(z, {2, batch.size, tiles}), tile, tiles};
}

template <typename T>
PowersOut<T> out_of(const Powers& powers) {
  T* const above = powers.extrema.mutable_data_ptr<T>();
  return {powers.z.mutable_data_ptr<T>(), powers.sums.mutable_data_ptr<double>(), above, above + powers.extrema.numel() / 2};
}

Colored new_colored(const Batch& batch, int tile, const Tensor& samples) {
  const int tiles = divide_up(batch.num_samples, tile);
  return {samples, torch::stable::new_empty(samples, {2, batch.size, tiles}, ScalarType::Double), tile, tiles};
}

template <typename T>
NoiseOut<T> out_of(const Colored& colored) {
  double* const squares = colored.squares.mutable_data_ptr<double>();
  return {colored.samples.mutable_data_ptr<T>(), squares, squares + colored.squares.numel() / 2};
}

// Launch `filter_fft_kernel` for what is asked for: powers of x, the noise (into `colored`), or both.
void filter_fft(const OnDevice& device, const Tensor& x, const Bank& bank, const Batch& batch, int num_filters, const Powers* powers,
                const Noise* noise, const Colored* colored, bool signal) {
  const int tile = Segments(bank.num_taps).tile(), tiles = divide_up(batch.num_samples, tile);
  const int64_t blocks = batch.size * tiles;
  // Of the filters, those that are used: all, or only LnL's or SSI's.
  const int first = powers ? 0 : bank.per_utterance - 1, count = powers && !noise ? num_filters : bank.per_utterance - first;
  const Tensor spectrum = spectra(device, bank, first, count);
  device.launch_with_memory(kFftBytes, filter_fft_kernel, blocks * ((powers != nullptr) + (noise != nullptr)), Fft::kThreads, wave_of(x),
                            noise ? noise->given : Wave{}, noise ? noise->seeds() : nullptr, static_cast<const float2*>(spectrum.const_data_ptr()),
                            count, num_filters, bank.num_taps, batch.rows(), tiles, powers ? int(blocks) : 0,
                            powers ? out_of<float>(*powers) : PowersOut<float>{}, signal ? wave_of(x) : Wave{},
                            noise ? out_of<float>(*colored) : NoiseOut<float>{});
}

Powers filter_powers(const OnDevice& device, const Tensor& x, const Bank& bank, int num_filters, const Batch& batch, const Tensor& z) {
  if (filter_by_fft(x, num_filters, bank.num_taps, !is_wide(x))) {
    const Powers powers = new_powers(batch, Segments(bank.num_taps).tile(), z);
    filter_fft(device, x, bank, batch, num_filters, &powers, nullptr, nullptr, false);
    return powers;
  }
  auto run = [&](auto type, auto branches) {
    using T = decltype(type);
    constexpr int N = decltype(branches)::value;
    using F = Fir<T, N>;
    const Powers powers = new_powers(batch, F::kTile, z);
    device.launch(lnl_kernel<T, N>, batch.size * powers.tiles, F::kThreads, wave_of(x), bank.data<T>(), bank.per_utterance, num_filters,
                  bank.num_taps, batch.rows(), powers.tiles, out_of<T>(powers));
    return powers;
  };
  if (x.scalar_type() == ScalarType::Double) return run(double{}, std::integral_constant<int, 0>{});
  if (num_filters > 5) return run(float{}, std::integral_constant<int, 0>{});
  return run(float{}, std::integral_constant<int, 5>{});
}

Colored color_noise(const OnDevice& device, const Tensor& x, const Bank& bank, const Batch& batch, const Noise& noise, const Tensor& samples,
                    bool signal) {
  if (filter_by_fft(x, 1, bank.num_taps, !is_wide(x))) {
    const Colored colored = new_colored(batch, Segments(bank.num_taps).tile(), samples);
    filter_fft(device, x, bank, batch, 0, nullptr, &noise, &colored, signal);
    return colored;
  }
  return dispatch_wide(x, [&](auto type) {
    using T = decltype(type);
    constexpr int N = std::is_same_v<T, float> ? 1 : 0;
    using F = Fir<T, N>;
    const Colored colored = new_colored(batch, F::kTile, samples);
    device.launch(ssi_kernel<T, N>, batch.size * colored.tiles, F::kThreads, signal ? wave_of(x) : Wave{}, noise.given, noise.seeds(), bank.data<T>(),
                  bank.per_utterance, bank.num_taps, batch.rows(), colored.tiles, out_of<T>(colored));
    return colored;
  });
}

// --------------------------------------------------------------------------------------------------------------------------- the impulses

// One thread per rank, kBlock / kThreads of them in turn: marks [B, words] gets a bit at the position of each rank that is chosen.
__global__ __launch_bounds__(kThreads) void isd_mark_kernel(const int64_t* seeds, Rows rows, double p, int blocks_per_row, int64_t words,
                                                            uint32_t* marks) {
  const int64_t b = blockIdx.x / blocks_per_row;
  const int length = rows.length(b);
  const uint64_t seed = uint64_t(seeds[b]);
  const uint32_t wanted = uint32_t(floor(double(length) * (uniform(philox(seed, kStreamIsdBeta, 0).w[0], 0.0, p) / 100)));
  const uint32_t first = blockIdx.x % blocks_per_row * kBlock;
  if (first >= wanted) return;
  const Bijection pi = make_bijection(seed, uint32_t(length));
  for (uint32_t rank = first + threadIdx.x; rank < min(first + kBlock, wanted); rank += kThreads) {
    const uint32_t n = unpermute(pi, rank);
    atomicOr(marks + b * words + n / 32, 1u << n % 32);
  }
}

Marked::Marked(const OnDevice& device, const Tensor& x, const Batch& batch, const std::optional<Tensor>& seeds, const std::optional<Tensor>& factor,
               double p) {
  // A given factor goes before the seeds, as in the reference.
  check_same_device(factor ? *factor : *seeds, x, factor ? "`factor`" : "`seeds`");
  if (factor) {
    given_ = wave_of(*factor);
    return;
  }
  keys_ = torch::stable::contiguous(*seeds);
  const int64_t words = divide_up(batch.num_samples, 32), most = int64_t(batch.num_samples * (p / 100));
  marks_ = torch::stable::new_zeros(x, {batch.size, words}, ScalarType::Int);
  const int blocks = int(divide_up<int64_t>(most, kBlock));
  device.launch(isd_mark_kernel, batch.size * blocks, kThreads, keys_->const_data_ptr<int64_t>(), batch.rows(), p, blocks, words,
                static_cast<uint32_t*>(marks_->mutable_data_ptr()));
}

// One block per (utterance, block of samples): y = v * (1 + g_sd * f) + addend, where v is `source` or, where `powers` is there, (source - mean) /
// peak; the block's peak and, where asked for, sum of squares [B, blocks]. `source` and `addend` may be y.
template <typename S>
__global__ __launch_bounds__(kThreads) void isd_kernel(Wave source, PowerTiles<Wide<S>> powers, Impulses impulses, Wide<S> g_sd, Wave addend,
                                                       Rows rows, int num_blocks, S* y, Wide<S>* peaks, double* squares) {
  using T = Wide<S>;
  __shared__ Factors factors;
  __shared__ Extent<T> extent;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
  // The samples are on their way while the factors are drawn and the utterance's level is found.
  T v[kEach], f[kEach];
  block_samples(source, b, length, first, v);
  if (powers.sums != nullptr) extent.find(powers, b, length);
  block_factors(impulses, b, length, first, factors, f);
  __syncthreads();
  Level<T> level{0, 1};
  if (powers.sums != nullptr) level = extent.level(length);
  const T scale = 1 / level.divisor();
#pragma unroll
  for (int r = 0; r < kEach; ++r) v[r] = (v[r] - level.mean) * scale * (1 + g_sd * f[r]);
  if (addend.data != nullptr) {
    block_samples(addend, b, length, first, f);
#pragma unroll
    for (int r = 0; r < kEach; ++r) v[r] += f[r];
  }
  T peak = 0;
  double square = 0;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    if (first + int(threadIdx.x) + r * kThreads >= length) continue;
    peak = Larger{}(peak, T(fabs(v[r])));
    square += double(v[r]) * double(v[r]);
  }
  store_block(y, b, rows.num_samples, length, first, v);
  peak = block_reduce<kThreads>(peak, Larger{});
  if (squares != nullptr) square = block_reduce<kThreads>(square, Add{});
  if (threadIdx.x > 0) return;
  peaks[blockIdx.x] = peak;
  if (squares != nullptr) squares[blockIdx.x] = square;
}

// ---------------------------------------------------------------------------------------------------------------------------------- finish

// What is left: of `source` minus the mean and by the norm of `powers`, by the norm of `peaks`, plus the noise `colored` [B, T] at its level, where
// each of these is there; 0 beyond the utterance. `source` and `colored` may be `out`. Silence stays silence.
template <typename S>
__global__ __launch_bounds__(kThreads) void rawboost_finish_kernel(Wave source, PowerTiles<Wide<S>> powers, Tiles<Wide<S>> peaks, Wave colored,
                                                                   Tiles<double> signal, Tiles<double> noise, NoiseLevel noise_level, Rows rows,
                                                                   int num_blocks, S* out) {
  using T = Wide<S>;
  __shared__ Extent<T> extent;
  __shared__ T largest;
  __shared__ double signal_square, noise_square;
  const int64_t b = blockIdx.x / num_blocks;
  const int first = int(blockIdx.x % num_blocks) * kBlock, length = rows.length(b);
  if (powers.sums != nullptr) extent.find(powers, b, length);
  combine_tiles(3, peaks, b, length, T(-INFINITY), Larger{}, largest);
  combine_tiles(4, signal, b, length, 0.0, Add{}, signal_square);
  combine_tiles(5, noise, b, length, 0.0, Add{}, noise_square);
  const bool adds = colored.data != nullptr;
  T v[kEach], white[kEach] = {};
  // On their way while the level is found. Without noise, there may be nothing to do.
  if (adds) block_samples(source, b, length, first, v), block_samples(colored, b, length, first, white);
  __syncthreads();
  Level<T> level{0, 1};
  if (powers.sums != nullptr) level = extent.level(length);
  if (peaks.of != nullptr) level.peak = largest;
  const T divisor = level.divisor(), scale = 1 / divisor;
  T noise_scale = 0;
  if (!adds) {
    // Every sample is where it belongs.
    if (source.data == out && level.mean == 0 && divisor == 1 && first + kBlock <= length) return;
    block_samples(source, b, length, first, v);
  } else if (noise_square > 0) {
    noise_scale = T(sqrt(signal_square) / double(divisor) / sqrt(noise_square) * noise_level(b));
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) v[r] = (v[r] - level.mean) * scale + noise_scale * white[r];
  store_block(out, b, rows.num_samples, length, first, v);
}

// ---------------------------------------------------------------------------------------------------------------------------- the chain

// Writes what `rawboost` returns into batch.out. With norm(v) = v / max(1, max |v|), and the noise filtered and at its level, the passes are
//
//        filter_powers, color_noise   isd_kernel                       rawboost_finish_kernel
//   1    z                                                             out = norm(z - mean)
//   2                                 y = x * gain                     out = norm(y)
//   3          noise                                                   out = x + noise
//   4    z and noise                  out = norm(z - mean) * gain      out = norm(out) + noise
//   5    z                            out = norm(z - mean) * gain      out = norm(out)
//   6    z and noise                  out = norm(z - mean)             out = norm(out) + noise
//   7          noise                  out = x * gain                   out = norm(out) + noise
//   8    what 2 does, and then
//        z                            out = norm(z - mean) + out       out = norm(out)
//
// Half precision may not hold x * gain: there 7 is 2, and then 3 with the result in the place of x. In float32, where memory allows, one launch
// filters z and the noise together; else the noise of 4, 6 and 7 comes after isd_kernel. z, y and the noise have the dtype of computation and lie
//
//          float32, float64             half precision
//   z      in out; of 8 beside it       beside out
//   y      in out                       beside out
//   noise  beside out; of 3 in it       beside out; of 4 and 6 where z was
//
// so that there is never more than one [B, T] beside the result.
void chain(const Batch& batch, const Tensor& x, const std::optional<Tensor>& filters, const std::optional<Tensor>& seeds,
           const std::optional<Tensor>& factor, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, int64_t algo, double p,
           double g_sd, double snr_min, double snr_max) {
  const Steps steps = steps_of(algo);
  const OnDevice device(x);
  std::optional<Bank> bank;
  std::optional<Marked> marked;
  std::optional<Noise> drawn;
  if (steps.lnl || steps.ssi) bank.emplace(*filters, x);
  if (steps.isd) marked.emplace(device, x, batch, seeds, factor, p);
  if (steps.ssi) drawn.emplace(x, seeds, noise, snr_db, snr_min, snr_max);

  dispatch_floating(x.scalar_type(), "x", [&](auto stored) {
    using S = decltype(stored);
    using T = Wide<S>;
    const Tensor& out = batch.out;
    // Of the last isd_kernel's result.
    const Tensor peaks = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, wide_dtype(x));
    const Tensor squares = torch::stable::new_empty(x, {batch.size, batch.num_blocks}, ScalarType::Double);
    const Tiles<T> of_peaks{peaks.const_data_ptr<T>(), kBlock, batch.num_blocks};
    const Tiles<double> of_squares{squares.const_data_ptr<double>(), kBlock, batch.num_blocks};

    // The table's columns. A pass that gets `level` takes norm(source - mean) by it.
    const auto filter = [&](const Tensor& z) { return filter_powers(device, x, *bank, bank->per_utterance - steps.ssi, batch, z); };
    const auto pass = [&](Wave source, const PowerTiles<T>& level, const Impulses& impulses, Wave addend, const Tensor& to) {
      const auto run = [&](auto type) {
        using Y = decltype(type);
        device.launch(isd_kernel<Y>, batch.blocks(), kThreads, source, level, impulses, T(g_sd), addend, batch.rows(), batch.num_blocks,
                      to.mutable_data_ptr<Y>(), peaks.mutable_data_ptr<T>(), steps.ssi ? squares.mutable_data_ptr<double>() : nullptr);
      };
      to.scalar_type() == x.scalar_type() ? run(S{}) : run(T{});
    };
    const auto finish = [&](Wave source, const PowerTiles<T>& level, const Tiles<T>& norm, const std::optional<Colored>& colored = {},
                            const Tiles<double>& signal = {}) {
      device.launch(rawboost_finish_kernel<S>, batch.blocks(), kThreads, source, level, norm, colored ? wave_of(colored->samples) : Wave{},
                    colored ? signal : Tiles<double>{}, colored ? colored->noise() : Tiles<double>{}, NoiseLevel(drawn), batch.rows(),
                    batch.num_blocks, out.mutable_data_ptr<S>());
    };
    // Rows 2 and 3.
    const auto isd_alone = [&] {
      const Tensor y = batch.scratch();
      pass(wave_of(x), {}, marked->impulses(), {}, y);
      finish(wave_of(y), {}, of_peaks);
    };
    const auto ssi_alone = [&](const Tensor& source) {
      const Colored colored = color_noise(device, source, *bank, batch, *drawn, batch.scratch(), true);
      finish(wave_of(source), {}, {}, colored, colored.signal());
    };

    if (algo == 1) {
      const Powers powers = filter(batch.scratch());
      return finish(wave_of(powers.z), powers.parts<T>(), {});
    }
    if (algo == 2) return isd_alone();
    if (algo == 3) return ssi_alone(x);
    if (algo == 7 && !is_wide(x)) {
      isd_alone();
      return ssi_alone(out);
    }
    if (algo == 8) {
      isd_alone();
      const Powers powers = filter(batch.new_samples());
      pass(wave_of(powers.z), powers.parts<T>(), {}, wave_of(out), out);
      return finish(wave_of(out), {}, of_peaks);
    }

    // 4 to 7.
    const Tensor z = batch.scratch(), samples = steps.ssi && is_wide(x) ? batch.new_samples() : z;
    std::optional<Powers> powers;
    std::optional<Colored> colored;
    if (steps.lnl && steps.ssi && is_wide(x) && filter_by_fft(x, bank->per_utterance, bank->num_taps, 1)) {
      const int tile = Segments(bank->num_taps).tile();
      powers = new_powers(batch, tile, z), colored = new_colored(batch, tile, samples);
      filter_fft(device, x, *bank, batch, bank->per_utterance - 1, &*powers, &*drawn, &*colored, false);
    } else if (steps.lnl) {
      powers = filter(z);
    }
    const Impulses impulses = marked ? marked->impulses() : Impulses{};
    powers ? pass(wave_of(z), powers->parts<T>(), impulses, {}, out) : pass(wave_of(x), {}, impulses, {}, out);
    if (steps.ssi && !colored) colored = color_noise(device, x, *bank, batch, *drawn, samples, false);
    finish(wave_of(out), {}, of_peaks, colored, of_squares);
  });
}

Tensor rawboost(const Tensor& x, const std::optional<Tensor>& filters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
                const std::optional<Tensor>& factor, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, int64_t algo, double p,
                double g_sd, double snr_min, double snr_max) {
  return in_parts(x, [&](const Part& part, const Tensor& out) {
    const Tensor own = part(x);
    chain(Batch(own, part(lengths), out), own, part(filters), part(seeds), part(factor), part(noise), part(snr_db), algo, p, g_sd, snr_min, snr_max);
  });
}

Tensor lnl(const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths) {
  return rawboost(x, filters, lengths, {}, {}, {}, {}, 1, 0, 0, 0, 0);
}

Tensor isd(const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds, const std::optional<Tensor>& factor, double p,
           double g_sd) {
  return rawboost(x, {}, lengths, seeds, factor, {}, {}, 2, p, g_sd, 0, 0);
}

Tensor ssi(const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
           const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min, double snr_max) {
  return rawboost(x, filters, lengths, seeds, {}, noise, snr_db, 3, 0, 0, snr_min, snr_max);
}

}  // namespace gradalign::cuda

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CUDA, m) {
  m.impl("notch_bank", TORCH_BOX(&gradalign::cuda::notch_bank));
  m.impl("notch_filters", TORCH_BOX(&gradalign::cuda::notch_filters));
  m.impl("lnl", TORCH_BOX(&gradalign::cuda::lnl));
  m.impl("isd", TORCH_BOX(&gradalign::cuda::isd));
  m.impl("ssi", TORCH_BOX(&gradalign::cuda::ssi));
  m.impl("rawboost", TORCH_BOX(&gradalign::cuda::rawboost));
}
