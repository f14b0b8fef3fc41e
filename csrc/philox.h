// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the numbers drawn from it.
// One source for host and device; equivalent to `philox`, `_uniform` and `ssi_noise` in gradalign/reference.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "compiler.h"

namespace gradalign {

// The fourth word of the counter; the same numbers as in gradalign/reference.py.
enum Stream : uint32_t {
  kStreamNotch = 0,
  kStreamIsdBeta = 1,
  kStreamIsdKeys = 2,
  kStreamIsdFactor = 3,
  kStreamSsiNoise = 4,
  kStreamSsiSnr = 5,
};

struct Words {
  uint32_t w[4];
};

// Four uniform 32-bit words for (seed, stream, index, filter).
GRADALIGN_HD Words philox(uint64_t seed, uint32_t stream, uint64_t index, uint32_t filter = 0) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = filter, c3 = stream;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  GRADALIGN_UNROLL
  for (int round = 0; round < 10; ++round) {
    uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// In the open interval (low, high).
GRADALIGN_HD double uniform(uint32_t word, double low, double high) { return low + (high - low) * ((double(word) + 0.5) * 0x1p-32); }

// Product of two uniforms on [-1, 1): the factor of impulsive noise.
GRADALIGN_HD float impulse_factor(uint32_t word1, uint32_t word2) {
  return (float(word1 >> 8) * 0x1p-23f - 1.0f) * (float(word2 >> 8) * 0x1p-23f - 1.0f);
}

// a / b and the root of v >= 0, to 3 ulp: on a device by its approximations, a few instructions where the exact ones take tens.
GRADALIGN_HD float quick_ratio(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

GRADALIGN_HD float quick_root(float v) {
#if defined(__CUDA_ARCH__)
  return v > 0.0f ? v * rsqrtf(v) : 0.0f;
#else
  return sqrtf(v > 0.0f ? v : 0.0f);
#endif
}

// Natural logarithm on (0, 1], to a few ulp: v = m * 2^e with m in [0.70, 1.41), ln m = 2 artanh((m - 1) / (m + 1)).
GRADALIGN_HD float fast_log(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  uint32_t shifted = bits - 0x3F330000u;
  int32_t exponent = int32_t(shifted) >> 23;
  bits = (shifted & 0x007FFFFFu) + 0x3F330000u;
  float m;
  memcpy(&m, &bits, 4);
  float s = quick_ratio(m - 1.0f, m + 1.0f), s2 = s * s;
  float tail = s2 * (0.66666667f + s2 * (0.4f + s2 * (0.28571429f + s2 * 0.22222222f)));
  return float(exponent) * 0.69314718f + (2.0f * s + s * tail);
}

// sin(2 pi u) and cos(2 pi u) for u in [0, 1), to 1e-7: the Taylor series of the quarter turn nearest to u.
GRADALIGN_HD void fast_sincos_turns(float u, float* sine, float* cosine) {
  int32_t quarter = int32_t(u * 4.0f + 0.5f);
  float a = (u - float(quarter) * 0.25f) * 6.28318531f, a2 = a * a;
  float s = a * (1.0f + a2 * (-1.66666667e-1f + a2 * (8.33333333e-3f + a2 * (-1.98412698e-4f + a2 * 2.75573192e-6f))));
  float c = 1.0f + a2 * (-0.5f + a2 * (4.16666667e-2f + a2 * (-1.38888889e-3f + a2 * (2.48015873e-5f + a2 * -2.75573192e-7f))));
  float swapped_s = (quarter & 1) ? c : s, swapped_c = (quarter & 1) ? s : c;
  *sine = (quarter & 2) ? -swapped_s : swapped_s;
  *cosine = ((quarter + 1) & 2) ? -swapped_c : swapped_c;
}

// Two independent N(0, 1) numbers by Box-Muller, from 24-bit fractions, which float32 holds exactly.
GRADALIGN_HD void box_muller(uint32_t radius_word, uint32_t angle_word, float* first, float* second) {
  float radius = quick_root(-2.0f * fast_log((float(radius_word >> 8) + 1.0f) * 0x1p-24f));
  float sine, cosine;
  fast_sincos_turns(float(angle_word >> 8) * 0x1p-24f, &sine, &cosine);
  *first = radius * cosine;
  *second = radius * sine;
}

}  // namespace gradalign
