/* What the files of the program share. Each instruction validates everything first and only then writes. */
#pragma once

#include "errors.h"
#include "state.h"

#define MAX_ACCOUNTS 8

struct account {
    const key *address;
    const key *owner;
    u64 *lamports;
    void *data;
    u64 length;
    u8 signer;
    u8 writable;
};

struct input {
    struct account account[MAX_ACCOUNTS];
    u64 account_count;
    const u8 *data; /* instruction data behind the mark */
    u64 length;
    key program;
};

/* What an address of create_account_with_seed follows from. */
struct derivation {
    const key *base;
    const key *program;
    const slice *name;
    u64 parts;
    const char *tag;
};

/* Which of the three accounts an instruction writes. */
#define WRITES_RUN 1
#define WRITES_MEMBERS 2
#define WRITES_ROUNDS 4

/* accounts.c */
u64 read_input(const u8 *raw, struct input *input, u64 *mark);
u64 open_run(const struct input *input, u64 signers, u64 writes, struct context *out);
u64 open_version(const struct input *input, u64 signers, u64 writes, u64 version, struct context *out);
u64 open_owned(const struct input *input, u64 writes, struct context *out);
u64 open_grant(const struct input *input, u64 index, const struct account **out);
u64 open_receipt(const struct input *input, u64 index, const struct account **out);
u64 check_fresh(const struct input *input, const struct account *account, u64 size);
void derive_address(const struct derivation *from, key *address);
u64 check_address(const struct input *input, const struct account *account, const slice *name, u64 parts,
                  const char *tag);
u64 check_payable(const struct account *from, const struct account *to);
void close_account(const struct account *account, const struct account *heir);
u64 read_slot(u64 *slot);
u64 find_member(const struct members *members, const key *wallet);
#define NO_MEMBER MAX_MEMBERS

/* instructions */
u64 init_run(const struct input *input);
u64 migrate(const struct input *input);
u64 set_config(const struct input *input);
u64 set_model(const struct input *input);
u64 pause(const struct input *input);
u64 resume(const struct input *input);
u64 finish(const struct input *input);
u64 close_run(const struct input *input);
u64 kick(const struct input *input);
u64 ban(const struct input *input);
u64 authorize(const struct input *input);
u64 revoke(const struct input *input);
u64 delegate(const struct input *input);
u64 archive(const struct input *input);
u64 restore(const struct input *input);
u64 reclaim(const struct input *input);
u64 set_reward_rate(const struct input *input);
u64 claim(const struct input *input);
u64 set_share(const struct input *input);
u64 join(const struct input *input);
u64 ready(const struct input *input);
u64 leave(const struct input *input);
u64 commit(const struct input *input);
u64 attest(const struct input *input);
u64 checkpoint(const struct input *input);
u64 tick(const struct input *input);

/* init.c: what a run may be like */
u64 check_limits(const struct limits *limits);
u64 check_terms(const struct terms *terms, const struct course *course);

/* members.c */
void become(struct context *c, struct member *member, u8 status);
void restart_clocks(struct context *c);
void eject(struct context *c, const bitmap *members);
int can_eject(const struct context *c, u64 slot);
int in_flight(const struct rounds *rounds, u64 slot);

/* ban.c */
int is_banned(const struct members *members, const key *key_);

/* grant.c */
void grant_address(const struct input *input, const struct context *c, const key *grantee, key *address);
u64 admit(const struct input *input, const struct context *c, key *grant, u64 *most);

/* rewards.c */
u64 reward_of(u64 rate, u64 tokens);

/* config.c */
void adopt_config(struct context *c);

/* checkpoint.c */
int agree(struct context *c);

/* schedule.c: when the next tick is due, from the state alone */
void schedule(struct context *c);
int may_attest(const struct member *member);
int decided(const struct context *c, const struct round *round);

/* assign.c: the start of a round */
void start_round(struct context *c);

/* settle.c: the end of a round */
void close_round(struct context *c);
void finalize_round(struct context *c, struct round *round);
void next_seed(struct context *c, const struct round *round);
void publish_attested(struct context *c);
void emit_members(const struct context *c, u64 mark, u32 round, const bitmap *members);
void drop(struct context *c, u64 slot, bitmap *dropped);

/* tick.c */
void go_on(struct context *c, u64 phase);
void publish(struct context *c);

/* requeue.c */
u64 draw_positions(struct context *c, struct round *round, u64 members); /* 0: all of them for one member */
void requeue_excluded(struct context *c, const struct round *round);
