/* When the next tick is due. Every instruction that changes anything ends here, so that `due_slot` is always the first
 * slot at which `tick` succeeds and no client needs a copy of these rules. */
#include "counter.h"
#include "program.h"

/* A desynced witness has wrong weights, but what it says about bytes it holds is as good as before. */
int may_attest(const struct member *member) { return member->status == ACTIVE || member->status == DESYNCED; }

/* Nobody's inclusion can change any more: all witnesses have spoken, or what is missing cannot turn a member's fate.
 * Who was dropped or has left will not speak; the quorum stays that of the elected. */
int decided(const struct context *c, const struct round *round) {
    u64 quorum = two_thirds(round->witness_count), missing = 0;
    for (u64 w = 0; w < round->witness_count; w++)
        missing += !(round->attested >> w & 1) && may_attest(&c->members->member[round->witness[w]]);
    if (missing == 0) return 1;
    u64 reachable = quorum > missing ? quorum - missing : 0;
    u64 open = 0;
    for (u64 w = 0; w < 4; w++) {
        u64 can_reach = counts_at_least(round, w, reachable);
        u64 has_reached = counts_at_least(round, w, quorum);
        open |= round->eligible.word[w] & can_reach & ~has_reached;
    }
    return open == 0;
}

static u64 waiting_due(struct context *c) {
    const struct limits *l = &c->run->limits;
    struct header *h = &c->rounds->header;
    if (c->run->request) return c->slot;
    if (h->members < l->init_min_members) {
        h->grace_slot = UNKNOWN_SLOT;
        return UNKNOWN_SLOT;
    }
    if (h->grace_slot == UNKNOWN_SLOT) h->grace_slot = c->slot;
    return h->members >= l->max_members ? c->slot : saturating_add(h->grace_slot, l->join_grace);
}

static u64 warmup_due(const struct context *c) {
    const struct limits *l = &c->run->limits;
    const struct header *h = &c->rounds->header;
    if (c->run->request) return c->slot;
    return h->ready >= l->min_members && h->ready == h->members ? c->slot : saturating_add(c->run->phase_slot, l->warmup_time);
}

/* Positions in the slices of some members. */
static u64 positions_of(const struct round *round, const bitmap *members) {
    u64 positions = 0;
    for_each (slot, members) positions += round->slice_count[slot];
    return positions;
}

/* All have committed; or 2/3 have, and 1.5 times the median commit time and the grace are over; or the time is up. Half
 * and 2/3 are of the members and of the positions: many with little to do do not set the pace of those with much. */
static u64 train_due(struct context *c) {
    const struct limits *l = &c->run->limits;
    struct round *round = entry_of(c->rounds, c->run->round);
    u64 expected = round->expected_count, committed = round->committed_count;
    if (committed >= expected) return c->slot;
    u64 due = saturating_add(round->start_slot, l->max_round_train_time);
    if (2 * committed < expected) return due;
    bitmap done;
    for (u64 w = 0; w < 4; w++) done.word[w] = round->expected.word[w] & round->committed.word[w];
    u64 wanted = positions_of(round, &round->expected), have = positions_of(round, &done);
    if (round->median_elapsed == U32_MAX && 2 * have >= wanted)
        round->median_elapsed = (u32)smaller(c->slot - round->start_slot, U32_MAX - 1);
    if (committed >= two_thirds(expected) && have >= two_thirds(wanted)) {
        u64 patience = (3 * (u64)round->median_elapsed + 1) / 2 + l->adaptive_grace;
        due = smaller(due, saturating_add(round->start_slot, patience));
    }
    return due;
}

/* The inclusion set that the next step needs is decided, or the time is up. */
static u64 witness_due(const struct context *c) {
    const struct run *run = c->run;
    struct rounds *rounds = c->rounds;
    int open = 0;
    if (run->round > 0) {
        const struct round *previous = entry_of(rounds, run->round - 1);
        open = previous->state == ROUND_CLOSED && !decided(c, previous);
    }
    if (run->limits.overlap == 0 || rounds->header.drain) open |= !decided(c, entry_of(rounds, run->round));
    return open ? saturating_add(run->phase_slot, run->limits.round_witness_time) : c->slot;
}

void schedule(struct context *c) {
    struct header *h = &c->rounds->header;
    u64 due = UNKNOWN_SLOT;
    if (c->run->phase == WAITING_FOR_MEMBERS) due = waiting_due(c);
    if (c->run->phase == WARMUP) due = warmup_due(c);
    if (c->run->phase == ROUND_TRAIN) due = train_due(c);
    if (c->run->phase == ROUND_WITNESS) due = witness_due(c);
    if (c->run->phase == COOLDOWN)
        due = h->checkpoint_agreed ? c->slot : saturating_add(c->run->phase_slot, c->run->limits.cooldown_time);
    if (c->run->phase == PAUSED && c->run->request) due = c->slot;
    h->due_slot = due;
}
