/* Writes and draws, compiled once for each instruction set; NAME gives the functions their names. */
#ifndef RECALL_DRAWS_H
#define RECALL_DRAWS_H

#include "census.h"
#include "ranks.h"

/* Mode "per" raises numbers up to 1 to `alpha`. A power of two makes them so, as few new maxima
 * change that; but with a large exponent all might become 0. */
#define LARGE_EXPONENT 64.0

static recall_form form_of(const recall_priorities *p) {
    recall_form f;
    memset(&f, 0, sizeof f);
    f.mode = p->mode;
    f.least = least_value(p);
    f.sums = SUMS_OF_WEIGHTS;
    f.alpha = p->alpha;
    if (!p->num_valued) {
        f.sums = SUMS_OF_COUNTS;
        f.threshold = -INFINITY;
    } else if (p->mode == MODE_TOP) {
        f.sums = SUMS_OF_COUNTS;
        f.threshold = p->threshold;
    } else if (p->mode == MODE_SOFT) {
        f.reference = p->largest;
        /* Within what a float holds: 0 or infinity times 0 would be no number. */
        f.rate = fmin(fmax(1.0 / p->temperature, 1e-37), 1e37);
    } else if (p->mode == MODE_PER) {
        int exponent;
        const double largest = p->largest + p->eps;
        frexp(largest, &exponent);
        f.rate = 1.0;
        if (p->alpha == 1.0) f.rate = fmin(ldexp(1.0, -exponent), 1e37);
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
        if (!p->threshold_is_valid || k <= 0 || k > p->num_tied) {
            const int64_t status = find_threshold(p);
            if (status != OK) return status;
            p->least_is_valid = 0;
        }
    }
    const recall_form f = form_of(p);
    const int by_rank = p->mode == MODE_RANK && p->num_valued;
    if (by_rank && !p->order_is_valid) {
        const int64_t status = sort_entries(p);
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
    p->order_is_valid = p->least_is_valid = 0;
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
        p->threshold_is_valid = 0;
    } else if (i < p->size) {
        recount(p, value_at(p, i), -1, least);
        recount(p, value, 1, least);
    }
    if (p->is_double) ((double *)p->values)[i] = value;
    else ((float *)p->values)[i] = (float)value;
}

/* What was counted holds only while the same entries may be drawn, and while there is still one of
 * the largest value. */
static void end_writes(recall_priorities *p, double least) {
    const int by_size = p->mode == MODE_SOFT || p->mode == MODE_PER;
    if (least_value(p) != least || (by_size && p->num_largest <= 0)) p->census_is_valid = 0;
}

int64_t NAME(recall_write)(recall_priorities *, const int64_t *, const void *, int64_t, int64_t,
                           int64_t, double);
int64_t NAME(recall_write)(recall_priorities *p, const int64_t *index, const void *values,
                           int64_t is_double, int64_t count, int64_t stride, double none) {
    int64_t refused = 0;
    for (int64_t i = 0; i < count; i++) {
        if (index[i] >= p->capacity) return -1;
    }
    if (stride && count > 1) {
        int64_t i = 1;
        while (i < count && index[i] == index[0]) i++;
        if (i == count) return -2;
    }
    const double least = least_value(p);
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
        if (index[i] >= p->capacity) return -1;
    }
    const double least = least_value(p);
    for (int64_t i = 0; i < count; i++) {
        if (index[i] >= 0) set_value(p, index[i], -INFINITY, least);
    }
    end_writes(p, least);
    follow(p, index, count);
    return 0;
}

#define COPY(to_type, from_type)                                                                  \
    do {                                                                                          \
        to_type *to = (to_type *)p->values;                                                       \
        const from_type *from = (const from_type *)values, lowest = (from_type)none;              \
        for (int64_t start = 0; start < count; start += CHUNK) {                                   \
            const int64_t end = start + CHUNK < count ? start + CHUNK : count;                      \
            int32_t bad = 0;                                                                      \
            for (int64_t i = start; i < end; i++) {                                               \
                const to_type x = (to_type)from[i];                                               \
                const int is_bad = !(x - x == 0);                                                 \
                to[i] = is_bad ? (to_type)NAN : from[i] == lowest ? -(to_type)INFINITY : x;       \
                bad += is_bad;                                                                    \
            }                                                                                     \
            refused += bad;                                                                       \
        }                                                                                         \
    } while (0)

int64_t NAME(recall_refresh)(recall_priorities *, const void *, int64_t, int64_t, double);
int64_t NAME(recall_refresh)(recall_priorities *p, const void *values, int64_t is_double,
                             int64_t count, double none) {
    int64_t refused = 0;
    if (count > p->capacity) return -1;
    if (p->is_double && is_double) COPY(double, double);
    else if (p->is_double) COPY(double, float);
    else if (is_double) COPY(float, double);
    else COPY(float, float);
    p->census_is_valid = p->threshold_is_valid = p->eligible_is_valid = 0;
    p->order_is_valid = p->least_is_valid = 0;
    p->nodes_are_valid = p->nodes_are_valid && p->num_ranks;
    return refused;
}

int64_t NAME(recall_resize)(recall_priorities *, int64_t);
int64_t NAME(recall_resize)(recall_priorities *p, int64_t size) {
    const int64_t before = p->size;
    if (size == before) return OK;
    p->size = size;
    p->order_is_valid = p->least_is_valid = 0;
    if (size < before || size - before > size / 8) {
        p->census_is_valid = p->threshold_is_valid = p->eligible_is_valid = 0;
        p->nodes_are_valid = p->nodes_are_valid && p->num_ranks;
        return OK;
    }
    levels l;
    if (p->census_is_valid) {
        const double least = least_value(p);
        for (int64_t i = before; i < size; i++) recount(p, value_at(p, i), 1, least);
        end_writes(p, least);
    } else {
        p->threshold_is_valid = 0;
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

/* The weight of one entry. */
static double weight_of(const recall_priorities *p, const levels *l, int64_t entry) {
    const recall_form *f = &p->form;
    const double value = value_at(p, entry);
    if (!(value >= f->least)) return 0.0;
    if (f->sums == SUMS_OF_COUNTS)
        return value > f->threshold ? 1.0 : value == f->threshold ? tied_share(p) : 0.0;
    if (f->mode == MODE_RANK) {
        const int64_t from = first_below(p, 0, p->num_ranks, value, 1);
        return mean_of_ranks(p, l, from, run_end(p, from));
    }
    float weight[FAN];
    entry_weights(p, f, entry - entry % LANES, LANES, weight); /* no vector reaches past the last */
    return weight[entry % LANES];
}

/* The least weight of all that may be drawn, and the least above 0. */
static void find_least(recall_priorities *p, const levels *l) {
    const recall_form *f = &p->form;
    double least = INFINITY, positive = INFINITY;
    if (f->sums == SUMS_OF_COUNTS) {
        const double share = tied_share(p);
        positive = num_tied(l) ? share : 1.0;
        least = num_above(l) + num_tied(l) < num_eligible(p) ? 0.0 : positive;
    } else if (f->mode == MODE_RANK) {
        /* A large exponent makes the last weights 0. */
        for (int64_t to = p->num_ranks; to > 0 && positive == INFINITY;) {
            const int64_t from = run_begin(p, to - 1);
            const double weight = mean_of_ranks(p, l, from, to);
            if (to == p->num_ranks) least = weight;
            if (weight > 0.0) positive = weight;
            to = from;
        }
    } else {
        float weight[RUN];
        for (int64_t first = 0; first < p->size; first += RUN) {
            const int64_t n = p->size - first < RUN ? p->size - first : RUN;
            entry_weights(p, f, first, n, weight);
            for (int64_t j = 0; j < n; j++) {
                if (weight[j] < least && value_at(p, first + j) >= f->least) least = weight[j];
                if (weight[j] > 0.0f && weight[j] < positive) positive = weight[j];
            }
        }
    }
    p->least_weight = least;
    p->least_positive_weight = positive;
    p->least_is_valid = 1;
}

typedef struct {
    double share, total, even; /* of a tied entry; of all weights; each entry's uniform part */
} mixture;

/* With a uniform share, weights become probabilities. */
INLINE double mixed(const recall_priorities *p, const mixture *m, double weight) {
    return p->uniform_share > 0.0 ? (1.0 - p->uniform_share) * weight / m->total + m->even : weight;
}

static mixture mixture_of(const recall_priorities *p, const levels *l) {
    mixture m;
    m.share = p->form.sums == SUMS_OF_COUNTS ? tied_share(p) : 1.0;
    m.total = p->form.sums == SUMS_OF_COUNTS
        ? (double)num_above(l) + (double)num_tied(l) * m.share
        : sum_of_weights(l);
    m.even = p->uniform_share / (double)num_eligible(p);
    return m;
}

/* Numbers in [0, 1) become entries above the threshold, or at it with the weight `share`. */
static void draw_counted(const recall_priorities *p, const recall_form *f, const levels *l,
                         const roots *from, double share, int64_t count, const double *uniform, int64_t *entry,
                         double *drawn) {
    uint32_t rest[SIDE_BY_SIDE];
    uint8_t shift[SIDE_BY_SIDE];
    const double above = (double)num_above(l), tied = (double)num_tied(l);
    for (int64_t i = 0; i < count; i++) {
        const double x = uniform[i] * (above + tied * share);
        const int is_tied = tied > 0.0 && x >= above;
        const double number = is_tied ? (x - above) / share : x, last = is_tied ? tied : above;
        rest[i] = (uint32_t)(number < last ? number : last - 1.0);
        shift[i] = is_tied ? 0 : 32;
        drawn[i] = is_tied ? share : 1.0;
    }
    descend_counts(p, f, l, from, count, rest, shift, entry);
}

/* Numbers in [0, 1) become entries that may be drawn. */
static void draw_evenly(const recall_priorities *p, const levels *l, const roots *from,
                        int64_t count, const double *uniform, int64_t *entry) {
    double drawn[SIDE_BY_SIDE];
    if (num_eligible(p) < p->size) {
        draw_counted(p, &p->eligible_form, l, from, 1.0, count, uniform, entry, drawn);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        entry[i] = (int64_t)(uniform[i] * (double)p->size);
        if (entry[i] >= p->size) entry[i] = p->size - 1;
    }
}

/* Numbers in [0, 1) become entries by their weights. */
static void draw_weighted(const recall_priorities *p, const levels *l, const roots *from,
                          const mixture *m, int64_t count, double *uniform, int64_t *entry, double *drawn) {
    if (p->form.sums == SUMS_OF_COUNTS) {
        draw_counted(p, &p->form, l, from, m->share, count, uniform, entry, drawn);
        return;
    }
    for (int64_t i = 0; i < count; i++) uniform[i] *= m->total;
    descend(p, &p->form, l, from, count, uniform, entry, drawn);
    for (int64_t i = 0; i < count && p->num_ranks; i++) {
        const int64_t from = run_begin(p, entry[i]), to = run_end(p, entry[i]);
        const int64_t among = (int64_t)(uniform[i] / drawn[i] * (double)(to - from));
        if (to - from > 1) drawn[i] = mean_of_ranks(p, l, from, to);
        entry[i] = p->order[from + (among < to - from ? among : to - from - 1)];
    }
}

int64_t NAME(recall_draw)(recall_priorities *, const double *, int64_t, double, int64_t *, float *);
int64_t NAME(recall_draw)(recall_priorities *p, const double *uniform, int64_t count, double beta,
                          int64_t *entry, float *importance) {
    levels l, even_levels;
    roots from, even_from;
    const int64_t status = prepare(p);
    if (status != OK) return status;
    find_levels(p->capacity, p->num_ranks ? p->num_ranks : p->size, p->nodes, &l);
    find_roots(&p->form, &l, count, &from);
    if (p->uniform_share > 0.0 && num_eligible(p) < p->size) {
        find_levels(p->capacity, p->size, p->eligible, &even_levels);
        find_roots(&p->eligible_form, &even_levels, count, &even_from);
    }
    if (importance && !p->least_is_valid) find_least(p, &l);
    const mixture m = mixture_of(p, &l);
    const double mixed_share = p->uniform_share;
    const double least = mixed_share > 0.0 ? p->least_weight : p->least_positive_weight;
    for (int64_t first = 0; first < count; first += SIDE_BY_SIDE) {
        const int64_t n = count - first < SIDE_BY_SIDE ? count - first : SIDE_BY_SIDE;
        double rest[SIDE_BY_SIDE], drawn[SIDE_BY_SIDE], even[SIDE_BY_SIDE];
        int64_t at[SIDE_BY_SIDE], chosen[SIDE_BY_SIDE], place[SIDE_BY_SIDE], num_even = 0, k = 0;
        for (int64_t i = 0; i < n; i++) {
            const double u = uniform[first + i];
            if (u < mixed_share) {
                even[num_even] = u / mixed_share;
                place[SIDE_BY_SIDE - ++num_even] = i;
            } else {
                rest[k] = (u - mixed_share) / (1.0 - mixed_share);
                place[k++] = i;
            }
        }
        draw_weighted(p, &l, &from, &m, k, rest, at, drawn);
        for (int64_t i = 0; i < k; i++) {
            entry[first + place[i]] = at[i];
            if (importance)
                importance[first + place[i]] =
                    (float)pow(mixed(p, &m, drawn[i]) / mixed(p, &m, least), -beta);
        }
        if (num_even) draw_evenly(p, &even_levels, &even_from, num_even, even, chosen);
        for (int64_t i = 0; i < num_even; i++) {
            const int64_t to = first + place[SIDE_BY_SIDE - 1 - i];
            entry[to] = chosen[i];
            if (importance)
                importance[to] = (float)pow(
                    mixed(p, &m, weight_of(p, &l, chosen[i])) / mixed(p, &m, least), -beta);
        }
    }
    return OK;
}

int64_t NAME(recall_weights)(recall_priorities *, double *);
int64_t NAME(recall_weights)(recall_priorities *p, double *weights) {
    levels l;
    const int64_t status = prepare(p);
    if (status != OK) return status;
    find_levels(p->capacity, p->num_ranks ? p->num_ranks : p->size, p->nodes, &l);
    const mixture m = mixture_of(p, &l);
    for (int64_t i = 0; i < p->size; i++) {
        const double value = value_at(p, i);
        weights[i] = value >= p->form.least ? mixed(p, &m, weight_of(p, &l, i)) : 0.0;
    }
    return OK;
}

int64_t NAME(recall_prepare)(recall_priorities *);
int64_t NAME(recall_prepare)(recall_priorities *p) { return prepare(p); }

int64_t NAME(recall_census)(recall_priorities *);
int64_t NAME(recall_census)(recall_priorities *p) {
    if (!p->census_is_valid) take_census(p);
    return OK;
}

#endif
