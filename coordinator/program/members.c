/* join, ready, set_share, leave: who takes part. Accounts: the keys that sign, then run, members, rounds. */
#include "events.h"

struct join_arguments {
    u32 share;
    u32 reserved;
};

struct ready_arguments {
    key root;
};

void become(const struct context *c, struct member *member, u8 status) {
    member->status = status;
    member->status_slot = c->slot;
    member->ready = 0;
}

void activate(struct context *c, struct member *member) {
    become(c, member, ACTIVE);
    member->missed = 0;
    member->excluded = 0;
    c->rounds->header.active++;
}

/* A live member is one no more. */
static void retire(struct context *c, struct member *member, u8 status) {
    struct header *h = &c->rounds->header;
    if (member->status == ACTIVE) h->active--;
    if (stage_of(c->run) == WARMUP && member->ready) h->ready--;
    h->members--;
    become(c, member, status);
}

/* Nobody waits for this member's commitment any more. */
static void stop_expecting(struct round *round, u64 slot) {
    clear_bit(&round->expected, slot);
    round->expected_count--;
}

/* Who has left or was dropped cannot be put out any more, unless it has work that may still count. */
int can_eject(const struct context *c, u64 slot) {
    u64 status = c->members->member[slot].status;
    return live(status) || (status != EMPTY && status != STATUS_EJECTED && in_flight(c->rounds, slot));
}

/* Out at once, by the owner's hand: what it has committed in rounds that are not final does not count. Its slices come
 * back when those are final. */
u64 eject(struct context *c, u64 slot) {
    struct header *h = &c->rounds->header;
    struct member *member = &c->members->member[slot];
    require(can_eject(c, slot), MEMBER_NOT_ACTIVE);
    if (live(member->status)) {
        retire(c, member, STATUS_EJECTED);
    } else {
        become(c, member, STATUS_EJECTED);
    }
    for (u64 i = 0; i < ROUND_RING; i++) {
        struct round *round = &c->rounds->ring[i];
        clear_bit(&round->eligible, slot);
        if (round->state != ROUND_OPEN || !has_bit(&round->expected, slot)) continue;
        stop_expecting(round, slot);
        if (!has_bit(&round->committed, slot)) continue;
        round->committed_count--;
        h->committed = round->committed_count;
    }
    struct event_member event = {EVENT_MEMBER_EJECTED, h->run, c->run->round, (u32)slot};
    emit(event);
    return 0;
}

/* Where a joining wallet goes: back into its own slot, into an empty one, or into one that was given up without
 * credit and has no work in a round that is not final. `key_in_use`: another live member's node key. */
static u64 find_place(const struct context *c, const key *wallet, const key *node_key, u64 *place) {
    u64 empty = NO_MEMBER, given_up = NO_MEMBER, own = NO_MEMBER;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        const struct member *member = &c->members->member[slot];
        u64 status = member->status;
        if (status == EMPTY) {
            if (empty == NO_MEMBER) empty = slot;
            continue;
        }
        int own_wallet = same_key(&member->wallet, wallet), own_key = same_key(&member->node_key, node_key);
        if (own_wallet) {
            require(!live(status) || !own_key, ALREADY_A_MEMBER);
            own = slot;
        } else if (live(status)) {
            require(!own_key, NODE_KEY_IN_USE);
        } else if (given_up == NO_MEMBER && !member->credit && !member->reward && !in_flight(c->rounds, slot)) {
            given_up = slot;
        }
    }
    *place = own != NO_MEMBER ? own : empty != NO_MEMBER ? empty : given_up;
    return 0;
}

/* A round that is not final may still give this slot's member credit, or wait for what it says as a witness. */
int in_flight(const struct rounds *rounds, u64 slot) {
    for (u64 i = 0; i < ROUND_RING; i++) {
        const struct round *round = &rounds->ring[i];
        if ((round->state == ROUND_OPEN || round->state == ROUND_CLOSED) && has_bit(&round->active, slot)) return 1;
    }
    return 0;
}

static u64 check_share(const struct run *run, u64 share) {
    u64 most = run->limits.max_share ? run->limits.max_share : MAX_SHARE;
    require(share >= 1 && share <= most, BAD_SHARE);
    return 0;
}

/* Behind the usual accounts: the grant, where the run has a join authority. A live member that joins with another node
 * key goes on under that key, and nothing else changes. */
u64 join(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct join_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 2, WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const struct join_arguments *a = (const struct join_arguments *)input->data;
    require(a->reserved == 0, BAD_INSTRUCTION_DATA);
    const key *wallet = input->account[0].address, *node_key = input->account[1].address;
    struct header *h = &c.rounds->header;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(!is_banned(c.members, wallet) && !is_banned(c.members, node_key), BANNED);
    key grant;
    check(admit(input, &c, &grant));
    check(check_share(c.run, a->share));
    u64 slot;
    check(find_place(&c, wallet, node_key, &slot));
    require(slot != NO_MEMBER, RUN_FULL);
    struct member *member = &c.members->member[slot];
    int rotates = same_key(&member->wallet, wallet) && live(member->status);
    require(rotates || h->members < c.run->limits.max_members, RUN_FULL);

    if (!same_key(&member->wallet, wallet)) sol_memset_(member, 0, sizeof *member);
    member->wallet = *wallet;
    member->node_key = *node_key;
    member->grant = grant;
    member->next_share = a->share;
    if (!rotates) {
        member->share = a->share;
        member->joined_round = c.run->round;
        member->joined_slot = c.slot;
        member->missed = 0;
        member->excluded = 0;
        become(&c, member, PENDING);
        h->members++;
    }
    schedule(&c);

    struct event_member_joined event = {EVENT_MEMBER_JOINED, h->run, *wallet, *node_key, (u32)slot, a->share};
    emit(event);
    return 0;
}

/* In Warmup every pending member reports ready. In training a joiner does, or a desynced member, when it has loaded
 * the checkpoint and replayed the rounds since; it is active from the next round, and its first fingerprint shows
 * whether it spoke the truth. */
u64 ready(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct ready_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const key *root = &((const struct ready_arguments *)input->data)->root;
    struct header *h = &c.rounds->header;
    u64 stage = stage_of(c.run);
    require(stage != FINISHED, RUN_FINISHED);
    require(stage != WAITING_FOR_MEMBERS, WRONG_PHASE);
    u64 slot = find_member(c.members, input->account[0].address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    struct member *member = &c.members->member[slot];
    require(member->status == PENDING || member->status == DESYNCED, MEMBER_NOT_ACTIVE);
    require(!member->ready, ALREADY_READY);
    require(same_key(root, &c.run->checkpoint_root), WRONG_MODEL_ROOT);

    member->ready = 1;
    if (stage == WARMUP) h->ready++;
    schedule(&c);

    struct event_member event = {EVENT_MEMBER_READY, h->run, c.run->round, (u32)slot};
    emit(event);
    return 0;
}

/* How much of the batch a member can take, beside the others: from the next round on. */
u64 set_share(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct join_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_MEMBERS, &c));
    const struct join_arguments *a = (const struct join_arguments *)input->data;
    require(a->reserved == 0, BAD_INSTRUCTION_DATA);
    require(c.run->phase != FINISHED, RUN_FINISHED);
    u64 slot = find_member(c.members, input->account[0].address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    struct member *member = &c.members->member[slot];
    require(live(member->status), MEMBER_NOT_ACTIVE);
    check(check_share(c.run, a->share));

    member->next_share = a->share;
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

    retire(&c, member, LEFT);
    if (c.run->phase == ROUND_TRAIN) {
        /* a commitment that it has made still counts */
        struct round *round = entry_of(c.rounds, c.run->round);
        if (has_bit(&round->expected, slot) && !has_bit(&round->committed, slot)) stop_expecting(round, slot);
    }
    schedule(&c);

    struct event_member event = {EVENT_MEMBER_LEFT, h->run, c.run->round, (u32)slot};
    emit(event);
    return 0;
}
