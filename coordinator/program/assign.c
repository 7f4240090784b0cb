/* The start of a round: its positions, everybody's slice of them, its witnesses. */
#include "program.h"
#include "random.h"

/* The members that take part, in slot order. */
struct team {
    u64 count;
    u64 share;
    u8 slot[MAX_MEMBERS];
};

/* Collect the active members; a desynced one that has reported ready is active again from here on. */
static void gather(struct context *c, struct round *round, struct team *team) {
    u64 count = 0, share = 0;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c->members->member[slot];
        if (member->status == DESYNCED && member->ready) {
            member->status = ACTIVE;
            member->ready = 0;
            member->missed = 0;
            member->excluded = 0;
            c->rounds->header.active++;
        }
        if (member->status != ACTIVE) continue;
        team->slot[count++] = (u8)slot;
        share += member->share;
        set_bit(&round->active, slot);
    }
    team->count = count;
    team->share = share;
}

/* Slices are contiguous, from the rotated first member on, and end at floor(positions x cumulative share / total
 * share): their sizes follow the shares and their sum is exact. */
static void cut_slices(struct round *round, const struct members *members, const struct team *team, u64 first) {
    u64 total = team->share, cumulative = 0, offset = 0, empty = 0;
    round->assigned = round->active;
    for (u64 i = 0, at = first; i < team->count; i++) {
        u64 slot = team->slot[at];
        if (++at == team->count) at = 0;
        cumulative += members->member[slot].share;
        u64 end = round->positions * cumulative / total;
        round->slice_offset[slot] = (u32)offset;
        round->slice_count[slot] = (u32)(end - offset);
        if (end == offset) {
            clear_bit(&round->assigned, slot);
            empty++;
        }
        offset = end;
    }
    round->expected_count = (u32)(team->count - empty);
}

/* A crowded queue: the whole round goes to one member. */
static void give_all(struct round *round, u64 slot) {
    set_bit(&round->assigned, slot);
    round->slice_count[slot] = (u32)round->positions;
    round->expected_count = 1;
}

/* A partial Fisher-Yates shuffle; disturbs the order of the team. */
static void elect_witnesses(struct round *round, struct team *team, u64 wanted, u64 *random) {
    u64 elected = smaller(wanted ? wanted : MAX_WITNESSES, team->count);
    for (u64 i = 0; i < elected; i++) {
        u64 j = i + draw(random) % (team->count - i);
        u8 slot = team->slot[j];
        team->slot[j] = team->slot[i];
        round->witness[i] = slot;
    }
    round->witness_count = (u8)elected;
}

void start_round(struct context *c) {
    struct run *run = c->run;
    struct round *round = entry_of(c->rounds, run->round);
    sol_memset_(round, 0, sizeof *round);
    round->round = run->round;
    round->state = ROUND_OPEN;
    round->start_slot = c->slot;
    round->median_elapsed = U32_MAX;

    struct team team;
    gather(c, round, &team); /* never empty: a round starts with min_members at least */
    u64 random = run->seed.word[0];
    u64 first = draw(&random) % team.count;
    round->first_slot = team.slot[first];
    if (draw_positions(c, round, team.count)) {
        cut_slices(round, c->members, &team, first);
    } else {
        give_all(round, round->first_slot);
    }
    round->expected = round->assigned;
    elect_witnesses(round, &team, run->limits.witnesses, &random);
    c->rounds->header.committed = 0;
    c->rounds->header.drain = 0;
}
