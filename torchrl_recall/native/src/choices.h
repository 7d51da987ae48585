/* Which of sixteen numbers a point on the line of their running sums falls on.
 *
 * Where it goes is not to be foreseen, so there are no branches: the running sums at or below the
 * point are counted. Within fours, then of fours to eight, then of eights: every instruction set
 * adds in this order. */
#ifndef RECALL_CHOICES_H
#define RECALL_CHOICES_H

#include "sums.h"

/* Writes the sixteen running sums, and counts those of the first fifteen that are at most x. */
#if RECALL_ISA == 512
INLINE __m512d running_eight(__m512d x) {
    x = _mm512_add_pd(x, _mm512_maskz_permutex_pd(0xee, x, 0x90));
    x = _mm512_add_pd(x, _mm512_maskz_permutex_pd(0xcc, x, 0x40));
    const __m512i fourth = _mm512_set1_epi64(3);
    return _mm512_add_pd(x, _mm512_maskz_permutexvar_pd(0xf0, fourth, x));
}
INLINE int steps_up(const double *weight, double x, double *sum) {
    const __m512d point = _mm512_set1_pd(x), low = running_eight(_mm512_loadu_pd(weight));
    const __m512d last = _mm512_permutexvar_pd(_mm512_set1_epi64(7), low);
    const __m512d high = _mm512_add_pd(running_eight(_mm512_loadu_pd(weight + 8)), last);
    const unsigned up = (unsigned)_mm512_cmp_pd_mask(low, point, _CMP_LE_OQ) |
        (unsigned)_mm512_cmp_pd_mask(high, point, _CMP_LE_OQ) << 8;
    _mm512_storeu_pd(sum, low);
    _mm512_storeu_pd(sum + 8, high);
    return count_bits(up & 0x7fff);
}
#elif RECALL_ISA == 256
INLINE __m256d running_four(__m256d x) {
    const __m256d zero = _mm256_setzero_pd();
    x = _mm256_add_pd(x, _mm256_blend_pd(_mm256_permute4x64_pd(x, 0x90), zero, 1));
    return _mm256_add_pd(x, _mm256_blend_pd(_mm256_permute4x64_pd(x, 0x40), zero, 3));
}
INLINE __m256d behind(__m256d x, __m256d before) {
    return _mm256_add_pd(x, _mm256_permute4x64_pd(before, 0xff));
}
INLINE int steps_up(const double *weight, double x, double *sum) {
    const __m256d a = running_four(_mm256_loadu_pd(weight));
    const __m256d b = behind(running_four(_mm256_loadu_pd(weight + 4)), a);
    const __m256d third = running_four(_mm256_loadu_pd(weight + 8));
    const __m256d d = behind(behind(running_four(_mm256_loadu_pd(weight + 12)), third), b);
    const __m256d c = behind(third, b), parts[4] = {a, b, c, d}, point = _mm256_set1_pd(x);
    unsigned up = 0;
    for (int j = 0; j < 4; j++) {
        const __m256d below = _mm256_cmp_pd(parts[j], point, _CMP_LE_OQ);
        up |= (unsigned)_mm256_movemask_pd(below) << (4 * j);
        _mm256_storeu_pd(sum + 4 * j, parts[j]);
    }
    return count_bits(up & 0x7fff);
}
#else
INLINE int steps_up(const double *weight, double x, double *sum) {
    for (int j = 0; j < FAN; j += 4) {
        const double *w = weight + j;
        sum[j] = w[0];
        sum[j + 1] = w[1] + w[0];
        sum[j + 2] = (w[2] + w[1]) + w[0];
        sum[j + 3] = (w[3] + w[2]) + (w[1] + w[0]);
    }
    for (int j = 0; j < 4; j++) sum[j + 4] += sum[3], sum[j + 12] += sum[11];
    for (int j = 8; j < FAN; j++) sum[j] += sum[7];
    int up = 0;
    for (int j = 0; j < FAN - 1; j++) up += sum[j] <= x;
    return up;
}
#endif

/* Chooses among sixteen weights by a number in [0, their sum), and leaves in it what is left, to
 * rounding below the weight chosen. */
INLINE int choose_weight(const double *weight, double *rest) {
    double sum[FAN + 1];
    sum[0] = 0.0;
    int chosen = steps_up(weight, *rest, sum + 1);
    const double left = *rest - sum[chosen];
    if (!(weight[chosen] > 0.0)) {
        /* Rounding has led past the last weight: any that is there is as good. */
        for (chosen = FAN - 1; chosen && !(weight[chosen] > 0.0); chosen--) {}
    }
    *rest = left > 0.0 ? left : 0.0;
    return chosen;
}

/* Chooses among sixteen counts, the 32 bits from `shift` on, by a number below their sum. */
INLINE int choose_count(const uint64_t *count, int shift, uint32_t *rest) {
    uint32_t sum[FAN + 1];
    sum[0] = 0;
#if RECALL_ISA == 512
    const __m128i by = _mm_cvtsi32_si128(shift);
    const __m256i low = _mm512_cvtepi64_epi32(_mm512_srl_epi64(_mm512_loadu_si512(count), by));
    const __m256i high = _mm512_cvtepi64_epi32(_mm512_srl_epi64(_mm512_loadu_si512(count + 8), by));
    const __m512i zero = _mm512_setzero_si512();
    __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 15));
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 14));
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 12));
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 8));
    _mm512_storeu_si512(sum + 1, x);
    const __mmask16 up = _mm512_cmple_epu32_mask(x, _mm512_set1_epi32((int)*rest));
    const int chosen = count_bits(up & 0x7fffu);
#else
    int chosen = 0;
    for (int j = 0; j < FAN; j++) sum[j + 1] = sum[j] + (uint32_t)(count[j] >> shift);
    for (int j = 1; j < FAN; j++) chosen += sum[j] <= *rest;
#endif
    *rest -= sum[chosen];
    return chosen;
}

/* The place of a set bit of sixteen by its number among them. */
INLINE int choose_bit(uint32_t bits, uint32_t number) {
    int place = 0;
    UNROLLED
    for (int width = 8; width; width /= 2) {
        const uint32_t before = (uint32_t)count_bits(bits & ((1u << width) - 1));
        const uint32_t up = number >= before;
        number -= before & (0u - up);
        bits >>= up ? width : 0;
        place += up ? width : 0;
    }
    return place;
}

#endif
