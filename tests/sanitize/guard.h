/* Forced into every source of a checked build: red zones between the parts of one allocation, and
 * allocations that fail on demand. `run` puts GUARDED where the library lays memory out. */
#ifndef RECALL_GUARD_H
#define RECALL_GUARD_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#undef _DEFAULT_SOURCE /* a source defines it itself */

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GUARD_POISONS 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define GUARD_POISONS 1
#endif
#if defined(GUARD_POISONS)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) ((void)(from), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes) ((void)(from), (void)(bytes))
#endif

/* Where the next part begins: after the bytes of this one, and a zone that nothing may touch. */
static inline uintptr_t guarded(uintptr_t here, int64_t bytes) {
    uintptr_t end = here + (uintptr_t)bytes, next = (end + 63) / 64 * 64 + 64;
    if (here > 1 << 24) ASAN_POISON_MEMORY_REGION((void *)end, next - end); /* else a size only */
    return next;
}

/* Packing clears a whole block, zones and all; the next walk lays it out again. */
static inline void *clear_with_zones(void *to, int byte, size_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(to, bytes);
    return memset(to, byte, bytes);
}
#define memset clear_with_zones

/* The driver counts down to the allocation that fails; below 0 none does. */
extern __attribute__((weak)) int64_t allocations_left;
static inline int fails_now(void) {
    return &allocations_left && allocations_left >= 0 && allocations_left-- == 0;
}
static inline void *malloc_or_fail(size_t bytes) { return fails_now() ? NULL : malloc(bytes); }
static inline void *calloc_or_fail(size_t n, size_t size) {
    return fails_now() ? NULL : calloc(n, size);
}
#define malloc malloc_or_fail
#define calloc calloc_or_fail

#endif
