// Reductions on the CPU: vectorised, in one order, the same on every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "compiler.h"

namespace gradalign {

// Interleaved partial sums, float64 for what is added up.
constexpr int kSums = 16;

template <typename T>
GRADALIGN_INLINE double wide_sum(const T* v, int64_t count) {
  double partial[kSums] = {}, total = 0;
  int64_t t = 0;
  for (; t + kSums <= count; t += kSums)
    for (int i = 0; i < kSums; ++i) partial[i] += double(v[t + i]);
  for (; t < count; ++t) partial[t % kSums] += double(v[t]);
  for (int i = 0; i < kSums; ++i) total += partial[i];
  return total;
}

template <typename T>
GRADALIGN_INLINE double inner_product(const T* a, const T* b, int64_t count) {
  double partial[kSums] = {}, total = 0;
  int64_t t = 0;
  for (; t + kSums <= count; t += kSums)
    for (int i = 0; i < kSums; ++i) partial[i] += double(a[t + i]) * double(b[t + i]);
  for (; t < count; ++t) partial[t % kSums] += double(a[t]) * double(b[t]);
  for (int i = 0; i < kSums; ++i) total += partial[i];
  return total;
}

// products = {a a, a b, b b}: inner_product of each, the same bits, in one pass. Each number is read and widened once.
template <typename T>
GRADALIGN_INLINE void inner_products(const T* a, const T* b, int64_t count, double* products) {
  double aa[kSums] = {}, ab[kSums] = {}, bb[kSums] = {};
  const auto add = [&](double x, double y, int i) {
    aa[i] += x * x;
    ab[i] += x * y;
    bb[i] += y * y;
  };
  int64_t t = 0;
  for (; t + kSums <= count; t += kSums)
    for (int i = 0; i < kSums; ++i) add(double(a[t + i]), double(b[t + i]), i);
  for (; t < count; ++t) add(double(a[t]), double(b[t]), int(t % kSums));
  std::fill_n(products, 3, 0.0);
  for (int i = 0; i < kSums; ++i) {
    products[0] += aa[i];
    products[1] += ab[i];
    products[2] += bb[i];
  }
}

// The largest magnitude, and NaN where there is one.
template <typename T>
GRADALIGN_INLINE T peak(const T* v, int64_t count) {
  const auto larger = [](T a, T b) { return b > a || b != b ? b : a; };
  T partial[kSums] = {}, largest = 0;
  int64_t t = 0;
  for (; t + kSums <= count; t += kSums)
    for (int i = 0; i < kSums; ++i) partial[i] = larger(partial[i], std::abs(v[t + i]));
  for (; t < count; ++t) largest = larger(largest, std::abs(v[t]));
  for (int i = 0; i < kSums; ++i) largest = larger(largest, partial[i]);
  return largest;
}

}  // namespace gradalign
