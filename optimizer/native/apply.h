/* From members' messages to a step of the weights: votes, inverse transform in integers, the trend, its sign. */
#ifndef PSYCHE_APPLY_H
#define PSYCHE_APPLY_H

/* FRACTION: bits behind the point of the trend. */
enum { MOST_MEMBERS = INT16_MAX, FRACTION = 3, LARGEST_TREND = INT16_MAX, LONGEST_WINDOW = 15 };

/* What all members say about a slab. */
struct ballots {
    const uint8_t *const *bodies;
    int64_t members, count;
    const struct code *code;
    int32_t limit;
};

static int32_t check_ballots(const struct ballots *all_of) {
    if (check_code(all_of->code) != DONE)
        return BAD_CODE;
    int good = all_of->members >= 0 && all_of->members <= MOST_MEMBERS && all_of->limit >= 0;
    return good ? DONE : BAD_MEMBERS;
}

/* No sum in the transform is beyond the sum of all magnitudes: of the votes cast, or of 4,096 limited votes. */
static int fits_int16(const struct ballots *all_of) {
    int64_t cast = all_of->members * all_of->code->topk;
    int64_t limited = (int64_t)BLOCK * (all_of->limit ? all_of->limit : all_of->members);
    return (cast < limited ? cast : limited) <= INT16_MAX;
}

INLINE void cast_votes(const uint8_t *row, const struct code *code, int16_t *votes) {
    uint16_t index[BLOCK + 4];
    if (!read_row(row, code, index))
        return;
    for (int i = 0; i < code->topk; i += 64) {
        uint64_t signs = read_signs(row, code, i / 64);
        for (int j = i; j < code->topk && j < i + 64; j++, signs >>= 1)
            votes[index[j] & (BLOCK - 1)] += (int16_t)(1 - 2 * (int)(signs & 1));
    }
}

/* Sum of the members' signs in block b, (4096,). */
static void count_votes(const struct ballots *all_of, int64_t b, int16_t *votes) {
    uint8_t copy[LONGEST_CODE + SLACK];
    memset(votes, 0, BLOCK * sizeof *votes);
    for (int64_t m = 0; m < all_of->members; m++)
        cast_votes(readable(all_of->bodies[m], b, all_of->count, all_of->code, copy), all_of->code, votes);
}

/* U of one block: int16 in `narrow` where that holds it, otherwise int32 in `wide`. */
struct inverse {
    int16_t narrow[BLOCK] __attribute__((aligned(LINE)));
    int32_t wide[BLOCK] __attribute__((aligned(LINE)));
};

/* In place, or from `narrow` to `wide`; votes are limited first. */
static void invert(const struct ballots *all_of, int is_narrow, struct ahead ahead, struct inverse *u) {
    int16_t limit = (int16_t)(all_of->limit && all_of->limit < MOST_MEMBERS ? all_of->limit : MOST_MEMBERS);
    if (is_narrow)
        transform_shorts(u->narrow, limit, ahead);
    else
        transform_ints(u->narrow, limit, u->wide);
}

INLINE ints load_u(const struct inverse *u, int is_narrow, int at) {
    if (is_narrow)
        return __builtin_convertvector(load_half(u->narrow + at), ints);
    return load_ints(u->wide + at);
}

/* What the trend of a block becomes: t - t / 2^window + (u << FRACTION), at most 16 bits; the quotient is rounded away
 * from zero. */
INLINE void follow(const struct inverse *u, int is_narrow, int32_t window, const int16_t *trend, int16_t *next) {
    ints most = LARGEST_TREND - (ints){0};
    for (int i = 0; i < BLOCK; i += LANES) {
        ints t = __builtin_convertvector(load_half(trend + i), ints);
        ints sign = t >> 31, leak = ((t ^ sign) - sign + ((1 << window) - 1)) >> window;
        t = t - ((leak ^ sign) - sign) + (load_u(u, is_narrow, i) << FRACTION);
        store_half(next + i, __builtin_convertvector(-larger(-larger(t, -most), -most), half_shorts));
    }
}

/* Vote, invert and follow one block. Without members the trend only leaks. */
static void next_trend(const struct ballots *all_of, int64_t b, struct ahead ahead, int32_t window,
                       const int16_t *trend, struct inverse *u, int16_t *next) {
    int is_narrow = fits_int16(all_of);
    count_votes(all_of, b, u->narrow);
    if (all_of->members)
        invert(all_of, is_narrow, ahead, u);
    if (is_narrow)
        follow(u, 1, window, trend, next);
    else
        follow(u, 0, window, trend, next);
}

/* The rate with the sign of a value of the trend, +0 for a zero and for a rate of zero. */
INLINE floats steps_of(const int16_t *trend, float lr) {
    ints v = __builtin_convertvector(load_half(trend), ints);
    return (floats)(((v & SIGN) | bits_of(lr)) & (v != 0)) + 0.0f;
}
INLINE float step_of(int16_t trend, float lr) {
    return trend == 0 || lr == 0 ? 0.0f : trend < 0 ? -lr : lr;
}

/* w = w * share - step, for n values. */
INLINE void step_row(const int16_t *trend, int n, float lr, int shrinks, float share, float *w) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats old = load_floats(w + i);
        store_floats(w + i, (shrinks ? old * share : old) - steps_of(trend + i, lr));
    }
    for (; i < n; i++)
        w[i] = (shrinks ? w[i] * share : w[i]) - step_of(trend[i], lr);
}

/* The same for a whole block: rows of a constant length, while the other half of the rows ahead is fetched. */
INLINE void step_block(const int16_t *trend, float lr, float share, struct ahead ahead, int64_t stride, float *w) {
    for (int r = 0; r < SIDE; r++, w += stride) {
        fetch(ahead, r, LINES / 2, LINES);
        if (share != 1.0f)
            step_row(trend + r * SIDE, SIDE, lr, 1, share, w);
        else
            step_row(trend + r * SIDE, SIDE, lr, 0, share, w);
    }
}

INLINE void step_piece(const struct piece *p, const int16_t *trend, float lr, float share, struct ahead ahead,
                       float *w) {
    int64_t stride;
    if (is_whole(p, &stride)) {
        step_block(trend, lr, share, ahead, stride, w + p->start);
        return;
    }
    for (int32_t r = 0; r < p->rows; r++)
        step_row(trend + p->offset + r * SIDE, p->cols, lr, share != 1.0f, share, w + p->start + p->stride * r);
}

static int32_t check_step(const struct ballots *all_of, const struct slab *slab, const void *const *weights,
                          int32_t window) {
    int32_t status = check_ballots(all_of);
    if (status == DONE && (window < 0 || window > LONGEST_WINDOW))
        status = BAD_WINDOW;
    return status == DONE ? check_slab(slab, weights, 0) : status;
}

static int32_t apply(const struct slab *slab, float *const *weights, int16_t *trend, const uint8_t *const *bodies,
                     int64_t members, const struct code *code, int32_t limit, int32_t window, const float *rates,
                     const float *shares) {
    struct ballots all_of = {bodies, members, slab->count, code, limit};
    struct inverse u;
    int32_t status = check_step(&all_of, slab, (const void *const *)weights, window);
    if (status != DONE)
        return status;
    const struct piece *p = slab->pieces, *end;
    for (int64_t b = 0; b < slab->count; b++, trend += BLOCK) {
        end = pieces_of(p, slab_end(slab), b);
        struct ahead ahead = rows_ahead(end, slab_end(slab), (const void *const *)weights, 4);
        next_trend(&all_of, b, ahead, window, trend, &u, trend);
        for (; p < end; p++)
            step_piece(p, trend, rates[p->tensor], shares[p->tensor], ahead, weights[p->tensor]);
    }
    return DONE;
}

static int32_t inverse(int64_t count, const uint8_t *const *bodies, int64_t members, const struct code *code,
                       int32_t limit, int32_t *out) {
    struct ballots all_of = {bodies, members, count, code, limit};
    struct inverse u;
    int32_t status = check_ballots(&all_of);
    if (status != DONE)
        return status;
    int is_narrow = fits_int16(&all_of);
    for (int64_t b = 0; b < count; b++, out += BLOCK) {
        count_votes(&all_of, b, u.narrow);
        invert(&all_of, is_narrow, (struct ahead){0, 0}, &u);
        for (int i = 0; i < BLOCK; i += LANES)
            store_ints(out + i, load_u(&u, is_narrow, i));
    }
    return DONE;
}

#endif
