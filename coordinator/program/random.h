/* The run's randomness: a 32-byte seed that every round mixes with its commitments and a recent slot hash. */
#pragma once

#include "program.h"

/* seed = SHA-256(seed, data, newest slot hash). Nobody knows the hash before the slot, nor the commitments before the
 * round. */
void mix_seed(key *seed, const void *data, u64 length);

/* SplitMix64 (Steele, Lea, Flood 2014): cheap draws from a seed that is already uniform. */
INLINE u64 draw(u64 *state) {
    u64 x = *state += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
