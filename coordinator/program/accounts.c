/* Reading what the runtime hands to the program, and checking that it is a run of this program. */
#include "marks.h"
#include "program.h"

#define NOT_DUPLICATE 0xff
#define GROWTH_ROOM 10240 /* the runtime leaves this much behind every account's data */

/* Layout: account count; per account either the index of an earlier one, or flags, address, owner, lamports, data
 * length, data, room, rent epoch; then the instruction data with its length and the program's address, which may be
 * unaligned. */
u64 read_input(const u8 *raw, struct input *input, u64 *mark) {
    u64 count = *(const u64 *)raw;
    const u8 *at = raw + 8;
    for (u64 i = 0; i < count; i++) {
        u64 original = at[0];
        if (original != NOT_DUPLICATE) {
            if (i < MAX_ACCOUNTS) input->account[i] = input->account[original];
            at += 8;
            continue;
        }
        u64 length = *(const u64 *)(at + 80);
        if (i < MAX_ACCOUNTS) {
            struct account *account = &input->account[i];
            account->signer = at[1];
            account->writable = at[2];
            account->address = (const key *)(at + 8);
            account->owner = (const key *)(at + 40);
            account->length = length;
            account->data = (void *)(at + 88);
        }
        at += 88 + ((length + GROWTH_ROOM + 7) & ~7ull) + 8;
    }
    input->account_count = smaller(count, MAX_ACCOUNTS);
    u64 length = *(const u64 *)at;
    require(length >= 8, BAD_INSTRUCTION_DATA);
    *mark = *(const u64 *)(at + 8);
    input->data = at + 16;
    input->length = length - 8;
    input->program = *(const key *)(at + 8 + length);
    return 0;
}

static u64 check_account(const struct input *input, const struct account *account, u64 size, u64 mark) {
    require(same_key(account->owner, &input->program), WRONG_ACCOUNT_OWNER);
    require(account->length == size, WRONG_ACCOUNT_SIZE);
    const struct header *header = account->data; /* mark and version lie at the same place in all three */
    require(header->discriminator == mark, WRONG_ACCOUNT_TYPE);
    require(header->version == VERSION, WRONG_ACCOUNT_VERSION);
    return 0;
}

/* Accounts are: `signers` keys that must sign, then run, members, rounds. */
u64 open_run(const struct input *input, u64 signers, u64 writes, struct context *out) {
    require(input->account_count >= signers + 3, MISSING_ACCOUNTS);
    for (u64 i = 0; i < signers; i++) require(input->account[i].signer, MISSING_SIGNER);

    const struct account *run = &input->account[signers];
    const struct account *members = run + 1;
    const struct account *rounds = run + 2;
    check(check_account(input, run, sizeof(struct run), ACCOUNT_RUN));
    check(check_account(input, members, sizeof(struct members), ACCOUNT_MEMBERS));
    check(check_account(input, rounds, sizeof(struct rounds), ACCOUNT_ROUNDS));

    out->run = run->data;
    out->members = members->data;
    out->rounds = rounds->data;
    require(same_key(&out->run->members, members->address), ACCOUNT_MISMATCH);
    require(same_key(&out->run->rounds, rounds->address), ACCOUNT_MISMATCH);
    require(same_key(&out->members->run, run->address), ACCOUNT_MISMATCH);
    require(same_key(&out->rounds->header.run, run->address), ACCOUNT_MISMATCH);

    require(run->writable || !(writes & WRITES_RUN), ACCOUNT_NOT_WRITABLE);
    require(members->writable || !(writes & WRITES_MEMBERS), ACCOUNT_NOT_WRITABLE);
    require(rounds->writable || !(writes & WRITES_ROUNDS), ACCOUNT_NOT_WRITABLE);
    return read_slot(&out->slot);
}

u64 read_slot(u64 *slot) {
    u64 clock[5];
    require(sol_get_clock_sysvar(clock) == 0, BUILTIN_UNSUPPORTED_SYSVAR);
    *slot = clock[0];
    return 0;
}

/* The slot of a wallet, whatever its status; NO_MEMBER when it has none. A wallet has one slot at most. */
u64 find_member(const struct members *members, const key *wallet) {
    u64 first = wallet->word[0];
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        const struct member *member = &members->member[slot];
        if (member->wallet.word[0] != first || member->status == EMPTY) continue;
        if (same_key(&member->wallet, wallet)) return slot;
    }
    return NO_MEMBER;
}
