/* join, ready, set_share, leave: who takes part. Accounts: the keys that sign, then run, members, rounds. */
#include "events.h"

/* join, set_share */
struct share_arguments {
    u32 share;
    u32 reserved;
};

struct ready_arguments {
    key root;
};

/* The header's counts follow. Who is no live member any more is not ready for anything. */
void become(struct context *c, struct member *member, u8 status) {
    struct header *h = &c->rounds->header;
    if (live(member->status)) h->members--;
    if (member->status == ACTIVE) h->active--;
    if (member->ready) h->ready--;
    if (live(status)) h->members++;
    if (status == ACTIVE) h->active++;
    member->status = status;
    member->status_slot = c->slot;
    member->ready = 0;
}

/* Who is not ready yet has the time of a whole warm-up, from now on. */
void restart_clocks(struct context *c) {
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c->members->member[slot];
        if (live(member->status) && member->status != ACTIVE) member->status_slot = c->slot;
    }
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

/* Out at once, by the owner's hand: what they have committed in rounds that are not final does not count. Their slices
 * come back when those are final. */
void eject(struct context *c, const bitmap *members) {
    struct header *h = &c->rounds->header;
    for_each (slot, members) become(c, &c->members->member[slot], STATUS_EJECTED);
    for (u64 i = 0; i < ROUND_RING; i++) {
        struct round *round = &c->rounds->ring[i];
        for (u64 w = 0; w < 4; w++) {
            u64 out = members->word[w];
            round->eligible.word[w] &= ~out;
            if (round->state != ROUND_OPEN) continue;
            out &= round->expected.word[w];
            round->expected.word[w] &= ~out;
            round->expected_count -= (u32)count_bits(out);
            round->committed_count -= (u32)count_bits(out & round->committed.word[w]);
            h->committed = round->committed_count;
        }
    }
    emit_members(c, EVENT_MEMBERS_EJECTED, c->run->round, members);
}

/* Where a joining wallet goes: back into its own slot, into an empty one, or into one that was given up without
 * credit and has no work in a round that is not final. */
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
    require(share >= 1 && share <= share_limit(run), BAD_SHARE);
    return 0;
}

/* Live members that one grant has let in. */
static u64 members_under(const struct members *members, const key *grant) {
    u64 count = 0;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        const struct member *member = &members->member[slot];
        count += same_key(&member->grant, grant) && live(member->status);
    }
    return count;
}

/* Behind the usual accounts: the grant, where the run has a join authority. A live member that joins with another node
 * key goes on under that key, and nothing else changes. */
u64 join(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct share_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 2, WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const struct share_arguments *a = (const struct share_arguments *)input->data;
    require(a->reserved == 0, BAD_INSTRUCTION_DATA);
    const key *wallet = input->account[0].address, *node_key = input->account[1].address;
    struct header *h = &c.rounds->header;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(!is_banned(c.members, wallet) && !is_banned(c.members, node_key), BANNED);
    key grant;
    u64 most;
    check(admit(input, &c, &grant, &most));
    check(check_share(c.run, a->share));
    u64 slot;
    check(find_place(&c, wallet, node_key, &slot));
    require(slot != NO_MEMBER, RUN_FULL);
    struct member *member = &c.members->member[slot];
    int rotates = same_key(&member->wallet, wallet) && live(member->status);
    require(rotates || h->members < c.run->limits.max_members, RUN_FULL);
    require(rotates || members_under(c.members, &grant) < most, GRANT_FULL);

    if (!same_key(&member->wallet, wallet)) sol_memset_(member, 0, sizeof *member);
    member->wallet = *wallet;
    member->node_key = *node_key;
    member->grant = grant;
    member->next_share = a->share;
    if (!rotates) {
        /* what it owes from an earlier time (missed, excluded, a halved share) it still owes */
        member->joined_round = c.run->round;
        member->joined_slot = c.slot;
        become(&c, member, PENDING);
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
    h->ready++;
    schedule(&c);

    struct event_member event = {EVENT_MEMBER_READY, h->run, c.run->round, (u32)slot};
    emit(event);
    return 0;
}

/* How much of the batch a member can take, beside the others: from the next round on. */
u64 set_share(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct share_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_MEMBERS, &c));
    const struct share_arguments *a = (const struct share_arguments *)input->data;
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

    become(&c, member, LEFT);
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
