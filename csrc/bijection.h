// A keyed bijection of [0, size): Feistel rounds on the next power of two, walked until the value falls inside
// (Mitchell et al., "Bandwidth-Optimal Random Shuffling for GPUs", 2022). The inverse of `bijection` in gradalign/reference.py, which gives each
// position its rank: so only the positions that are chosen are visited.
#pragma once

#include "philox.h"

namespace gradalign {

constexpr int kBijectionRounds = 8;

struct Bijection {
  uint32_t keys[kBijectionRounds];
  uint32_t size, low_bits, low_mask, high_mask;
};

GRADALIGN_HD Bijection make_bijection(uint64_t seed, uint32_t size) {
  Bijection b;
  GRADALIGN_UNROLL
  for (int block = 0; block < kBijectionRounds / 4; ++block) {
    Words words = philox(seed, kStreamIsdKeys, block);
    GRADALIGN_UNROLL
    for (int i = 0; i < 4; ++i) b.keys[4 * block + i] = words.w[i];
  }
  uint32_t bits = 4;
  while ((uint64_t(1) << bits) < size) ++bits;
  b.size = size;
  b.low_bits = bits / 2;
  b.low_mask = (1u << b.low_bits) - 1;
  b.high_mask = (1u << (bits - b.low_bits)) - 1;
  return b;
}

// MurmurHash3's 32-bit finalizer.
GRADALIGN_HD uint32_t mix(uint32_t v) {
  v = (v ^ (v >> 16)) * 0x85EBCA6Bu;
  v = (v ^ (v >> 13)) * 0xC2B2AE35u;
  return v ^ (v >> 16);
}

GRADALIGN_HD uint32_t unpermute_once(const Bijection& b, uint32_t value) {
  uint32_t low = value & b.low_mask, high = value >> b.low_bits;
  for (int r = kBijectionRounds - 2; r >= 0; r -= 2) {
    high ^= mix(low + b.keys[r + 1]) & b.high_mask;
    low ^= mix(high + b.keys[r]) & b.low_mask;
  }
  return high << b.low_bits | low;
}

// The position of a rank; chosen are those of the ranks below the number wanted.
GRADALIGN_HD uint32_t unpermute(const Bijection& b, uint32_t rank) {
  do {
    rank = unpermute_once(b, rank);
  } while (rank >= b.size);
  return rank;
}

}  // namespace gradalign
