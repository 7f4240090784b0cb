/* The topk largest magnitudes of a block, without sorting: magnitudes of fp32 are ordered as integers. */
#ifndef PSYCHE_SELECT_H
#define PSYCHE_SELECT_H

enum {
    GROUPS = BLOCK / 8, /* group g holds the values g, g + 512, ... */
    FEW = 384,          /* up to here maxima of groups are a good bound for the topk-th largest value */
};

/* How many of n bit patterns are at least `least` (n a multiple of LANES); their sign bits do not count. */
INLINE int count_at_least(const fp32_bits *bits, int n, int32_t least) {
    ints count = {0};
    for (int i = 0; i < n; i += LANES)
        count += (load_ints(bits + i) & MAGNITUDE) >= least; /* -1 for yes */
    return -sum_of(count);
}

/* A bound `least` with topk or more of the values at or above it, at most `most` of them if that can be had; then
 * *reached is their number. Values are below `above`. With most = topk: the topk-th largest value, or a bound that
 * exactly topk values reach. */
INLINE int32_t bound(const fp32_bits *bits, int n, int topk, int most, int32_t least, int32_t above, int *reached) {
    /* Halves of the largest value come first: the topk-th is seldom far from it. */
    int32_t probe = above - (1 << 23);
    *reached = n;
    while ((uint32_t)above - (uint32_t)least > 1) {
        int32_t middle = least + (int32_t)(((uint32_t)above - (uint32_t)least) / 2);
        if (probe > middle)
            middle = probe, probe = 0;
        int count = count_at_least(bits, n, middle);
        if (count < topk) {
            above = middle;
            continue;
        }
        least = middle, *reached = count;
        if (count <= most)
            break;
    }
    return least;
}

/* Candidates in order of their index; arrays have room for a vector behind the last one. */
struct candidates {
    int n;
    uint16_t index[BLOCK + LANES];
    int32_t bits[BLOCK + LANES];
};

/* Values whose magnitude is at least `least`. Rows with any are listed first: most have none, at random, which is
 * what branch predictors cannot follow. */
INLINE void collect(const fp32_bits *block, int32_t least, struct candidates *all_of) {
    uint64_t masks[SIDE];
    uint8_t rows[SIDE];
    int n = 0, listed = 0;
    for (int r = 0; r < SIDE; r++) {
        masks[listed] = magnitudes_above(block + r * SIDE, least - 1);
        rows[listed] = (uint8_t)r;
        listed += masks[listed] != 0;
    }
    for (int i = 0; i < listed; i++) {
        uint64_t mask = masks[i];
        do {
            int index = rows[i] * SIDE + __builtin_ctzll(mask);
            all_of->index[n] = (uint16_t)index;
            all_of->bits[n++] = block[index] & MAGNITUDE;
            mask &= mask - 1;
        } while (mask);
    }
    all_of->n = n;
}

/* The topk largest of the candidates to index[topk], in their order; ties to the first. */
INLINE void keep_largest(struct candidates *all_of, int topk, int32_t least, int32_t most, uint16_t *index) {
    int n = all_of->n, reached = n, ties = topk;
    if (n > topk) {
        for (int i = n; i < n + LANES; i++)
            all_of->bits[i] = 0;
        int padded = (n + LANES - 1) / LANES * LANES;
        /* Padding counts only for a bound of zero, which is never probed: probes lie above `least`. */
        least = bound(all_of->bits, padded, topk, topk, least, most + 1, &reached);
        if (reached != topk)
            ties = topk - count_at_least(all_of->bits, padded, least + 1);
    }
    int kept = 0;
    for (int i = 0; i < n && kept < topk; i++) {
        int tied = all_of->bits[i] == least;
        index[kept] = all_of->index[i];
        kept += all_of->bits[i] > least || (tied && ties > 0);
        ties -= tied;
    }
}

/* Indices of the topk largest magnitudes of a block, ascending; of equal ones the lowest indices.
 * `maxima` are the largest magnitudes (bits) of the groups. */
static void select_largest(const fp32_bits *block, const int32_t *maxima, int topk, uint16_t *index) {
    struct candidates found;
    ints most = load_ints(maxima);
    int reached, slack = topk + topk / 8 + 2;
    for (int i = LANES; i < GROUPS; i += LANES)
        most = larger(most, load_ints(maxima + i));
    int32_t largest = largest_of(most), least;
    /* topk groups with a maximum of at least b are topk values of at least b. */
    if (topk <= FEW)
        least = bound(maxima, GROUPS, topk, slack, 0, largest + 1, &reached);
    else
        least = bound(block, BLOCK, topk, slack, 0, largest + 1, &reached);
    collect(block, least, &found);
    keep_largest(&found, topk, least, largest, index);
}

#endif
