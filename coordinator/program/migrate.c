/* migrate: the accounts of a run made by the version before become this version's, at any moment of its life.
 * Accounts: payer (signer), run, members, rounds. Anyone may: there is nothing to choose.
 *
 * Version 1 kept zeros where version 2 has fields, so sizes and places stay; what zero does not say is filled in. */
#include "program.h"

#define VERSION_BEFORE 1

u64 migrate(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_version(input, 1, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, VERSION_BEFORE, &c));

    c.run->version = VERSION;
    c.run->schedule_rounds = c.run->limits.total_rounds;
    c.members->version = VERSION;
    c.rounds->header.version = VERSION;
    u32 ready = 0;
    for (u64 slot = 0; slot < MAX_MEMBERS; slot++) {
        struct member *member = &c.members->member[slot];
        if (!live(member->status)) continue;
        member->status_slot = c.slot;
        ready += member->ready;
    }
    c.rounds->header.ready = ready;
    publish(&c);
    return 0;
}
