/* Weights of entries from their values, in each mode. */
#ifndef RECALL_LEAVES_H
#define RECALL_LEAVES_H

#include <math.h>

#include "functions.h"
#include "priorities.h"
#include "sums.h"

#define RUN 1024                 /* entries that are weighed at a time, at most */
#define SMALLEST 1.17549435e-38f /* normal float */

INLINE double value_at(const recall_priorities *p, int64_t i) {
    return p->is_double ? ((const double *)p->values)[i] : (double)((const float *)p->values)[i];
}

INLINE void prefetch_value(const recall_priorities *p, int64_t i) {
#if defined(__GNUC__)
    __builtin_prefetch((const char *)p->values + i * (p->is_double ? 8 : 4));
#else
    (void)p, (void)i;
#endif
}

/* Which of sixteen entries lie above the threshold (upper half) and at it (lower half). */
INLINE uint32_t entry_classes(const recall_priorities *p, const recall_form *f, int64_t first,
                              int64_t n) {
    uint32_t above = 0, tied = 0;
    if (p->is_double) {
        const double *v = (const double *)p->values + first;
        for (int j = 0; j < FAN; j++) {
            above |= (uint32_t)((v[j] >= f->least) & (v[j] > f->threshold)) << j;
            tied |= (uint32_t)((v[j] >= f->least) & (v[j] == f->threshold)) << j;
        }
    } else {
        const vf least = v_set((float)f->least), threshold = v_set((float)f->threshold);
        for (int j = 0; j < FAN; j += LANES) {
            const vf v = v_load((const float *)p->values + first + j);
            const vm drawn = v_le(least, v);
            above |= vm_bits(vm_and(drawn, v_lt(threshold, v))) << j;
            tied |= vm_bits(vm_and(drawn, v_eq(threshold, v))) << j;
        }
    }
    const uint32_t stored = n < FAN ? (1u << n) - 1 : 0xffff;
    return (above & stored) << 16 | (tied & stored);
}

/* (x 2^shift)^exponent of positive normal numbers. */
INLINE vf v_power(vf x, vf shift, float exponent) {
    vf k, f;
    v_split(x, &k, &f);
    return v_exp(v_mul(v_set(exponent), v_log_of_split(v_add(k, shift), f)));
}

/* A vector of doubles as floats in [1, 2] and their exponents. */
INLINE void split_doubles(const double *x, float *part, float *exponent) {
    for (int j = 0; j < LANES; j++) {
        uint64_t bits;
        memcpy(&bits, x + j, sizeof bits);
        exponent[j] = (float)((int)(bits >> 52 & 0x7ff) - 1023);
        bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
        double one;
        memcpy(&one, &bits, sizeof one);
        part[j] = (float)one;
    }
}

/* Weights exp((v - reference) rate) of a vector of entries that may be drawn. */
INLINE vf soft_weights(const recall_priorities *p, const recall_form *f, int64_t first) {
    if (p->is_double) {
        const double *v = (const double *)p->values + first;
        float exponent[LANES];
        for (int j = 0; j < LANES; j++) exponent[j] = (float)((v[j] - f->reference) * f->rate);
        return v_exp(v_load(exponent));
    }
    const vf v = v_load((const float *)p->values + first);
    return v_exp(v_mul(v_sub(v, v_set((float)f->reference)), v_set((float)f->rate)));
}

/* Weights ((|v| rate + extra) 2^shift)^alpha, with |v| = 0 for no value yet. Nothing that may be
 * drawn rounds to 0: with a small exponent it has its share. */
INLINE vf sized_weights(const recall_priorities *p, const recall_form *f, int64_t first,
                        int all_valued) {
    vf size, shift = v_set((float)f->shift);
    if (p->is_double) {
        const double *v = (const double *)p->values + first;
        double x[LANES];
        float part[LANES], exponent[LANES];
        for (int j = 0; j < LANES; j++) {
            x[j] = (v[j] > -INFINITY ? fabs(v[j]) : 0.0) * f->rate + f->extra;
            x[j] = x[j] > 1e-300 ? x[j] : 1e-300;
            part[j] = (float)x[j];
        }
        if (f->alpha != 1.0) {
            split_doubles(x, part, exponent);
            shift = v_add(shift, v_load(exponent));
        }
        size = v_load(part);
    } else {
        const vf v = v_load((const float *)p->values + first);
        const vf valued = v_select(v_lt(v_set(-INFINITY), v), v_abs(v), v_set(0.0f));
        size = v_add(v_mul(all_valued ? v_abs(v) : valued, v_set((float)f->rate)), v_set((float)f->extra));
    }
    size = v_max(v_set(SMALLEST), size);
    return f->alpha == 1.0 ? size : v_power(size, shift, (float)f->alpha);
}

/* Which of a vector of entries may be drawn. */
INLINE vm may_be_drawn(const recall_priorities *p, const recall_form *f, int64_t first) {
    if (!p->is_double) return v_le(v_set((float)f->least), v_load((const float *)p->values + first));
    const double *v = (const double *)p->values + first;
    float drawn[LANES];
    for (int j = 0; j < LANES; j++) drawn[j] = v[j] >= f->least ? 1.0f : 0.0f;
    return v_eq(v_load(drawn), v_set(1.0f));
}

/* The weights of n entries; behind them there is room up to a multiple of FAN, and behind the values
 * there is memory. Where all entries are known to have a value, and none is left out for a small
 * one, that need not be looked at. */
INLINE void entry_weights(const recall_priorities *p, const recall_form *f, int64_t first, int64_t n,
                          int all_valued, float *weight) {
    const int all_drawn = all_valued && f->least == -INFINITY;
    for (int64_t j = 0; j < n; j += LANES) {
        const vf w = f->mode == MODE_SOFT ? soft_weights(p, f, first + j)
                                          : sized_weights(p, f, first + j, all_valued);
        v_store(weight + j,
                all_drawn ? w : v_select(may_be_drawn(p, f, first + j), w, v_set(0.0f)));
    }
    for (int64_t j = n; j % FAN; j++) weight[j] = 0.0f;
}

/* The weights 1 / rank^alpha of n ranks, in the same way. */
INLINE void rank_weights(const recall_form *f, int64_t first, int64_t n, float *weight) {
    for (int64_t j = 0; j < n; j++) weight[j] = (float)(first + j + 1);
    for (int64_t j = n; j % FAN; j++) weight[j] = 1.0f;
    for (int64_t j = 0; j < n; j += LANES) {
        const vf rank = v_load(weight + j);
        v_store(weight + j, f->alpha == 1.0 ? v_div(v_set(1.0f), rank)
                                            : v_power(rank, v_set(0.0f), (float)-f->alpha));
    }
    for (int64_t j = n; j % FAN; j++) weight[j] = 0.0f;
}

#endif
