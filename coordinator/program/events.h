/* Events in Anchor's form, a mark and fixed-size fields, logged as "Program data: <base64>". Each names its run. */
#pragma once

#include "marks.h"
#include "program.h"

struct event_run_created {
    u64 mark;
    key run;
    key owner;
    u8 run_id[32];
};

struct event_member_joined {
    u64 mark;
    key run;
    key wallet;
    key node_key;
    u32 member;
    u32 share;
};

/* MemberReady, MemberLeft */
struct event_member {
    u64 mark;
    key run;
    u32 round;
    u32 member;
};

struct event_committed {
    u64 mark;
    key run;
    u32 round;
    u32 member;
    key digest;
    u64 length;
    u64 tokens;
    u64 fingerprint;
};

/* Attested (member: the witness), MembersDropped, MembersDesynced */
struct event_members {
    u64 mark;
    key run;
    u32 round;
    u32 member;
    bitmap members;
};

struct event_phase_changed {
    u64 mark;
    key run;
    u64 slot;
    u32 phase;
    u32 round;
    u32 epoch;
    u32 pad;
};

struct event_round_final {
    u64 mark;
    key run;
    u32 round;
    u32 is_void;
    u64 tokens;
    bitmap members;
};

struct event_checkpoint_agreed {
    u64 mark;
    key run;
    u32 round;
    u32 votes;
    key root;
};

#define emit(event) \
    do { \
        slice part_ = {&(event), sizeof(event)}; \
        sol_log_data(&part_, 1); \
    } while (0)
