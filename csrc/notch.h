// Design of a notch band: a Hamming-windowed band-stop of odd length, symmetric about its middle tap.
// Equivalent to `notch_draws` and `notch_bank` in gradalign/reference.py; float64 throughout.
#pragma once

#include <cmath>

#include "philox.h"

namespace gradalign {

// The peak of a bank's response is taken on the frequencies k*pi/512, k = 0..511: it is 1 at 0 Hz, and the others are w = k*pi/512, k = 1..256,
// and pi - w.
constexpr int kResponsePairs = 256;
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
  return {uniform(words.w[0], r.min_center_hz, r.max_center_hz), uniform(words.w[1], r.min_width_hz, r.max_width_hz), uniform(words.w[3], 0.0, 1.0),
          taps + (taps % 2 == 0)};
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

// response[j] = taps[0] + 2 * sum over m of taps[m] * cos(m w_j), and mirrored[j] that at pi - w_j, where odd taps change their sign. Clenshaw's
// recurrence in 2 w, for even and odd taps apart, needs no table of cosines of multiples; N frequencies side by side hide its latency. One zero
// follows the taps 0..reach.
template <int N>
GRADALIGN_HD void symmetric_response(const double* taps, int reach, const double* cos_w, double* response, double* mirrored) {
  double twice_cos_2w[N], even[N] = {}, even_before[N] = {}, odd[N] = {}, odd_before[N] = {};
  GRADALIGN_UNROLL
  for (int j = 0; j < N; ++j) twice_cos_2w[j] = 4 * cos_w[j] * cos_w[j] - 2;
  for (int m = reach | 1; m > 0; m -= 2) {
    GRADALIGN_UNROLL
    for (int j = 0; j < N; ++j) {
      const double next_even = twice_cos_2w[j] * even[j] + (taps[m - 1] - even_before[j]);
      const double next_odd = twice_cos_2w[j] * odd[j] + (taps[m] - odd_before[j]);
      even_before[j] = even[j];
      even[j] = next_even;
      odd_before[j] = odd[j];
      odd[j] = next_odd;
    }
  }
  GRADALIGN_UNROLL
  for (int j = 0; j < N; ++j) {
    const double of_even = 2 * even[j] - twice_cos_2w[j] * even_before[j] - taps[0], of_odd = 2 * cos_w[j] * (odd[j] - odd_before[j]);
    response[j] = of_even + of_odd;
    mirrored[j] = of_even - of_odd;
  }
}

}  // namespace gradalign
