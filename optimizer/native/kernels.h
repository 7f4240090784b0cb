/* Kernels of the optimizer on CPU: what Python sees.
 *
 * A block is 4,096 fp32 values, a tile of 64 x 64 by rows. Its coefficients are the natural-order Walsh-Hadamard
 * transform: butterflies (a, b) -> (a + b, a - b) with strides 1, 2, 4, ..., 2048, each result rounded to fp32. A slab
 * is a range of blocks worked on in one call; `count` is how many. All functions are reentrant and return a status.
 *
 * Results have the same bits on every machine: additions, subtractions and multiplications are rounded one by one, in
 * the order of the definitions beside each function, and never contracted or reassociated.
 */
#ifndef PSYCHE_KERNELS_H
#define PSYCHE_KERNELS_H

#include <stdint.h>

/* Change it with any struct or signature below, and in __init__.py. */
#define PSYCHE_ABI 3

enum { SIDE = 64, BLOCK = SIDE * SIDE };

enum status {
    DONE = 0,
    BAD_PIECE,   /* a piece leaves its block, its slab or the list of tensors, or has no storage to be in */
    BAD_CODE,    /* sizes that no layout has */
    BAD_MEMBERS, /* too few or too many messages */
    BAD_WINDOW,  /* a window beyond 15 */
    MALFORMED,   /* a message that encode_blocks would not have made */
};

enum dtype { FP32 = 0, BF16 = 1 };

/* A rectangle of a tensor in a block: value (r, c) is value offset + 64 r + c of the block and element
 * start + stride r + c of the tensor. One row may be as long as a block. */
struct piece {
    int32_t tensor, block, offset, rows, cols, reserved;
    int64_t start, stride;
};

/* Which values of which tensors are in the blocks of a slab: `n` pieces, sorted by block. */
struct slab {
    const struct piece *pieces;
    int64_t n, count, tensors;
};

/* Sizes of a block's code: bits of an index kept as they are, bits of the bitmap, bytes in all. */
struct code {
    int32_t topk, low, bitmap, bytes;
};

/* What one member sent for a slab: `code.bytes` and, known to the sender alone, a scale for each block. */
struct message {
    const uint8_t *body;
    const float *scale;
};

struct psyche_kernels {
    /* Momentum (count, 4096), per block and in this order:
     * 1. M = decay * M + rate * C, with C the coefficients of the gradient and rate the learning rate / 64;
     * 2. the topk largest |M| are kept, of equal ones those of the lowest index; the sign bit of a kept one is 1 if
     *    M < 0, and for a zero the lowest bit of index + salt; scale is the mean |M| of the kept ones, summed by
     *    halves; the code is written to body (count, code.bytes);
     * 3. M[i] += -(s * scale) for what was kept, s = +1 or -1.
     * energy[0] and [1]: sums of M^2 after 1, of all and of the kept ones. A base of NULL is a gradient of zeros. */
    int32_t (*encode)(const struct slab *slab, const void *const *gradients, const uint8_t *dtypes, float *momentum,
                      float decay, float rate, const struct code *code, uint32_t salt, uint8_t *body, float *scale,
                      double *energy);

    /* M[i] += s * (scale * factor). */
    int32_t (*add)(int64_t count, float *momentum, const struct message *message, float factor,
                   const struct code *code);

    /* T = T - T / 2^window + 8 U, the quotient rounded away from zero, the result held within 16 bits, to `trend`
     * (count, 4096); w = w * share - step, step = rate with the sign of T, +0 for a zero. U: the transform, in integers, of the sum of all members' signs, limited to
     * [-limit, limit] if limit is not 0. Rates and shares are the tensors'; no product where share is 1. */
    int32_t (*apply)(const struct slab *slab, float *const *weights, int16_t *trend, const uint8_t *const *bodies,
                     int64_t members, const struct code *code, int32_t limit, int32_t window, const float *rates,
                     const float *shares);

    /* out = w - step, by the T that these members' signs would make; the trend stays as it is. */
    int32_t (*preview)(const struct slab *slab, float *const *weights, void *const *out, const uint8_t *dtypes,
                       const int16_t *trend, const uint8_t *const *bodies, int64_t members, const struct code *code,
                       int32_t window, const float *rates);

    /* U alone, (count, 4096). */
    int32_t (*inverse)(int64_t count, const uint8_t *const *bodies, int64_t members, const struct code *code,
                       int32_t limit, int32_t *out);

    /* Indices and signs (1 for negative), both (count, topk). */
    int32_t (*decode)(int64_t count, const uint8_t *body, const struct code *code, uint16_t *indices,
                      uint8_t *negative);
    int32_t (*validate)(int64_t count, const uint8_t *body, const struct code *code);
    int32_t (*encode_blocks)(int64_t count, const uint16_t *indices, const uint8_t *negative,
                             const struct code *code, uint8_t *body);

    /* Sum over blocks b and values j of of_blocks[b] * within[j] * bits, modulo 2^64. */
    int32_t (*fingerprint)(const struct slab *slab, float *const *weights, const uint64_t *within,
                           const uint64_t *of_blocks, uint64_t *sum);
};

extern const struct psyche_kernels psyche_baseline, psyche_avx2, psyche_avx512;

#endif
