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

/* Who has said that it is ready need not say it again. */
static void begin_warmup(struct context *c) {
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c->members->member[slot];
        if (live(member->status) && !(member->status == PENDING && member->ready)) become(c, member, PENDING);
    }
    enter(c, WARMUP);
}

static void wait_for_members(struct context *c) {
    c->rounds->header.grace_slot = UNKNOWN_SLOT;
    enter(c, WAITING_FOR_MEMBERS);
}

/* Too few were ready in time. Who has had the whole time makes room; who came late stays. */
static void give_up_warmup(struct context *c) {
    bitmap dropped = {{0, 0, 0, 0}};
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c->members->member[slot];
        int overdue = c->slot - member->status_slot >= c->run->limits.warmup_time;
        if (member->status != PENDING || member->ready || !overdue) continue;
        drop(c, slot, &dropped);
    }
    emit_members(c, EVENT_MEMBERS_DROPPED, c->run->round, &dropped);
    wait_for_members(c);
}

/* The round's start makes members that are ready active. */
static void begin_training(struct context *c) {
    if (c->run->round >= c->run->limits.total_rounds) { /* lowered meanwhile */
        enter(c, FINISHED);
        return;
    }
    c->run->epoch_round = c->run->round;
    start_round(c);
    enter(c, ROUND_TRAIN);
}

static void end_warmup(struct context *c) {
    if (c->rounds->header.ready < c->run->limits.min_members) {
        give_up_warmup(c);
    } else {
        restart_clocks(c); /* others stay pending: they can be ready later */
        begin_training(c);
    }
}

/* For another round, in which those who are ready take part. */
static int enough_members(const struct context *c) {
    const struct header *h = &c->rounds->header;
    return h->active + h->ready >= c->run->limits.min_members;
}

/* No further round may start before a cooldown. */
static int epoch_ends(const struct context *c) {
    const struct run *run = c->run;
    const struct limits *next = run->next_limits.batch ? &run->next_limits : &run->limits;
    u64 done = (u64)run->round + 1;
    /* with another overlap, rounds become final at another time: not while two of them are open */
    return run->request || next->overlap != run->limits.overlap || done >= next->total_rounds ||
           done - run->epoch_round >= run->limits.rounds_per_epoch || !enough_members(c);
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
    adopt_config(c);
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

static void pause_now(struct context *c, u8 resume_phase) {
    c->run->request = REQUEST_NONE;
    c->run->resume_phase = resume_phase;
    enter(c, PAUSED);
}

/* Where the run goes when nothing holds it up: after a cooldown, or out of a pause. */
void go_on(struct context *c, u64 phase) {
    if (phase == WARMUP) {
        enter(c, WARMUP);
    } else if (phase == ROUND_TRAIN && enough_members(c)) {
        begin_training(c);
    } else {
        wait_for_members(c);
    }
}

static void end_cooldown(struct context *c) {
    struct run *run = c->run;
    struct header *h = &c->rounds->header;
    if (h->checkpoint_agreed || agree(c)) { /* others may have left since the last vote */
        run->checkpoint_root = h->checkpoint_root;
        run->checkpoint_round = h->checkpoint_round;
    }
    if (run->round >= run->limits.total_rounds || run->request == REQUEST_FINISH) {
        enter(c, FINISHED);
        return;
    }
    run->epoch++;
    if (run->request == REQUEST_PAUSE) {
        pause_now(c, ROUND_TRAIN);
    } else {
        go_on(c, ROUND_TRAIN);
    }
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
    int idle = phase == WAITING_FOR_MEMBERS || phase == WARMUP || phase == PAUSED;
    if (idle && run->request == REQUEST_FINISH) {
        enter(&c, FINISHED);
    } else if (idle && run->request == REQUEST_PAUSE) {
        pause_now(&c, (u8)phase);
    } else {
        if (phase == WAITING_FOR_MEMBERS) begin_warmup(&c);
        if (phase == WARMUP) end_warmup(&c);
        if (phase == ROUND_TRAIN) end_commits(&c);
        if (phase == ROUND_WITNESS) end_witnessing(&c);
        if (phase == COOLDOWN) end_cooldown(&c);
    }
    publish(&c);
    return 0;
}

/* Every change of the run account ends here: what the header and the counters say follows from it. */
void publish(struct context *c) {
    struct run *run = c->run;
    struct header *h = &c->rounds->header;
    run->revision++;
    run->member_count = h->members;
    run->active_count = h->active;
    h->phase = run->phase;
    h->round = run->round;
    publish_attested(c);
    schedule(c);
}
