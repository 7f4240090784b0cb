/* checkpoint: members report the model root that they reached, in Cooldown. Accounts: wallet (signer), run, members,
 * rounds. */
#include "events.h"

struct checkpoint_arguments {
    u32 round;
    u32 reserved;
    key root;
};

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
    u64 same = 0;
    for_each (voter, &h->checkpoint_voted)
        same += c.members->member[voter].status == ACTIVE && same_key(&c.rounds->vote[voter], &a->root);
    if (!h->checkpoint_agreed && same >= two_thirds(h->active)) {
        /* the next tick, due at once, carries it into the run account */
        h->checkpoint_agreed = 1;
        h->checkpoint_root = a->root;
        h->checkpoint_round = a->round;
        struct event_checkpoint_agreed event = {EVENT_CHECKPOINT_AGREED, h->run, a->round, (u32)same, a->root};
        emit(event);
    }
    schedule(&c);
    return 0;
}
