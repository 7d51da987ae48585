/* The walk with AVX2 with FMA. */
#include "processor.h"

#if RECALL_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,popcnt")
#endif
#define RECALL_ISA 256
#define RECALL_BFLOAT16 0
#define NAME(x) x##_256
#include "walk.h"
#include "draws.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
