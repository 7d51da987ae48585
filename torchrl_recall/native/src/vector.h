/* Vectors of floats and of 32-bit integers: 16 lanes with AVX-512, 8 with AVX2, else 4 where
 * the compiler has vectors of its own, else plain loops. RECALL_ISA (512, 256 or 0) chooses.
 *
 * Every operation rounds once, lane by lane, so AVX2, AVX-512 and NEON give the same bits. Without a
 * fused multiply-add results differ by rounding.
 */
#ifndef RECALL_VECTOR_H
#define RECALL_VECTOR_H

#include <stdint.h>
#include <string.h>

#if RECALL_ISA
#include <immintrin.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE static __forceinline
#define NOINLINE static __declspec(noinline)
#else
#define NOINLINE static __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline, unused))
#endif

#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLLED _Pragma("GCC unroll 16")
#else
#define UNROLLED
#endif

#if RECALL_ISA == 512

#define LANES 16
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vm v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vm v_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE vm v_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE vm vm_and(vm a, vm b) { return (vm)(a & b); }
INLINE vf v_select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE int vm_all(vm m) { return m == 0xffff; }
INLINE uint32_t vm_bits(vm m) { return m; }
INLINE vi v_round(vf a) { return _mm512_cvtps_epi32(a); }
INLINE vi v_bits(vf a) { return _mm512_castps_si512(a); }
INLINE vf vi_float(vi a) { return _mm512_castsi512_ps(a); }
INLINE vf vi_convert(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
INLINE vi vi_set(uint32_t x) { return _mm512_set1_epi32((int)x); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
#define vi_shift_left(a, n) _mm512_slli_epi32(a, n)
#define vi_shift_right(a, n) _mm512_srli_epi32(a, n)
INLINE vi vi_wide_product(vi a, vi b) { return _mm512_mul_epu32(a, b); }
INLINE vi vi_upper_half(vi a) { return _mm512_srli_epi64(a, 32); }
INLINE vi vi_lower_to_upper(vi a) { return _mm512_slli_epi64(a, 32); }
INLINE vi vi_even_odd(vi even, vi odd) { return _mm512_mask_blend_epi32(0xaaaa, even, odd); }
INLINE vi vi_xor3(vi a, vi b, vi c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

#elif RECALL_ISA == 256

#define LANES 8
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;

INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
INLINE vm v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE vm v_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
INLINE vm v_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
INLINE vm vm_and(vm a, vm b) { return _mm256_and_ps(a, b); }
INLINE vf v_select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
INLINE int vm_all(vm m) { return _mm256_movemask_ps(m) == 0xff; }
INLINE uint32_t vm_bits(vm m) { return (uint32_t)_mm256_movemask_ps(m); }
INLINE vi v_round(vf a) { return _mm256_cvtps_epi32(a); }
INLINE vi v_bits(vf a) { return _mm256_castps_si256(a); }
INLINE vf vi_float(vi a) { return _mm256_castsi256_ps(a); }
INLINE vf vi_convert(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256((__m256i *)p, a); }
INLINE vi vi_set(uint32_t x) { return _mm256_set1_epi32((int)x); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
INLINE vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
#define vi_shift_left(a, n) _mm256_slli_epi32(a, n)
#define vi_shift_right(a, n) _mm256_srli_epi32(a, n)
INLINE vi vi_wide_product(vi a, vi b) { return _mm256_mul_epu32(a, b); }
INLINE vi vi_upper_half(vi a) { return _mm256_srli_epi64(a, 32); }
INLINE vi vi_lower_to_upper(vi a) { return _mm256_slli_epi64(a, 32); }
INLINE vi vi_even_odd(vi even, vi odd) { return _mm256_blend_epi32(even, odd, 0xaa); }
INLINE vi vi_xor3(vi a, vi b, vi c) { return vi_xor(a, vi_xor(b, c)); }

#elif defined(__GNUC__)

/* The compiler's own vectors of four: SSE2, NEON, or whatever else there is. */
#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <math.h>
#endif

#define LANES 4
typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vi __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));
#define LANE(v, i) (v)[i]

INLINE vf v_load(const float *p) { vf r; memcpy(&r, p, sizeof r); return r; }
INLINE void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf v_set(float x) { return (vf){x, x, x, x}; }
INLINE vf v_add(vf a, vf b) { return a + b; }
INLINE vf v_sub(vf a, vf b) { return a - b; }
INLINE vf v_mul(vf a, vf b) { return a * b; }
INLINE vf v_div(vf a, vf b) { return a / b; }
INLINE vm v_lt(vf a, vf b) { return a < b; }
INLINE vm v_le(vf a, vf b) { return a <= b; }
INLINE vm v_eq(vf a, vf b) { return a == b; }
INLINE vm vm_and(vm a, vm b) { return a & b; }
INLINE vf v_select(vm m, vf yes, vf no) { return (vf)((m & (vm)yes) | (~m & (vm)no)); }
INLINE vf v_min(vf a, vf b) { return v_select(a < b, a, b); }
INLINE vf v_max(vf a, vf b) { return v_select(a > b, a, b); }
INLINE int vm_all(vm m) { return (m[0] & m[1] & m[2] & m[3]) != 0; }
INLINE uint32_t vm_bits(vm m) {
    return (uint32_t)((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8));
}
INLINE vi v_bits(vf a) { return (vi)a; }
INLINE vf vi_float(vi a) { return (vf)a; }
INLINE vi vi_load(const void *p) { vi r; memcpy(&r, p, sizeof r); return r; }
INLINE void vi_store(void *p, vi a) { memcpy(p, &a, sizeof a); }
INLINE vi vi_set(uint32_t x) { return (vi){x, x, x, x}; }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vi vi_sub(vi a, vi b) { return a - b; }
INLINE vi vi_and(vi a, vi b) { return a & b; }
INLINE vi vi_or(vi a, vi b) { return a | b; }
INLINE vi vi_xor(vi a, vi b) { return a ^ b; }
INLINE vi vi_shift_left(vi a, int n) { return a << n; }
INLINE vi vi_shift_right(vi a, int n) { return a >> n; }
#if defined(__aarch64__)
INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf v_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
INLINE vf v_sqrt(vf a) { return vsqrtq_f32(a); }
INLINE vi v_round(vf a) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(a)); }
INLINE vf vi_convert(vi a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
#else
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf v_fnma(vf a, vf b, vf c) { return c - a * b; }
INLINE vf v_sqrt(vf a) { return (vf){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
/* To the nearest, by the spacing of floats at 1.5 * 2^23; only small numbers come here, or NaN. */
INLINE vi v_round(vf a) {
    const vf magic = v_set(12582912.0f);
    return (vi)(a + magic) - (vi)magic;
}
INLINE vf vi_convert(vi a) {
    const vm n = (vm)a;
    return (vf){(float)n[0], (float)n[1], (float)n[2], (float)n[3]};
}
#endif

#else

#include <math.h>

#define LANES 8
typedef struct { float x[LANES]; } vf;
typedef struct { uint32_t x[LANES]; } vi;
typedef struct { uint32_t x[LANES]; } vm;
#define LANE(v, i) (v).x[i]

#define EACH(type, value)                                                                         \
    type r;                                                                                       \
    for (int i = 0; i < LANES; i++) r.x[i] = (value);                                             \
    return r

INLINE vf v_load(const float *p) { vf r; memcpy(&r, p, sizeof r); return r; }
INLINE void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf v_set(float x) { EACH(vf, x); }
INLINE vf v_add(vf a, vf b) { EACH(vf, a.x[i] + b.x[i]); }
INLINE vf v_sub(vf a, vf b) { EACH(vf, a.x[i] - b.x[i]); }
INLINE vf v_mul(vf a, vf b) { EACH(vf, a.x[i] * b.x[i]); }
INLINE vf v_div(vf a, vf b) { EACH(vf, a.x[i] / b.x[i]); }
INLINE vf v_fma(vf a, vf b, vf c) { EACH(vf, a.x[i] * b.x[i] + c.x[i]); }
INLINE vf v_fnma(vf a, vf b, vf c) { EACH(vf, c.x[i] - a.x[i] * b.x[i]); }
INLINE vf v_min(vf a, vf b) { EACH(vf, a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
INLINE vf v_max(vf a, vf b) { EACH(vf, a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
INLINE vf v_sqrt(vf a) { EACH(vf, sqrtf(a.x[i])); }
INLINE vm v_lt(vf a, vf b) { EACH(vm, a.x[i] < b.x[i]); }
INLINE vm v_le(vf a, vf b) { EACH(vm, a.x[i] <= b.x[i]); }
INLINE vm v_eq(vf a, vf b) { EACH(vm, a.x[i] == b.x[i]); }
INLINE vm vm_and(vm a, vm b) { EACH(vm, a.x[i] & b.x[i]); }
INLINE vf v_select(vm m, vf yes, vf no) { EACH(vf, m.x[i] ? yes.x[i] : no.x[i]); }
INLINE int vm_all(vm m) {
    uint32_t r = 1;
    for (int i = 0; i < LANES; i++) r &= m.x[i];
    return (int)r;
}
INLINE uint32_t vm_bits(vm m) {
    uint32_t r = 0;
    for (int i = 0; i < LANES; i++) r |= m.x[i] << i;
    return r;
}
/* To the nearest, by the spacing of floats at 1.5 * 2^23; only small numbers come here, or NaN. */
INLINE int32_t to_int(float x) {
    return x > -4194304.0f && x < 4194304.0f ? (int32_t)((x + 12582912.0f) - 12582912.0f) : INT32_MIN;
}
INLINE vi v_round(vf a) { EACH(vi, (uint32_t)to_int(a.x[i])); }
INLINE vi v_bits(vf a) { vi r; memcpy(&r, &a, sizeof r); return r; }
INLINE vf vi_float(vi a) { vf r; memcpy(&r, &a, sizeof r); return r; }
INLINE vf vi_convert(vi a) { EACH(vf, (float)(int32_t)a.x[i]); }
INLINE vi vi_load(const void *p) { vi r; memcpy(&r, p, sizeof r); return r; }
INLINE void vi_store(void *p, vi a) { memcpy(p, &a, sizeof a); }
INLINE vi vi_set(uint32_t x) { EACH(vi, x); }
INLINE vi vi_add(vi a, vi b) { EACH(vi, a.x[i] + b.x[i]); }
INLINE vi vi_sub(vi a, vi b) { EACH(vi, a.x[i] - b.x[i]); }
INLINE vi vi_and(vi a, vi b) { EACH(vi, a.x[i] & b.x[i]); }
INLINE vi vi_or(vi a, vi b) { EACH(vi, a.x[i] | b.x[i]); }
INLINE vi vi_xor(vi a, vi b) { EACH(vi, a.x[i] ^ b.x[i]); }
INLINE vi vi_shift_left(vi a, int n) { EACH(vi, a.x[i] << n); }
INLINE vi vi_shift_right(vi a, int n) { EACH(vi, a.x[i] >> n); }

#endif

INLINE int count_bits(uint32_t bits) {
#if defined(__GNUC__)
    return __builtin_popcount(bits);
#else
    bits -= bits >> 1 & 0x55555555u;
    bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
    return (int)((bits + (bits >> 4) & 0x0f0f0f0fu) * 0x01010101u >> 24);
#endif
}

/* first, first + 1 and so on. */
INLINE vi vi_from(uint32_t first) {
    static const uint32_t place[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return vi_add(vi_load(place), vi_set(first));
}
INLINE vf v_neg(vf a) { return vi_float(vi_xor(v_bits(a), vi_set(0x80000000u))); }
INLINE vf v_abs(vf a) { return vi_float(vi_and(v_bits(a), vi_set(0x7fffffffu))); }
INLINE vf v_copy_sign(vf size, vf sign) {
    return vi_float(vi_or(v_bits(size), vi_and(v_bits(sign), vi_set(0x80000000u))));
}

#endif
