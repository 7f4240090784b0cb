/* Pieces of tensors in blocks. */
#ifndef PSYCHE_BLOCKS_H
#define PSYCHE_BLOCKS_H

enum { LINE = 64, LINES = 4 }; /* bytes of a cache line, lines of a row of fp32 */

/* Everything below relies on this check: no piece leaves its block. Where a piece lies in its tensor is the caller's
 * responsibility, which knows the tensors' sizes. `bases` may have NULLs only if `gaps`. */
static int32_t check_slab(const struct slab *slab, const void *const *bases, int gaps) {
    int32_t block = 0;
    for (const struct piece *p = slab->pieces; p < slab->pieces + slab->n; p++) {
        int64_t last = p->offset + (int64_t)SIDE * (p->rows - 1) + p->cols;
        int straddles = p->rows > 1 && p->offset % SIDE + p->cols > SIDE;
        if (p->tensor < 0 || p->tensor >= slab->tensors || p->block < block || p->block >= slab->count ||
            p->offset < 0 || p->rows < 1 || p->cols < 1 || p->cols > BLOCK || last > BLOCK || straddles)
            return BAD_PIECE;
        if (!gaps && !bases[p->tensor])
            return BAD_PIECE;
        block = p->block;
    }
    return DONE;
}

INLINE const struct piece *slab_end(const struct slab *slab) {
    return slab->pieces + slab->n;
}

/* The first piece from `p` on that is of another block. */
INLINE const struct piece *pieces_of(const struct piece *p, const struct piece *end, int64_t block) {
    while (p < end && p->block == block)
        p++;
    return p;
}

/* The piece is all of its block, as 64 rows of 64 that are *stride apart. */
INLINE int is_whole(const struct piece *p, int64_t *stride) {
    *stride = p->rows == 1 ? SIDE : p->stride;
    return (p->rows == SIDE && p->cols == SIDE) || (p->rows == 1 && p->cols == BLOCK);
}

/* Rows of 64 fp32 values that the next block needs, fetched one by one while this one is worked on: tiles lie in memory
 * in a way that hardware does not predict, and bursts of requests stall. A wrong address does no harm, so there always
 * is one: past the end, or NULL. */
struct ahead {
    const char *row;
    int64_t stride; /* bytes */
};

/* Of the piece `next`, if there is one and it is all of its block. */
INLINE struct ahead rows_ahead(const struct piece *next, const struct piece *end, const void *const *bases, int bytes) {
    struct ahead ahead = {0, 0};
    int64_t stride;
    if (next < end && bases[next->tensor] && is_whole(next, &stride)) {
        ahead.row = (const char *)bases[next->tensor] + next->start * bytes;
        ahead.stride = stride * bytes;
    }
    return ahead;
}

/* Lines `from` to `to` of the four of row r. */
INLINE void fetch(struct ahead ahead, int r, int from, int to) {
    const char *row = (const char *)((uintptr_t)ahead.row + (uintptr_t)(r * ahead.stride));
    for (int line = from; line < to; line++)
        __builtin_prefetch(row + line * LINE);
}

INLINE float value_at(const void *base, uint8_t dtype, int64_t element) {
    if (dtype == FP32)
        return ((const float *)base)[element];
    return of_bits((int32_t)((uint32_t)((const uint16_t *)base)[element] << 16));
}

/* Round to nearest, ties to even; NaN to the quiet one that torch makes. */
INLINE uint16_t bf16_of(float value) {
    uint32_t bits = (uint32_t)bits_of(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* One piece into a block of values. */
static void gather(const struct piece *p, const void *base, uint8_t dtype, float *block) {
    for (int32_t r = 0; r < p->rows; r++) {
        float *to = block + p->offset + r * SIDE;
        int64_t from = p->start + p->stride * r;
        if (dtype == FP32)
            memcpy(to, (const float *)base + from, 4 * (size_t)p->cols);
        else
            for (int32_t c = 0; c < p->cols; c++)
                to[c] = value_at(base, dtype, from + c);
    }
}

#endif
