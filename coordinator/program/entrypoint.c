/* Where the runtime enters: pick the instruction by its mark. */
#include "marks.h"
#include "program.h"

u64 entrypoint(const u8 *raw) {
    struct input input;
    u64 mark;
    check(read_input(raw, &input, &mark));
    if (mark == IX_COMMIT) return commit(&input);
    if (mark == IX_ATTEST) return attest(&input);
    if (mark == IX_TICK) return tick(&input);
    if (mark == IX_CHECKPOINT) return checkpoint(&input);
    if (mark == IX_READY) return ready(&input);
    if (mark == IX_JOIN) return join(&input);
    if (mark == IX_LEAVE) return leave(&input);
    if (mark == IX_SET_SHARE) return set_share(&input);
    if (mark == IX_CLAIM) return claim(&input);
    if (mark == IX_ARCHIVE) return archive(&input);
    if (mark == IX_RESTORE) return restore(&input);
    if (mark == IX_RECLAIM) return reclaim(&input);
    if (mark == IX_AUTHORIZE) return authorize(&input);
    if (mark == IX_REVOKE) return revoke(&input);
    if (mark == IX_DELEGATE) return delegate(&input);
    if (mark == IX_SET_CONFIG) return set_config(&input);
    if (mark == IX_SET_MODEL) return set_model(&input);
    if (mark == IX_PAUSE) return pause(&input);
    if (mark == IX_RESUME) return resume(&input);
    if (mark == IX_FINISH) return finish(&input);
    if (mark == IX_KICK) return kick(&input);
    if (mark == IX_BAN) return ban(&input);
    if (mark == IX_SET_REWARD_RATE) return set_reward_rate(&input);
    if (mark == IX_INIT_RUN) return init_run(&input);
    if (mark == IX_CLOSE_RUN) return close_run(&input);
    if (mark == IX_MIGRATE) return migrate(&input);
    return UNKNOWN_INSTRUCTION;
}
