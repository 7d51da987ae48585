/* Weights of entries from their values, in each mode. */
#ifndef RECALL_LEAVES_H
#define RECALL_LEAVES_H

#include <math.h>

#include "functions.h"
#include "priorities.h"

#define FAN 16                   /* children of a node */
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

/* base^exponent of numbers at least 0; 0 where the base is. */
INLINE vf v_power(vf base, float exponent) {
    if (exponent == 1.0f) return base;
    vf power = v_exp(v_mul(v_set(exponent), v_log(base)));
    return v_select(v_lt(base, v_set(SMALLEST)), v_set(0.0f), power);
}

/* The weights of n entries; behind them there is room up to a multiple of FAN, and behind the values
 * there is memory. */
INLINE void entry_weights(const recall_priorities *p, const recall_form *f, int64_t first, int64_t n,
                          float *weight) {
    const vf least = v_set((float)f->least), reference = v_set((float)f->reference);
    const vf rate = v_set((float)f->rate), extra = v_set((float)f->extra);
    for (int64_t j = 0; j < n; j += LANES) {
        vf may_be_drawn, scaled;
        if (p->is_double) {
            const double *v = (const double *)p->values + first + j;
            float lane[LANES], drawn[LANES];
            for (int k = 0; k < LANES; k++) {
                const double size = f->mode == MODE_SOFT ? v[k] - f->reference
                                    : v[k] > -INFINITY ? fabs(v[k]) : 0.0;
                lane[k] = (float)(size * f->rate + f->extra);
                drawn[k] = v[k] >= f->least ? 1.0f : 0.0f;
            }
            scaled = v_load(lane);
            may_be_drawn = v_load(drawn);
        } else {
            const vf v = v_load((const float *)p->values + first + j);
            const vf valued = v_select(v_lt(v_set(-INFINITY), v), v_abs(v), v_set(0.0f));
            const vf size = f->mode == MODE_SOFT ? v_sub(v, reference) : valued;
            scaled = v_add(v_mul(size, rate), extra);
            may_be_drawn = v_select(v_le(least, v), v_set(1.0f), v_set(0.0f));
        }
        /* Nothing that may be drawn rounds to 0 in mode "per": with a small exponent it has its
         * share. */
        const vf w = f->mode == MODE_SOFT
            ? v_exp(scaled)
            : v_power(v_max(v_set(SMALLEST), scaled), (float)f->alpha);
        v_store(weight + j, v_select(v_eq(may_be_drawn, v_set(1.0f)), w, v_set(0.0f)));
    }
    for (int64_t j = n; j % FAN; j++) weight[j] = 0.0f;
}

/* The weights 1 / rank^alpha of n ranks, in the same way. */
INLINE void rank_weights(const recall_form *f, int64_t first, int64_t n, float *weight) {
    for (int64_t j = 0; j < n; j++) weight[j] = 1.0f / (float)(first + j + 1);
    for (int64_t j = n; j % FAN; j++) weight[j] = 0.0f;
    for (int64_t j = 0; j < n; j += LANES)
        v_store(weight + j, v_power(v_load(weight + j), (float)f->alpha));
}

#endif
