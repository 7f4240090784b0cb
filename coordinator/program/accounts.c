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
            account->lamports = (u64 *)(at + 72);
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

/* What every kind of account begins with. */
struct head {
    u64 discriminator;
    u32 version;
};

static u64 check_account(const struct input *input, const struct account *account, u64 size, u64 mark, u64 version) {
    require(same_key(account->owner, &input->program), WRONG_ACCOUNT_OWNER);
    require(account->length == size, WRONG_ACCOUNT_SIZE);
    const struct head *head = account->data;
    require(head->discriminator == mark, WRONG_ACCOUNT_TYPE);
    require(head->version == version, WRONG_ACCOUNT_VERSION);
    return 0;
}

/* Accounts are: `signers` keys that must sign, then run, members, rounds. */
u64 open_run(const struct input *input, u64 signers, u64 writes, struct context *out) {
    return open_version(input, signers, writes, VERSION, out);
}

u64 open_version(const struct input *input, u64 signers, u64 writes, u64 version, struct context *out) {
    require(input->account_count >= signers + 3, MISSING_ACCOUNTS);
    for (u64 i = 0; i < signers; i++) require(input->account[i].signer, MISSING_SIGNER);

    const struct account *run = &input->account[signers];
    const struct account *members = run + 1;
    const struct account *rounds = run + 2;
    check(check_account(input, run, sizeof(struct run), ACCOUNT_RUN, version));
    check(check_account(input, members, sizeof(struct members), ACCOUNT_MEMBERS, version));
    check(check_account(input, rounds, sizeof(struct rounds), ACCOUNT_ROUNDS, version));

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

/* The same, for the run's owner. */
u64 open_owned(const struct input *input, u64 writes, struct context *out) {
    check(open_run(input, 1, writes, out));
    require(same_key(&out->run->owner, input->account[0].address), NOT_OWNER);
    return 0;
}

/* A grant or a receipt, behind the run's three accounts. Which run it belongs to is up to the caller. */
static u64 check_record(const struct input *input, u64 index, u64 size, u64 mark, const struct account **out) {
    require(input->account_count > index, MISSING_ACCOUNTS);
    *out = &input->account[index];
    return check_account(input, *out, size, mark, RECORD_VERSION);
}

/* A run's address comes from its name, so the next run of that name has it, too: they differ in the slot. */
static u64 check_run_of_record(const struct input *input, u64 index, const key *run, u64 run_slot) {
    const struct account *account = &input->account[index - 3];
    require(same_key(run, account->address), ACCOUNT_MISMATCH);
    require(run_slot == ((const struct run *)account->data)->created_slot, ACCOUNT_MISMATCH);
    return 0;
}

u64 open_grant(const struct input *input, u64 index, const struct account **out) {
    check(check_record(input, index, sizeof(struct grant), ACCOUNT_GRANT, out));
    const struct grant *grant = (*out)->data;
    return check_run_of_record(input, index, &grant->run, grant->run_slot);
}

u64 open_receipt(const struct input *input, u64 index, const struct account **out) {
    check(check_record(input, index, sizeof(struct receipt), ACCOUNT_RECEIPT, out));
    const struct receipt *receipt = (*out)->data;
    return check_run_of_record(input, index, &receipt->run, receipt->run_slot);
}

/* An account that someone has just created for this program. */
u64 check_fresh(const struct input *input, const struct account *account, u64 size) {
    require(same_key(account->owner, &input->program), WRONG_ACCOUNT_OWNER);
    require(account->length == size, WRONG_ACCOUNT_SIZE);
    require(*(const u64 *)account->data == 0, ALREADY_INITIALIZED);
    require(account->writable, ACCOUNT_NOT_WRITABLE);
    return 0;
}

/* Whether lamports can move between the two, by this program's hand. */
u64 check_payable(const struct account *from, const struct account *to) {
    require(from->writable && to->writable, ACCOUNT_NOT_WRITABLE);
    require(!same_key(from->address, to->address), ACCOUNT_MISMATCH);
    return 0;
}

/* An account without lamports is gone at the end of the transaction; without its mark it is nothing until then. */
void close_account(const struct account *account, const struct account *heir) {
    sol_memset_(account->data, 0, account->length);
    *heir->lamports += *account->lamports;
    *account->lamports = 0;
}

#define STEM_BYTES 14
#define SEED_LENGTH (2 * STEM_BYTES + 3)

/* create_account_with_seed's address: SHA-256(base, seed, program), seed = hex of SHA-256(name)'s first 14 bytes and
 * a tag. */
void derive_address(const struct derivation *from, key *address) {
    key hash;
    sol_sha256(from->name, from->parts, (u8 *)&hash);
    const u8 *bytes = (const u8 *)&hash;
    u8 seed[SEED_LENGTH + 1];
    for (u64 i = 0; i < STEM_BYTES; i++) {
        u64 high = bytes[i] >> 4, low = bytes[i] & 15;
        seed[2 * i] = (u8)(high < 10 ? '0' + high : 'a' - 10 + high);
        seed[2 * i + 1] = (u8)(low < 10 ? '0' + low : 'a' - 10 + low);
    }
    for (u64 i = 0; i < 3; i++) seed[2 * STEM_BYTES + i] = (u8)from->tag[i];
    slice derived[3] = {{from->base, 32}, {seed, SEED_LENGTH}, {from->program, 32}};
    sol_sha256(derived, 3, (u8 *)address);
}

/* The base is the first signer. */
u64 check_address(const struct input *input, const struct account *account, const slice *name, u64 parts,
                  const char *tag) {
    struct derivation from = {input->account[0].address, &input->program, name, parts, tag};
    key address;
    derive_address(&from, &address);
    require(same_key(&address, account->address), WRONG_ADDRESS);
    return 0;
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
