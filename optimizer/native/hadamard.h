/* Butterflies over a block. Floating point: strides strictly ascending, which fixes every rounding. Integers: exact, so
 * in any order. A row of a tile is 64 values: strides 1 to 32 stay in its registers. */
#ifndef PSYCHE_HADAMARD_H
#define PSYCHE_HADAMARD_H

enum { IN_ROW = SIDE / LANES, SHORTS = 2 * LANES, SHORTS_IN_ROW = SIDE / SHORTS };

#define BUTTERFLY(a, b)                                                                                                \
    do {                                                                                                               \
        __typeof__(a) sum = (a) + (b), difference = (a) - (b);                                                         \
        (a) = sum, (b) = difference;                                                                                   \
    } while (0)

/* Strides 1, 2 and 4 over eight vectors. */
#define RADIX4(v)                                                                                                      \
    do {                                                                                                               \
        BUTTERFLY((v)[0], (v)[1]);                                                                                     \
        BUTTERFLY((v)[2], (v)[3]);                                                                                     \
        BUTTERFLY((v)[0], (v)[2]);                                                                                     \
        BUTTERFLY((v)[1], (v)[3]);                                                                                     \
    } while (0)
#define RADIX8(v)                                                                                                      \
    do {                                                                                                               \
        RADIX4(v);                                                                                                     \
        RADIX4((v) + 4);                                                                                               \
        BUTTERFLY((v)[0], (v)[4]);                                                                                     \
        BUTTERFLY((v)[1], (v)[5]);                                                                                     \
        BUTTERFLY((v)[2], (v)[6]);                                                                                     \
        BUTTERFLY((v)[3], (v)[7]);                                                                                     \
    } while (0)

/* Within a vector a butterfly is v + swapped, with v negated where it is subtracted: a - b is a + (-b) in IEEE 754. */
INLINE floats in_lanes(floats v) {
    v = SWAP1(v) + (floats)((ints)v ^ (ODD1 & SIGN));
    v = SWAP2(v) + (floats)((ints)v ^ (ODD2 & SIGN));
#if LANES >= 8
    v = SWAP4(v) + (floats)((ints)v ^ (ODD4 & SIGN));
#endif
#if LANES >= 16
    v = SWAP8(v) + (floats)((ints)v ^ (ODD8 & SIGN));
#endif
    return v;
}

/* Strides 1 to 32: one row, in registers. */
INLINE void transform_row(floats *v) {
#if LANES == 4
    v[0] = in_lanes(v[0]), v[1] = in_lanes(v[1]), v[2] = in_lanes(v[2]), v[3] = in_lanes(v[3]);
    v[4] = in_lanes(v[4]), v[5] = in_lanes(v[5]), v[6] = in_lanes(v[6]), v[7] = in_lanes(v[7]);
    v[8] = in_lanes(v[8]), v[9] = in_lanes(v[9]), v[10] = in_lanes(v[10]), v[11] = in_lanes(v[11]);
    v[12] = in_lanes(v[12]), v[13] = in_lanes(v[13]), v[14] = in_lanes(v[14]), v[15] = in_lanes(v[15]);
    RADIX8(v);
    RADIX8(v + 8);
    BUTTERFLY(v[0], v[8]);
    BUTTERFLY(v[1], v[9]);
    BUTTERFLY(v[2], v[10]);
    BUTTERFLY(v[3], v[11]);
    BUTTERFLY(v[4], v[12]);
    BUTTERFLY(v[5], v[13]);
    BUTTERFLY(v[6], v[14]);
    BUTTERFLY(v[7], v[15]);
#elif LANES == 8
    v[0] = in_lanes(v[0]), v[1] = in_lanes(v[1]), v[2] = in_lanes(v[2]), v[3] = in_lanes(v[3]);
    v[4] = in_lanes(v[4]), v[5] = in_lanes(v[5]), v[6] = in_lanes(v[6]), v[7] = in_lanes(v[7]);
    RADIX8(v);
#else
    v[0] = in_lanes(v[0]), v[1] = in_lanes(v[1]), v[2] = in_lanes(v[2]), v[3] = in_lanes(v[3]);
    RADIX4(v);
#endif
}

/* Rows of 64 from `from`, `stride` apart, to a block: strides 1 to 32. The other rows are needed next. */
INLINE void transform_rows(const float *from, int64_t stride, struct ahead ahead, float *to) {
    for (int r = 0; r < SIDE; r++, from += stride, to += SIDE) {
        floats v[IN_ROW];
        fetch(ahead, r, 0, LINES);
        for (int i = 0; i < IN_ROW; i++)
            v[i] = load_floats(from + i * LANES);
        transform_row(v);
        for (int i = 0; i < IN_ROW; i++)
            store_floats(to + i * LANES, v[i]);
    }
}

INLINE void transform_rows_bf16(const uint16_t *from, int64_t stride, struct ahead ahead, float *to) {
    for (int r = 0; r < SIDE; r++, from += stride, to += SIDE) {
        floats v[IN_ROW];
        fetch(ahead, r, 0, LINES);
        for (int i = 0; i < IN_ROW; i++)
            v[i] = load_bf16(from + i * LANES);
        transform_row(v);
        for (int i = 0; i < IN_ROW; i++)
            store_floats(to + i * LANES, v[i]);
    }
}

INLINE void load8(const float *from, int stride, floats *v) {
    for (int k = 0; k < 8; k++)
        v[k] = load_floats(from + k * stride);
}

/* Strides 64 to 256, in place: columns of eight neighbouring rows. */
INLINE void transform_columns(float *block) {
    for (int group = 0; group < BLOCK; group += 8 * SIDE)
        for (int c = 0; c < SIDE; c += LANES) {
            float *at = block + group + c;
            floats v[8];
            load8(at, SIDE, v);
            RADIX8(v);
            for (int k = 0; k < 8; k++)
                store_floats(at + k * SIDE, v[k]);
        }
}

/* Strides 512 to 2048 of the values at `at`, `at` + 512, ...: the last stage, fused with whatever uses the result. */
INLINE void transform_last(const float *at, floats *v) {
    load8(at, 8 * SIDE, v);
    RADIX8(v);
}

/* ---- integers ---- */

/* v, negated in the lanes where `odd` is -1. */
#if defined(__AVX2__) && LANES == 8
#define NEGATED(v, odd) ((shorts)_mm256_sign_epi16((__m256i)(v), (__m256i)((odd) | 1)))
#else
#define NEGATED(v, odd) (((v) ^ (odd)) - (odd))
#endif

/* Butterflies within a vector of int16: neighbours, then pairs of them as 32-bit lanes. */
INLINE shorts short_lanes(shorts v) {
    v = SHORT_SWAP1(v) + NEGATED(v, SHORT_ODD1);
    v = (shorts)SWAP1((ints)v) + NEGATED(v, (shorts)ODD1);
    v = (shorts)SWAP2((ints)v) + NEGATED(v, (shorts)ODD2);
#if LANES >= 8
    v = (shorts)SWAP4((ints)v) + NEGATED(v, (shorts)ODD4);
#endif
#if LANES >= 16
    v = (shorts)SWAP8((ints)v) + NEGATED(v, (shorts)ODD8);
#endif
    return v;
}

INLINE void short_row(int16_t *row, int16_t limit) {
    shorts v[SHORTS_IN_ROW];
    for (int i = 0; i < SHORTS_IN_ROW; i++)
        v[i] = short_lanes(limited(load_shorts(row + i * SHORTS), limit));
#if LANES == 4
    RADIX8(v);
#elif LANES == 8
    RADIX4(v);
#else
    BUTTERFLY(v[0], v[1]);
#endif
    for (int i = 0; i < SHORTS_IN_ROW; i++)
        store_shorts(row + i * SHORTS, v[i]);
}

INLINE void short_columns(int16_t *at, int stride) {
    shorts v[8];
    for (int k = 0; k < 8; k++)
        v[k] = load_shorts(at + k * stride);
    RADIX8(v);
    for (int k = 0; k < 8; k++)
        store_shorts(at + k * stride, v[k]);
}

/* The transform of a block of int16 limited to [-limit, limit], in place. The caller knows that no sum leaves the
 * range. Half of the rows ahead are fetched. */
static void transform_shorts(int16_t *block, int16_t limit, struct ahead ahead) {
    for (int r = 0; r < SIDE; r++) {
        fetch(ahead, r, 0, LINES / 2);
        short_row(block + r * SIDE, limit);
    }
    for (int group = 0; group < BLOCK; group += 8 * SIDE)
        for (int c = 0; c < SIDE; c += SHORTS)
            short_columns(block + group + c, SIDE);
    for (int c = 0; c < 8 * SIDE; c += SHORTS)
        short_columns(block + c, 8 * SIDE);
}

/* The same to int32: only for more votes than int16 holds, so kept simple. */
static void transform_ints(const int16_t *votes, int16_t limit, int32_t *block) {
    for (int i = 0; i < BLOCK; i++)
        block[i] = votes[i] > limit ? limit : votes[i] < -limit ? -limit : votes[i];
    for (int stride = 1; stride < BLOCK; stride *= 2)
        for (int group = 0; group < BLOCK; group += 2 * stride)
            for (int i = group; i < group + stride; i++)
                BUTTERFLY(block[i], block[i + stride]);
}

#endif
