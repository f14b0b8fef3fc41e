// A complex FFT of many signals at once, one signal per vector lane: every operation is a whole-vector operation, no shuffles.
// Forward is decimation in frequency and leaves its bins digit-reversed; inverse is its mirror and takes them so. For filtering, where both
// factors pass through the same forward transform, the order never matters.
#pragma once

#include <cmath>
#include <vector>

#include "compiler.h"

namespace gradalign {

// 64 bytes: one AVX-512 register, two of AVX2, four of NEON or SSE; the compiler splits it.
template <typename T>
struct LaneVector {
  typedef T type __attribute__((vector_size(64)));
  static constexpr int count = 64 / sizeof(T);
};

// GCC forgets the alignment of a vector type that depends on a template parameter, hence alignas.
template <typename T>
struct alignas(64) Complex {
  typename LaneVector<T>::type re, im;
};

// exp(-2 pi i k / n), k < n; n a power of two.
template <typename T>
struct Twiddles {
  explicit Twiddles(int n) : n(n), re(n), im(n) {
    for (int k = 0; k < n; ++k) {
      re[k] = T(std::cos(-2 * M_PI * k / n));
      im[k] = T(std::sin(-2 * M_PI * k / n));
    }
  }
  int n;
  std::vector<T> re, im;
};

template <typename T>
GRADALIGN_INLINE Complex<T> times(const Complex<T>& a, T re, T im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

// One radix-4 stage on blocks of `len` points: outputs s = 0..3 of each butterfly go to the s-th quarter of its block.
template <typename T>
GRADALIGN_INLINE void forward_stage(Complex<T>* z, int points, int len, const Twiddles<T>& w) {
  int quarter = len / 4, step = w.n / len;
  for (int block = 0; block < points; block += len) {
    for (int j = 0; j < quarter; ++j) {
      Complex<T>* p = z + block + j;
      Complex<T> a0 = p[0], a1 = p[quarter], a2 = p[2 * quarter], a3 = p[3 * quarter];
      Complex<T> t0 = {a0.re + a2.re, a0.im + a2.im}, t1 = {a0.re - a2.re, a0.im - a2.im};
      Complex<T> t2 = {a1.re + a3.re, a1.im + a3.im}, t3 = {a1.im - a3.im, a3.re - a1.re};
      int k = j * step;
      p[0] = {t0.re + t2.re, t0.im + t2.im};
      p[quarter] = times<T>({t1.re + t3.re, t1.im + t3.im}, w.re[k], w.im[k]);
      p[2 * quarter] = times<T>({t0.re - t2.re, t0.im - t2.im}, w.re[2 * k], w.im[2 * k]);
      p[3 * quarter] = times<T>({t1.re - t3.re, t1.im - t3.im}, w.re[3 * k], w.im[3 * k]);
    }
  }
}

template <typename T>
GRADALIGN_INLINE void inverse_stage(Complex<T>* z, int points, int len, const Twiddles<T>& w) {
  int quarter = len / 4, step = w.n / len;
  for (int block = 0; block < points; block += len) {
    for (int j = 0; j < quarter; ++j) {
      Complex<T>* p = z + block + j;
      int k = j * step;
      Complex<T> a0 = p[0], a1 = times<T>(p[quarter], w.re[k], -w.im[k]);
      Complex<T> a2 = times<T>(p[2 * quarter], w.re[2 * k], -w.im[2 * k]), a3 = times<T>(p[3 * quarter], w.re[3 * k], -w.im[3 * k]);
      Complex<T> t0 = {a0.re + a2.re, a0.im + a2.im}, t1 = {a0.re - a2.re, a0.im - a2.im};
      Complex<T> t2 = {a1.re + a3.re, a1.im + a3.im}, t3 = {a3.im - a1.im, a1.re - a3.re};
      p[0] = {t0.re + t2.re, t0.im + t2.im};
      p[quarter] = {t1.re + t3.re, t1.im + t3.im};
      p[2 * quarter] = {t0.re - t2.re, t0.im - t2.im};
      p[3 * quarter] = {t1.re - t3.re, t1.im - t3.im};
    }
  }
}

template <typename T>
GRADALIGN_INLINE void radix2_stage(Complex<T>* z, int points) {
  for (int i = 0; i < points; i += 2) {
    Complex<T> a = z[i], b = z[i + 1];
    z[i] = {a.re + b.re, a.im + b.im};
    z[i + 1] = {a.re - b.re, a.im - b.im};
  }
}

// Stages on at most this many points (32 KiB) stay in the first-level cache: they are run block by block.
constexpr int kCachedPoints = 256;

template <typename T>
GRADALIGN_INLINE void fft(Complex<T>* z, const Twiddles<T>& w) {
  int len = w.n;
  for (; len > kCachedPoints; len /= 4) forward_stage(z, w.n, len, w);
  for (int block = 0, cached = len; block < w.n; block += cached) {
    for (len = cached; len >= 4; len /= 4) forward_stage(z + block, cached, len, w);
    if (len == 2) radix2_stage(z + block, cached);
  }
}

// n times the inverse transform.
template <typename T>
GRADALIGN_INLINE void inverse_fft(Complex<T>* z, const Twiddles<T>& w) {
  int cached = w.n, smallest = w.n;
  while (cached > kCachedPoints) cached /= 4;
  while (smallest > 4) smallest /= 4;
  for (int block = 0; block < w.n; block += cached) {
    if (smallest == 2) radix2_stage(z + block, cached);
    for (int len = smallest == 2 ? 8 : 4; len <= cached; len *= 4) inverse_stage(z + block, cached, len, w);
  }
  for (int len = cached * 4; len <= w.n; len *= 4) inverse_stage(z, w.n, len, w);
}

}  // namespace gradalign
