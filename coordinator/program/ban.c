/* ban: keys that may take no part, as wallet, as node key or as the grantee of an authorization. Accounts: owner
 * (signer), run, members, rounds. */
#include "program.h"

struct ban_arguments {
    key key_;
    u32 lift;
    u32 reserved;
};

static u64 find_banned(const struct members *members, const key *key_) {
    for (u64 i = 0; i < members->banned_count; i++)
        if (same_key(&members->banned[i], key_)) return i;
    return MAX_BANNED;
}

int is_banned(const struct members *members, const key *key_) { return find_banned(members, key_) != MAX_BANNED; }

u64 ban(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct ban_arguments), BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const struct ban_arguments *a = (const struct ban_arguments *)input->data;
    require(a->lift <= 1 && a->reserved == 0, BAD_INSTRUCTION_DATA);
    struct members *members = c.members;
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(!zero_key(&a->key_), BAD_KEY);
    u64 place = find_banned(members, &a->key_);
    if (a->lift) {
        require(place != MAX_BANNED, NOT_BANNED);
        members->banned_count--;
        members->banned[place] = members->banned[members->banned_count];
        sol_memset_(&members->banned[members->banned_count], 0, sizeof(key));
        return 0;
    }
    require(place == MAX_BANNED, ALREADY_BANNED);
    require(members->banned_count < MAX_BANNED, BAN_LIST_FULL);

    members->banned[members->banned_count++] = a->key_;
    key grant;
    grant_address(input, &c, &a->key_, &grant);
    bitmap out = {{0, 0, 0, 0}};
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        const struct member *member = &members->member[slot];
        int has_it = same_key(&member->wallet, &a->key_) || same_key(&member->node_key, &a->key_) ||
                     same_key(&member->grant, &grant);
        if (has_it && can_eject(&c, slot)) set_bit(&out, slot);
    }
    eject(&c, &out);
    publish(&c);
    return 0;
}
