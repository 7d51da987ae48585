/* What the stored values are like as a whole: counts, the largest, the threshold of MODE_TOP. */
#ifndef RECALL_CENSUS_H
#define RECALL_CENSUS_H

#include <stdlib.h>

#include "leaves.h"

#define FEW 2048   /* values that are a sample, or just partitioned */
#define CHUNK 8192 /* values whose counts fit narrow counters */

/* Places among the values, for selection.h. */
enum { ABOVE, AT_HIGH, BETWEEN, AT_LOW };

#define VALUE float
#define OF(name) name##_float
#if RECALL_ISA == 512
#define GATHER                                                                                    \
    for (; i + LANES <= n; i += LANES) {                                                          \
        const vf x = v_load(v + i);                                                               \
        const vm inside = vm_and(v_lt(x, v_set(high)), v_lt(v_set(low), x));                      \
        v_store(to, _mm512_maskz_compress_ps(inside, x));                                         \
        to += __builtin_popcount(inside);                                                         \
    }
#endif
#include "selection.h"
#undef GATHER
#undef VALUE
#undef OF
#define VALUE double
#define OF(name) name##_double
#include "selection.h"
#undef VALUE
#undef OF

/* Finds the threshold of MODE_TOP, and how many lie above it and at it. */
static int64_t find_threshold(recall_priorities *p) {
    const int64_t k = p->num_best - 1;
    p->num_above = 0;
    const int64_t status = p->is_double
        ? find_double(p, p->values, p->size, p->num_drawable, k)
        : find_float(p, p->values, p->size, p->num_drawable, k);
    p->threshold_is_valid = status == OK;
    return status;
}

/* Entries below this value are not drawn, if any is at or above it. */
INLINE double least_value(const recall_priorities *p) {
    return p->has_min_value && p->num_enough ? p->min_value : -INFINITY;
}

/* What decides the scale of a mode's weights: the value, or its size. */
INLINE double magnitude(const recall_priorities *p, double value) {
    if (p->mode != MODE_PER) return value;
    return value == -INFINITY ? 0.0 : fabs(value);
}

#define COUNT_VALUES(type)                                                                        \
    do {                                                                                          \
        const type *v = (const type *)p->values;                                                  \
        const type min_value = (type)p->min_value;                                                \
        for (int64_t from = 0; from < p->size; from += CHUNK) {                                    \
            const int64_t to = from + CHUNK < p->size ? from + CHUNK : p->size;                     \
            int32_t drawable = 0, valued = 0, enough = 0;                                         \
            for (int64_t i = from; i < to; i++) {                                                 \
                drawable += v[i] == v[i];                                                         \
                valued += v[i] > -(type)INFINITY;                                                 \
                enough += (v[i] > -(type)INFINITY) & (v[i] >= min_value);                         \
            }                                                                                     \
            p->num_drawable += drawable;                                                          \
            p->num_valued += valued;                                                              \
            p->num_enough += enough;                                                              \
        }                                                                                         \
    } while (0)

/* `magnitude` without branches; -inf for what is not drawn. */
#define MAGNITUDE(type, x)                                                                        \
    (!((x) >= least) ? -(type)INFINITY : !by_size ? (x) : (x) > -(type)INFINITY ? ((x) < 0 ? -(x) : (x)) : 0)

#define FIND_LARGEST(type)                                                                        \
    do {                                                                                          \
        const type *v = (const type *)p->values;                                                  \
        const type least = (type)least_value(p);                                                  \
        const int by_size = p->mode == MODE_PER;                                                  \
        const int64_t whole = p->size / FAN * FAN;                                                \
        type lane[FAN], largest = -(type)INFINITY;                                                \
        for (int j = 0; j < FAN; j++) lane[j] = largest;                                          \
        for (int64_t i = 0; i < whole; i += FAN) {                                                \
            for (int j = 0; j < FAN; j++) {                                                       \
                const type x = MAGNITUDE(type, v[i + j]);                                         \
                lane[j] = x > lane[j] ? x : lane[j];                                              \
            }                                                                                     \
        }                                                                                         \
        for (int j = 0; j < FAN; j++) largest = lane[j] > largest ? lane[j] : largest;            \
        for (int64_t i = whole; i < p->size; i++) {                                               \
            const type x = MAGNITUDE(type, v[i]);                                                 \
            largest = x > largest ? x : largest;                                                  \
        }                                                                                         \
        for (int64_t from = 0; from < p->size; from += CHUNK) {                                    \
            const int64_t to = from + CHUNK < p->size ? from + CHUNK : p->size;                     \
            int32_t count = 0;                                                                    \
            for (int64_t i = from; i < to; i++) count += MAGNITUDE(type, v[i]) == largest;        \
            p->num_largest += count;                                                              \
        }                                                                                         \
        p->largest = (double)largest;                                                             \
    } while (0)

static void take_census(recall_priorities *p) {
    p->num_drawable = p->num_valued = p->num_enough = p->num_largest = 0;
    if (p->is_double) COUNT_VALUES(double);
    else COUNT_VALUES(float);
    if (p->mode == MODE_SOFT || p->mode == MODE_PER) {
        if (p->is_double) FIND_LARGEST(double);
        else FIND_LARGEST(float);
    }
    p->census_is_valid = 1;
}

/* Takes a value out of the census (`by` = -1) or into it (1), as long as `least` is the least value
 * that may be drawn. */
INLINE void recount(recall_priorities *p, double value, int64_t by, double least) {
    if (!(value == value)) return;
    const int64_t valued = value > -INFINITY;
    p->num_drawable += by;
    p->num_valued += valued ? by : 0;
    p->num_enough += valued && p->has_min_value && value >= p->min_value ? by : 0;
    if (p->threshold_is_valid) {
        p->num_above += value > p->threshold ? by : 0;
        p->num_tied += value == p->threshold ? by : 0;
    }
    if (p->mode != MODE_SOFT && p->mode != MODE_PER) return;
    if (!(value >= least)) return;
    const double size = magnitude(p, value);
    if (by > 0 && size > p->largest) {
        p->largest = size;
        p->num_largest = 0;
    }
    p->num_largest += size == p->largest ? by : 0;
}

#endif
