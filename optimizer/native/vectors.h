/* Vectors of LANES fp32 or int32 values, or 2 LANES int16 values, in the extensions common to GCC and clang. */
#ifndef PSYCHE_VECTORS_H
#define PSYCHE_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
typedef int16_t half_shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t half_words __attribute__((vector_size(2 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint64_t longs __attribute__((vector_size(4 * LANES)));

#define SIGN INT32_MIN
#define MAGNITUDE INT32_MAX

/* The bits of floats in memory. */
typedef int32_t fp32_bits __attribute__((may_alias));
typedef uint32_t fp32_words __attribute__((may_alias));

/* memcpy is how C spells an unaligned load or store; it compiles to one instruction. */
#define LOAD(type, name, element)                                                                                      \
    INLINE type name(const element *from) {                                                                            \
        type v;                                                                                                        \
        memcpy(&v, from, sizeof v);                                                                                    \
        return v;                                                                                                      \
    }
LOAD(floats, load_floats, float)
LOAD(ints, load_ints, fp32_bits)
LOAD(words, load_words, fp32_words)
LOAD(shorts, load_shorts, int16_t)
LOAD(half_shorts, load_half, int16_t)
LOAD(half_words, load_half_words, uint16_t)
#undef LOAD

INLINE void store_floats(float *to, floats v) {
    memcpy(to, &v, sizeof v);
}
INLINE void store_ints(int32_t *to, ints v) {
    memcpy(to, &v, sizeof v);
}
INLINE void store_half(int16_t *to, half_shorts v) {
    memcpy(to, &v, sizeof v);
}
INLINE void store_shorts(int16_t *to, shorts v) {
    memcpy(to, &v, sizeof v);
}

INLINE floats load_bf16(const uint16_t *from) {
    return (floats)(__builtin_convertvector(load_half_words(from), words) << 16);
}

INLINE int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE float of_bits(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE ints larger(ints a, ints b) {
#if defined(__AVX512F__) && LANES == 16
    return (ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && LANES == 8
    return (ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    ints above = a > b;
    return (a & above) | (b & ~above);
#endif
}

/* v, within [-limit, limit]. */
INLINE shorts limited(shorts v, int16_t limit) {
    shorts most = limit - (shorts){0}, least = -most;
#if defined(__AVX2__) && LANES == 8
    return (shorts)_mm256_min_epi16(_mm256_max_epi16((__m256i)v, (__m256i)least), (__m256i)most);
#elif defined(__AVX512BW__) && LANES == 16
    return (shorts)_mm512_min_epi16(_mm512_max_epi16((__m512i)v, (__m512i)least), (__m512i)most);
#else
    shorts below = v < least, above = v > most;
    return (v & ~(below | above)) | (least & below) | (most & above);
#endif
}

/* Which of 64 fp32 values have magnitude bits above `bound`: bit i for value i. */
#if defined(__AVX512F__) && LANES == 16
INLINE uint64_t magnitudes_above(const fp32_bits *row, int32_t bound) {
    __m512i magnitude = _mm512_set1_epi32(MAGNITUDE), least = _mm512_set1_epi32(bound);
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += 16) {
        __m512i bits = _mm512_and_si512(_mm512_loadu_si512(row + i), magnitude);
        mask |= (uint64_t)_mm512_cmpgt_epi32_mask(bits, least) << i;
    }
    return mask;
}
#elif defined(__AVX2__) && LANES == 8
INLINE __m256i compared(const fp32_bits *at, int32_t bound) {
    return (__m256i)((load_ints(at) & MAGNITUDE) > bound);
}
/* Packing works on halves of 16 bytes, so that dwords come out as 0 4 1 5 2 6 3 7. */
INLINE uint64_t half_row_above(const fp32_bits *row, int32_t bound) {
    __m256i low = _mm256_packs_epi32(compared(row, bound), compared(row + 8, bound));
    __m256i high = _mm256_packs_epi32(compared(row + 16, bound), compared(row + 24, bound));
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return (uint32_t)_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
INLINE uint64_t magnitudes_above(const fp32_bits *row, int32_t bound) {
    return half_row_above(row, bound) | half_row_above(row + 32, bound) << 32;
}
#elif defined(__x86_64__) && LANES == 4
INLINE __m128i compared(const fp32_bits *at, int32_t bound) {
    return (__m128i)((load_ints(at) & MAGNITUDE) > bound);
}
INLINE uint64_t magnitudes_above(const fp32_bits *row, int32_t bound) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += 16) {
        __m128i low = _mm_packs_epi32(compared(row + i, bound), compared(row + i + 4, bound));
        __m128i high = _mm_packs_epi32(compared(row + i + 8, bound), compared(row + i + 12, bound));
        mask |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_packs_epi16(low, high)) << i;
    }
    return mask;
}
#else
INLINE uint64_t magnitudes_above(const fp32_bits *row, int32_t bound) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i++)
        mask |= (uint64_t)((row[i] & MAGNITUDE) > bound) << i;
    return mask;
}
#endif

INLINE int32_t sum_of(ints v) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

INLINE int32_t largest_of(ints v) {
    int32_t most = v[0];
    for (int i = 1; i < LANES; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

/* A shuffle of one vector by constant lanes. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(v, index, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, index, ...) __builtin_shuffle(v, (index){__VA_ARGS__})
#endif

/* Lanes exchanged with the ones 1, 2, 4, 8 further, and -1 in the lanes that a butterfly subtracts. */
#if LANES == 4
#define SWAP1(v) SHUFFLE(v, ints, 1, 0, 3, 2)
#define SWAP2(v) SHUFFLE(v, ints, 2, 3, 0, 1)
#define ODD1 ((ints){0, -1, 0, -1})
#define ODD2 ((ints){0, 0, -1, -1})
#define SHORT_SWAP1(v) SHUFFLE(v, shorts, 1, 0, 3, 2, 5, 4, 7, 6)
#define SHORT_ODD1 ((shorts){0, -1, 0, -1, 0, -1, 0, -1})
#elif LANES == 8
#define SWAP1(v) SHUFFLE(v, ints, 1, 0, 3, 2, 5, 4, 7, 6)
#define SWAP2(v) SHUFFLE(v, ints, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAP4(v) SHUFFLE(v, ints, 4, 5, 6, 7, 0, 1, 2, 3)
#define ODD1 ((ints){0, -1, 0, -1, 0, -1, 0, -1})
#define ODD2 ((ints){0, 0, -1, -1, 0, 0, -1, -1})
#define ODD4 ((ints){0, 0, 0, 0, -1, -1, -1, -1})
#define SHORT_SWAP1(v) SHUFFLE(v, shorts, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define SHORT_ODD1 ((shorts){0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1})
#elif LANES == 16
#define SWAP1(v) SHUFFLE(v, ints, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define SWAP2(v) SHUFFLE(v, ints, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP4(v) SHUFFLE(v, ints, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP8(v) SHUFFLE(v, ints, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define ODD1 ((ints){0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1})
#define ODD2 ((ints){0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1})
#define ODD4 ((ints){0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1})
#define ODD8 ((ints){0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1})
#define SHORT_SWAP1(v)                                                                                                 \
    SHUFFLE(v, shorts, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14, 17, 16, 19, 18, 21, 20, 23, 22, 25, 24,   \
            27, 26, 29, 28, 31, 30)
#define SHORT_ODD1                                                                                                     \
    ((shorts){0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1,                                                  \
              0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1})
#else
#error "LANES is 4, 8 or 16"
#endif

#endif
