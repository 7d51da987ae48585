/* The k-th largest of many values, at about the speed of reading them; included once for each type
 * of VALUE, with OF to name its functions.
 *
 * After Floyd and Rivest (1975): a sample tells between which two values the wanted one lies; one
 * pass counts what is outside and gathers the few inside, among which the same is done again.
 */

/* The k-th largest (from 0) of n > k numbers, which are reordered. */
static VALUE OF(partition)(VALUE *v, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const VALUE a = v[low], b = v[low + (high - low) / 2], c = v[high];
        const VALUE smaller = a < b ? a : b, larger = a < b ? b : a;
        const VALUE pivot = c < smaller ? smaller : c > larger ? larger : c;
        int64_t i = low, j = high;
        while (i <= j) {
            while (v[i] > pivot) i++;
            while (v[j] < pivot) j--;
            if (i > j) break;
            const VALUE swapped = v[i];
            v[i++] = v[j];
            v[j--] = swapped;
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return v[k];
}

/* Adds counts by where values lie. NaN is nowhere. */
static void OF(count)(const VALUE *v, int64_t n, VALUE high, VALUE low, int64_t counts[4]) {
    for (int64_t from = 0; from < n; from += CHUNK) {
        const int64_t to = from + CHUNK < n ? from + CHUNK : n;
        int32_t above = 0, at_high = 0, between = 0, at_low = 0;
        for (int64_t i = from; i < to; i++) {
            above += v[i] > high;
            at_high += v[i] == high;
            between += (v[i] < high) & (v[i] > low);
            at_low += (v[i] < high) & (v[i] == low);
        }
        counts[ABOVE] += above;
        counts[AT_HIGH] += at_high;
        counts[BETWEEN] += between;
        counts[AT_LOW] += at_low;
    }
}

/* Gathers what lies between; `to` has room for LANES more. Returns its end. */
static VALUE *OF(gather)(const VALUE *v, int64_t n, VALUE high, VALUE low, VALUE *to) {
    int64_t i = 0;
#ifdef GATHER
    GATHER
#endif
    for (; i < n; i++) {
        *to = v[i];
        to += (v[i] < high) & (v[i] > low);
    }
    return to;
}

/* Counts, and gathers while a piece is in the cache; returns whether there was room for all. */
static int OF(split)(const VALUE *v, int64_t n, VALUE high, VALUE low, int64_t counts[4],
                     VALUE *inside, int64_t room) {
    memset(counts, 0, 4 * sizeof *counts);
    for (int64_t from = 0; from < n; from += CHUNK) {
        const int64_t size = n - from < CHUNK ? n - from : CHUNK;
        const int64_t before = counts[BETWEEN];
        OF(count)(v + from, size, high, low, counts);
        if (counts[BETWEEN] + LANES <= room) OF(gather)(v + from, size, high, low, inside + before);
    }
    return counts[BETWEEN] + LANES <= room;
}

/* Between which two of a sample's m values, which are reordered, lies the one that `middle` of them
 * are above, give or take `spread`: `high` and `low` stay what they are where none is beyond. Returns
 * how many of the sample are between. */
static int64_t OF(bracket)(VALUE *few, int64_t m, double middle, double spread, VALUE *high,
                           VALUE *low) {
    const int64_t first = (int64_t)fmin(fmax(middle - spread, 0.0), (double)m);
    const int64_t last = (int64_t)fmin(fmax(middle + spread, 0.0), (double)m);
    if (middle >= spread && first < m) *high = OF(partition)(few, m, first);
    /* What is partitioned has the larger ones in front. */
    if (last < m) *low = OF(partition)(few + first, m - first, last - first);
    return last - first;
}

static int64_t OF(find)(recall_priorities *, const VALUE *, int64_t, int64_t, int64_t);

/* Goes on once it is counted what lies where: `inside` is what lies between, and is freed, unless it
 * is not looked at. It was found among `all`. */
static int64_t OF(narrow)(recall_priorities *p, int64_t counts[4], VALUE high, VALUE low,
                          VALUE *inside, int64_t all, int64_t k) {
    int64_t status = OK;
    p->num_above += counts[ABOVE];
    p->num_over = -1; /* no band, unless one comes yet */
    k -= counts[ABOVE];
    if (k < counts[AT_HIGH]) {
        p->threshold = (double)high;
        p->num_tied = counts[AT_HIGH];
    } else if (k >= counts[AT_HIGH] + counts[BETWEEN]) {
        p->threshold = (double)low;
        p->num_above += counts[AT_HIGH] + counts[BETWEEN];
        p->num_tied = counts[AT_LOW];
    } else {
        p->num_above += counts[AT_HIGH];
        p->band_low = (double)low;
        p->band_high = (double)high;
        k -= counts[AT_HIGH];
        if (counts[BETWEEN] < all) {
            status = OF(find)(p, inside, counts[BETWEEN], counts[BETWEEN], k);
        } else { /* the same sample would tell the same again */
            high = OF(partition)(inside, all, k);
            memset(counts, 0, 4 * sizeof *counts);
            OF(count)(inside, all, high, high, counts);
            p->threshold = (double)high;
            p->num_above += counts[ABOVE];
            p->num_tied = counts[AT_HIGH];
        }
    }
    free(inside);
    return status;
}

/* Finds the k-th largest (from 0) of n values, of which `all` > k are not NaN: the threshold, with
 * how many lie at it, and above it beside those that are counted already. The last few, among which
 * it is found, are the band. */
static int64_t OF(find)(recall_priorities *p, const VALUE *v, int64_t n, int64_t all, int64_t k) {
    VALUE few[FEW], high = (VALUE)INFINITY, low = -(VALUE)INFINITY;
    int64_t m = 0, counts[4];
    if (n <= FEW) {
        p->num_over = p->num_above;
        for (int64_t i = 0; i < n; i++) {
            if (v[i] == v[i]) few[m++] = v[i];
        }
        high = OF(partition)(few, m, k);
        memset(counts, 0, sizeof counts);
        OF(count)(few, m, high, high, counts);
        p->threshold = (double)high;
        p->num_above += counts[ABOVE];
        p->num_tied = counts[AT_HIGH];
        return OK;
    }
    uint64_t place = 0;
    for (int64_t i = 0; i < FEW; i++) {
        const VALUE x = v[next_place(&place, n)];
        if (x == x) few[m++] = x;
    }
    /* Where the wanted one lies in the sample, give or take three standard deviations, or more if
     * the sample was unlucky. */
    const double share = ((double)k + 0.5) / (double)all;
    double spread = 3.0 * sqrt((double)m * share * (1.0 - share)) + 1.0;
    VALUE *inside = NULL;
    int is_between = 0, has_room = 0;
    for (; !is_between; spread *= 4.0) {
        high = (VALUE)INFINITY;
        low = -(VALUE)INFINITY;
        const int64_t few_between =
            OF(bracket)(few, m, share * (double)m, spread, &high, &low);
        /* As many as the sample lets expect, and a quarter more. */
        const int64_t room =
            (int64_t)(1.25 * (double)few_between / (double)(m + 1) * (double)n) + FEW;
        free(inside);
        inside = malloc((size_t)room * sizeof *inside);
        if (!inside) return NO_MEMORY;
        has_room = OF(split)(v, n, high, low, counts, inside, room);
        is_between = k >= counts[ABOVE] &&
                     k < counts[ABOVE] + counts[AT_HIGH] + counts[BETWEEN] + counts[AT_LOW];
    }
    const int64_t number = k - counts[ABOVE] - counts[AT_HIGH];
    if (!has_room && number >= 0 && number < counts[BETWEEN]) {
        free(inside);
        inside = malloc((size_t)(counts[BETWEEN] + LANES) * sizeof *inside);
        if (!inside) return NO_MEMORY;
        OF(gather)(v, n, high, low, inside);
    }
    return OF(narrow)(p, counts, high, low, inside, all, k);
}
