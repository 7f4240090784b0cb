/* commit and attest: what members say about a round. Accounts: wallet (signer), run, members, rounds. */
#include "counter.h"
#include "events.h"

struct commit_arguments {
    u32 round;
    u32 reserved;
    key digest;
    u64 length;
    u64 tokens;
    u64 fingerprint;
};

struct attest_arguments {
    u32 round;
    u32 reserved;
    bitmap members;
};

u64 commit(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct commit_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_ROUNDS, &c));
    const struct commit_arguments *a = (const struct commit_arguments *)input->data;
    require(a->reserved == 0, BAD_INSTRUCTION_DATA);
    const struct run *run = c.run;
    require(run->phase != FINISHED, RUN_FINISHED);
    require(run->phase == ROUND_TRAIN, WRONG_PHASE);
    require(a->round == run->round, WRONG_ROUND);
    u64 slot = find_member(c.members, input->account[0].address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    require(c.members->member[slot].status == ACTIVE, MEMBER_NOT_ACTIVE);
    struct round *round = entry_of(c.rounds, run->round);
    require(has_bit(&round->expected, slot), NOTHING_ASSIGNED);
    require(!has_bit(&round->committed, slot), ALREADY_COMMITTED);
    require(a->length == run->terms.update_bytes, WRONG_LENGTH);
    require(a->tokens <= (u64)round->slice_count[slot] * run->terms.sequence_length, TOO_MANY_TOKENS);

    set_bit(&round->committed, slot);
    round->committed_count++;
    round->digest[slot] = a->digest;
    round->length[slot] = a->length;
    round->tokens[slot] = a->tokens;
    round->fingerprint[slot] = a->fingerprint;
    round->commit_slot[slot] = c.slot;
    c.rounds->header.committed = round->committed_count;
    schedule(&c);

    struct event_committed event = {EVENT_COMMITTED, c.rounds->header.run, a->round,  (u32)slot,
                                    a->digest,       a->length,            a->tokens, a->fingerprint};
    emit(event);
    return 0;
}

static u64 find_witness(const struct round *round, u64 slot) {
    for (u64 i = 0; i < round->witness_count; i++)
        if (round->witness[i] == slot) return i;
    return MAX_WITNESSES;
}

u64 attest(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct attest_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_ROUNDS, &c));
    const struct attest_arguments *a = (const struct attest_arguments *)input->data;
    require(a->reserved == 0, BAD_INSTRUCTION_DATA);
    struct round *round = entry_of(c.rounds, a->round);
    require(round->state != ROUND_UNUSED && round->round == a->round, WRONG_ROUND);
    require(round->state != ROUND_OPEN, ROUND_NOT_CLOSED);
    require(round->state != ROUND_IS_FINAL, ROUND_FINAL);
    u64 slot = find_member(c.members, input->account[0].address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    require(may_attest(&c.members->member[slot]), MEMBER_NOT_ACTIVE);
    u64 witness = find_witness(round, slot);
    require(witness != MAX_WITNESSES, NOT_A_WITNESS);
    require(!(round->attested >> witness & 1), ALREADY_ATTESTED);
    bitmap members = a->members;
    for (u64 w = 0; w < 4; w++) require(!(members.word[w] & ~round->committed.word[w]), ATTESTED_UNCOMMITTED);

    round->attested |= 1u << witness;
    round->attested_count++;
    round->attestation[witness] = members;
    count_bitmap(round, &members);
    publish_attested(&c);
    schedule(&c);

    struct event_members event = {EVENT_ATTESTED, c.rounds->header.run, a->round, (u32)slot, members};
    emit(event);
    return 0;
}
