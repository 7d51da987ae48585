/* Sums of sixteen numbers, in one order of additions wherever a sum is formed:
 * a[k] = x[k] + x[k + 8] for k < 8, then a[k] += a[k + 4] for k < 4, then (a0 + a2) + (a1 + a3). */
#ifndef RECALL_SUMS_H
#define RECALL_SUMS_H

#include "vector.h"

#define FAN 16 /* children of a node */

#define SUM_OF_SIXTEEN(type, result, x)                                                           \
    do {                                                                                          \
        type a[8];                                                                                \
        for (int k = 0; k < 8; k++) a[k] = (type)(x)[k] + (type)(x)[k + 8];                       \
        for (int k = 0; k < 4; k++) a[k] += a[k + 4];                                             \
        result = (a[0] + a[2]) + (a[1] + a[3]);                                                   \
    } while (0)

/* Several sums side by side, as what one leaves free of a register holds another. */
#if RECALL_ISA == 512
#define ABREAST 8
INLINE __m512d fold_floats(const float *x) {
    return _mm512_add_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x)),
                         _mm512_cvtps_pd(_mm256_loadu_ps(x + 8)));
}
INLINE __m512d fold_doubles(const double *x) {
    return _mm512_add_pd(_mm512_loadu_pd(x), _mm512_loadu_pd(x + 8));
}
/* a0 to a3 of two. */
INLINE __m512d halve(__m512d x, __m512d y) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x44), _mm512_shuffle_f64x2(x, y, 0xee));
}
/* a0 + a2 and a1 + a3 of four. */
INLINE __m512d quarter(__m512d x, __m512d y) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x88), _mm512_shuffle_f64x2(x, y, 0xdd));
}
#define SUMS_ABREAST(fold, x, sum)                                                                \
    do {                                                                                          \
        const __m512d low = quarter(halve(fold((x)), fold((x) + FAN)),                            \
                                    halve(fold((x) + 2 * FAN), fold((x) + 3 * FAN)));             \
        const __m512d high = quarter(halve(fold((x) + 4 * FAN), fold((x) + 5 * FAN)),             \
                                     halve(fold((x) + 6 * FAN), fold((x) + 7 * FAN)));            \
        const __m512d mixed =                                                                     \
            _mm512_add_pd(_mm512_unpacklo_pd(low, high), _mm512_unpackhi_pd(low, high));          \
        const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);                           \
        _mm512_storeu_pd(sum, _mm512_permutexvar_pd(order, mixed));                               \
    } while (0)
#elif RECALL_ISA == 256
#define ABREAST 4
INLINE __m256d fold_floats(const float *x) {
    const __m256d low = _mm256_add_pd(_mm256_cvtps_pd(_mm_loadu_ps(x)),
                                      _mm256_cvtps_pd(_mm_loadu_ps(x + 8)));
    return _mm256_add_pd(low, _mm256_add_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + 4)),
                                            _mm256_cvtps_pd(_mm_loadu_ps(x + 12))));
}
INLINE __m256d fold_doubles(const double *x) {
    const __m256d low = _mm256_add_pd(_mm256_loadu_pd(x), _mm256_loadu_pd(x + 8));
    return _mm256_add_pd(low, _mm256_add_pd(_mm256_loadu_pd(x + 4), _mm256_loadu_pd(x + 12)));
}
INLINE __m256d quarter(__m256d x, __m256d y) {
    return _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
}
#define SUMS_ABREAST(fold, x, sum)                                                                \
    do {                                                                                          \
        const __m256d low = quarter(fold((x)), fold((x) + FAN));                                  \
        const __m256d high = quarter(fold((x) + 2 * FAN), fold((x) + 3 * FAN));                   \
        const __m256d mixed =                                                                     \
            _mm256_add_pd(_mm256_unpacklo_pd(low, high), _mm256_unpackhi_pd(low, high));          \
        _mm256_storeu_pd(sum, _mm256_permute4x64_pd(mixed, 0xd8));                                \
    } while (0)
#endif

/* Sums of `count` sixteens in a row. */
INLINE void sums_of_floats(const float *x, int64_t count, double *sum) {
    int64_t i = 0;
#if RECALL_ISA
    for (; i + ABREAST <= count; i += ABREAST) SUMS_ABREAST(fold_floats, x + i * FAN, sum + i);
#endif
    for (; i < count; i++) SUM_OF_SIXTEEN(double, sum[i], x + i * FAN);
}

INLINE void sums_of_doubles(const double *x, int64_t count, double *sum) {
    int64_t i = 0;
#if RECALL_ISA
    for (; i + ABREAST <= count; i += ABREAST) SUMS_ABREAST(fold_doubles, x + i * FAN, sum + i);
#endif
    for (; i < count; i++) SUM_OF_SIXTEEN(double, sum[i], x + i * FAN);
}

#endif
