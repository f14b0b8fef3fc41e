// Design of a notch band: a Hamming-windowed band-stop of odd length, symmetric about its middle tap.
// Equivalent to `notch_draws` and `notch_bank` in gradalign/reference.py; float64 throughout.
#pragma once

#include <cmath>

#include "philox.h"

namespace gradalign {

// The peak of a bank's response is taken on the frequencies k*pi/512, k = 0..511.
constexpr int kResponsePoints = 512;
constexpr double kPi = 3.14159265358979323846;

struct NotchRanges {
  double min_center_hz, max_center_hz, min_width_hz, max_width_hz, min_taps, max_taps;
};

// The draws of one band; `gain` in (0, 1) belongs to the bank and is taken from its band 0.
struct NotchDraw {
  double center_hz, width_hz, gain;
  int64_t taps;
};

GRADALIGN_HD NotchDraw draw_notch(uint64_t seed, uint32_t filter, uint32_t band, const NotchRanges& r) {
  Words words = philox(seed, kStreamNotch, band, filter);
  int64_t taps = int64_t(floor(uniform(words.w[2], r.min_taps, r.max_taps)));
  return {uniform(words.w[0], r.min_center_hz, r.max_center_hz), uniform(words.w[1], r.min_width_hz, r.max_width_hz),
          uniform(words.w[3], 0.0, 1.0), taps + (taps % 2 == 0)};
}

struct NotchBand {
  double left, right;  // edges as fractions of the Nyquist frequency
  int reach;           // taps -reach..reach
};

GRADALIGN_HD NotchBand notch_band(double center_hz, double width_hz, int64_t taps, double sample_rate) {
  double low = center_hz - width_hz / 2, high = center_hz + width_hz / 2;
  low = low <= 0 ? 0.001 : low;
  high = high >= sample_rate / 2 ? sample_rate / 2 - 0.001 : high;
  return {2 / sample_rate * low, 2 / sample_rate * high, int(taps - 1) / 2};
}

// sin(pi v) and cos(pi v). The device's functions reduce their argument exactly; those of v * pi keep a slow path for huge arguments, with a
// table in local memory.
GRADALIGN_HD double sin_pi(double v) {
#if defined(__CUDA_ARCH__)
  return sinpi(v);
#else
  return sin(kPi * v);
#endif
}

GRADALIGN_HD double cos_pi(double v) {
#if defined(__CUDA_ARCH__)
  return cospi(v);
#else
  return cos(kPi * v);
#endif
}

// Tap m >= 0 (= tap -m) before the band is scaled to gain 1 at 0 Hz.
GRADALIGN_HD double notch_tap(const NotchBand& band, int m) {
  if (m == 0) return band.left + 1 - band.right;
  double window = 0.54 + 0.46 * cos_pi(double(m) / band.reach);
  return (sin_pi(band.left * m) - sin_pi(band.right * m)) / (kPi * m) * window;
}

// response[j] = taps[0] + 2 * sum over m of taps[m] * cos(m w_j) by Clenshaw's recurrence, without a table of cosines of multiples; N frequencies
// side by side hide its latency.
template <int N>
GRADALIGN_HD void symmetric_response(const double* taps, int reach, const double* cos_w, double* response) {
  double last[N] = {}, before[N] = {};
  for (int m = reach; m > 0; --m) {
    GRADALIGN_UNROLL
    for (int j = 0; j < N; ++j) {
      double current = taps[m] + 2 * cos_w[j] * last[j] - before[j];
      before[j] = last[j];
      last[j] = current;
    }
  }
  GRADALIGN_UNROLL
  for (int j = 0; j < N; ++j) response[j] = taps[0] + 2 * (cos_w[j] * last[j] - before[j]);
}

}  // namespace gradalign
