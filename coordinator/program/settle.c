/* The end of a round: commitments close, then the inclusion set becomes final and its consequences follow. */
#include "counter.h"
#include "events.h"
#include "random.h"

void drop(struct context *c, u64 slot, bitmap *dropped) {
    become(c, &c->members->member[slot], DROPPED);
    set_bit(dropped, slot);
}

static void count_up(u8 *count) {
    if (*count < 255) ++*count;
}

/* One more of what max_missed bounds, for a member that still takes part. */
INLINE void blame(struct context *c, u64 slot, u8 *count, bitmap *dropped) {
    count_up(count);
    if (*count >= c->run->limits.max_missed && c->members->member[slot].status == ACTIVE) drop(c, slot, dropped);
}

void emit_members(const struct context *c, u64 mark, u32 round, const bitmap *members) {
    if (zero_key((const key *)members)) return;
    struct event_members event = {mark, c->rounds->header.run, round, 0, *members};
    emit(event);
}

/* Boyer and Moore's majority vote over the committed fingerprints, with the second pass that proves the majority. */
static int majority_fingerprint(const struct round *round, u64 *majority) {
    u64 candidate = 0, lead = 0, votes = 0;
    for_each (slot, &round->eligible) {
        u64 fingerprint = round->fingerprint[slot];
        if (lead == 0) candidate = fingerprint;
        lead = fingerprint == candidate ? lead + 1 : lead - 1;
    }
    for_each (slot, &round->eligible) votes += round->fingerprint[slot] == candidate;
    *majority = candidate;
    return 2 * votes > round->committed_count;
}

/* No more commitments: who is silent is counted, who trained on other weights than the majority is out of sync. */
void close_round(struct context *c) {
    const struct run *run = c->run;
    struct round *round = entry_of(c->rounds, run->round);
    bitmap dropped = {{0, 0, 0, 0}}, desynced = {{0, 0, 0, 0}};
    /* who was ejected is not expected any more, and what it has committed does not count */
    for (u64 w = 0; w < 4; w++) round->eligible.word[w] = round->committed.word[w] & round->expected.word[w];
    u64 majority;
    int known = majority_fingerprint(round, &majority);
    for_each (slot, &round->expected) {
        struct member *member = &c->members->member[slot];
        if (!has_bit(&round->committed, slot)) {
            /* no speed that its share promises: the others should not wait for so much again */
            if (member->share > 1) member->next_share = (u32)smaller(member->next_share, member->share / 2);
            blame(c, slot, &member->missed, &dropped);
            continue;
        }
        if (!has_bit(&round->eligible, slot)) continue;
        if (!known || round->fingerprint[slot] == majority) {
            member->missed = 0;
            continue;
        }
        clear_bit(&round->eligible, slot);
        /* It was there, and may load the run's weights again, unless it had missed too much before this. */
        int again = member->missed >= run->limits.max_missed;
        count_up(&member->missed);
        if (member->status != ACTIVE) continue;
        become(c, member, again ? DROPPED : DESYNCED);
        set_bit(again ? &dropped : &desynced, slot);
    }
    round->state = ROUND_CLOSED;
    round->close_slot = c->slot;
    emit_members(c, EVENT_MEMBERS_DROPPED, run->round, &dropped);
    emit_members(c, EVENT_MEMBERS_DESYNCED, run->round, &desynced);
}

/* Members with a quorum of attestations are in: they get their credit. The positions of all others come back. */
void finalize_round(struct context *c, struct round *round) {
    struct run *run = c->run;
    u64 quorum = two_thirds(round->witness_count), tokens = 0, any = 0;
    u64 rate = run->reward_rate, rewards = 0;
    int late = !decided(c, round);
    bitmap dropped = {{0, 0, 0, 0}};
    for (u64 w = 0; w < 4; w++)
        any |= round->included.word[w] = round->eligible.word[w] & counts_at_least(round, w, quorum);
    /* Enough witnesses have spoken: what they do not name they could not get, or it was malformed. Else nobody knows. */
    bitmap refused = {{0, 0, 0, 0}};
    for (u64 w = 0; round->attested_count >= quorum && w < 4; w++)
        refused.word[w] = round->eligible.word[w] & ~round->included.word[w];
    for_each (slot, &refused) blame(c, slot, &c->members->member[slot].excluded, &dropped);
    /* Witnesses that the round has waited for in vain, while a third did speak (when hardly anybody can, it is the
     * chain's fault). Whoever wants to stop a run by silence is out of it soon. */
    late &= 3 * round->attested_count >= round->witness_count;
    for (u64 w = 0; late && w < round->witness_count; w++) {
        u64 slot = round->witness[w];
        int silent = !(round->attested >> w & 1) && c->members->member[slot].status == ACTIVE;
        if (silent) blame(c, slot, &c->members->member[slot].excluded, &dropped);
    }
    for_each (slot, &round->included) {
        struct member *member = &c->members->member[slot];
        member->excluded = 0;
        member->updates_included++;
        u64 trained = round->tokens[slot], reward = reward_of(rate, trained);
        member->credit = saturating_add(member->credit, trained);
        member->reward = saturating_add(member->reward, reward);
        tokens += trained;
        rewards = saturating_add(rewards, reward);
    }
    run->reward_earned = saturating_add(run->reward_earned, rewards);
    run->tokens = saturating_add(run->tokens, tokens);
    round->state = ROUND_IS_FINAL;
    round->final_slot = c->slot;
    requeue_excluded(c, round);

    struct inclusion *kept = &run->inclusion[round->round % INCLUSION_RING];
    kept->round = round->round;
    kept->flags = any ? INCLUSION_PRESENT : INCLUSION_PRESENT | INCLUSION_VOID;
    kept->members = round->included;
    struct event_round_final event = {
        EVENT_ROUND_FINAL, c->rounds->header.run, round->round, !any, tokens, round->included};
    emit(event);
    emit_members(c, EVENT_MEMBERS_DROPPED, round->round, &dropped);
}

/* The next round's seed: who commits does not know the slot hash yet, who ticks cannot choose the commitments. */
void next_seed(struct context *c, const struct round *round) {
    mix_seed(&c->run->seed, round->digest, sizeof round->digest);
}

/* The header shows the attestations of the oldest round that waits for them. */
void publish_attested(struct context *c) {
    const struct run *run = c->run;
    const struct round *round = entry_of(c->rounds, run->round);
    if (run->round > 0) {
        const struct round *previous = entry_of(c->rounds, run->round - 1);
        if (previous->state == ROUND_CLOSED) round = previous;
    }
    c->rounds->header.attested = round->round == run->round || round->state == ROUND_CLOSED ? round->attested_count : 0;
}
