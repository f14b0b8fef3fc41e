// RawBoost on the CPU: notch_bank, notch_filters, lnl, isd, ssi, their gradients in the waveform, and rawboost. Equivalent to the functions of these
// names in gradalign/reference.py.
// One utterance per task; nothing an utterance yields depends on the batch around it or on the number of threads.
#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>

#include "bijection.h"
#include "common.h"
#include "fft.h"
#include "notch.h"
#include "steps.h"
#include "sums.h"

namespace gradalign {

// ------------------------------------------------------------------------------------------------------------------ the filter bank

// Buffers of one thread, kept between utterances.
template <typename T>
struct Scratch {
  std::vector<T> wave, out, noise, grad, gain;
  std::vector<Complex<T>> base, power, work, sum, spectra;
  std::map<int, std::unique_ptr<Twiddles<T>>> twiddles;

  const Twiddles<T>& plan(int n) {
    auto& entry = twiddles[n];
    if (!entry) entry = std::make_unique<Twiddles<T>>(n);
    return *entry;
  }
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// Rows of a tile stay in the first-level cache while every block writes, or is read by, its column of them.
constexpr int64_t kTile = 64;

// base[t], column c = x[(first + c) * hop + advance + t], zero outside [0, length).
template <typename T>
GRADALIGN_INLINE void load_blocks(const T* x, int64_t length, int64_t first, int64_t hop, int64_t advance, int points, Complex<T>* base) {
  constexpr int kColumns = 2 * LaneVector<T>::count;
  for (int64_t tile = 0; tile < points; tile += kTile) {
    for (int column = 0; column < kColumns; ++column) {
      const int64_t start = (first + column) * hop + advance + tile;
      const int64_t from = std::clamp<int64_t>(-start, 0, kTile), to = std::clamp<int64_t>(length - start, from, kTile);
      T* row = reinterpret_cast<T*>(&base[tile]) + column;
      for (int64_t t = 0; t < from; ++t) row[t * kColumns] = 0;
      for (int64_t t = from; t < to; ++t) row[t * kColumns] = x[start + t];
      for (int64_t t = to; t < kTile; ++t) row[t * kColumns] = 0;
    }
  }
}

// The inverse of load_blocks for the `hop` results of each block: y = sum, or with `wave` y += (power + 1) * wave^power * sum.
template <typename T>
GRADALIGN_INLINE void store_blocks(const Complex<T>* sum, int64_t length, int64_t first, int64_t hop, const T* wave, int64_t power, T* y) {
  constexpr int kColumns = 2 * LaneVector<T>::count;
  for (int64_t tile = 0; tile < hop; tile += kTile) {
    for (int column = 0; column < kColumns; ++column) {
      const int64_t start = (first + column) * hop + tile, count = std::min({kTile, hop - tile, length - start});
      const T* row = reinterpret_cast<const T*>(&sum[tile]) + column;
      if (wave == nullptr) {
        for (int64_t t = 0; t < count; ++t) y[start + t] = row[t * kColumns];
        continue;
      }
      for (int64_t t = 0; t < count; ++t) {
        T factor = T(power + 1);
        for (int64_t i = 0; i < power; ++i) factor *= wave[start + t];
        y[start + t] += factor * row[t * kColumns];
      }
    }
  }
}

// Overlap-save, with the signal's blocks in the lanes' real and imaginary parts (the filters are real, so the two never mix). x is zero
// outside [0, length). Without `wave`:
//   y[n] = sum over branches i and taps k of b_i[k] * x[n + (P+1)/2 - k]^(i+1).
// With `wave`, the gradient of that in the waveform, x being the gradient in y (correlation is filtering with the mirror image):
//   y[n] = sum over i of (i+1) * wave[n]^i * sum over k of b_i[k] * x[n - (P+1)/2 + k].
template <typename T>
GRADALIGN_INLINE void filter_bank(const T* x, const T* filters, int64_t num_filters, int64_t num_taps, int64_t length, const T* wave, T* y,
                                  Scratch<T>& s) {
  using Vector = typename LaneVector<T>::type;
  constexpr int kLanes = LaneVector<T>::count;
  // The transform size of least work: points times stages, over the groups of blocks it needs.
  int points = 0;
  int64_t groups = 0;
  double least = 0;
  for (int n = 1024, stages = 10; n <= (1 << 24); n *= 2, ++stages) {
    int64_t hop = n - (num_taps - 1);
    if (n < 2 * num_taps) continue;
    int64_t needed = (length + 2 * kLanes * hop - 1) / (2 * kLanes * hop);
    double work = double(n) * stages * needed;
    if (points != 0 && work >= least) break;
    points = n, groups = needed, least = work;
  }
  const Twiddles<T>& w = s.plan(points);
  const int64_t hop = points - (num_taps - 1), advance = wave == nullptr ? (num_taps + 1) / 2 - (num_taps - 1) : -((num_taps + 1) / 2);

  // The filters' spectra, one filter per lane.
  const int64_t banks = (num_filters + kLanes - 1) / kLanes;
  s.spectra.assign(size_t(banks) * points, Complex<T>{});
  for (int64_t bank = 0; bank < banks; ++bank) {
    Complex<T>* h = s.spectra.data() + bank * points;
    for (int64_t i = bank * kLanes; i < std::min(num_filters, (bank + 1) * kLanes); ++i)
      for (int64_t k = 0; k < num_taps; ++k) {
        const T tap = filters[i * num_taps + (wave == nullptr ? k : num_taps - 1 - k)];
        reinterpret_cast<T*>(&h[k].re)[i % kLanes] = tap / T(points);
      }
    fft(h, w);
  }

  s.base.resize(points), s.power.resize(points), s.work.resize(points), s.sum.resize(points);
  if (wave != nullptr) std::fill_n(y, length, T(0));
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * 2 * kLanes;
    load_blocks(x, length, first, hop, advance, points, s.base.data());
    if (wave != nullptr) fft(s.base.data(), w);
    for (int64_t i = 0; i < num_filters; ++i) {
      const T* h = reinterpret_cast<const T*>(s.spectra.data() + (i / kLanes) * points) + i % kLanes;
      if (wave != nullptr) {
        for (int k = 0; k < points; ++k) s.sum[k] = times<T>(s.base[k], h[k * 2 * kLanes], h[k * 2 * kLanes + kLanes]);
        inverse_fft(s.sum.data(), w);
        store_blocks(s.sum.data() + num_taps - 1, length, first, hop, wave, i, y);
        continue;
      }
      for (int t = 0; t < points; ++t) {
        if (i == 0) {
          s.power[t] = s.base[t];
        } else {
          s.power[t].re *= s.base[t].re;
          s.power[t].im *= s.base[t].im;
        }
        s.work[t] = s.power[t];
      }
      fft(s.work.data(), w);
      for (int k = 0; k < points; ++k) {
        const Complex<T> product = times<T>(s.work[k], h[k * 2 * kLanes], h[k * 2 * kLanes + kLanes]);
        const Vector zero = {};
        s.sum[k].re = (i == 0 ? zero : s.sum[k].re) + product.re;
        s.sum[k].im = (i == 0 ? zero : s.sum[k].im) + product.im;
      }
    }
    if (wave == nullptr) {
      inverse_fft(s.sum.data(), w);
      store_blocks<T>(s.sum.data() + num_taps - 1, length, first, hop, nullptr, 0, y);
    }
  }
}

template <typename T>
GRADALIGN_INLINE void cond_norm(T* v, int64_t count) {
  T largest = peak(v, count);
  if (largest > 1)
    for (int64_t t = 0; t < count; ++t) v[t] /= largest;
}

// The gradient in cond_norm's result becomes the one in its argument v; of several largest magnitudes, the first one counts.
template <typename T>
GRADALIGN_INLINE void cond_norm_backward(const T* v, int64_t count, T* grad) {
  const T largest = peak(v, count);
  if (!(largest > 1)) return;
  for (int64_t t = 0; t < count; ++t) grad[t] /= largest;
  int64_t at = 0;
  while (at + 1 < count && std::abs(v[at]) != largest) ++at;
  grad[at] -= T(inner_product(grad, v, count) / double(largest)) * (v[at] < 0 ? T(-1) : T(1));
}

template <typename T>
GRADALIGN_INLINE void subtract_mean(T* v, int64_t count) {
  const T mean = T(wide_sum(v, count) / double(count));
  for (int64_t t = 0; t < count; ++t) v[t] -= mean;
}

template <typename T>
GRADALIGN_INLINE void lnl_utterance(const T* filters, int64_t num_filters, int64_t num_taps, int64_t length, Scratch<T>& s) {
  filter_bank<T>(s.wave.data(), filters, num_filters, num_taps, length, nullptr, s.out.data(), s);
  subtract_mean(s.out.data(), length);
  cond_norm(s.out.data(), length);
}

template <typename T>
GRADALIGN_INLINE void lnl_backward_utterance(const T* filters, int64_t num_filters, int64_t num_taps, int64_t length, Scratch<T>& s) {
  filter_bank<T>(s.wave.data(), filters, num_filters, num_taps, length, nullptr, s.out.data(), s);
  subtract_mean(s.out.data(), length);
  cond_norm_backward(s.out.data(), length, s.grad.data());
  subtract_mean(s.grad.data(), length);
  filter_bank<T>(s.grad.data(), filters, num_filters, num_taps, length, s.wave.data(), s.out.data(), s);
}

// gain = 1 + g_sd * f, f at the drawn positions.
template <typename T>
GRADALIGN_INLINE void isd_gain(uint64_t seed, double p, double g_sd, int64_t length, T* gain) {
  std::fill_n(gain, length, T(1));
  double beta = uniform(philox(seed, kStreamIsdBeta, 0).w[0], 0.0, p);
  int64_t count = int64_t(std::floor(double(length) * (beta / 100)));
  Bijection pi = make_bijection(seed, uint32_t(length));
  // A block of ranks is walked side by side in the lanes; of those that leave the range, few, each walks on alone.
  constexpr int kBlock = 64;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int ranks = int(std::min<int64_t>(kBlock, count - first));
    uint32_t at[kBlock];
    float factor[kBlock];
    for (int i = 0; i < kBlock; ++i) at[i] = unpermute_once(pi, uint32_t(first + i));
    for (int i = 0; i < ranks; ++i)
      if (at[i] >= pi.size) at[i] = unpermute(pi, at[i]);
    for (int i = 0; i < kBlock; ++i) {
      Words words = philox(seed, kStreamIsdFactor, at[i]);
      factor[i] = impulse_factor(words.w[0], words.w[1]);
    }
    for (int i = 0; i < ranks; ++i) gain[at[i]] = T(1) + T(g_sd) * T(factor[i]);
  }
}

template <typename T>
GRADALIGN_INLINE void isd_utterance(int64_t length, Scratch<T>& s) {
  for (int64_t t = 0; t < length; ++t) s.out[t] = s.wave[t] * s.gain[t];
  cond_norm(s.out.data(), length);
}

template <typename T>
GRADALIGN_INLINE void isd_backward_utterance(int64_t length, Scratch<T>& s) {
  for (int64_t t = 0; t < length; ++t) s.out[t] = s.wave[t] * s.gain[t];
  cond_norm_backward(s.out.data(), length, s.grad.data());
  for (int64_t t = 0; t < length; ++t) s.out[t] = s.grad[t] * s.gain[t];
}

// cond_norm of the sum of two steps' results.
template <typename T>
GRADALIGN_INLINE void add_utterance(int64_t length, Scratch<T>& s) {
  for (int64_t t = 0; t < length; ++t) s.out[t] += s.grad[t];
  cond_norm(s.out.data(), length);
}

template <typename T>
GRADALIGN_INLINE void white_noise(uint64_t seed, int64_t length, T* noise) {
  constexpr int kBlocks = 16;
  for (int64_t first = 0; first < length; first += 4 * kBlocks) {
    float sample[4][kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      Words words = philox(seed, kStreamSsiNoise, uint64_t(first / 4 + i));
      box_muller(words.w[0], words.w[1], &sample[0][i], &sample[1][i]);
      box_muller(words.w[2], words.w[3], &sample[2][i], &sample[3][i]);
    }
    int64_t count = std::min<int64_t>(4 * kBlocks, length - first);
    for (int64_t t = 0; t < count; ++t) noise[first + t] = T(sample[t % 4][t / 4]);
  }
}

// out = the filtered noise; returns what it is multiplied with beside |x|: 10^(-SNR/20) / |out|, 0 for silent noise.
template <typename T>
GRADALIGN_INLINE double ssi_noise(const T* filter, int64_t num_taps, int64_t length, double snr_db, Scratch<T>& s) {
  filter_bank<T>(s.noise.data(), filter, 1, num_taps, length, nullptr, s.out.data(), s);
  const double norm = std::sqrt(inner_product(s.out.data(), s.out.data(), length));
  return norm > 0 ? std::pow(10.0, -snr_db / 20) / norm : 0;
}

template <typename T>
GRADALIGN_INLINE void ssi_utterance(const T* filter, int64_t num_taps, int64_t length, double snr_db, Scratch<T>& s) {
  const double level = ssi_noise(filter, num_taps, length, snr_db, s);
  const T scale = T(std::sqrt(inner_product(s.wave.data(), s.wave.data(), length)) * level);
  for (int64_t t = 0; t < length; ++t) s.out[t] = s.wave[t] + scale * s.out[t];
}

template <typename T>
GRADALIGN_INLINE void ssi_backward_utterance(const T* filter, int64_t num_taps, int64_t length, double snr_db, Scratch<T>& s) {
  const double level = ssi_noise(filter, num_taps, length, snr_db, s), norm = std::sqrt(inner_product(s.wave.data(), s.wave.data(), length));
  const T toward_x = norm > 0 ? T(inner_product(s.grad.data(), s.out.data(), length) * level / norm) : T(0);
  for (int64_t t = 0; t < length; ++t) s.out[t] = s.grad[t] + toward_x * s.wave[t];
}

// The compiler clones plain functions, not templates.
#define GRADALIGN_UTTERANCE(T)                                                                                                     \
  GRADALIGN_CLONES void lnl_one(const T* filters, int64_t num_filters, int64_t num_taps, int64_t length, Scratch<T>& s) {          \
    lnl_utterance<T>(filters, num_filters, num_taps, length, s);                                                                   \
  }                                                                                                                                \
  GRADALIGN_CLONES void lnl_backward_one(const T* filters, int64_t num_filters, int64_t num_taps, int64_t length, Scratch<T>& s) { \
    lnl_backward_utterance<T>(filters, num_filters, num_taps, length, s);                                                          \
  }                                                                                                                                \
  GRADALIGN_CLONES void gain_one(uint64_t seed, double p, double g_sd, int64_t length, Scratch<T>& s) {                            \
    isd_gain<T>(seed, p, g_sd, length, s.gain.data());                                                                             \
  }                                                                                                                                \
  GRADALIGN_CLONES void isd_one(int64_t length, Scratch<T>& s) { isd_utterance<T>(length, s); }                                    \
  GRADALIGN_CLONES void isd_backward_one(int64_t length, Scratch<T>& s) { isd_backward_utterance<T>(length, s); }                  \
  GRADALIGN_CLONES void add_one(int64_t length, Scratch<T>& s) { add_utterance<T>(length, s); }                                    \
  GRADALIGN_CLONES void noise_one(uint64_t seed, int64_t length, T* noise) { white_noise<T>(seed, length, noise); }                \
  GRADALIGN_CLONES void ssi_one(const T* filter, int64_t num_taps, int64_t length, double snr_db, Scratch<T>& s) {                 \
    ssi_utterance<T>(filter, num_taps, length, snr_db, s);                                                                         \
  }                                                                                                                                \
  GRADALIGN_CLONES void ssi_backward_one(const T* filter, int64_t num_taps, int64_t length, double snr_db, Scratch<T>& s) {        \
    ssi_backward_utterance<T>(filter, num_taps, length, snr_db, s);                                                                \
  }
GRADALIGN_UTTERANCE(float)
GRADALIGN_UTTERANCE(double)
#undef GRADALIGN_UTTERANCE

// ------------------------------------------------------------------------------------------------------------------------------- ops

// Read row b of a [B, T] tensor of any strides and floating dtype.
template <typename T>
void read_row(const Tensor& x, int64_t b, int64_t count, T* row) {
  dispatch_floating(x.scalar_type(), "a waveform", [&](auto type) {
    using S = decltype(type);
    const S* source = x.const_data_ptr<S>() + b * x.stride(0);
    const int64_t stride = x.stride(1);
    if (stride == 1) {
      std::transform(source, source + count, row, [](S v) { return T(v); });
    } else {
      for (int64_t t = 0; t < count; ++t) row[t] = T(source[t * stride]);
    }
  });
}

// Allocate y like x and fill it utterance by utterance: body(b, length, scratch) reads scratch.wave and writes scratch.out.
template <typename Body>
Tensor for_each_utterance(const Tensor& x, const std::optional<Tensor>& lengths, Body&& body) {
  const int64_t batch = x.size(0), num_samples = x.size(1);
  Tensor y = torch::stable::new_empty(x, {batch, num_samples});
  std::optional<Tensor> own = lengths ? std::optional(torch::stable::contiguous(*lengths)) : std::nullopt;
  dispatch_floating(x.scalar_type(), "x", [&](auto type) {
    using S = decltype(type);
    using T = Wide<S>;
    S* const out = y.mutable_data_ptr<S>();
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Scratch<T>& s = Scratch<T>::mine();
      if (int64_t(s.wave.size()) < num_samples)
        for (auto* buffer : {&s.wave, &s.out, &s.noise, &s.grad, &s.gain}) buffer->resize(num_samples);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t length = own ? std::clamp<int64_t>(own->const_data_ptr<int64_t>()[b], 0, num_samples) : num_samples;
        read_row(x, b, length, s.wave.data());
        if (length > 0) body(b, length, s);
        for (int64_t t = 0; t < length; ++t) out[b * num_samples + t] = S(s.out[t]);
        std::fill(out + b * num_samples + length, out + (b + 1) * num_samples, S(0));
      }
    });
  });
  return y;
}

// What one thread designs banks in.
struct DesignScratch {
  std::vector<NotchBand> bands;
  std::vector<double> half, next, bank;

  static DesignScratch& of_thread(int64_t num_bands, int64_t num_taps) {
    static thread_local DesignScratch scratch;
    scratch.bands.resize(num_bands), scratch.half.resize(num_taps + 1), scratch.next.resize(num_taps), scratch.bank.resize(num_taps);
    return scratch;
  }
};

// Design one bank of scratch.bands into scratch.bank [num_taps], which is in the middle of its row between zeros.
GRADALIGN_CLONES void design_bank(DesignScratch& scratch, double gain_db) {
  const int64_t num_bands = int64_t(scratch.bands.size()), num_taps = int64_t(scratch.bank.size());
  double *const half = scratch.half.data(), *const next = scratch.next.data(), *const bank = scratch.bank.data();
  static const std::array<double, kResponsePairs> cos_w = [] {
    std::array<double, kResponsePairs> table;
    for (int k = 1; k <= kResponsePairs; ++k) table[k - 1] = std::cos(kPi * k / (2 * kResponsePairs));
    return table;
  }();
  std::array<double, 2 * kResponsePairs> response;
  response.fill(1);
  const int64_t middle = num_taps / 2;
  std::fill_n(bank, num_taps, 0.0);
  bank[middle] = 1;
  int64_t reach = 0;
  for (int64_t i = 0; i < num_bands; ++i) {
    // A band longer than its room in the bank is designed for that room.
    NotchBand band = scratch.bands[i];
    const int r = band.reach = std::clamp(band.reach, 0, int((num_taps - 1) / (2 * num_bands)));
    double sum = 0;
    for (int m = 0; m <= r; ++m) sum += (m == 0 ? 1 : 2) * (half[m] = notch_tap(band, m));
    for (int m = 0; m <= r; ++m) half[m] /= sum;
    half[r + 1] = 0;
    constexpr int kAtOnce = 16;
    for (int k = 0; k < kResponsePairs; k += kAtOnce) {
      double band_response[2 * kAtOnce];
      symmetric_response<kAtOnce>(half, r, cos_w.data() + k, band_response, band_response + kAtOnce);
      for (int j = 0; j < 2 * kAtOnce; ++j) response[2 * k + j] *= band_response[j];
    }
    std::fill_n(next, num_taps, 0.0);
    for (int m = -r; m <= r; ++m) {
      const double tap = half[std::abs(m)];
      for (int64_t n = middle - reach; n <= middle + reach; ++n) next[n + m] += tap * bank[n];
    }
    reach += r;
    std::copy_n(next, num_taps, bank);
  }
  double largest = 1;
  for (double value : response) largest = std::max(largest, std::abs(value));
  const double scale = std::pow(10.0, gain_db / 20) / largest;
  for (int64_t n = 0; n < num_taps; ++n) bank[n] *= scale;
}

// Allocate banks [B, N_f, P] and design each from what read(b, f, bands) puts into bands [N_b] and the gain in dB that it returns.
template <typename Read>
Tensor design_banks(const Tensor& like, int64_t batch, int64_t num_filters, int64_t num_bands, int64_t num_taps, ScalarType dtype, Read&& read) {
  Tensor out = torch::stable::new_empty(like, {batch, num_filters, num_taps}, dtype);
  dispatch_floating(dtype, "dtype", [&](auto type) {
    using S = decltype(type);
    S* const to = out.mutable_data_ptr<S>();
    torch::stable::parallel_for(0, batch * num_filters, 1, [&](int64_t begin, int64_t end) {
      DesignScratch& scratch = DesignScratch::of_thread(num_bands, num_taps);
      for (int64_t i = begin; i < end; ++i) {
        design_bank(scratch, read(i / num_filters, i % num_filters, scratch.bands.data()));
        for (int64_t n = 0; n < num_taps; ++n) to[i * num_taps + n] = S(Wide<S>(scratch.bank[n]));
      }
    });
  });
  return out;
}

Tensor notch_bank(const Tensor& center_hz, const Tensor& width_hz, const Tensor& taps, const Tensor& gain_db, double sample_rate, int64_t num_taps,
                  ScalarType dtype) {
  const int64_t batch = center_hz.size(0), num_filters = center_hz.size(1), num_bands = center_hz.size(2);
  const Tensor centers = contiguous_as(center_hz, ScalarType::Double), widths = contiguous_as(width_hz, ScalarType::Double);
  const Tensor counts = torch::stable::contiguous(taps), gains = contiguous_as(gain_db, ScalarType::Double);
  const double *center = centers.const_data_ptr<double>(), *width = widths.const_data_ptr<double>(), *gain = gains.const_data_ptr<double>();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  return design_banks(center_hz, batch, num_filters, num_bands, num_taps, dtype, [=](int64_t b, int64_t f, NotchBand* bands) {
    const int64_t row = b * num_filters + f;
    for (int64_t j = 0; j < num_bands; ++j) {
      const int64_t at = row * num_bands + j;
      bands[j] = notch_band(center[at], width[at], count[at], sample_rate);
    }
    return gain[row];
  });
}

Tensor notch_filters(const Tensor& seeds, const std::vector<int64_t>& filters, const std::vector<double>& min_gain_db,
                     const std::vector<double>& max_gain_db, int64_t num_bands, double min_center_hz, double max_center_hz, double min_width_hz,
                     double max_width_hz, double min_taps, double max_taps, double sample_rate, int64_t num_taps, ScalarType dtype) {
  const Tensor keys = torch::stable::contiguous(seeds);
  const int64_t* seed = keys.const_data_ptr<int64_t>();
  const NotchRanges ranges{min_center_hz, max_center_hz, min_width_hz, max_width_hz, min_taps, max_taps};
  return design_banks(seeds, seeds.size(0), int64_t(filters.size()), num_bands, num_taps, dtype, [&](int64_t b, int64_t f, NotchBand* bands) {
    for (int64_t j = 0; j < num_bands; ++j) {
      const NotchDraw draw = draw_notch(uint64_t(seed[b]), uint32_t(filters[f]), uint32_t(j), ranges);
      bands[j] = notch_band(draw.center_hz, draw.width_hz, draw.taps, sample_rate);
    }
    const double gain = draw_notch(uint64_t(seed[b]), uint32_t(filters[f]), 0, ranges).gain;
    return gain * (max_gain_db[f] - min_gain_db[f]) + min_gain_db[f];
  });
}

// RawBoost's steps. Each reads scratch.wave and writes scratch.out; its gradient reads scratch.grad too.

struct Lnl {
  // [B, F, P] in the dtype of computation, of whose F filters the first num_filters are LnL's.
  Tensor bank;
  int64_t num_filters;

  template <typename T>
  const T* filters(int64_t b) const {
    return bank.const_data_ptr<T>() + b * bank.size(1) * bank.size(2);
  }
  template <typename T>
  void forward(int64_t b, int64_t length, Scratch<T>& s) const {
    lnl_one(filters<T>(b), num_filters, bank.size(2), length, s);
  }
  template <typename T>
  void backward(int64_t b, int64_t length, Scratch<T>& s) const {
    lnl_backward_one(filters<T>(b), num_filters, bank.size(2), length, s);
  }
};

struct Isd {
  Isd(const std::optional<Tensor>& seeds, const std::optional<Tensor>& factor, double p, double g_sd) : factor(factor), p(p), g_sd(g_sd) {
    if (!factor) keys = torch::stable::contiguous(*seeds);
  }
  std::optional<Tensor> keys, factor;
  double p, g_sd;

  template <typename T>
  void find_gain(int64_t b, int64_t length, Scratch<T>& s) const {
    if (!factor) return gain_one(uint64_t(keys->const_data_ptr<int64_t>()[b]), p, g_sd, length, s);
    read_row(*factor, b, length, s.gain.data());
    for (int64_t t = 0; t < length; ++t) s.gain[t] = T(1) + T(g_sd) * s.gain[t];
  }
  template <typename T>
  void forward(int64_t b, int64_t length, Scratch<T>& s) const {
    find_gain(b, length, s);
    isd_one(length, s);
  }
  template <typename T>
  void backward(int64_t b, int64_t length, Scratch<T>& s) const {
    find_gain(b, length, s);
    isd_backward_one(length, s);
  }
};

struct Ssi {
  // `bank` [B, F, P] in the dtype of computation: SSI's filter is the last of F.
  Ssi(const Tensor& bank, const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min,
      double snr_max)
      : bank(bank), noise(noise), snr_min(snr_min), snr_max(snr_max) {
    if (noise)
      levels = contiguous_as(*snr_db, ScalarType::Double);
    else
      keys = torch::stable::contiguous(*seeds);
  }
  Tensor bank;
  std::optional<Tensor> keys, noise, levels;
  double snr_min, snr_max;

  template <typename T>
  const T* filter(int64_t b) const {
    return bank.const_data_ptr<T>() + ((b + 1) * bank.size(1) - 1) * bank.size(2);
  }
  // Put the noise into scratch.noise and return its level in dB.
  template <typename T>
  double find_noise(int64_t b, int64_t length, Scratch<T>& s) const {
    if (noise) {
      read_row(*noise, b, length, s.noise.data());
      return levels->const_data_ptr<double>()[b];
    }
    const uint64_t seed = uint64_t(keys->const_data_ptr<int64_t>()[b]);
    noise_one(seed, length, s.noise.data());
    return uniform(philox(seed, kStreamSsiSnr, 0).w[0], snr_min, snr_max);
  }
  template <typename T>
  void forward(int64_t b, int64_t length, Scratch<T>& s) const {
    const double level = find_noise(b, length, s);
    ssi_one(filter<T>(b), bank.size(2), length, level, s);
  }
  template <typename T>
  void backward(int64_t b, int64_t length, Scratch<T>& s) const {
    const double level = find_noise(b, length, s);
    ssi_backward_one(filter<T>(b), bank.size(2), length, level, s);
  }
};

template <typename Step>
Tensor forward(const Tensor& x, const std::optional<Tensor>& lengths, const Step& step) {
  return for_each_utterance(x, lengths, [&](int64_t b, int64_t length, auto& s) { step.forward(b, length, s); });
}

template <typename Step>
Tensor backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& lengths, const Step& step) {
  return for_each_utterance(x, lengths, [&](int64_t b, int64_t length, auto& s) {
    read_row(grad, b, length, s.grad.data());
    step.backward(b, length, s);
  });
}

Tensor lnl(const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths) {
  return forward(x, lengths, Lnl{contiguous_as(filters, wide_dtype(x)), filters.size(1)});
}

Tensor lnl_backward(const Tensor& grad, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths) {
  return backward(grad, x, lengths, Lnl{contiguous_as(filters, wide_dtype(x)), filters.size(1)});
}

Tensor isd(const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds, const std::optional<Tensor>& factor, double p,
           double g_sd) {
  return forward(x, lengths, Isd(seeds, factor, p, g_sd));
}

Tensor isd_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
                    const std::optional<Tensor>& factor, double p, double g_sd) {
  return backward(grad, x, lengths, Isd(seeds, factor, p, g_sd));
}

// SSI's filter [B, P] as a bank of one.
Tensor bank_of_one(const Tensor& x, const Tensor& filters) { return torch::stable::unsqueeze(contiguous_as(filters, wide_dtype(x)), 1); }

Tensor ssi(const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
           const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min, double snr_max) {
  return forward(x, lengths, Ssi(bank_of_one(x, filters), seeds, noise, snr_db, snr_min, snr_max));
}

Tensor ssi_backward(const Tensor& grad, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& lengths,
                    const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, double snr_min,
                    double snr_max) {
  return backward(grad, x, lengths, Ssi(bank_of_one(x, filters), seeds, noise, snr_db, snr_min, snr_max));
}

Tensor rawboost(const Tensor& x, const std::optional<Tensor>& filters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& seeds,
                const std::optional<Tensor>& factor, const std::optional<Tensor>& noise, const std::optional<Tensor>& snr_db, int64_t algo, double p,
                double g_sd, double snr_min, double snr_max) {
  const Steps steps = steps_of(algo);
  std::optional<Lnl> lnl;
  std::optional<Isd> isd;
  std::optional<Ssi> ssi;
  std::optional<Tensor> bank;
  if (steps.lnl || steps.ssi) bank = contiguous_as(*filters, wide_dtype(x));
  if (steps.lnl) lnl = Lnl{*bank, bank->size(1) - steps.ssi};
  if (steps.isd) isd.emplace(seeds, factor, p, g_sd);
  if (steps.ssi) ssi.emplace(*bank, seeds, noise, snr_db, snr_min, snr_max);
  return for_each_utterance(x, lengths, [&](int64_t b, int64_t length, auto& s) {
    if (steps.parallel) {
      lnl->forward(b, length, s);
      std::swap(s.out, s.grad);
      isd->forward(b, length, s);
      return add_one(length, s);
    }
    bool first = true;
    auto run = [&](const auto& step) {
      if (!step) return;
      // Each step on the result of the one before.
      if (!first) std::swap(s.wave, s.out);
      step->forward(b, length, s);
      first = false;
    };
    run(lnl), run(isd), run(ssi);
  });
}

}  // namespace gradalign

STABLE_TORCH_LIBRARY_IMPL(gradalign_native, CPU, m) {
  m.impl("notch_bank", TORCH_BOX(&gradalign::notch_bank));
  m.impl("notch_filters", TORCH_BOX(&gradalign::notch_filters));
  m.impl("lnl", TORCH_BOX(&gradalign::lnl));
  m.impl("isd", TORCH_BOX(&gradalign::isd));
  m.impl("ssi", TORCH_BOX(&gradalign::ssi));
  m.impl("lnl_backward", TORCH_BOX(&gradalign::lnl_backward));
  m.impl("isd_backward", TORCH_BOX(&gradalign::isd_backward));
  m.impl("ssi_backward", TORCH_BOX(&gradalign::ssi_backward));
  m.impl("rawboost", TORCH_BOX(&gradalign::rawboost));
}
