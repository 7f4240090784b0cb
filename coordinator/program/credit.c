/* archive, restore, reclaim: slots are given to others, and credit stays. Accounts: the key that signs, run, members,
 * rounds, receipt.
 *
 * Anyone may move what a member that is gone has earned into a receipt, an account of its own, and so make room for a
 * joiner. The member gets it back into its slot when it has one again. */
#include "events.h"

struct archive_arguments {
    u32 slot;
    u32 reserved;
};

#define RECEIPT_ACCOUNT 4

u64 archive(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct archive_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_MEMBERS, &c));
    const struct archive_arguments *a = (const struct archive_arguments *)input->data;
    require(a->reserved == 0 && a->slot < MAX_MEMBERS, BAD_INSTRUCTION_DATA);
    require(c.run->phase != FINISHED, RUN_FINISHED);
    struct member *member = &c.members->member[a->slot];
    require(!live(member->status) && !in_flight(c.rounds, a->slot), SLOT_IN_USE);
    require(member->credit || member->reward, NOTHING_TO_ARCHIVE);
    require(input->account_count > RECEIPT_ACCOUNT, MISSING_ACCOUNTS);
    const struct account *account = &input->account[RECEIPT_ACCOUNT];
    check(check_fresh(input, account, sizeof(struct receipt)));

    struct receipt *receipt = account->data;
    receipt->discriminator = ACCOUNT_RECEIPT;
    receipt->version = RECORD_VERSION;
    receipt->run = *input->account[1].address;
    receipt->wallet = member->wallet;
    receipt->payer = *input->account[0].address;
    receipt->credit = member->credit;
    receipt->updates_included = member->updates_included;
    receipt->reward = member->reward;
    receipt->reward_claimed = member->reward_claimed;
    receipt->archived_slot = c.slot;
    receipt->run_slot = c.run->created_slot;
    c.members->archived_credit += member->credit;
    c.members->archived_members++;
    struct event_credit event = {EVENT_MEMBER_ARCHIVED, receipt->run,    receipt->wallet, *account->address,
                                 receipt->credit,       a->slot,         0};
    sol_memset_(member, 0, sizeof *member);
    emit(event);
    return 0;
}

/* Behind the receipt: who paid for it, and gets its lamports back. */
u64 restore(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_MEMBERS, &c));
    const struct account *account, *wallet = &input->account[0];
    check(open_receipt(input, RECEIPT_ACCOUNT, &account));
    const struct receipt *receipt = account->data;
    require(same_key(&receipt->wallet, wallet->address), WRONG_RECEIPT);
    u64 slot = find_member(c.members, wallet->address);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    require(input->account_count > RECEIPT_ACCOUNT + 1, MISSING_ACCOUNTS);
    const struct account *payer = &input->account[RECEIPT_ACCOUNT + 1];
    require(same_key(&receipt->payer, payer->address), ACCOUNT_MISMATCH);
    check(check_payable(account, payer));

    struct member *member = &c.members->member[slot];
    member->credit += receipt->credit;
    member->updates_included += receipt->updates_included;
    member->reward += receipt->reward;
    member->reward_claimed += receipt->reward_claimed;
    c.members->archived_credit -= receipt->credit;
    c.members->archived_members--;
    struct event_credit event = {EVENT_MEMBER_RESTORED, receipt->run, receipt->wallet, *account->address,
                                 receipt->credit,       (u32)slot,    0};
    close_account(account, payer);
    emit(event);
    return 0;
}

/* What is left of a run that was closed: the lamports of a receipt go back to who paid for it, those of a grant to the
 * authority. Accounts: that key (signer), the run's address, the grant or receipt. */
u64 reclaim(const struct input *input) {
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    require(input->account_count >= 3, MISSING_ACCOUNTS);
    const struct account *heir = &input->account[0], *run = &input->account[1], *record = &input->account[2];
    require(heir->signer, MISSING_SIGNER);
    require(same_key(record->owner, &input->program), WRONG_ACCOUNT_OWNER);
    const struct grant *grant = record->data;
    const struct receipt *receipt = record->data;
    int grants = record->length == sizeof *grant && grant->discriminator == ACCOUNT_GRANT;
    int receipts = record->length == sizeof *receipt && receipt->discriminator == ACCOUNT_RECEIPT;
    require(grants || receipts, WRONG_ACCOUNT_TYPE);
    require(same_key(grants ? &grant->run : &receipt->run, run->address), ACCOUNT_MISMATCH);
    const struct run *now = run->data;
    int exists = run->length == sizeof *now && same_key(run->owner, &input->program) && now->discriminator;
    require(!exists || now->created_slot != (grants ? grant->run_slot : receipt->run_slot), NOT_CLOSED);
    require(same_key(grants ? &grant->authority : &receipt->payer, heir->address), NOT_OWNER);
    check(check_payable(record, heir));
    close_account(record, heir);
    return 0;
}
