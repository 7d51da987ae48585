/* The walk with AVX-512. */
#include "processor.h"

#if RECALL_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#endif
#define RECALL_ISA 512
#define RECALL_BFLOAT16 0
#define NAME(x) x##_512
#include "walk.h"
#include "draws.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
