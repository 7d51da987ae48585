/* The packed form of a model: weights in blocks of ROWS outputs, constants of the heads. */
#ifndef RECALL_PACKED_H
#define RECALL_PACKED_H

#include <stddef.h>

#include "recall.h"

#define ROWS 6 /* outputs that a register block computes together */
#define WIDEST_VECTOR 16
#define ROUND_UP(n, to) (((n) + (to)-1) / (to) * (to))

static inline int is_continuous(const recall_head *head) { return head->kind <= HEAD_MIXTURE; }

/* A place in memory that is being laid out; of no memory, for its size alone. */
static inline void *take(uintptr_t *cursor, int64_t bytes) {
    void *place = (void *)*cursor;
    *cursor += (uintptr_t)ROUND_UP(bytes, 64);
    return place;
}

/* Weights lie input by input within a block of ROWS outputs; what is left of the outputs makes a
 * narrower block. In bfloat16 two inputs share a word, the even one in the lower half. */
typedef struct {
    int64_t inputs, outputs;
    const float *weight;
    const uint32_t *weight_pairs;
    const float *bias;
    const float *columns; /* [features, outputs]: the first layer of one-hot inputs, or NULL */
} packed_layer;

typedef struct {
    int64_t num_layers, activation;
    float slope;
    packed_layer layer[MAX_LAYERS];
} packed_network;

typedef struct {
    packed_network network[NUM_NETWORKS];
    const float *mean;                      /* [state_size], of continuous states */
    const float *action_add, *action_times; /* to the action's own unit */
    const float *delta_unit, *delta_log_unit;
    const float *constants; /* what all log-densities have in common: action's, delta's */
    const int64_t *offset;  /* [state_size + 1], where a coordinate's one-hot features begin */
    int64_t max_width;           /* of a layer's output */
} packed_model;

/* Points `packed` into a block; gives the block's size (of a NULL block, too). */
int64_t packed_layout(const recall_model *model, const void *block, packed_model *packed);

#endif
