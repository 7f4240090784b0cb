/* set_config, set_model: what the owner can change in a run that has begun. Accounts: owner (signer), run, members,
 * rounds. */
#include "events.h"

struct config_arguments {
    struct limits limits;
    key join_authority;
};

struct model_arguments {
    struct terms terms;
    struct course course;
};

static void announce_config(const struct context *c, u64 mark) {
    struct event_config event = {mark, c->rounds->header.run, c->run->round,
                                         c->run->config_version};
    emit(event);
}

/* Between two rounds: what set_config has left takes effect. */
void adopt_config(struct context *c) {
    struct run *run = c->run;
    if (!run->next_limits.batch) return;
    run->limits = run->next_limits;
    sol_memset_(&run->next_limits, 0, sizeof run->next_limits);
    run->config_version++;
    announce_config(c, EVENT_CONFIG_CHANGED);
}

/* New limits hold from the next round on, or at once while no round is open. A new join authority holds at once: it
 * concerns joins only. */
u64 set_config(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct config_arguments), BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_ROUNDS, &c));
    const struct config_arguments *a = (const struct config_arguments *)input->data;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    check(check_limits(&a->limits));

    c.run->join_authority = a->join_authority;
    c.run->next_limits = a->limits;
    if (c.run->phase != ROUND_TRAIN && c.run->phase != ROUND_WITNESS) {
        adopt_config(&c);
    } else {
        announce_config(&c, EVENT_CONFIG_REQUESTED);
    }
    publish(&c);
    return 0;
}

static int same_data(const struct terms *a, const struct terms *b) {
    return same_key(&a->data_manifest, &b->data_manifest) && a->samples == b->samples &&
           a->sequence_length == b->sequence_length;
}

/* Another model, other data or other optimizer settings, while nobody trains: all members warm up again. Other data
 * is begun from its first position. With the root of the last checkpoint, training goes on from there. */
u64 set_model(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct model_arguments), BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const struct model_arguments *a = (const struct model_arguments *)input->data;
    const struct terms *terms = &a->terms;
    struct run *run = c.run;
    struct header *h = &c.rounds->header;
    require(run->phase != FINISHED, RUN_FINISHED);
    require(run->phase == WAITING_FOR_MEMBERS || run->phase == PAUSED, WRONG_PHASE);
    check(check_terms(terms, &a->course));

    if (!same_data(terms, &run->terms)) {
        run->cursor = 0;
        h->requeue_head = 0;
        h->requeue_count = 0;
        h->requeued = 0;
    }
    run->checkpoint_root = terms->model_root;
    run->checkpoint_round = run->round;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) c.members->member[slot].ready = 0;
    h->ready = 0;
    run->terms = *terms;
    run->course = a->course;
    run->model_round = run->round;
    u64 total = run->limits.total_rounds;
    run->schedule_rounds = total > run->round ? (u32)(total - run->round) : 1;
    run->config_version++;
    if (run->phase == PAUSED) run->resume_phase = WAITING_FOR_MEMBERS;
    publish(&c);

    struct event_model_changed event = {EVENT_MODEL_CHANGED, h->run, run->round, run->config_version,
                                        terms->model_root, terms->data_manifest};
    emit(event);
    return 0;
}
