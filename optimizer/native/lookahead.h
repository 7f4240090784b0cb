/* Weights as the trend and the own votes that travel predict them. */
#ifndef PSYCHE_LOOKAHEAD_H
#define PSYCHE_LOOKAHEAD_H

INLINE void row_ahead(const int16_t *trend, const float *w, int n, float lr, float *out) {
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        store_floats(out + i, load_floats(w + i) - steps_of(trend + i, lr));
    for (; i < n; i++)
        out[i] = w[i] - step_of(trend[i], lr);
}

INLINE void row_ahead_bf16(const int16_t *trend, const float *w, int n, float lr, uint16_t *out) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats ahead = load_floats(w + i) - steps_of(trend + i, lr);
        words bits = (words)ahead, ok = (words)(ahead == ahead);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        bits = (bits & ok) | (0x7fc0 & ~ok);
        half_words halves = __builtin_convertvector(bits, half_words);
        memcpy(out + i, &halves, sizeof halves);
    }
    for (; i < n; i++)
        out[i] = bf16_of(w[i] - step_of(trend[i], lr));
}

static int32_t preview(const struct slab *slab, float *const *weights, void *const *out, const uint8_t *dtypes,
                       const int16_t *trend, const uint8_t *const *bodies, int64_t members, const struct code *code,
                       int32_t window, const float *rates) {
    struct ballots all_of = {bodies, members, slab->count, code, 0};
    struct inverse u;
    int16_t next[BLOCK] __attribute__((aligned(LINE)));
    int32_t status = check_step(&all_of, slab, (const void *const *)weights, window);
    if (status == DONE)
        status = check_slab(slab, (const void *const *)out, 0);
    if (status != DONE)
        return status;
    const struct piece *p = slab->pieces;
    for (int64_t b = 0; b < slab->count; b++, trend += BLOCK) {
        struct ahead ahead = rows_ahead(p, slab_end(slab), (const void *const *)weights, 4);
        next_trend(&all_of, b, ahead, window, trend, &u, next);
        for (; p < slab_end(slab) && p->block == b; p++)
            for (int32_t r = 0; r < p->rows; r++) {
                int64_t at = p->start + p->stride * r;
                const int16_t *v = next + p->offset + r * SIDE;
                const float *w = weights[p->tensor] + at;
                if (dtypes[p->tensor] == FP32)
                    row_ahead(v, w, p->cols, rates[p->tensor], (float *)out[p->tensor] + at);
                else
                    row_ahead_bf16(v, w, p->cols, rates[p->tensor], (uint16_t *)out[p->tensor] + at);
            }
    }
    return DONE;
}

#endif
