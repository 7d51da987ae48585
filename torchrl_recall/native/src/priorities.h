/* The C interface of draws by value: stored values, sums over them, and exact draws, each on a way
 * as long as the logarithm of their number to the base 16.
 *
 * Everything lies in memory that the caller owns; ../priorities.py mirrors the structure. Sums are
 * a tree of sixteen children a node, always added up anew from the children in one order, so that
 * after any sequence of writes they are what a rebuild would give, to the bit.
 */
#ifndef RECALL_PRIORITIES_H
#define RECALL_PRIORITIES_H

#include "recall.h"

#define MAX_BAND 4096

enum mode { MODE_TOP, MODE_SOFT, MODE_RANK, MODE_PER };
/* What the nodes hold: sums of weights, or how many entries lie above a threshold and at it. */
enum sums { SUMS_OF_WEIGHTS, SUMS_OF_COUNTS };
enum draw_status { NOTHING_TO_DRAW = 2 };
enum write_status { OUT_OF_RANGE = -1, ONE_INDEX = -2 };

/* What the weight of an entry depends on beside its own value. */
typedef struct {
    int64_t sums, mode;
    double least;                 /* entries below it are not drawn; -inf: all but NaN may be */
    double threshold;             /* of SUMS_OF_COUNTS */
    double reference, rate;       /* weight exp((v - reference) rate), */
    double extra, shift, alpha;   /* or ((|v| rate + extra) 2^shift)^alpha */
} recall_form;

typedef struct {
    int64_t capacity, is_double, instruction_set;
    void *values;                    /* [capacity, and on to a multiple of 16] float or double;
                                      * -inf: none yet, NaN: never drawn */
    int64_t size;                    /* how many entries are stored */
    int64_t mode, has_min_value;
    double temperature, min_value, alpha, eps, uniform_share;
    int64_t num_best;                /* of MODE_TOP: how many it keeps, ties aside */

    /* What the first `size` values are like: kept up to date by writes while it is valid. */
    int64_t census_is_valid, num_drawable, num_valued, num_enough, num_largest;
    double largest;                  /* value, in MODE_PER absolute value, of those to be drawn */
    int64_t threshold_is_valid, num_above, num_tied;
    double threshold;
    int64_t band_is_valid, num_over, num_band; /* entries at or above `band_high`, and between */
    double band_low, band_high;
    uint32_t *band;                  /* [MAX_BAND], the entries between */

    int64_t nodes_are_valid, eligible_is_valid, order_is_valid, least_is_valid;
    recall_form form, eligible_form;
    void *nodes, *eligible;          /* [recall_num_nodes(capacity)] of 8 bytes */
    uint32_t *order, *spare;         /* MODE_RANK: [capacity], entries by falling value */
    uint64_t *changed;               /* MODE_RANK: a bit an entry, written since it was ordered */
    int64_t num_ordered, num_changed;
    int64_t num_ranks;               /* that the nodes are the sums of */
    double least_weight, least_positive_weight;
} recall_priorities;

RECALL_EXPORT int64_t recall_priorities_bytes(void); /* of the structure, as a check of versions */
RECALL_EXPORT int64_t recall_num_nodes(int64_t capacity);
/* Asks for large pages where memory is about to be written for the first time. */
RECALL_EXPORT int64_t recall_expect(void *memory, int64_t bytes);
/* Brings the census up to date; MODE_TOP needs `num_drawable` to know its `num_best`. */
RECALL_EXPORT int64_t recall_census(recall_priorities *p);
/* Brings all that a draw needs up to date. */
RECALL_EXPORT int64_t recall_prepare(recall_priorities *p);
/* Writes values at indices, negative ones skipped, as well as values equal to `none`; `stride` 0
 * stands for one value for all. Returns how many values were not finite; or, before anything is
 * written, OUT_OF_RANGE for an index, ONE_INDEX for several values for one and the same. */
RECALL_EXPORT int64_t recall_write(recall_priorities *p, const int64_t *index, const void *values,
                                   int64_t is_double, int64_t count, int64_t stride, double none);
/* Takes the values at indices back: none yet. Returns OK or OUT_OF_RANGE. */
RECALL_EXPORT int64_t recall_erase(recall_priorities *p, const int64_t *index, int64_t count);
/* Writes the first `count` values, where `none` stands for none yet; returns how many were not
 * finite, or OUT_OF_RANGE. */
RECALL_EXPORT int64_t recall_refresh(recall_priorities *p, const void *values, int64_t is_double,
                                     int64_t count, double none);
/* Says how many entries are stored; those that are new have the values that lie there. */
RECALL_EXPORT int64_t recall_resize(recall_priorities *p, int64_t size);
/* Entries for uniform numbers in [0, 1), and their importance weights, unless NULL. */
RECALL_EXPORT int64_t recall_draw(recall_priorities *p, const double *uniform, int64_t count,
                                  double beta, int64_t *entry, float *importance);
/* The weights of all stored entries. */
RECALL_EXPORT int64_t recall_weights(recall_priorities *p, double *weights);

#endif
