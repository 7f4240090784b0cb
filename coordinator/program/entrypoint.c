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
    if (mark == IX_INIT_RUN) return init_run(&input);
    return UNKNOWN_INSTRUCTION;
}
