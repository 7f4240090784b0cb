/* The start of a round: its positions, everybody's slice of them, its witnesses. */
#include "events.h"
#include "random.h"

/* The members that take part, in slot order. */
struct team {
    u64 count;
    u64 share;
    u8 slot[MAX_MEMBERS];
};

/* Collect the active members. One that has joined or re-synced and reported ready is active from here on; one that has
 * had the time of a warm-up for it and is not ready gives its place up. */
static void gather(struct context *c, struct round *round, struct team *team) {
    u64 count = 0, share = 0;
    bitmap dropped = {{0, 0, 0, 0}};
    struct member *member = c->members->member;
    for (u64 w = 0; w < 4; w++) {
        u64 active = 0;
        for (u64 slot = 64 * w, bit = 1; bit; slot++, bit <<= 1, member++) {
            u64 status = member->status;
            if (status != ACTIVE) {
                if (status != PENDING && status != DESYNCED) continue;
                if (!member->ready) {
                    if (c->slot - member->status_slot <= c->run->limits.warmup_time) continue;
                    become(c, member, DROPPED);
                    c->rounds->header.members--;
                    set_bit(&dropped, slot);
                    continue;
                }
                activate(c, member);
            }
            member->share = member->next_share;
            share += member->share;
            team->slot[count++] = (u8)slot;
            active |= bit;
        }
        round->active.word[w] = active;
    }
    team->count = count;
    team->share = share;
    emit_members(c, EVENT_MEMBERS_DROPPED, round->round, &dropped);
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

static void emit_started(const struct context *c, const struct round *round) {
    struct event_round_started event;
    event.mark = EVENT_ROUND_STARTED;
    event.run = c->rounds->header.run;
    event.round = round->round;
    event.first_slot = round->first_slot;
    event.positions = round->positions;
    event.active = round->active;
    sol_memcpy_(event.range, round->range, sizeof event.range);
    sol_memcpy_(event.slice_count, round->slice_count, sizeof event.slice_count);
    emit(event);
}

void start_round(struct context *c) {
    adopt_config(c);
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
    emit_started(c, round);
}
