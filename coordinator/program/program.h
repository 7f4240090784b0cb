/* What the files of the program share. Each instruction validates everything first and only then writes. */
#pragma once

#include "errors.h"
#include "state.h"

#define MAX_ACCOUNTS 8

struct account {
    const key *address;
    const key *owner;
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

/* Which of the three accounts an instruction writes. */
#define WRITES_RUN 1
#define WRITES_MEMBERS 2
#define WRITES_ROUNDS 4

/* accounts.c */
u64 read_input(const u8 *raw, struct input *input, u64 *mark);
u64 open_run(const struct input *input, u64 signers, u64 writes, struct context *out);
u64 read_slot(u64 *slot);
u64 find_member(const struct members *members, const key *wallet);
#define NO_MEMBER MAX_MEMBERS

/* instructions */
u64 init_run(const struct input *input);
u64 join(const struct input *input);
u64 ready(const struct input *input);
u64 leave(const struct input *input);
u64 commit(const struct input *input);
u64 attest(const struct input *input);
u64 checkpoint(const struct input *input);
u64 tick(const struct input *input);

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

/* requeue.c */
u64 draw_positions(struct context *c, struct round *round, u64 members); /* 0: all of them for one member */
void requeue_excluded(struct context *c, const struct round *round);
