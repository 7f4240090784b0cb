/* pause, resume, finish, close_run, kick: the owner's hand on a run. Accounts: owner (signer), run, members, rounds.
 *
 * Pause and finish take effect by a tick, when the round in flight is final and its checkpoint agreed: nothing is
 * discarded, and members stay. */
#include "events.h"

#define CLAIM_SLOTS 6480000 /* 30 days at 0.4 s */

struct kick_arguments {
    key wallet;
};

u64 pause(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_ROUNDS, &c));
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(c.run->phase != PAUSED && c.run->request == REQUEST_NONE, ALREADY_REQUESTED);
    c.run->request = REQUEST_PAUSE;
    publish(&c);
    return 0;
}

/* Also takes back a pause that has not come about yet. */
u64 resume(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, &c));
    struct run *run = c.run;
    require(run->phase != FINISHED, RUN_FINISHED);
    require(run->request != REQUEST_FINISH, ALREADY_REQUESTED);
    require(run->phase == PAUSED || run->request == REQUEST_PAUSE, NOT_PAUSED);
    run->request = REQUEST_NONE;
    if (run->phase == PAUSED) {
        restart_clocks(&c);
        go_on(&c, run->resume_phase);
    }
    publish(&c);
    return 0;
}

u64 finish(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_ROUNDS, &c));
    require(c.run->phase != FINISHED, RUN_FINISHED);
    require(c.run->request != REQUEST_FINISH, ALREADY_REQUESTED);
    c.run->request = REQUEST_FINISH;
    publish(&c);
    return 0;
}

/* The accounts' lamports go back to the owner. Members that are owed something have 30 days for their claims. */
u64 close_run(const struct input *input) {
    struct context c;
    require(input->length == 0, BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, &c));
    const struct run *run = c.run;
    require(run->phase == FINISHED && c.slot > run->created_slot, NOT_FINISHED);
    int owes = run->reward_paid < run->reward_earned;
    require(!owes || c.slot >= saturating_add(run->phase_slot, CLAIM_SLOTS), REWARDS_OWED);
    const struct account *owner = &input->account[0];
    for (u64 i = 1; i <= 3; i++) check(check_payable(&input->account[i], owner));

    struct event_run_closed event = {EVENT_RUN_CLOSED, c.rounds->header.run, run->owner, run->tokens};
    for (u64 i = 1; i <= 3; i++) close_account(&input->account[i], owner);
    emit(event);
    return 0;
}

/* Out now; it may join again. `ban` keeps it out. */
u64 kick(const struct input *input) {
    struct context c;
    require(input->length == sizeof(struct kick_arguments), BAD_INSTRUCTION_DATA);
    check(open_owned(input, WRITES_RUN | WRITES_MEMBERS | WRITES_ROUNDS, &c));
    require(c.run->phase != FINISHED, RUN_FINISHED);
    u64 slot = find_member(c.members, &((const struct kick_arguments *)input->data)->wallet);
    require(slot != NO_MEMBER, NOT_A_MEMBER);
    require(can_eject(&c, slot), MEMBER_NOT_ACTIVE);
    bitmap out = {{0, 0, 0, 0}};
    set_bit(&out, slot);
    eject(&c, &out);
    publish(&c);
    return 0;
}
