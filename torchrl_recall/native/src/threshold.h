/* The k-th largest of many values, at about the speed of reading them.
 *
 * After Floyd and Rivest (1975): a sample tells between which two values the wanted one lies; one
 * pass counts what is outside and gathers the few inside, among which the same is done again.
 */
#ifndef RECALL_THRESHOLD_H
#define RECALL_THRESHOLD_H

#include <stdlib.h>

#include "leaves.h"

#define FEW 2048   /* values that are just partitioned */
#define SAMPLE 2048
#define CHUNK 8192 /* values whose counts fit narrow counters */

#define DEFINE_SELECTION(type)                                                                    \
    /* The k-th largest (from 0) of n > k numbers, which are reordered. */                        \
    static type partition_##type(type *v, int64_t n, int64_t k) {                                 \
        int64_t low = 0, high = n - 1;                                                            \
        while (low < high) {                                                                      \
            const type a = v[low], b = v[low + (high - low) / 2], c = v[high];                    \
            const type smaller = a < b ? a : b, larger = a < b ? b : a;                           \
            const type pivot = c < smaller ? smaller : c > larger ? larger : c;                   \
            int64_t i = low, j = high;                                                            \
            while (i <= j) {                                                                      \
                while (v[i] > pivot) i++;                                                         \
                while (v[j] < pivot) j--;                                                         \
                if (i > j) break;                                                                 \
                const type swapped = v[i];                                                        \
                v[i++] = v[j];                                                                    \
                v[j--] = swapped;                                                                 \
            }                                                                                     \
            if (k <= j) high = j;                                                                 \
            else if (k >= i) low = i;                                                             \
            else break;                                                                           \
        }                                                                                         \
        return v[k];                                                                              \
    }                                                                                             \
                                                                                                  \
    /* How many lie above `high`, at it, between, at `low`. NaN are none of these. */             \
    static void count_##type(const type *v, int64_t n, type high, type low, int64_t counts[4]) {  \
        memset(counts, 0, 4 * sizeof *counts);                                                    \
        for (int64_t from = 0; from < n; from += CHUNK) {                                         \
            const int64_t to = from + CHUNK < n ? from + CHUNK : n;                               \
            int32_t above = 0, top = 0, between = 0, bottom = 0;                                  \
            for (int64_t i = from; i < to; i++) {                                                 \
                above += v[i] > high;                                                             \
                top += v[i] == high;                                                              \
                between += (v[i] < high) & (v[i] > low);                                          \
                bottom += v[i] == low;                                                            \
            }                                                                                     \
            counts[0] += above;                                                                   \
            counts[1] += top;                                                                     \
            counts[2] += between;                                                                 \
            counts[3] += bottom;                                                                  \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    static void gather_##type(const type *v, int64_t n, type high, type low, type *to) {          \
        for (int64_t from = 0; from < n; from += 8) {                                             \
            const int64_t count = n - from < 8 ? n - from : 8;                                    \
            int32_t any = 0;                                                                      \
            for (int64_t i = from; i < from + count; i++) any |= (v[i] < high) & (v[i] > low);    \
            if (!any) continue;                                                                   \
            for (int64_t i = from; i < from + count; i++) {                                       \
                if (v[i] < high && v[i] > low) *to++ = v[i];                                      \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    /* The k-th largest (from 0) of n numbers that are not NaN, of which there are more than k. */ \
    static int64_t select_##type(const type *v, int64_t n, int64_t k, type *found) {              \
        type few[FEW];                                                                            \
        int64_t m = 0, counts[4];                                                                 \
        if (n <= FEW) {                                                                           \
            for (int64_t i = 0; i < n; i++) {                                                     \
                few[m] = v[i];                                                                    \
                m += v[i] == v[i];                                                                \
            }                                                                                     \
            *found = partition_##type(few, m, k);                                                 \
            return OK;                                                                            \
        }                                                                                         \
        /* Places by the golden ratio fall in step with no period of the data. */                 \
        uint64_t place = 0;                                                                       \
        for (int64_t i = 0; i < SAMPLE; i++) {                                                    \
            place += 0x9e3779b97f4a7c15u;                                                         \
            const type x = v[(int64_t)((double)(place >> 11) * 0x1p-53 * (double)n)];             \
            few[m] = x;                                                                           \
            m += x == x;                                                                          \
        }                                                                                         \
        type high = INFINITY, low = -INFINITY;                                                    \
        if (m) {                                                                                  \
            /* Where the k-th lies in the sample, give or take three standard deviations. */      \
            count_##type(v, n, INFINITY, -INFINITY, counts);                                      \
            const double all = (double)(counts[1] + counts[2] + counts[3]);                       \
            const double at = ((double)k + 0.5) / all, middle = at * (double)m;                   \
            const double spread = 3.0 * sqrt((double)m * at * (1.0 - at)) + 1.0;                  \
            if (middle - spread >= 0.0)                                                           \
                high = partition_##type(few, m, (int64_t)(middle - spread));                      \
            if (middle + spread < (double)m)                                                      \
                low = partition_##type(few, m, (int64_t)(middle + spread));                       \
        }                                                                                         \
        count_##type(v, n, high, low, counts);                                                    \
        if (k < counts[0] || k >= counts[0] + counts[1] + counts[2] + counts[3]) {                \
            /* An unlucky sample: everything is between infinities. */                            \
            high = INFINITY;                                                                      \
            low = -INFINITY;                                                                      \
            count_##type(v, n, high, low, counts);                                                \
        }                                                                                         \
        k -= counts[0];                                                                           \
        if (k < counts[1] || k >= counts[1] + counts[2]) {                                        \
            *found = k < counts[1] ? high : low;                                                  \
            return OK;                                                                            \
        }                                                                                         \
        type *inside = malloc((size_t)counts[2] * sizeof *inside);                                \
        if (!inside) return NO_MEMORY;                                                            \
        gather_##type(v, n, high, low, inside);                                                   \
        const int64_t status = counts[2] < n                                                      \
            ? select_##type(inside, counts[2], k - counts[1], found)                              \
            : (*found = partition_##type(inside, counts[2], k - counts[1]), OK);                  \
        free(inside);                                                                             \
        return status;                                                                            \
    }

DEFINE_SELECTION(float)
DEFINE_SELECTION(double)

/* Finds the threshold of MODE_TOP, and how many lie above it and at it. */
static int64_t find_threshold(recall_priorities *p) {
    int64_t counts[4], status;
    if (p->is_double) {
        double found;
        status = select_double(p->values, p->size, p->num_best - 1, &found);
        if (status != OK) return status;
        count_double(p->values, p->size, found, found, counts);
        p->threshold = found;
    } else {
        float found;
        status = select_float(p->values, p->size, p->num_best - 1, &found);
        if (status != OK) return status;
        count_float(p->values, p->size, found, found, counts);
        p->threshold = found;
    }
    p->num_above = counts[0];
    p->num_tied = counts[1];
    p->threshold_is_valid = 1;
    return OK;
}

#endif
