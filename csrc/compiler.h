// What the compilers are told: functions of host and device, loops unrolled or not, bodies for several instruction sets.
#pragma once

#if defined(__CUDACC__)
#define GRADALIGN_HD __host__ __device__ __forceinline__
// An array indexed in a loop stays in registers only where the loop is unrolled; other loops stay loops, for the size of the code.
#define GRADALIGN_UNROLL _Pragma("unroll")
#define GRADALIGN_LOOP _Pragma("unroll 1")
#else
#define GRADALIGN_HD GRADALIGN_INLINE
#define GRADALIGN_UNROLL
#define GRADALIGN_LOOP
#endif

// One body, compiled for several instruction sets and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define GRADALIGN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GRADALIGN_CLONES
#endif
// Always inlined, so that a body takes the instruction set of the function around it.
#define GRADALIGN_INLINE inline __attribute__((always_inline))
