/* Elias-Fano code of a block's indices and their signs, as in optimizer/codec.py: a string of bits, the least
 * significant of a byte first: topk x low bits; a bitmap with bit (index >> low) + i set for the i-th index; topk
 * signs; zeros to the end of the byte. */
#ifndef PSYCHE_CODE_H
#define PSYCHE_CODE_H

enum {
    LONGEST_CODE = (2 * BLOCK + BLOCK) / 8, /* bytes, for topk 4096 */
    SLACK = 16,                             /* bytes that a reader of 64 bits may touch behind a code */
};

/* Bodies cannot be trusted, sizes can: they are the layout's. Checked once per call. */
static int32_t check_code(const struct code *code) {
    int32_t topk = code->topk, low = 12;
    if (topk < 1 || topk > BLOCK)
        return BAD_CODE;
    while ((BLOCK >> low) < topk)
        low--;
    int32_t bitmap = topk + (BLOCK >> low);
    int right = code->low == low && code->bitmap == bitmap && code->bytes == (topk * low + bitmap + topk + 7) / 8;
    return right ? DONE : BAD_CODE;
}

INLINE uint64_t load64(const uint8_t *from) {
    uint64_t v;
    memcpy(&v, from, 8);
    return v;
}

INLINE uint64_t ones(int n) {
    return n >= 64 ? ~0ull : (1ull << n) - 1;
}

/* `n` <= 57 bits from bit `at` on. */
INLINE uint64_t bits57(const uint8_t *from, int32_t at, int n) {
    return load64(from + (at >> 3)) >> (at & 7) & ones(n);
}

/* `n` <= 64 bits from bit `at` on. */
INLINE uint64_t bits64(const uint8_t *from, int32_t at, int n) {
    const uint8_t *byte = from + (at >> 3);
    int shift = at & 7;
    uint64_t high = shift ? (uint64_t)byte[8] << (64 - shift) : 0;
    return (load64(byte) >> shift | high) & ones(n);
}

/* Row `b` of a body with SLACK readable bytes behind it: the last rows are copied, the memory ends behind them. */
INLINE const uint8_t *readable(const uint8_t *body, int64_t b, int64_t count, const struct code *code,
                               uint8_t *copy) {
    const uint8_t *row = body + b * code->bytes;
    if ((count - 1 - b) * code->bytes >= SLACK)
        return row;
    memcpy(copy, row, (size_t)code->bytes);
    memset(copy + code->bytes, 0, SLACK);
    return copy;
}

/* ---- reading ---- */

/* Four fields of `low` <= 11 bits, one in each 16 bits of the result. */
INLINE uint64_t spread(uint64_t bits, int low) {
    uint64_t pair = ones(2 * low), one = ones(low);
    uint64_t pairs = (bits & pair) | (bits >> 2 * low & pair) << 32;
    one |= one << 32;
    return (pairs & one) | (pairs >> low & one) << 16;
}

INLINE int set_bits(const uint8_t *from, int32_t at, int n) {
    int count = 0;
    for (int i = 0; i < n; i += 64)
        count += __builtin_popcountll(bits64(from, at + i, n - i < 64 ? n - i : 64));
    return count;
}

/* The set bits of a string, from the first on. There must be as many as are asked for. */
struct set_bits {
    const uint8_t *from;
    int32_t at, start;
    uint64_t map;
};

INLINE uint64_t next_set(struct set_bits *bits) {
    while (!bits->map) {
        bits->start += 64;
        bits->map = bits64(bits->from, bits->at + bits->start, 64);
    }
    uint64_t position = (uint64_t)(bits->start + __builtin_ctzll(bits->map));
    bits->map &= bits->map - 1;
    return position;
}

/* Indices of a row into index[topk + 3], a multiple of four being written; 0 if its bitmap does not have topk bits.
 * They may be anything up to 65535 when the row is not valid. */
INLINE int read_row(const uint8_t *row, const struct code *code, uint16_t *index) {
    int topk = code->topk, low = code->low, map = topk * low, i = 0;
    if (set_bits(row, map, code->bitmap) != topk)
        return 0;
    struct set_bits bits = {row, map, 0, bits64(row, map, 64)};
    if (topk == 1) { /* the only case of more than 11 low bits */
        index[0] = (uint16_t)(next_set(&bits) << low | bits57(row, 0, low));
        return 1;
    }
    for (int at = 0; i + 4 <= topk; i += 4, at += 4 * low) {
        uint64_t lows = spread(bits57(row, at, 4 * low), low);
        uint64_t positions = next_set(&bits);
        positions |= next_set(&bits) << 16;
        positions |= next_set(&bits) << 32;
        positions |= next_set(&bits) << 48;
        /* A position is never below its number, so the subtraction of all four borrows nothing. */
        uint64_t four = (positions - (uint64_t)i * 0x0001000100010001u - 0x0003000200010000u) << low | lows;
        memcpy(index + i, &four, 8);
    }
    for (; i < topk; i++)
        index[i] = (uint16_t)((next_set(&bits) - (uint64_t)i) << low | bits57(row, i * low, low));
    return 1;
}

/* Sign bits of a row, 64 at a time: word `w` of them. */
INLINE uint64_t read_signs(const uint8_t *row, const struct code *code, int w) {
    int left = code->topk - 64 * w;
    return bits64(row, code->topk * code->low + code->bitmap + 64 * w, left < 64 ? left : 64);
}

/* The checks beyond the one of `read_row`. */
INLINE int is_valid(const uint8_t *row, const struct code *code, const uint16_t *index) {
    int end = code->topk * code->low + code->bitmap + code->topk, bad = 0;
    bad |= end % 8 && row[code->bytes - 1] >> end % 8;
    bad |= index[0] >= BLOCK;
    for (int i = 1; i < code->topk; i++)
        bad |= index[i] >= BLOCK || index[i] <= index[i - 1];
    return !bad;
}

/* Bits of a byte to eight bytes of 0 or 1, in memory order. */
INLINE uint64_t bytes_of_bits(uint64_t bits) {
    uint64_t one_each = (bits & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
    return (one_each + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

INLINE void read_negative(const uint8_t *row, const struct code *code, uint8_t *negative) {
    for (int i = 0; i < code->topk; i += 64) {
        uint64_t signs = read_signs(row, code, i / 64);
        for (int j = i; j < code->topk && j < i + 64; j += 8, signs >>= 8) {
            uint64_t eight = bytes_of_bits(signs);
            memcpy(negative + j, &eight, code->topk - j < 8 ? (size_t)(code->topk - j) : 8);
        }
    }
}

static int32_t decode(int64_t count, const uint8_t *body, const struct code *code, uint16_t *indices,
                      uint8_t *negative) {
    uint16_t index[BLOCK + 4];
    uint8_t copy[LONGEST_CODE + SLACK];
    if (check_code(code) != DONE)
        return BAD_CODE;
    for (int64_t b = 0; b < count; b++) {
        const uint8_t *row = readable(body, b, count, code, copy);
        if (!read_row(row, code, index) || !is_valid(row, code, index))
            return MALFORMED;
        memcpy(indices + b * code->topk, index, 2 * (size_t)code->topk);
        read_negative(row, code, negative + b * code->topk);
    }
    return DONE;
}

static int32_t validate(int64_t count, const uint8_t *body, const struct code *code) {
    uint16_t index[BLOCK + 4];
    uint8_t copy[LONGEST_CODE + SLACK];
    if (check_code(code) != DONE)
        return BAD_CODE;
    for (int64_t b = 0; b < count; b++) {
        const uint8_t *row = readable(body, b, count, code, copy);
        if (!read_row(row, code, index) || !is_valid(row, code, index))
            return MALFORMED;
    }
    return DONE;
}

/* ---- writing ---- */

/* A row under construction: enough words for the longest code and what is written at once behind it. */
struct row {
    uint64_t word[LONGEST_CODE / 8 + 2];
};

/* `n` <= 64 bits at bit `at`; bits of `value` beyond them are zero. */
INLINE void put(struct row *row, int at, uint64_t value, int n) {
    int shift = at & 63;
    row->word[at >> 6] |= value << shift;
    if (shift + n > 64)
        row->word[(at >> 6) + 1] |= value >> (64 - shift);
}

/* The inverse of `spread`. */
INLINE uint64_t gathered(uint64_t four, int low) {
    uint64_t one = ones(low);
    one |= one << 32;
    uint64_t pairs = (four & one) | (four >> 16 & one) << low;
    return (pairs & ones(2 * low)) | (pairs >> 32) << 2 * low;
}

INLINE void write_lows(struct row *row, const uint16_t *index, int topk, int low) {
    if (low > 11) {
        put(row, 0, index[0] & ones(low), low);
        return;
    }
    uint64_t gather = 0;
    int at = 0, filled = 0, bits = 4 * low;
    for (int i = 0; i < topk; i += 4) {
        uint64_t four = 0;
        memcpy(&four, index + i, topk - i < 4 ? 2 * (size_t)(topk - i) : 8);
        uint64_t fields = gathered(four, low);
        gather |= fields << filled;
        filled += bits;
        if (filled >= 64) {
            row->word[at++] = gather;
            filled -= 64;
            gather = filled ? fields >> (bits - filled) : 0;
        }
    }
    row->word[at] = gather;
}

/* index[topk] strictly ascending and below 4096; signs as bits, 64 in a word. */
static void write_row(const uint16_t *index, const uint64_t *signs, const struct code *code, uint8_t *to) {
    struct row row;
    int topk = code->topk, low = code->low, map = topk * low, sign = map + code->bitmap;
    memset(row.word, 0, (size_t)(code->bytes + 15) / 8 * 8);
    write_lows(&row, index, topk, low);
    for (int i = 0; i < topk; i++) {
        int at = map + (index[i] >> low) + i;
        row.word[at >> 6] |= 1ull << (at & 63);
    }
    for (int i = 0; i < topk; i += 64)
        put(&row, sign + i, signs[i / 64], topk - i < 64 ? topk - i : 64);
    memcpy(to, row.word, (size_t)code->bytes);
}

static int32_t encode_blocks(int64_t count, const uint16_t *indices, const uint8_t *negative,
                             const struct code *code, uint8_t *body) {
    uint64_t signs[SIDE];
    if (check_code(code) != DONE)
        return BAD_CODE;
    for (int64_t b = 0; b < count; b++, indices += code->topk, negative += code->topk, body += code->bytes) {
        memset(signs, 0, sizeof signs);
        for (int i = 0; i < code->topk; i++) {
            if (indices[i] >= BLOCK || (i && indices[i] <= indices[i - 1]))
                return MALFORMED;
            signs[i / 64] |= (uint64_t)(negative[i] != 0) << i % 64;
        }
        write_row(indices, signs, code, body);
    }
    return DONE;
}

#endif
