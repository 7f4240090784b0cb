/* The machine: integer types, system calls and the few helpers that every file uses. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

_Static_assert(sizeof(u32) == 4 && sizeof(u64) == 8, "integer sizes");

typedef struct { u64 word[4]; } key; /* 32 bytes: public keys, digests, roots, bitmaps of 256 members */
typedef struct { u64 word[4]; } bitmap;

#define NULL ((void *)0)
#define U64_MAX 0xffffffffffffffffull
#define U32_MAX 0xffffffffu
#define INLINE static inline __attribute__((always_inline))

/* Errors of the runtime itself that this program passes on. */
#define BUILTIN_UNSUPPORTED_SYSVAR (17ull << 32)

typedef struct { const void *data; u64 length; } slice;

u64 sol_sha256(const slice *parts, u64 count, u8 *hash);
u64 sol_get_clock_sysvar(void *clock);
u64 sol_get_rent_sysvar(void *rent);
u64 sol_get_sysvar(const u8 *id, u8 *out, u64 offset, u64 length);
void sol_log_data(const slice *parts, u64 count);
void sol_memset_(void *at, u8 value, u64 length);
void sol_memcpy_(void *to, const void *from, u64 length);

/* Leave the function with an error unless the condition holds. */
#define require(condition, code) \
    do { \
        if (!(condition)) return (code); \
    } while (0)
/* Leave the function with the error of a step that failed. */
#define check(step) \
    do { \
        u64 failed_ = (step); \
        if (failed_) return failed_; \
    } while (0)

INLINE int same_key(const key *a, const key *b) {
    return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

INLINE int zero_key(const key *a) { return (a->word[0] | a->word[1] | a->word[2] | a->word[3]) == 0; }

INLINE int has_bit(const bitmap *b, u64 slot) { return (b->word[(slot >> 6) & 3] >> (slot & 63)) & 1; }
INLINE void set_bit(bitmap *b, u64 slot) { b->word[(slot >> 6) & 3] |= 1ull << (slot & 63); }
INLINE void clear_bit(bitmap *b, u64 slot) { b->word[(slot >> 6) & 3] &= ~(1ull << (slot & 63)); }

/* Run the statement for every set bit of a bitmap, in ascending order. `break` leaves only the word at hand. */
#define for_each(slot, bits) \
    for (u64 word_ = 0; word_ < 4; word_++) \
        for (u64 rest_ = (bits)->word[word_], slot = 64 * word_; rest_; rest_ >>= 1, slot++) \
            if (rest_ & 1)

INLINE u64 count_bits(u64 x) {
    x -= (x >> 1) & 0x5555555555555555ull;
    x = (x & 0x3333333333333333ull) + ((x >> 2) & 0x3333333333333333ull);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0full;
    return (x * 0x0101010101010101ull) >> 56;
}

INLINE u64 saturating_add(u64 a, u64 b) { return a + b < a ? U64_MAX : a + b; }
INLINE u64 smaller(u64 a, u64 b) { return a < b ? a : b; }

/* ceil(2/3 n): the quorum of everything in this program. */
INLINE u64 two_thirds(u64 n) { return (2 * n + 2) / 3; }
