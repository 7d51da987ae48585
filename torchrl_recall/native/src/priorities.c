/* The doors of draws by value: which kernel runs is decided here. */
#include "large_pages.h"
#include "priorities.h"

#include "processor.h"

#define KERNEL(isa)                                                                               \
    int64_t recall_census_##isa(recall_priorities *);                                             \
    int64_t recall_prepare_##isa(recall_priorities *);                                            \
    int64_t recall_write_##isa(recall_priorities *, const int64_t *, const void *, int64_t,       \
                               int64_t, int64_t, double);                                         \
    int64_t recall_erase_##isa(recall_priorities *, const int64_t *, int64_t);                    \
    int64_t recall_refresh_##isa(recall_priorities *, const void *, int64_t, int64_t, double);    \
    int64_t recall_resize_##isa(recall_priorities *, int64_t);                                    \
    int64_t recall_draw_##isa(recall_priorities *, const double *, int64_t, double, int64_t *,    \
                              float *);                                                           \
    int64_t recall_weights_##isa(recall_priorities *, double *);
KERNEL(0)
#if RECALL_X86
KERNEL(256)
KERNEL(512)
#define CHOOSE(function, p, ...)                                                                  \
    switch ((p)->instruction_set) {                                                               \
        case 513:                                                                                 \
        case 512: return function##_512(__VA_ARGS__);                                             \
        case 256: return function##_256(__VA_ARGS__);                                             \
        default: return function##_0(__VA_ARGS__);                                                \
    }
#else
#define CHOOSE(function, p, ...) return function##_0(__VA_ARGS__);
#endif

int64_t recall_priorities_bytes(void) { return (int64_t)sizeof(recall_priorities); }

int64_t recall_num_nodes(int64_t capacity) {
    int64_t sum = 0;
    do {
        capacity = (capacity + 15) / 16;
        sum += (capacity + 15) / 16 * 16;
    } while (capacity > 1);
    return sum;
}

int64_t recall_expect(void *memory, int64_t bytes) {
    expect(memory, bytes);
    return OK;
}

int64_t recall_census(recall_priorities *p) { CHOOSE(recall_census, p, p) }

int64_t recall_prepare(recall_priorities *p) { CHOOSE(recall_prepare, p, p) }

int64_t recall_write(recall_priorities *p, const int64_t *index, const void *values,
                     int64_t is_double, int64_t count, int64_t stride, double none) {
    CHOOSE(recall_write, p, p, index, values, is_double, count, stride, none)
}

int64_t recall_erase(recall_priorities *p, const int64_t *index, int64_t count) {
    CHOOSE(recall_erase, p, p, index, count)
}

int64_t recall_refresh(recall_priorities *p, const void *values, int64_t is_double, int64_t count,
                       double none) {
    CHOOSE(recall_refresh, p, p, values, is_double, count, none)
}

int64_t recall_resize(recall_priorities *p, int64_t size) { CHOOSE(recall_resize, p, p, size) }

int64_t recall_draw(recall_priorities *p, const double *uniform, int64_t count, double beta,
                    int64_t *entry, float *importance) {
    CHOOSE(recall_draw, p, p, uniform, count, beta, entry, importance)
}

int64_t recall_weights(recall_priorities *p, double *weights) {
    CHOOSE(recall_weights, p, p, weights)
}
