/* Memory that is about to be written for the first time. Included before anything else. */
#ifndef RECALL_LARGE_PAGES_H
#define RECALL_LARGE_PAGES_H

#if defined(__linux__)
#define _DEFAULT_SOURCE
#include <sys/mman.h>
#endif

#include <stdint.h>

/* In large pages it costs a fraction of the page faults, and later of the look-ups of addresses. */
static void expect(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)2 << 20;
    uintptr_t from = ((uintptr_t)memory + page - 1) & ~(page - 1);
    uintptr_t to = ((uintptr_t)memory + (uintptr_t)bytes) & ~(page - 1);
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

#endif
