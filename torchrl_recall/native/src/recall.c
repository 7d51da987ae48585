/* The library's doors: which kernel runs is decided here. */
#include "large_pages.h"
#include "recall.h"

#include "processor.h"

#define KERNEL(isa)                                                                               \
    int64_t recall_walk_##isa(const recall_model *, const void *, recall_call *);                 \
    int64_t recall_look_up_##isa(const recall_model *, const void *, recall_call *);              \
    int64_t recall_table_bytes_##isa(const recall_model *);                                       \
    int64_t recall_tables_##isa(const recall_model *, const void *, void *);                      \
    int64_t recall_words_##isa(const uint32_t *, uint64_t, uint32_t *);
KERNEL(0)
#if RECALL_X86
KERNEL(256)
KERNEL(512)
#if RECALL_X86_BFLOAT16
KERNEL(513)
#define CASE_513(function, ...) case 513: result = function##_513(__VA_ARGS__); break;
#else
#define CASE_513(function, ...)
#endif
#define CHOOSE(set, function, ...)                                                                \
    switch (set) {                                                                                \
        CASE_513(function, __VA_ARGS__)                                                           \
        case 512: result = function##_512(__VA_ARGS__); break;                                    \
        case 256: result = function##_256(__VA_ARGS__); break;                                    \
        default: result = function##_0(__VA_ARGS__);                                              \
    }
#else
#define CHOOSE(set, function, ...)                                                                \
    (void)(set);                                                                                  \
    result = function##_0(__VA_ARGS__);
#endif

int64_t recall_version(void) { return RECALL_VERSION; }

int64_t recall_instruction_set(void) {
#if RECALL_X86
    /* These look at what the operating system saves, too. */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 256;
#if RECALL_X86_BFLOAT16
    if (__builtin_cpu_supports("avx512bf16")) return 513;
#endif
    return 512;
#else
    return 0;
#endif
}

int64_t recall_words(int64_t instruction_set, const uint32_t counter[3], uint64_t seed,
                     uint32_t words[4]) {
    int64_t result;
    CHOOSE(instruction_set, recall_words, counter, seed, words)
    return result;
}

int64_t recall_table_bytes(const recall_model *model) { return recall_table_bytes_0(model); }

int64_t recall_tables(const recall_model *model, const void *block, void *tables,
                      int64_t instruction_set) {
    int64_t result;
    CHOOSE(instruction_set, recall_tables, model, block, tables)
    return result;
}

static void expect_outputs(const recall_model *model, const recall_call *call) {
    const int64_t steps = call->num_rows * call->num_steps;
    const int64_t state = steps * model->state_size * (model->is_discrete ? 8 : 4);
    expect(call->state, state);
    expect(call->next_state, state);
}

int64_t recall_walk(const recall_model *model, const void *block, recall_call *call) {
    if (call->packed && !recall_is_current(model, call->packed)) return STALE;
    expect_outputs(model, call);
    int64_t result;
    CHOOSE(call->instruction_set, recall_walk, model, block, call)
    return result;
}

int64_t recall_look_up(const recall_model *model, const void *tables, recall_call *call) {
    if (call->packed && !recall_is_current(model, call->packed)) return STALE;
    expect_outputs(model, call);
    int64_t result;
    CHOOSE(call->instruction_set, recall_look_up, model, tables, call)
    return result;
}
