/* Writes of values, and what they leave to be brought up to date before the next draw.
 *
 * Compiled once for each instruction set, as draws.h is; NAME gives the functions their names. */
#ifndef RECALL_WRITES_H
#define RECALL_WRITES_H

#include <float.h>

#include "ranks.h"
#include "threshold.h"

/* Mode "per" raises numbers up to 1 to `alpha`. A power of two makes them so, as few new maxima
 * change that; but with a large exponent all might become 0. */
#define LARGE_EXPONENT 64.0

static recall_form form_of(const recall_priorities *p) {
    recall_form f;
    memset(&f, 0, sizeof f);
    f.mode = p->mode;
    f.least = least_value(p);
    f.sums = SUMS_OF_WEIGHTS;
    /* Beyond that, rounding would decide, or all weights be 0; as a float it must be finite. */
    f.alpha = fmin(p->alpha, p->mode == MODE_PER ? 1e8 : 1e30);
    if (!p->num_valued) {
        f.sums = SUMS_OF_COUNTS;
        f.threshold = -INFINITY;
    } else if (p->mode == MODE_TOP) {
        f.sums = SUMS_OF_COUNTS;
        f.threshold = p->threshold;
    } else if (p->mode == MODE_SOFT) {
        f.reference = p->largest;
        /* Within what the values' type holds: 0 or infinity times 0 would be no number. */
        const double most = p->is_double ? 1e300 : 1e37;
        f.rate = fmin(fmax(1.0 / p->temperature, 1.0 / most), most);
    } else if (p->mode == MODE_PER) {
        int exponent;
        const double largest = fmin(p->largest + p->eps, DBL_MAX);
        frexp(largest, &exponent);
        f.rate = 1.0;
        /* As a float it may be infinite. */
        const int is_beyond = !p->is_double && largest > FLT_MAX;
        if (p->alpha == 1.0 || (is_beyond && p->alpha <= LARGE_EXPONENT))
            f.rate = fmin(ldexp(1.0, -exponent), 1e37);
        else if (p->alpha > LARGE_EXPONENT) f.rate = fmin(1.0 / largest, 1e37);
        else f.shift = -exponent;
        f.extra = p->eps * f.rate;
    }
    return f;
}

/* All that may be drawn, for the uniform share. */
static recall_form eligible_form_of(const recall_priorities *p) {
    recall_form f;
    memset(&f, 0, sizeof f);
    f.least = least_value(p);
    f.sums = SUMS_OF_COUNTS;
    f.threshold = -INFINITY;
    return f;
}

INLINE int64_t num_eligible(const recall_priorities *p) {
    return p->has_min_value && p->num_enough ? p->num_enough : p->num_drawable;
}

/* What an entry at the threshold weighs. */
INLINE double tied_share(const recall_priorities *p) {
    if (!p->num_valued) return 1.0;
    return (double)(p->num_best - p->num_above) / (double)p->num_tied;
}

static int is_same(const recall_form *a, const recall_form *b) { return !memcmp(a, b, sizeof *a); }

static int64_t prepare(recall_priorities *p) {
    levels l;
    if (!p->census_is_valid) take_census(p);
    if (!p->num_drawable) return NOTHING_TO_DRAW;
    if (p->mode == MODE_TOP && p->num_valued) {
        const int64_t k = p->num_best - p->num_above;
        if (!p->threshold_is_valid || ((k <= 0 || k > p->num_tied) && !move_threshold(p))) {
            const int64_t status = find_threshold(p);
            if (status != OK) return status;
            p->least_is_valid = 0;
        }
    }
    const recall_form f = form_of(p);
    const int by_rank = p->mode == MODE_RANK && p->num_valued;
    if (by_rank && (!p->order_is_valid || p->num_changed)) {
        const int64_t status = p->order_is_valid ? sort_changed(p) : sort_entries(p);
        if (status != OK) return status;
    }
    const int64_t num_ranks = by_rank ? num_eligible(p) : 0;
    if (!p->nodes_are_valid || !is_same(&f, &p->form) || num_ranks != p->num_ranks) {
        p->form = f;
        p->num_ranks = num_ranks;
        find_levels(p->capacity, by_rank ? num_ranks : p->size, p->nodes, &l);
        build(p, &f, &l, 0);
        p->nodes_are_valid = 1;
        p->least_is_valid = 0;
    }
    if (p->uniform_share > 0.0 && num_eligible(p) < p->size) {
        const recall_form eligible = eligible_form_of(p);
        if (!p->eligible_is_valid || !is_same(&eligible, &p->eligible_form)) {
            p->eligible_form = eligible;
            find_levels(p->capacity, p->size, p->eligible, &l);
            build(p, &eligible, &l, 0);
            p->eligible_is_valid = 1;
        }
    }
    return OK;
}

/* Brings the nodes above some entries up to date; entries beyond the size do not matter. */
static void follow(recall_priorities *p, const int64_t *index, int64_t count) {
    levels l;
    p->least_is_valid = 0;
    for (int64_t i = 0; i < count && p->order_is_valid; i++) {
        if (index[i] >= 0 && index[i] < p->size) note_change(p, index[i]);
    }
    if (count > p->size / 8) {
        p->nodes_are_valid = p->nodes_are_valid && p->num_ranks;
        p->eligible_is_valid = 0;
    }
    if (p->nodes_are_valid && !p->num_ranks) { /* ranks weigh the same whoever has them */
        find_levels(p->capacity, p->size, p->nodes, &l);
        update(p, &p->form, &l, index, count);
    }
    if (p->eligible_is_valid) {
        find_levels(p->capacity, p->size, p->eligible, &l);
        update(p, &p->eligible_form, &l, index, count);
    }
}

static void set_value(recall_priorities *p, int64_t i, double value, double least) {
    if (!p->census_is_valid) {
        p->threshold_is_valid = p->band_is_valid = 0;
    } else if (i < p->size) {
        const double before = value_at(p, i);
        recount(p, before, -1, least);
        recount(p, value, 1, least);
        if (p->band_is_valid && in_band(p, before) != in_band(p, value)) {
            if (in_band(p, value)) enter_band(p, i);
            else leave_band(p, i);
        }
    }
    if (p->is_double) ((double *)p->values)[i] = value;
    else ((float *)p->values)[i] = (float)value;
}

/* What was counted holds only while the same entries may be drawn, and while there is still one of
 * the largest value. */
static void end_writes(recall_priorities *p, double least) {
    if (least_value(p) != least || (needs_largest(p) && p->num_largest <= 0)) p->census_is_valid = 0;
}

int64_t NAME(recall_write)(recall_priorities *, const int64_t *, const void *, int64_t, int64_t,
                           int64_t, double);
int64_t NAME(recall_write)(recall_priorities *p, const int64_t *index, const void *values,
                           int64_t is_double, int64_t count, int64_t stride, double none) {
    int64_t refused = 0;
    for (int64_t i = 0; i < count; i++) {
        if (index[i] >= p->capacity) return OUT_OF_RANGE;
    }
    if (stride && count > 1) {
        int64_t i = 1;
        while (i < count && index[i] == index[0]) i++;
        if (i == count) return ONE_INDEX;
    }
    const double least = least_value(p);
    collect_band(p);
    for (int64_t i = 0; i < count; i++) {
        if (i + 16 < count && index[i + 16] >= 0) prefetch_value(p, index[i + 16]);
        double value = is_double ? ((const double *)values)[i * stride]
                                 : (double)((const float *)values)[i * stride];
        if (index[i] < 0 || value == none) continue;
        if (!p->is_double) value = (float)value;
        if (!(value - value == 0.0)) {
            value = (double)NAN;
            refused++;
        }
        set_value(p, index[i], value, least);
    }
    end_writes(p, least);
    follow(p, index, count);
    return refused;
}

int64_t NAME(recall_erase)(recall_priorities *, const int64_t *, int64_t);
int64_t NAME(recall_erase)(recall_priorities *p, const int64_t *index, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (index[i] >= p->capacity) return OUT_OF_RANGE;
    }
    const double least = least_value(p);
    collect_band(p);
    for (int64_t i = 0; i < count; i++) {
        if (index[i] >= 0) set_value(p, index[i], -INFINITY, least);
    }
    end_writes(p, least);
    follow(p, index, count);
    return OK;
}

int64_t NAME(recall_resize)(recall_priorities *, int64_t);
int64_t NAME(recall_resize)(recall_priorities *p, int64_t size) {
    const int64_t before = p->size;
    if (size == before) return OK;
    collect_band(p);
    p->size = size;
    p->least_is_valid = 0;
    for (int64_t i = before; i < size && p->order_is_valid; i++) note_change(p, i);
    if (size < before || size - before > size / 8) {
        p->order_is_valid = 0;
        p->census_is_valid = p->threshold_is_valid = p->band_is_valid = 0;
        p->eligible_is_valid = 0;
        p->nodes_are_valid = p->nodes_are_valid && p->num_ranks;
        return OK;
    }
    levels l;
    if (p->census_is_valid) {
        const double least = least_value(p);
        for (int64_t i = before; i < size; i++) {
            recount(p, value_at(p, i), 1, least);
            if (p->band_is_valid && in_band(p, value_at(p, i))) enter_band(p, i);
        }
        end_writes(p, least);
    } else {
        p->threshold_is_valid = p->band_is_valid = 0;
    }
    if (p->nodes_are_valid && !p->num_ranks) {
        find_levels(p->capacity, size, p->nodes, &l);
        build(p, &p->form, &l, before);
    }
    if (p->eligible_is_valid) {
        find_levels(p->capacity, size, p->eligible, &l);
        build(p, &p->eligible_form, &l, before);
    }
    return OK;
}

#endif
