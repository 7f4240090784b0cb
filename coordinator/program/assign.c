/* The start of a round: its positions, everybody's slice of them, its witnesses. */
#include "events.h"
#include "random.h"

/* The members that take part, in slot order. */
struct team {
    u64 count;
    u64 share;
    u8 slot[MAX_MEMBERS];
    u32 share_of[MAX_MEMBERS]; /* by slot */
};

/* A member gets the share that it asks for. More than it had it gets by doubling, and only in good standing. */
static u32 next_share(const struct member *member, u64 most) {
    u64 asked = smaller(member->next_share, most), had = member->share;
    if (asked <= had) return (u32)asked;
    return (u32)(member->missed || member->excluded ? had : smaller(asked, 2 * had));
}

/* A newcomer gets no more than the mean of the others: what it can do has to show. */
static void settle_newcomers(const struct context *c, struct team *team, const bitmap *newcomers, u64 established) {
    u64 mean = established ? team->share / established : MAX_SHARE;
    u64 most = smaller(share_limit(c->run), mean);
    for_each (slot, newcomers) {
        struct member *member = &c->members->member[slot];
        u64 share = smaller(member->next_share, most);
        member->share = team->share_of[slot] = (u32)share;
        team->share += share;
    }
}

/* Collect the active members. One that has joined or re-synced and reported ready is active from here on; one that has
 * had the time of a warm-up for it and is not ready gives its place up. */
static void gather(struct context *c, struct round *round, struct team *team) {
    u64 count = 0, share = 0, established = 0, most = share_limit(c->run);
    bitmap dropped = {{0, 0, 0, 0}}, newcomers = {{0, 0, 0, 0}};
    struct member *member = c->members->member;
    for (u64 w = 0; w < 4; w++) {
        u64 active = 0;
        for (u64 slot = 64 * w, bit = 1; bit; slot++, bit <<= 1, member++) {
            u64 status = member->status;
            if (status != ACTIVE) {
                if (status != PENDING && status != DESYNCED) continue;
                if (!member->ready) {
                    if (c->slot - member->status_slot <= c->run->limits.warmup_time) continue;
                    drop(c, slot, &dropped);
                    continue;
                }
                become(c, member, ACTIVE);
            }
            active |= bit;
            team->slot[count++] = (u8)slot;
            u64 had = member->share;
            if (!had) {
                newcomers.word[w] |= bit;
                continue;
            }
            if (had != member->next_share || had > most) member->share = (u32)(had = next_share(member, most));
            team->share_of[slot] = (u32)had;
            share += had;
            established++;
        }
        round->active.word[w] = active;
    }
    team->count = count;
    team->share = share;
    settle_newcomers(c, team, &newcomers, established);
    emit_members(c, EVENT_MEMBERS_DROPPED, round->round, &dropped);
}

/* Slices are contiguous, from the rotated first member on. Everybody gets one position, where there are enough: who has
 * nothing to do could stay for ever without doing anything. The others follow the shares: the slices end at
 * floor(others x cumulative share / total share), and their sum is exact. */
static void cut_slices(struct round *round, const struct team *team, u64 first) {
    u64 total = team->share, cumulative = 0, offset = 0, empty = 0;
    u64 least = round->positions >= team->count, others = round->positions - (least ? team->count : 0);
    round->assigned = round->active;
    for (u64 i = 0, at = first; i < team->count; i++) {
        u64 slot = team->slot[at];
        if (++at == team->count) at = 0;
        cumulative += team->share_of[slot];
        u64 end = least * (i + 1) + others * cumulative / total;
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

/* A crowded queue: every range of the round goes to one member. */
static void give_ranges(struct round *round, const struct team *team, u64 first) {
    u64 offset = 0;
    for (u64 i = 0, at = first; i < round->range_count; i++) {
        u64 slot = team->slot[at];
        if (++at == team->count) at = 0;
        set_bit(&round->assigned, slot);
        round->slice_offset[slot] = (u32)offset;
        round->slice_count[slot] = (u32)round->range[i].count;
        offset += round->range[i].count;
    }
    round->expected_count = round->range_count;
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
        cut_slices(round, &team, first);
    } else {
        give_ranges(round, &team, first);
    }
    round->expected = round->assigned;
    elect_witnesses(round, &team, run->limits.witnesses, &random);
    c->rounds->header.committed = 0;
    c->rounds->header.drain = 0;
    emit_started(c, round);
}
