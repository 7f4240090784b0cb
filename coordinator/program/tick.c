/* tick: make the transition that is due. Anyone may; accounts: payer (signer), run, members, rounds. */
#include "events.h"

static void enter(struct context *c, u8 phase) {
    struct run *run = c->run;
    run->phase = phase;
    run->phase_slot = c->slot;
    struct event_phase_changed event = {
        EVENT_PHASE_CHANGED, c->rounds->header.run, c->slot, phase, run->round, run->epoch, 0};
    emit(event);
}

static void begin_warmup(struct context *c) {
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c->members->member[slot];
        if (member->status != ACTIVE && member->status != DESYNCED) continue;
        member->status = PENDING;
        member->ready = 0;
    }
    c->rounds->header.active = 0;
    c->rounds->header.ready = 0;
    enter(c, WARMUP);
}

/* Members that are not ready by now stay pending: they can be ready in the next warm-up. */
static void begin_training(struct context *c) {
    struct header *h = &c->rounds->header;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c->members->member[slot];
        if (member->status != PENDING || !member->ready) continue;
        member->status = ACTIVE;
        member->ready = 0;
        member->missed = 0;
        member->excluded = 0;
        h->active++;
    }
    h->ready = 0;
    c->run->epoch_round = c->run->round;
    start_round(c);
    enter(c, ROUND_TRAIN);
}

/* No further round may start before a cooldown. */
static int epoch_ends(const struct context *c) {
    const struct run *run = c->run;
    u64 done = (u64)run->round + 1;
    return done >= run->limits.total_rounds || done - run->epoch_round >= run->limits.rounds_per_epoch ||
           c->rounds->header.active < run->limits.min_members;
}

static void end_commits(struct context *c) {
    close_round(c);
    c->rounds->header.drain = (u8)epoch_ends(c);
    enter(c, ROUND_WITNESS);
}

static void begin_cooldown(struct context *c) {
    struct header *h = &c->rounds->header;
    h->drain = 0;
    h->committed = 0;
    h->checkpoint_agreed = 0;
    h->checkpoint_votes = 0;
    for (u64 w = 0; w < 4; w++) h->checkpoint_voted.word[w] = 0;
    enter(c, COOLDOWN);
}

/* Leave RoundWitness r: round r-1 becomes final, and round r too without overlap or when it is the last before a
 * cooldown. */
static void end_witnessing(struct context *c) {
    struct run *run = c->run;
    struct header *h = &c->rounds->header;
    struct round *round = entry_of(c->rounds, run->round);
    if (run->round > 0) {
        struct round *previous = entry_of(c->rounds, run->round - 1);
        if (previous->state == ROUND_CLOSED) finalize_round(c, previous);
    }
    h->drain |= (u8)epoch_ends(c); /* members may have left or been dropped since the commits closed */
    if (run->limits.overlap == 0 || h->drain) {
        int late = c->slot >= saturating_add(run->phase_slot, run->limits.round_witness_time);
        if (!late && !decided(c, round)) return; /* found out only now that this round must drain: stay for it */
        finalize_round(c, round);
    }
    int ends = h->drain || epoch_ends(c);
    run->final_rounds = round->state == ROUND_IS_FINAL ? run->round + 1 : run->round;
    next_seed(c, round);
    run->round++;
    if (ends) {
        begin_cooldown(c);
    } else {
        start_round(c);
        enter(c, ROUND_TRAIN);
    }
}

static void end_cooldown(struct context *c) {
    struct run *run = c->run;
    struct header *h = &c->rounds->header;
    if (h->checkpoint_agreed) {
        run->checkpoint_root = h->checkpoint_root;
        run->checkpoint_round = h->checkpoint_round;
    }
    if (run->round >= run->limits.total_rounds) {
        enter(c, FINISHED);
        return;
    }
    run->epoch++;
    if (h->active < run->limits.min_members) {
        h->grace_slot = UNKNOWN_SLOT;
        enter(c, WAITING_FOR_MEMBERS);
        return;
    }
    run->epoch_round = run->round;
    start_round(c);
    enter(c, ROUND_TRAIN);
}

u64 tick(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, &c));
    struct run *run = c.run;
    struct header *h = &c.rounds->header;
    require(run->phase != FINISHED, RUN_FINISHED);
    require(h->due_slot != UNKNOWN_SLOT && c.slot >= h->due_slot, NOT_DUE);

    u64 phase = run->phase;
    if (phase == WAITING_FOR_MEMBERS) begin_warmup(&c);
    if (phase == WARMUP) begin_training(&c);
    if (phase == ROUND_TRAIN) end_commits(&c);
    if (phase == ROUND_WITNESS) end_witnessing(&c);
    if (phase == COOLDOWN) end_cooldown(&c);

    run->revision++;
    run->member_count = h->members;
    run->active_count = h->active;
    h->phase = run->phase;
    h->round = run->round;
    publish_attested(&c);
    schedule(&c);
    return 0;
}
