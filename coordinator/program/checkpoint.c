/* checkpoint: members report the model root that they reached, in Cooldown. Accounts: wallet (signer), run, members,
 * rounds. */
#include "events.h"

struct checkpoint_arguments {
    u32 round;
    u32 reserved;
    key root;
};

/* Two thirds of the active members name one root: it becomes the header's. Boyer and Moore's candidate, then a count. */
int agree(struct context *c) {
    struct header *h = &c->rounds->header;
    bitmap voters = {{0, 0, 0, 0}};
    const key *candidate = NULL;
    u64 lead = 0, same = 0;
    for_each (voter, &h->checkpoint_voted) {
        if (c->members->member[voter].status != ACTIVE) continue;
        const key *vote = &c->rounds->vote[voter];
        set_bit(&voters, voter);
        if (lead == 0) candidate = vote;
        lead = same_key(vote, candidate) ? lead + 1 : lead - 1;
    }
    if (!candidate) return 0;
    for_each (voter, &voters) same += same_key(&c->rounds->vote[voter], candidate);
    if (same < two_thirds(h->active)) return 0;
    h->checkpoint_agreed = 1;
    h->checkpoint_root = *candidate;
    h->checkpoint_round = c->run->final_rounds;
    struct event_checkpoint_agreed event = {EVENT_CHECKPOINT_AGREED, h->run, h->checkpoint_round, (u32)same, *candidate};
    emit(event);
    return 1;
}

u64 checkpoint(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct checkpoint_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_ROUNDS, &c));
    const struct checkpoint_arguments *a = (const struct checkpoint_arguments *)input->data;
    require(a->reserved == 0, BAD_INSTRUCTION_DATA);
    struct header *h = &c.rounds->header;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(c.run->phase == COOLDOWN, WRONG_PHASE);
    require(a->round == c.run->final_rounds, WRONG_ROUND);
    u64 slot = find_member(c.members, input->account[0].address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    require(c.members->member[slot].status == ACTIVE, MEMBER_NOT_ACTIVE);
    require(!has_bit(&h->checkpoint_voted, slot), ALREADY_VOTED);

    set_bit(&h->checkpoint_voted, slot);
    c.rounds->vote[slot] = a->root;
    h->checkpoint_votes++;
    /* the next tick, due at once, carries it into the run account */
    if (!h->checkpoint_agreed && h->checkpoint_votes >= two_thirds(h->active)) agree(&c);
    schedule(&c);
    return 0;
}
