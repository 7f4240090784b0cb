/* authorize, revoke, delegate: who may join a run with a join authority. Accounts: the key that signs, run, members,
 * rounds, grant.
 *
 * A grant to nobody in particular (a zero grantee) opens the run to everybody until it is revoked. */
#include "events.h"

struct authorize_arguments {
    key grantee;
};

struct revoke_arguments {
    u32 eject;
    u32 reserved;
};

struct delegate_arguments {
    key key_;
    u32 remove;
    u32 reserved;
};

#define GRANT_ACCOUNT 4

static u64 find_delegate(const struct grant *grant, const key *key_) {
    for (u64 i = 0; i < grant->delegate_count; i++)
        if (same_key(&grant->delegate[i], key_)) return i;
    return MAX_DELEGATES;
}

/* Where the present authority's grant to a key lies, if there is one. */
void grant_address(const struct input *input, const struct context *c, const key *grantee, key *address) {
    slice name[2] = {{&c->rounds->header.run, 32}, {grantee, 32}};
    struct derivation from = {&c->run->join_authority, &input->program, name, 2, "grt"};
    derive_address(&from, address);
}

/* What lets the joining wallet in: a grant, behind its two keys and the run's accounts, or that none is needed. `most`:
 * so many members may come by it. */
u64 admit(const struct input *input, const struct context *c, key *address, u64 *most) {
    sol_memset_(address, 0, sizeof *address);
    *most = U64_MAX;
    if (zero_key(&c->run->join_authority)) return 0;
    require(input->account_count > GRANT_ACCOUNT + 1, NOT_PERMISSIONLESS);
    const struct account *account;
    check(open_grant(input, GRANT_ACCOUNT + 1, &account));
    const struct grant *grant = account->data;
    require(same_key(&grant->authority, &c->run->join_authority), NOT_AUTHORIZED);
    require(!is_banned(c->members, &grant->grantee), BANNED);
    const key *wallet = input->account[0].address;
    int named = zero_key(&grant->grantee) || same_key(&grant->grantee, wallet);
    require(named || find_delegate(grant, wallet) != MAX_DELEGATES, NOT_AUTHORIZED);
    *address = *account->address;
    if (!zero_key(&grant->grantee)) *most = 1 + MAX_DELEGATES; /* delegates that were removed may still be here */
    return 0;
}

static u64 check_authority(const struct input *input, const struct context *c) {
    require(same_key(&c->run->join_authority, input->account[0].address), NOT_AUTHORITY);
    return 0;
}

u64 authorize(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct authorize_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, 0, &c));
    require(c.run->phase != FINISHED, RUN_FINISHED);
    check(check_authority(input, &c));
    require(input->account_count > GRANT_ACCOUNT, MISSING_ACCOUNTS);
    const struct account *account = &input->account[GRANT_ACCOUNT];
    check(check_fresh(input, account, sizeof(struct grant)));
    const key *grantee = &((const struct authorize_arguments *)input->data)->grantee;
    /* one grant per grantee: one to revoke */
    key address;
    grant_address(input, &c, grantee, &address);
    require(same_key(&address, account->address), WRONG_ADDRESS);

    struct grant *grant = account->data;
    grant->discriminator = ACCOUNT_GRANT;
    grant->version = RECORD_VERSION;
    grant->run = *input->account[1].address;
    grant->authority = *input->account[0].address;
    grant->grantee = *grantee;
    grant->created_slot = c.slot;
    grant->run_slot = c.run->created_slot;
    struct event_key event = {EVENT_AUTHORIZED, grant->run, *grantee};
    emit(event);
    return 0;
}

/* The grant's lamports go back to the authority that made it, which may be the run's no more. */
u64 revoke(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct revoke_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const struct revoke_arguments *a = (const struct revoke_arguments *)input->data;
    require(a->eject <= 1 && a->reserved == 0, BAD_INSTRUCTION_DATA);
    const struct account *account;
    check(open_grant(input, GRANT_ACCOUNT, &account));
    const struct grant *grant = account->data;
    require(same_key(&grant->authority, input->account[0].address), NOT_AUTHORITY);
    int ejects = a->eject && c.run->phase != FINISHED;
    if (ejects) check(check_authority(input, &c));
    check(check_payable(account, &input->account[0]));

    bitmap out = {{0, 0, 0, 0}};
    for (u64 slot = 0; ejects && slot < MAX_MEMBERS; slot++) {
        const struct member *member = &c.members->member[slot];
        if (same_key(&member->grant, account->address) && can_eject(&c, slot)) set_bit(&out, slot);
    }
    eject(&c, &out);
    struct event_key event = {EVENT_REVOKED, grant->run, grant->grantee};
    close_account(account, &input->account[0]);
    publish(&c);
    emit(event);
    return 0;
}

u64 delegate(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct delegate_arguments), BAD_INSTRUCTION_DATA);
    check(open_run(input, 1, 0, &c));
    const struct delegate_arguments *a = (const struct delegate_arguments *)input->data;
    require(a->remove <= 1 && a->reserved == 0, BAD_INSTRUCTION_DATA);
    const struct account *account;
    check(open_grant(input, GRANT_ACCOUNT, &account));
    require(account->writable, ACCOUNT_NOT_WRITABLE);
    struct grant *grant = account->data;
    require(same_key(&grant->grantee, input->account[0].address), NOT_THE_GRANTEE);
    require(!zero_key(&a->key_), BAD_KEY);
    u64 place = find_delegate(grant, &a->key_);
    if (a->remove) {
        require(place != MAX_DELEGATES, NOT_A_DELEGATE);
        grant->delegate_count--;
        grant->delegate[place] = grant->delegate[grant->delegate_count];
        sol_memset_(&grant->delegate[grant->delegate_count], 0, sizeof(key));
        return 0;
    }
    require(place == MAX_DELEGATES, ALREADY_A_DELEGATE);
    require(grant->delegate_count < MAX_DELEGATES, DELEGATES_FULL);
    grant->delegate[grant->delegate_count++] = a->key_;
    return 0;
}
