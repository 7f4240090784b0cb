/* set_reward_rate, claim: lamports for credit. What the run account holds above its rent is there to be claimed;
 * anyone may add to it by an ordinary transfer. */
#include "events.h"

struct rate_arguments {
    u64 rate;
};

#define MAX_RATE 10000000000ull /* 10 SOL per million tokens: the product below stays within 64 bits */
#define MILLION 1000000
#define RECEIPT_ACCOUNT 4
#define ACCOUNT_OVERHEAD 128 /* bytes that rent counts on top of an account's data */
#define TWO_AS_FP64 0x4000000000000000ull
#define ONE_AS_FP64 0x3ff0000000000000ull

/* tokens x rate / 10^6, rounded down, for up to 2^48 tokens. */
u64 reward_of(u64 rate, u64 tokens) {
    if (!rate) return 0;
    return tokens / MILLION * rate + tokens % MILLION * rate / MILLION;
}

/* Accounts: owner (signer), run, members, rounds. Credit earned before keeps the reward it has. */
u64 set_reward_rate(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct rate_arguments), BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_ROUNDS, &c));
    u64 rate = ((const struct rate_arguments *)input->data)->rate;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(rate <= MAX_RATE, BAD_REWARD_RATE);
    c.run->reward_rate = rate;
    publish(&c);
    return 0;
}

/* Lamports that an account of `size` bytes has to keep. */
static u64 rent_of(u64 size, u64 *lamports) {
    struct { u64 per_byte_year; u64 years; u64 burn; } rent;
    require(sol_get_rent_sysvar(&rent) == 0, BUILTIN_UNSUPPORTED_SYSVAR);
    u64 years = rent.years == TWO_AS_FP64 ? 2 : rent.years == ONE_AS_FP64 ? 1 : 0;
    require(years, BUILTIN_UNSUPPORTED_SYSVAR);
    *lamports = (ACCOUNT_OVERHEAD + size) * rent.per_byte_year * years;
    return 0;
}

/* Accounts: wallet (signer), run, members, rounds, and a receipt to be paid for that instead of for the slot. */
u64 claim(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_RUN | WRITES_MEMBERS, &c));
    const struct account *wallet = &input->account[0], *vault = &input->account[1];
    u64 earned, *claimed;
    if (input->account_count > RECEIPT_ACCOUNT) {
        const struct account *account;
        check(open_receipt(input, RECEIPT_ACCOUNT, &account));
        struct receipt *receipt = account->data;
        require(same_key(&receipt->wallet, wallet->address), WRONG_RECEIPT);
        require(account->writable, ACCOUNT_NOT_WRITABLE);
        earned = receipt->reward;
        claimed = &receipt->reward_claimed;
    } else {
        u64 slot = find_member(c.members, wallet->address);
        require(slot != NO_MEMBER, NOT_A_MEMBER);
        struct member *member = &c.members->member[slot];
        earned = member->reward;
        claimed = &member->reward_claimed;
    }
    require(*claimed < earned, NOTHING_TO_CLAIM);
    u64 kept;
    check(rent_of(sizeof(struct run), &kept));
    require(*vault->lamports > kept, REWARDS_UNFUNDED);
    check(check_payable(vault, wallet));

    u64 paid = smaller(earned - *claimed, *vault->lamports - kept);
    *claimed += paid;
    c.run->reward_paid += paid;
    c.run->revision++;
    *vault->lamports -= paid;
    *wallet->lamports += paid;
    struct event_reward_paid event = {EVENT_REWARD_PAID, *vault->address, *wallet->address, paid};
    emit(event);
    return 0;
}
