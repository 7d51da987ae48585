/* The C interface of the walk: plain numbers and pointers, mirrored in ../interface.py.
 *
 * A model is described by pointers to its live parameters. They are packed into a block that the
 * caller owns; the block keeps a copy of them, so that a changed parameter is noticed by content,
 * however it was written. Nothing here allocates what outlives a call, and nothing is global.
 */
#ifndef RECALL_H
#define RECALL_H

#include <stdint.h>

#if defined(_WIN32)
#define RECALL_EXPORT __declspec(dllexport)
#else
#define RECALL_EXPORT __attribute__((visibility("default")))
#endif

#define RECALL_VERSION 4
#define MAX_LAYERS 16
#define TILE 64 /* traces that go through all steps together */

enum activation {
    IDENTITY, RELU, LEAKY_RELU, ELU, TANH, SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS, MISH
};
enum head { HEAD_NORMAL, HEAD_TANH_NORMAL, HEAD_BOX, HEAD_MIXTURE, HEAD_CLASS, HEAD_SUPPORT };
enum status { OK = 0, NO_MEMORY = 1, STALE = 2 };

/* Linear layers, each weight [width[i + 1], width[i]] and bias [width[i + 1]], row-major. */
typedef struct {
    int64_t num_layers; /* 0: there is no such network; for actions: they are uniform */
    int64_t activation;
    float slope; /* of LEAKY_RELU and ELU */
    int64_t width[MAX_LAYERS + 1];
    const float *weight[MAX_LAYERS];
    const float *bias[MAX_LAYERS];
} recall_network;

enum { NETWORK_ACTION, NETWORK_DELTA, NETWORK_STOP, NUM_NETWORKS };

/* Gaussian heads: log-scale = low + width * sigmoid(raw). A tanh-squashed one has its bounds'
 * middle and half range as `mean` and `spread`, as has a uniform one over their box; the others,
 * mixtures of `components` too, have mean and variance, and a floor of the standard deviation. */
typedef struct {
    int64_t kind;
    int64_t size; /* values, or classes */
    int64_t components;
    float low, width, floor;
    const float *mean, *spread;
} recall_head;

typedef struct {
    recall_network network[NUM_NETWORKS];
    recall_head action, delta;
    int64_t state_size, feature_size;
    int64_t is_discrete, has_joint_code;
    const int64_t *cardinality; /* [state_size], discrete */
    float floor;                /* of the standard deviation, continuous */
    const float *mean, *variance;
    const float *support, *lowest, *highest; /* [size, state_size], [state_size] twice */
    int64_t has_dead_ends;
    int64_t is_bfloat16; /* pack weights for bfloat16 products */
} recall_model;

/* Which traces, from where, with which random numbers, to where. Rows are traces. */
typedef struct {
    int64_t num_rows, num_traces, num_steps; /* row r starts at start r / num_traces */
    const void *start;                                   /* [rows / num_traces, state_size] */
    int64_t seed;
    const float *noise_action, *noise_delta, *noise_stop; /* [T, rows, size], or NULL for `seed` */
    void *state, *next_state;                             /* [rows, T, state_size] float or int64 */
    void *action;                                         /* [rows, T, A] float or [rows, T] int64 */
    float *action_log_prob, *delta_log_prob;              /* [rows, T] */
    uint8_t *mask;                                        /* [rows, T] */
    int64_t last_visit;
    int64_t instruction_set; /* 0, 256, 512, or 513: AVX-512 with bfloat16 products */
    int64_t next_tile, finite_rows, bad_starts; /* shared by the threads of a call; begin at 0 */
    const void *packed; /* walk only if this block is current, else return STALE; or NULL */
} recall_call;

/* ../interface.py writes it as an array of 64-bit words. */
typedef char recall_call_is_of_words[sizeof(recall_call) == 20 * sizeof(int64_t) ? 1 : -1];

RECALL_EXPORT int64_t recall_version(void);
/* The widest instruction set that this processor has, see `recall_call`. */
RECALL_EXPORT int64_t recall_instruction_set(void);
/* The four random words of a counter (row, step, head << 16 | block), by one instruction set. */
RECALL_EXPORT int64_t recall_words(int64_t instruction_set, const uint32_t counter[3],
                                   uint64_t seed, uint32_t words[4]);
RECALL_EXPORT int64_t recall_packed_bytes(const recall_model *model);
RECALL_EXPORT void recall_pack(const recall_model *model, void *block);
RECALL_EXPORT int64_t recall_is_current(const recall_model *model, const void *block);
RECALL_EXPORT int64_t recall_table_bytes(const recall_model *model);
/* Fills `tables` for a discrete model with a discrete action. */
RECALL_EXPORT int64_t recall_tables(const recall_model *model, const void *block, void *tables,
                                    int64_t instruction_set);
/* Several threads may call these with the same arguments: each takes tiles until none is left. */
RECALL_EXPORT int64_t recall_walk(const recall_model *model, const void *block, recall_call *call);
RECALL_EXPORT int64_t recall_look_up(const recall_model *model, const void *tables,
                                     recall_call *call);

#endif
