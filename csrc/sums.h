// Reductions on the CPU: vectorised, in one order, the same on every instruction set.
#pragma once

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

// inner_product of every pair i <= j of K rows, the same bits, in one pass: each number is read and widened once.
template <int K, typename T>
GRADALIGN_INLINE void inner_products(const T* const* rows, int64_t count, double* products) {
  constexpr int kPairs = K * (K + 1) / 2;
  double partial[kPairs][kSums] = {};
  // The loop over i turns into vectors, and the sums into registers, only where those over paths are gone.
  const auto add = [&](int64_t t, int i) {
    double wide[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) wide[k] = double(rows[k][t]);
    int pair = 0;
#pragma GCC unroll 8
    for (int a = 0; a < K; ++a)
#pragma GCC unroll 8
      for (int b = a; b < K; ++b) partial[pair++][i] += wide[a] * wide[b];
  };
  int64_t t = 0;
  for (; t + kSums <= count; t += kSums)
    for (int i = 0; i < kSums; ++i) add(t + i, i);
  for (; t < count; ++t) add(t, int(t % kSums));
  for (int pair = 0; pair < kPairs; ++pair) {
    products[pair] = 0;
    for (int i = 0; i < kSums; ++i) products[pair] += partial[pair][i];
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
