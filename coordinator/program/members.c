/* join, ready, leave: who takes part. Accounts: the keys that sign, then run, members, rounds. */
#include "events.h"

struct join_arguments {
    u32 share;
};

struct ready_arguments {
    key root;
};

INLINE int live(u64 status) { return status == PENDING || status == ACTIVE || status == DESYNCED; }

/* Where a joining wallet goes: back into its own slot, into an empty one, or into one that was given up without
 * credit. */
static u64 find_place(const struct members *members, const key *wallet, const key *node_key, u64 *place) {
    u64 empty = NO_MEMBER, given_up = NO_MEMBER, own = NO_MEMBER;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        const struct member *member = &members->member[slot];
        u64 status = member->status;
        if (status == EMPTY) {
            if (empty == NO_MEMBER) empty = slot;
            continue;
        }
        int own_wallet = same_key(&member->wallet, wallet), own_key = same_key(&member->node_key, node_key);
        if (own_wallet || own_key) require(status != STATUS_EJECTED, EJECTED);
        if (live(status)) {
            require(!own_wallet, ALREADY_A_MEMBER);
            require(!own_key, NODE_KEY_IN_USE);
            continue;
        }
        if (own_wallet) own = slot;
        int worthless = status != STATUS_EJECTED && !member->credit && !member->reward_claimed;
        if (worthless && given_up == NO_MEMBER) given_up = slot;
    }
    *place = own != NO_MEMBER ? own : empty != NO_MEMBER ? empty : given_up;
    return 0;
}

u64 join(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct join_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 2, WRITES_MEMBERS | WRITES_ROUNDS, &c));
    u32 share = ((const struct join_arguments *)input->data)->share;
    const key *wallet = input->account[0].address, *node_key = input->account[1].address;
    struct header *h = &c.rounds->header;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(c.run->phase == WAITING_FOR_MEMBERS || c.run->phase == WARMUP, WRONG_PHASE);
    require(zero_key(&c.run->join_authority), NOT_PERMISSIONLESS);
    require(share >= 1 && share <= MAX_SHARE, BAD_SHARE);
    u64 slot;
    check(find_place(c.members, wallet, node_key, &slot));
    require(h->members < c.run->limits.max_members && slot != NO_MEMBER, RUN_FULL);

    struct member *member = &c.members->member[slot];
    if (!same_key(&member->wallet, wallet)) {
        member->credit = 0;
        member->updates_included = 0;
        member->reward_claimed = 0;
    }
    member->wallet = *wallet;
    member->node_key = *node_key;
    member->share = share;
    member->next_share = share;
    member->joined_round = c.run->round;
    member->joined_slot = c.slot;
    member->status = PENDING;
    member->ready = 0;
    member->missed = 0;
    member->excluded = 0;
    h->members++;
    schedule(&c);

    struct event_member_joined event = {EVENT_MEMBER_JOINED, h->run, *wallet, *node_key, (u32)slot, share};
    emit(event);
    return 0;
}

/* In Warmup every pending member reports ready. Later a desynced member does, when it has loaded the checkpoint and
 * replayed the rounds since; it is active again from the next round, and its next fingerprint shows whether it spoke
 * the truth. */
u64 ready(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct ready_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const key *root = &((const struct ready_arguments *)input->data)->root;
    struct header *h = &c.rounds->header;
    u64 phase = c.run->phase;
    require(phase != FINISHED, RUN_FINISHED);
    require(phase == WARMUP || phase == ROUND_TRAIN || phase == ROUND_WITNESS || phase == COOLDOWN, WRONG_PHASE);
    u64 slot = find_member(c.members, input->account[0].address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    struct member *member = &c.members->member[slot];
    require(member->status == (phase == WARMUP ? PENDING : DESYNCED), MEMBER_NOT_ACTIVE);
    require(!member->ready, ALREADY_READY);
    require(same_key(root, &c.run->checkpoint_root), WRONG_MODEL_ROOT);

    member->ready = 1;
    if (phase == WARMUP) h->ready++;
    schedule(&c);

    struct event_member event = {EVENT_MEMBER_READY, h->run, c.run->round, (u32)slot};
    emit(event);
    return 0;
}

u64 leave(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_MEMBERS | WRITES_ROUNDS, &c));
    struct header *h = &c.rounds->header;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    u64 slot = find_member(c.members, input->account[0].address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    struct member *member = &c.members->member[slot];
    require(live(member->status), MEMBER_NOT_ACTIVE);

    if (member->status == ACTIVE) h->active--;
    if (c.run->phase == WARMUP && member->ready) h->ready--;
    h->members--;
    member->status = LEFT;
    member->ready = 0;
    if (c.run->phase == ROUND_TRAIN) {
        /* nobody waits for its commitment any more; one that it has made still counts */
        struct round *round = entry_of(c.rounds, c.run->round);
        if (has_bit(&round->expected, slot) && !has_bit(&round->committed, slot)) {
            clear_bit(&round->expected, slot);
            round->expected_count--;
        }
    }
    schedule(&c);

    struct event_member event = {EVENT_MEMBER_LEFT, h->run, c.run->round, (u32)slot};
    emit(event);
    return 0;
}
