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

/* A form's numbers as vectors, made once for many entries: conversions in a loop are not moved out. */
typedef struct {
    vf least, reference, rate, extra, shift;
    float alpha;
} form_vectors;

INLINE form_vectors vectors_of(const recall_form *f) {
    const form_vectors v = {v_set((float)f->least), v_set((float)f->reference),
                            v_set((float)f->rate),  v_set((float)f->extra),
                            v_set((float)f->shift), (float)f->alpha};
    return v;
}

/* Weights exp((v - reference) rate) of a vector of floats that may be drawn, or of doubles. */
INLINE vf soft_weights(const form_vectors *f, vf value) {
    return v_exp(v_mul(v_sub(value, f->reference), f->rate));
}
INLINE vf soft_weights_of_doubles(const recall_form *f, const double *value) {
    float exponent[LANES];
    for (int j = 0; j < LANES; j++) exponent[j] = (float)((value[j] - f->reference) * f->rate);
    return v_exp(v_load(exponent));
}

/* Weights ((|v| rate + extra) 2^shift)^alpha, with |v| = 0 for no value yet. Nothing that may be
 * drawn rounds to 0: with a small exponent it has its share. */
INLINE vf sized_weights(const form_vectors *f, vf value, int is_power, int all_valued) {
    const vf size = all_valued ? v_abs(value)
                               : v_select(v_lt(v_set(-INFINITY), value), v_abs(value), v_set(0.0f));
    const vf scaled = v_max(v_set(SMALLEST), v_add(v_mul(size, f->rate), f->extra));
    return is_power ? v_power(scaled, f->shift, f->alpha) : scaled;
}
INLINE vf sized_weights_of_doubles(const recall_form *f, const double *value) {
    double x[LANES];
    float part[LANES], exponent[LANES];
    vf shift = v_set((float)f->shift);
    for (int j = 0; j < LANES; j++) {
        x[j] = (value[j] > -INFINITY ? fabs(value[j]) : 0.0) * f->rate + f->extra;
        x[j] = x[j] > 1e-300 ? x[j] : 1e-300;
        part[j] = (float)x[j];
    }
    if (f->alpha != 1.0) {
        split_doubles(x, part, exponent);
        shift = v_add(shift, v_load(exponent));
    }
    const vf size = v_max(v_set(SMALLEST), v_load(part));
    return f->alpha == 1.0 ? size : v_power(size, shift, (float)f->alpha);
}

/* The weights of n floats; constants say what they need, so that each loop has nothing else in it. */
INLINE void float_weights(const form_vectors *f, const float *value, int64_t n, int is_soft,
                          int is_power, int all_drawn, float *weight) {
    for (int64_t j = 0; j < n; j += LANES) {
        const vf v = v_load(value + j);
        const vf w = is_soft ? soft_weights(f, v) : sized_weights(f, v, is_power, all_drawn);
        v_store(weight + j, all_drawn ? w : v_select(v_le(f->least, v), w, v_set(0.0f)));
    }
}

INLINE void double_weights(const recall_form *f, const double *value, int64_t n, float *weight) {
    for (int64_t j = 0; j < n; j += LANES) {
        float drawn[LANES];
        for (int k = 0; k < LANES; k++) drawn[k] = value[j + k] >= f->least ? 1.0f : 0.0f;
        const vf w = f->mode == MODE_SOFT ? soft_weights_of_doubles(f, value + j)
                                          : sized_weights_of_doubles(f, value + j);
        v_store(weight + j, v_select(v_eq(v_load(drawn), v_set(1.0f)), w, v_set(0.0f)));
    }
}

/* The weights of n entries; behind them there is room up to a multiple of FAN, and behind the values
 * there is memory. Where all entries are known to have a value, and none is left out for a small
 * one, that need not be looked at. */
NOINLINE void entry_weights(const recall_priorities *p, const recall_form *f, int64_t first,
                            int64_t n, int all_valued, float *weight) {
    if (p->is_double) {
        double_weights(f, (const double *)p->values + first, n, weight);
    } else {
        const float *value = (const float *)p->values + first;
        const form_vectors v = vectors_of(f);
        const int is_soft = f->mode == MODE_SOFT, is_power = !is_soft && f->alpha != 1.0;
        const int all_drawn = all_valued && f->least == -INFINITY;
        switch (is_soft << 2 | is_power << 1 | all_drawn) {
            case 0: float_weights(&v, value, n, 0, 0, 0, weight); break;
            case 1: float_weights(&v, value, n, 0, 0, 1, weight); break;
            case 2: float_weights(&v, value, n, 0, 1, 0, weight); break;
            case 3: float_weights(&v, value, n, 0, 1, 1, weight); break;
            case 4: float_weights(&v, value, n, 1, 0, 0, weight); break;
            default: float_weights(&v, value, n, 1, 0, 1, weight); break;
        }
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
