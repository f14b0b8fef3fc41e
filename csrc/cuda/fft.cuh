// A complex FFT of 4096 = 16 * 16 * 16 points by a block of 256 threads with 16 points each: three passes of 16-point transforms in registers, with
// two exchanges through shared memory between them. In the first pass a thread has points 256 apart, so that the first exchange is among the whole
// block. From there on each half of a warp has 256 points to transform by itself, a region: the second exchange needs no barrier of the block.
//
// `forward` leaves its bins in an order of its own and `inverse`, which undoes its steps in turn, takes them so: for filtering, where both factors
// pass through `forward`, the order never matters.
#pragma once

#include "common.cuh"

namespace gradalign::cuda {

__device__ __forceinline__ float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 minus(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ __forceinline__ float2 times(float2 a, float2 b) { return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x}; }
__device__ __forceinline__ float2 conjugate_if(bool condition, float2 a) { return {a.x, condition ? -a.y : a.y}; }

// (a0, a1, a2, a3) becomes its 4-point transform.
template <bool kInverse>
__device__ __forceinline__ void fft4(float2& a0, float2& a1, float2& a2, float2& a3) {
  const float2 even = plus(a0, a2), odd = minus(a0, a2), sum = plus(a1, a3), difference = minus(a1, a3);
  // Times -i, or i for the inverse.
  const float2 turned = kInverse ? float2{-difference.y, difference.x} : float2{difference.y, -difference.x};
  a0 = plus(even, sum);
  a1 = plus(odd, turned);
  a2 = minus(even, sum);
  a3 = minus(odd, turned);
}

template <bool kInverse>
__device__ __forceinline__ void fft16(float2 (&v)[16]) {
  constexpr float kCos = 0.923879532511286756f, kSin = 0.382683432365089772f, kHalf = 0.707106781186547524f;
  // exp(-2 pi i k / 16) for the k = 0..9 that occur.
  constexpr float kRe[10] = {1, kCos, kHalf, kSin, 0, -kSin, -kHalf, -kCos, -1, -kCos};
  constexpr float kIm[10] = {0, -kSin, -kHalf, -kCos, -1, -kCos, -kHalf, -kSin, 0, kSin};
#pragma unroll
  for (int j = 0; j < 4; ++j) fft4<kInverse>(v[j], v[j + 4], v[j + 8], v[j + 12]);
#pragma unroll
  for (int j = 1; j < 4; ++j)
#pragma unroll
    for (int q = 1; q < 4; ++q) v[j + 4 * q] = times(v[j + 4 * q], conjugate_if(kInverse, {kRe[j * q], kIm[j * q]}));
#pragma unroll
  for (int q = 0; q < 4; ++q) fft4<kInverse>(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]);
  float2 in_order[16];
#pragma unroll
  for (int k = 0; k < 16; ++k) in_order[k] = v[4 * (k % 4) + k / 4];
#pragma unroll
  for (int k = 0; k < 16; ++k) v[k] = in_order[k];
}

class Fft {
 public:
  static constexpr int kPoints = 4096, kThreads = 256, kEach = 16;
  // The points of 16 threads make a region; its rows of 16 are padded by one so that its columns lie in different banks.
  static constexpr int kRegion = 16 * 17, kShared = 16 * kRegion;

  __device__ Fft() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sincospif(-2.0f * float(threadIdx.x << i) / kPoints, &first_[i].y, &first_[i].x);
      sincospif(-2.0f * float(threadIdx.x % 16 << i) / 256, &second_[i].y, &second_[i].x);
    }
  }

  // v[r] is point threadIdx.x + 256 * r; `shared` has kShared places and may be in use until the first barrier.
  __device__ void forward(float2 (&v)[kEach], float2* shared) const {
    const int t = threadIdx.x, lane = t % 16;
    float2* region = shared + t / 16 * kRegion;
    fft16<false>(v);
    twiddle<false>(v, first_);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kEach; ++k) shared[k * kRegion + t] = v[k];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kEach; ++r) v[r] = region[16 * r + lane];
    fft16<false>(v);
    twiddle<false>(v, second_);
    // From here on a region belongs to the half of a warp that has read it.
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kEach; ++k) region[17 * k + lane] = v[k];
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kEach; ++r) v[r] = region[17 * lane + r];
    fft16<false>(v);
  }

  // kPoints times the inverse transform. Follows a `forward` on the same memory: what a thread writes first are the places it has read last there,
  // so that no barrier goes before; after any other use of the memory one must.
  __device__ void inverse(float2 (&v)[kEach], float2* shared) const {
    const int t = threadIdx.x, lane = t % 16;
    float2* region = shared + t / 16 * kRegion;
    fft16<true>(v);
#pragma unroll
    for (int r = 0; r < kEach; ++r) region[17 * lane + r] = v[r];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kEach; ++k) v[k] = region[17 * k + lane];
    twiddle<true>(v, second_);
    fft16<true>(v);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kEach; ++r) region[16 * r + lane] = v[r];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kEach; ++k) v[k] = shared[k * kRegion + t];
    twiddle<true>(v, first_);
    fft16<true>(v);
  }

 private:
  // v[k] *= w**k, where w**1, w**2, w**4 and w**8 are given: at most three products deep, so that errors stay at float32's own.
  template <bool kInverse>
  __device__ static __forceinline__ void twiddle(float2 (&v)[kEach], const float2 (&w)[4]) {
    float2 power[kEach];
    power[0] = {1, 0};
#pragma unroll
    for (int bit = 0; bit < 4; ++bit) {
      power[1 << bit] = conjugate_if(kInverse, w[bit]);
#pragma unroll
      for (int k = (1 << bit) + 1; k < 2 << bit; ++k) power[k] = times(power[k - (1 << bit)], power[1 << bit]);
    }
#pragma unroll
    for (int k = 1; k < kEach; ++k) v[k] = times(v[k], power[k]);
  }

  // The twiddle factors of the first and of the second pass, to the powers 1, 2, 4 and 8.
  float2 first_[4], second_[4];
};

}  // namespace gradalign::cuda
