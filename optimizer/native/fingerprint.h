/* Exact checksums of weights, and the check that gradients are finite. */
#ifndef PSYCHE_FINGERPRINT_H
#define PSYCHE_FINGERPRINT_H

/* A sum modulo 2^64 of products of 32 and 64 bits: lanes for the lower and the upper half of the long factor. */
struct sum {
    longs low;
    words high;
    uint64_t rest;
};

/* The even lanes' products. */
INLINE longs products(words a, words b) {
#if defined(__AVX512F__) && LANES == 16
    return (longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && LANES == 8
    return (longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && LANES == 4
    return (longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return ((longs)a & 0xffffffffu) * ((longs)b & 0xffffffffu);
#endif
}

INLINE words odd_lanes(words v) {
    return (words)((longs)v >> 32);
}

/* Add bits * factor for n values, factors as their low and high halves. */
INLINE void add_products(const fp32_words *bits, const uint32_t *low, const uint32_t *high, int n, struct sum *sum) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        words v = load_words(bits + i), l = load_words(low + i), h = load_words(high + i);
        sum->low += products(v, l) + products(odd_lanes(v), odd_lanes(l));
        sum->high += v * h;
    }
    for (; i < n; i++)
        sum->rest += (uint64_t)bits[i] * low[i] + ((uint64_t)(bits[i] * high[i]) << 32);
}

INLINE uint64_t total(const struct sum *sum) {
    uint64_t all_of = sum->rest;
    for (int i = 0; i < LANES; i++)
        all_of += (uint64_t)sum->high[i] << 32;
    for (int i = 0; i < LANES / 2; i++)
        all_of += sum->low[i];
    return all_of;
}

static int32_t fingerprint(const struct slab *slab, float *const *weights, const uint64_t *within,
                           const uint64_t *of_blocks, uint64_t *result) {
    uint32_t low[BLOCK] __attribute__((aligned(LINE))), high[BLOCK] __attribute__((aligned(LINE)));
    if (check_slab(slab, (const void *const *)weights, 0) != DONE)
        return BAD_PIECE;
    for (int i = 0; i < BLOCK; i++)
        low[i] = (uint32_t)within[i], high[i] = (uint32_t)(within[i] >> 32);
    *result = 0;
    for (const struct piece *p = slab->pieces; p < slab_end(slab); p++) {
        struct ahead ahead = rows_ahead(p + 1, slab_end(slab), (const void *const *)weights, 4);
        struct sum sum = {{0}, {0}, 0};
        for (int32_t r = 0; r < p->rows; r++) {
            const float *w = weights[p->tensor] + p->start + p->stride * r;
            int at = p->offset + r * SIDE;
            fetch(ahead, r, 0, LINES);
            add_products((const fp32_words *)w, low + at, high + at, p->cols, &sum);
        }
        *result += of_blocks[p->block] * total(&sum);
    }
    return DONE;
}

#endif
