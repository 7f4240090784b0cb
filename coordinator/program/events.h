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

struct event_run_closed {
    u64 mark;
    key run;
    key owner;
    u64 tokens;
};

/* ConfigRequested (to hold from the next round on), ConfigChanged */
struct event_config {
    u64 mark;
    key run;
    u32 round;
    u32 config_version;
};

struct event_model_changed {
    u64 mark;
    key run;
    u32 round;
    u32 config_version;
    key model_root;
    key data_manifest;
};

/* Authorized, Revoked */
struct event_key {
    u64 mark;
    key run;
    key grantee;
};

/* MemberArchived, MemberRestored */
struct event_credit {
    u64 mark;
    key run;
    key wallet;
    key receipt;
    u64 credit;
    u32 member;
    u32 pad;
};

struct event_reward_paid {
    u64 mark;
    key run;
    key wallet;
    u64 lamports;
};

/* Slices lie one behind the other in the batch, from the member `first_slot` on and around. */
struct event_round_started {
    u64 mark;
    key run;
    u32 round;
    u32 first_slot;
    u64 positions;
    bitmap active;
    struct range range[MAX_RANGES];
    u32 slice_count[MAX_MEMBERS];
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

/* Attested (member: the witness), MembersDropped, MembersDesynced, MembersEjected */
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
