/* The threshold of MODE_TOP: found among all values, or moved among the few around it. */
#ifndef RECALL_THRESHOLD_H
#define RECALL_THRESHOLD_H

#include <stdlib.h>

#include "census.h"
#include "levels.h"

#define FEW 2048   /* values that are a sample, or just partitioned */

/* Places among the values, for selection.h. */
enum { ABOVE, AT_HIGH, BETWEEN, AT_LOW };

/* Places by the golden ratio fall in step with no period of the data. */
INLINE int64_t next_place(uint64_t *place, int64_t n) {
    *place += 0x9e3779b97f4a7c15u;
    return (int64_t)((double)(*place >> 11) * 0x1p-53 * (double)n);
}

#define VALUE float
#define OF(name) name##_float
#if RECALL_ISA == 512
#define GATHER                                                                                    \
    for (; i + LANES <= n; i += LANES) {                                                          \
        const vf x = v_load(v + i);                                                               \
        const vm inside = vm_and(v_lt(x, v_set(high)), v_lt(v_set(low), x));                      \
        v_store(to, _mm512_maskz_compress_ps(inside, x));                                         \
        to += count_bits(vm_bits(inside));                                                         \
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

#define NOT_COLLECTED -1 /* of `num_band` */

INLINE int in_band(const recall_priorities *p, double value) {
    return value > p->band_low && value < p->band_high;
}

INLINE void enter_band(recall_priorities *p, int64_t entry) {
    if (p->num_band == MAX_BAND) p->band_is_valid = 0;
    else p->band[p->num_band++] = (uint32_t)entry;
}

/* Few values are in the band, so few leave it. */
static void leave_band(recall_priorities *p, int64_t entry) {
    int64_t i = 0;
    while (i < p->num_band && p->band[i] != (uint32_t)entry) i++;
    if (i < p->num_band) p->band[i] = p->band[--p->num_band];
}

static void begin_threshold(recall_priorities *p) {
    p->num_above = p->band_is_valid = 0;
    p->band_low = p->band_high = INFINITY;
}

static int64_t end_threshold(recall_priorities *p, int64_t status) {
    p->threshold_is_valid = status == OK;
    if (p->num_over < 0) p->num_over = 0;
    else p->band_is_valid = status == OK && p->size > FEW;
    p->num_band = NOT_COLLECTED;
    return status;
}

/* Finds the threshold among all values. */
static int64_t find_threshold(recall_priorities *p) {
    const int64_t k = p->num_best - 1;
    begin_threshold(p);
    return end_threshold(p, p->is_double
        ? find_double(p, p->values, p->size, p->num_drawable, k)
        : find_float(p, p->values, p->size, p->num_drawable, k));
}

/* Finds which entries are in the band: when the first value is about to change, or the threshold. */
static void collect_band(recall_priorities *p) {
    if (!p->band_is_valid || p->num_band != NOT_COLLECTED) return;
    p->num_band = 0;
    const int64_t whole = p->is_double ? 0 : p->size / LANES * LANES;
    const vf low = v_set((float)p->band_low), high = v_set((float)p->band_high);
    for (int64_t i = 0; i < whole; i += LANES) {
        const vf v = v_load((const float *)p->values + i);
        uint32_t inside = vm_bits(vm_and(v_lt(low, v), v_lt(v, high)));
        for (int64_t j = i; inside; j++, inside >>= 1) {
            if (inside & 1) enter_band(p, j);
        }
    }
    for (int64_t i = whole; i < p->size; i++) {
        if (in_band(p, value_at(p, i))) enter_band(p, i);
    }
}

/* Moves the threshold within the band; returns whether that is where it must be. Entries that
 * change sides with it are weighed anew. */
static int move_threshold(recall_priorities *p) {
    collect_band(p);
    double value[MAX_BAND];
    int64_t crossed[MAX_BAND], num_crossed = 0, counts[4];
    const int64_t k = p->num_best - 1 - p->num_over, n = p->num_band;
    const double before = p->threshold;
    if (!p->band_is_valid || k < 0 || k >= n) return 0;
    for (int64_t i = 0; i < n; i++) value[i] = value_at(p, p->band[i]);
    const double after = partition_double(value, n, k);
    memset(counts, 0, sizeof counts);
    count_double(value, n, after, after, counts);
    p->threshold = after;
    p->num_above = p->num_over + counts[ABOVE];
    p->num_tied = counts[AT_HIGH];
    p->least_is_valid = 0;
    const double low = before < after ? before : after, high = before < after ? after : before;
    for (int64_t i = 0; i < n; i++) {
        const double x = value_at(p, p->band[i]);
        if (x >= low && x <= high) crossed[num_crossed++] = p->band[i];
    }
    if (p->nodes_are_valid && p->form.sums == SUMS_OF_COUNTS && p->form.threshold == before &&
        in_band(p, before)) {
        levels l;
        p->form.threshold = after;
        find_levels(p->capacity, p->size, p->nodes, &l);
        update(p, &p->form, &l, crossed, num_crossed);
    }
    return 1;
}

#endif
