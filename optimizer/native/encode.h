/* From a gradient to a message: transform, momentum, selection, code. */
#ifndef PSYCHE_ENCODE_H
#define PSYCHE_ENCODE_H

#include "select.h"

/* M[i] += s * amount for what a row says. Rows that are not valid stay within the block, too. */
INLINE void add_row(const uint8_t *row, const struct code *code, float amount, float *block) {
    uint16_t index[BLOCK + 4];
    uint64_t signs = 0;
    if (!read_row(row, code, index))
        return;
    for (int i = 0; i < code->topk; i++, signs >>= 1) {
        if (i % 64 == 0)
            signs = read_signs(row, code, i / 64);
        block[index[i] & (BLOCK - 1)] += signs & 1 ? -amount : amount;
    }
}

static int32_t add(int64_t count, float *momentum, const struct message *message, float factor,
                   const struct code *code) {
    uint8_t copy[LONGEST_CODE + SLACK];
    if (check_code(code) != DONE)
        return BAD_CODE;
    for (int64_t b = 0; b < count; b++) {
        const uint8_t *row = readable(message->body, b, count, code, copy);
        add_row(row, code, message->scale[b] * factor, momentum + b * BLOCK);
    }
    return DONE;
}

INLINE struct ahead gradient_ahead(const struct piece *next, const struct piece *end, const void *const *gradients,
                                   const uint8_t *dtypes) {
    return rows_ahead(next, end, gradients, next < end && dtypes[next->tensor] == BF16 ? 2 : 4);
}

/* Gradient of a block after strides 1 to 256; returns 0 if there is none. */
INLINE int transform_gradient(const struct piece *p, const struct piece *end, const void *const *gradients,
                              const uint8_t *dtypes, struct ahead ahead, float *scratch) {
    int64_t stride;
    int any = 0;
    if (end - p == 1 && gradients[p->tensor] && is_whole(p, &stride)) {
        if (dtypes[p->tensor] == FP32)
            transform_rows((const float *)gradients[p->tensor] + p->start, stride, ahead, scratch);
        else
            transform_rows_bf16((const uint16_t *)gradients[p->tensor] + p->start, stride, ahead, scratch);
        transform_columns(scratch);
        return 1;
    }
    memset(scratch, 0, BLOCK * sizeof *scratch);
    for (; p < end; p++)
        if (gradients[p->tensor]) {
            gather(p, gradients[p->tensor], dtypes[p->tensor], scratch);
            any = 1;
        }
    if (any) {
        transform_rows(scratch, SIDE, ahead, scratch);
        transform_columns(scratch);
    }
    return any;
}

/* The last strides, M = decay * M + rate * C, maxima of groups and the sum of squares. */
INLINE double update_momentum(const float *scratch, float decay, float rate, struct ahead next, float *block,
                              int32_t *maxima) {
    floats total = {0};
    for (int g = 0; g < GROUPS; g += LANES) {
        floats v[8], squares[8];
        ints most = {0};
        transform_last(scratch + g, v);
        for (int r = g * SIDE / GROUPS; r < (g + LANES) * SIDE / GROUPS; r++)
            fetch(next, r, 0, LINES);
        for (int k = 0; k < 8; k++) {
            float *at = block + g + k * GROUPS;
            floats m = decay * load_floats(at) + rate * v[k];
            store_floats(at, m);
            most = larger(most, (ints)m & MAGNITUDE);
            squares[k] = m * m;
        }
        store_ints(maxima + g, most);
        total += ((squares[0] + squares[1]) + (squares[2] + squares[3])) +
                 ((squares[4] + squares[5]) + (squares[6] + squares[7]));
    }
    double sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += (double)total[i];
    return sum;
}

/* Mean of n magnitudes: padded with zeros to a power of two, halves are added until one value is left. */
INLINE float mean(float *values, int n) {
    int half = 1;
    while (half < n)
        half *= 2;
    memset(values + n, 0, (size_t)(half - n) * sizeof *values);
    for (half /= 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            values[i] += values[i + half];
    return values[0] / (float)n;
}

struct kept {
    uint16_t index[BLOCK + 4];
    uint64_t signs[SIDE];
    float magnitude[BLOCK];
    float scale;
    double energy;
};

/* Signs, energy and scale of the values at kept->index. */
INLINE void weigh(const float *block, int topk, uint32_t salt, struct kept *kept) {
    kept->energy = 0;
    for (int i = 0; i < topk; i += 64) {
        uint64_t signs = 0;
        for (int j = i; j < topk && j < i + 64; j++) {
            int32_t bits = bits_of(block[kept->index[j]]);
            int zero = (bits & MAGNITUDE) == 0;
            uint64_t negative = zero ? (kept->index[j] + salt) & 1 : (uint32_t)bits >> 31;
            signs |= negative << (j - i);
            float magnitude = kept->magnitude[j] = of_bits(bits & MAGNITUDE);
            kept->energy += (double)magnitude * (double)magnitude;
        }
        kept->signs[i / 64] = signs;
    }
    kept->scale = mean(kept->magnitude, topk);
}

INLINE void subtract_kept(const struct kept *kept, int topk, float *block) {
    for (int i = 0; i < topk; i++)
        block[kept->index[i]] += kept->signs[i / 64] >> i % 64 & 1 ? kept->scale : -kept->scale;
}

static int32_t encode(const struct slab *slab, const void *const *gradients, const uint8_t *dtypes, float *momentum,
                      float decay, float rate, const struct code *code, uint32_t salt, uint8_t *body, float *scale,
                      double *energy) {
    float scratch[BLOCK] __attribute__((aligned(LINE)));
    int32_t maxima[GROUPS] __attribute__((aligned(LINE)));
    struct kept kept;
    if (check_code(code) != DONE)
        return BAD_CODE;
    if (check_slab(slab, gradients, 1) != DONE)
        return BAD_PIECE;
    energy[0] = energy[1] = 0;
    memset(scratch, 0, sizeof scratch);
    const struct piece *p = slab->pieces, *end;
    for (int64_t b = 0; b < slab->count; b++, p = end, momentum += BLOCK) {
        end = pieces_of(p, slab_end(slab), b);
        struct ahead next = {(const char *)(momentum + BLOCK), SIDE * sizeof *momentum};
        transform_gradient(p, end, gradients, dtypes, gradient_ahead(end, slab_end(slab), gradients, dtypes), scratch);
        energy[0] += update_momentum(scratch, decay, rate, next, momentum, maxima);
        select_largest((const fp32_bits *)momentum, maxima, code->topk, kept.index);
        weigh(momentum, code->topk, salt, &kept);
        write_row(kept.index, kept.signs, code, body + b * code->bytes);
        scale[b] = kept.scale;
        energy[1] += kept.energy;
        subtract_kept(&kept, code->topk, momentum);
    }
    return DONE;
}

#endif
