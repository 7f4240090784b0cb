/* The start of a round: its positions, everybody's slice of them, its witnesses. */
#include "program.h"
#include "random.h"

/* A desynced member that has reported ready is active again from here on. */
static void readmit(struct context *c) {
    struct header *h = &c->rounds->header;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c->members->member[slot];
        if (member->status != DESYNCED || !member->ready) continue;
        member->status = ACTIVE;
        member->ready = 0;
        member->missed = 0;
        member->excluded = 0;
        h->active++;
    }
}

/* Slices are contiguous, from the rotated first member on, and end at floor(positions x cumulative share / total share): their
 * sizes follow the shares and their sum is exact. */
static void cut_slices(struct round *round, const struct members *members, const u8 *active, u64 count, u64 first, u64 sharers) {
    u64 total = 0, cumulative = 0, offset = 0;
    for (u64 i = 0; i < sharers; i++) total += members->member[active[(first + i) % count]].share;
    for (u64 i = 0; i < sharers; i++) {
        u64 slot = active[(first + i) % count];
        cumulative += members->member[slot].share;
        u64 end = round->positions * cumulative / total;
        round->slice_offset[slot] = (u32)offset;
        round->slice_count[slot] = (u32)(end - offset);
        if (end != offset) {
            set_bit(&round->assigned, slot);
            round->expected_count++;
        }
        offset = end;
    }
    round->expected = round->assigned;
    round->first_slot = active[first];
}

/* A partial Fisher-Yates shuffle; disturbs the order of `active`. */
static void elect_witnesses(struct round *round, u8 *active, u64 count, u64 wanted, u64 *random) {
    u64 elected = smaller(wanted ? wanted : MAX_WITNESSES, count);
    for (u64 i = 0; i < elected; i++) {
        u64 j = i + draw(random) % (count - i);
        u8 slot = active[j];
        active[j] = active[i];
        active[i] = slot;
        round->witness[i] = slot;
    }
    round->witness_count = (u8)elected;
}

void start_round(struct context *c) {
    struct run *run = c->run;
    struct header *h = &c->rounds->header;
    struct round *round = entry_of(c->rounds, run->round);
    readmit(c);
    sol_memset_(round, 0, sizeof *round);
    round->round = run->round;
    round->state = ROUND_OPEN;
    round->start_slot = c->slot;
    round->median_elapsed = U32_MAX;

    u8 active[MAX_MEMBERS];
    u64 count = 0;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        if (c->members->member[slot].status != ACTIVE) continue;
        active[count++] = (u8)slot;
        set_bit(&round->active, slot);
    }
    u64 random = run->seed.word[0];
    u64 first = draw(&random) % count; /* never 0: a round starts with min_members at least */
    u64 sharers = draw_positions(c, round, count);
    cut_slices(round, c->members, active, count, first, sharers);
    elect_witnesses(round, active, count, run->limits.witnesses, &random);
    h->committed = 0;
    h->drain = 0;
}
