/* Attestation counts of 256 members at once: plane p holds bit p of everybody's count. Adding a bitmap and comparing
 * all counts with a number take a few operations per 64-bit word instead of one loop step per member. */
#pragma once

#include "state.h"

INLINE void count_bitmap(struct round *round, const bitmap *members) {
    for (u64 w = 0; w < 4; w++) {
        u64 carry = members->word[w];
        for (u64 p = 0; p < COUNTER_PLANES; p++) {
            u64 old = round->counter[p].word[w];
            round->counter[p].word[w] = old ^ carry;
            carry &= old;
        }
    }
}

/* Members of word w whose count is at least n, for n up to 63. */
INLINE u64 counts_at_least(const struct round *round, u64 w, u64 n) {
    u64 above = 0, equal = U64_MAX;
    for (u64 p = COUNTER_PLANES; p-- > 0;) {
        u64 plane = round->counter[p].word[w];
        u64 wanted = 0 - ((n >> p) & 1);
        above |= equal & plane & ~wanted;
        equal &= ~(plane ^ wanted);
    }
    return above | equal;
}
