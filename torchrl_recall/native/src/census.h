/* What the stored values are like as a whole: how many may be drawn, and the largest. */
#ifndef RECALL_CENSUS_H
#define RECALL_CENSUS_H

#include "leaves.h"

#define CHUNK 8192 /* values whose counts fit narrow counters */

/* Entries below this value are not drawn, if any is at or above it. */
INLINE double least_value(const recall_priorities *p) {
    return p->has_min_value && p->num_enough ? p->min_value : -INFINITY;
}

/* What decides the scale of a mode's weights: the value, or its size. */
INLINE double magnitude(const recall_priorities *p, double value) {
    if (p->mode != MODE_PER) return value;
    return value == -INFINITY ? 0.0 : fabs(value);
}

/* Counts a vector of floats at a time, or doubles one by one. */
static void count_values(recall_priorities *p, int64_t from, int64_t to) {
    const int64_t whole = p->is_double ? from : from + (to - from) / LANES * LANES;
    const vf none = v_set(-INFINITY), enough = v_set((float)p->min_value);
    for (int64_t i = from; i < whole; i += LANES) {
        const vf v = v_load((const float *)p->values + i);
        const vm valued = v_lt(none, v);
        p->num_drawable += count_bits(vm_bits(v_eq(v, v)));
        p->num_valued += count_bits(vm_bits(valued));
        p->num_enough += count_bits(vm_bits(vm_and(valued, v_le(enough, v))));
    }
    for (int64_t i = whole; i < to; i++) {
        const double v = value_at(p, i);
        p->num_drawable += v == v;
        p->num_valued += v > -INFINITY;
        p->num_enough += (v > -INFINITY) & (v >= p->min_value);
    }
}

/* The magnitudes of a vector of values; -inf for those that are not drawn. */
INLINE vf magnitudes(vf v, vf least, int by_size) {
    const vf none = v_set(-INFINITY);
    if (by_size) {
        const vf size = v_select(v_eq(v, none), v_set(0.0f), v_abs(v));
        return v_select(v_le(least, v), size, none);
    }
    return v_select(v_le(least, v), v, none);
}

/* Looks for the largest among some more values, and counts it. */
static void find_largest(recall_priorities *p, int64_t from, int64_t to, double least) {
    const int64_t whole = p->is_double ? from : from + (to - from) / LANES * LANES;
    const int by_size = p->mode == MODE_PER;
    const float *values = (const float *)p->values;
    const vf lowest = v_set((float)least);
    float lane[LANES];
    vf most = v_set(-INFINITY);
    for (int64_t i = from; i < whole; i += LANES)
        most = v_max(most, magnitudes(v_load(values + i), lowest, by_size));
    v_store(lane, most);
    double largest = -INFINITY;
    for (int j = 0; j < LANES; j++) largest = lane[j] > largest ? lane[j] : largest;
    for (int64_t i = whole; i < to; i++) {
        const double v = value_at(p, i), size = v >= least ? magnitude(p, v) : -INFINITY;
        largest = size > largest ? size : largest;
    }
    if (largest < p->largest) return;
    if (largest > p->largest) p->num_largest = 0;
    p->largest = largest;
    most = v_set((float)largest);
    for (int64_t i = from; i < whole; i += LANES)
        p->num_largest +=
            count_bits(vm_bits(v_eq(most, magnitudes(v_load(values + i), lowest, by_size))));
    for (int64_t i = whole; i < to; i++) {
        const double v = value_at(p, i);
        p->num_largest += v >= least && magnitude(p, v) == largest;
    }
}

static void begin_census(recall_priorities *p) {
    p->num_drawable = p->num_valued = p->num_enough = p->num_largest = 0;
    p->largest = -INFINITY;
}

INLINE int needs_largest(const recall_priorities *p) {
    return p->mode == MODE_SOFT || p->mode == MODE_PER;
}

/* Takes some more values in, while they are in the cache; not where a least value decides, once all
 * are counted, which of them may be drawn. */
static void take_in(recall_priorities *p, int64_t from, int64_t to) {
    count_values(p, from, to);
    if (needs_largest(p)) find_largest(p, from, to, -INFINITY);
}

static void take_census(recall_priorities *p) {
    begin_census(p);
    for (int64_t from = 0; from < p->size; from += CHUNK) {
        const int64_t to = from + CHUNK < p->size ? from + CHUNK : p->size;
        if (p->has_min_value) count_values(p, from, to);
        else take_in(p, from, to);
    }
    if (p->has_min_value && needs_largest(p)) {
        const double least = least_value(p);
        for (int64_t from = 0; from < p->size; from += CHUNK)
            find_largest(p, from, from + CHUNK < p->size ? from + CHUNK : p->size, least);
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
        p->num_over += value >= p->band_high ? by : 0;
    }
    if (!needs_largest(p)) return;
    if (!(value >= least)) return;
    const double size = magnitude(p, value);
    if (by > 0 && size > p->largest) {
        p->largest = size;
        p->num_largest = 0;
    }
    p->num_largest += size == p->largest ? by : 0;
}

#endif
