/* init_run: three empty accounts, created by the owner in front of this instruction, become a run.
 *
 * Accounts: owner (signer), run, members, rounds. The runtime itself refuses accounts that are not rent-exempt. */
#include "events.h"
#include "random.h"

#define MAX_SEQUENCE (1u << 24)
#define MAX_UPDATE_BYTES (1ull << 40)
#define MAX_TOPK (1u << 16)
#define MAX_WINDOW 8
#define FP32_ONE 0x3f800000u
#define FP32_INFINITY 0x7f800000u

struct init_arguments {
    u8 run_id[32];
    u8 run_id_length;
    u8 pad[7];
    struct limits limits;
    struct terms terms;
    key join_authority;
    struct course course;
};
_Static_assert(sizeof(struct init_arguments) == 432, "init_run's data");

static u64 check_run_id(const u8 *run_id, u64 length) {
    require(length >= 1 && length <= 32, BAD_RUN_ID);
    for (u64 i = 0; i < 32; i++) require((run_id[i] != 0) == (i < length), BAD_RUN_ID);
    return 0;
}

u64 check_limits(const struct limits *l) {
    require(l->min_members >= 1 && l->min_members <= l->init_min_members, BAD_MEMBER_LIMITS);
    require(l->init_min_members <= l->max_members && l->max_members <= MAX_MEMBERS, BAD_MEMBER_LIMITS);
    require(l->witnesses <= MAX_WITNESSES && l->witnesses <= l->min_members, BAD_WITNESSES);
    require(l->overlap <= 1, BAD_OVERLAP);
    require(l->max_missed >= 1 && l->max_missed <= 255, BAD_MAX_MISSED);
    require(l->warmup_time && l->max_round_train_time && l->round_witness_time && l->cooldown_time, BAD_TIMES);
    require(l->adaptive_grace <= l->max_round_train_time, BAD_TIMES);
    require(l->batch >= l->min_members && l->batch <= MAX_BATCH, BAD_BATCH);
    require(l->rounds_per_epoch >= 1, BAD_ROUNDS);
    require(l->total_rounds >= 1 && l->total_rounds < 1u << 31, BAD_ROUNDS);
    require(l->max_share <= MAX_SHARE, BAD_SHARE);
    return 0;
}

/* Bytes behind the first NUL must be NUL too: one text, one encoding. */
static int zero_padded(const u8 *text, u64 size) {
    u64 ended = 0;
    for (u64 i = 0; i < size; i++) {
        if (ended && text[i]) return 0;
        ended |= text[i] == 0;
    }
    return 1;
}

/* A ramp may begin below min_members: in its first rounds some members may have nothing to train, as always where the
 * batch is small. */
static u64 check_course(const struct course *course) {
    if (course->ramp_rounds) {
        require(course->ramp_batch >= 1 && course->ramp_batch <= MAX_BATCH, BAD_RAMP);
    } else {
        require(course->ramp_batch == 0, BAD_RAMP);
    }
    require(course->z_loss_bits < FP32_INFINITY, BAD_OPTIMIZER_TERMS);
    require(course->reserved == 0, BAD_INSTRUCTION_DATA);
    return 0;
}

u64 check_terms(const struct terms *t, const struct course *course) {
    require(t->samples >= 1, BAD_DATA_TERMS);
    require(t->sequence_length >= 1 && t->sequence_length <= MAX_SEQUENCE, BAD_DATA_TERMS);
    require(t->update_bytes >= 1 && t->update_bytes <= MAX_UPDATE_BYTES, BAD_UPDATE_TERMS);
    require(t->topk >= 1 && t->topk <= MAX_TOPK, BAD_UPDATE_TERMS);
    require(t->lookahead <= 1 && t->clip_votes <= 1 && t->schedule <= 3, BAD_OPTIMIZER_TERMS);
    require(t->window <= MAX_WINDOW, BAD_OPTIMIZER_TERMS);
    /* fp32 patterns below infinity's are finite and not negative */
    require(t->decay_bits < FP32_ONE, BAD_OPTIMIZER_TERMS);
    require(t->peak_lr_bits > 0 && t->peak_lr_bits < FP32_INFINITY, BAD_OPTIMIZER_TERMS);
    require(t->final_lr_bits < FP32_INFINITY && t->weight_decay_bits < FP32_INFINITY, BAD_OPTIMIZER_TERMS);
    require(t->clip_norm_bits < FP32_INFINITY, BAD_OPTIMIZER_TERMS);
    require(zero_padded(t->model_source, 64) && zero_padded(t->data_source, 64), BAD_SOURCE);
    return check_course(course);
}

u64 init_run(const struct input *input) {
    require(input->length == sizeof(struct init_arguments), BAD_INSTRUCTION_DATA);
    const struct init_arguments *arguments = (const struct init_arguments *)input->data;
    require(input->account_count >= 4, MISSING_ACCOUNTS);
    const struct account *account = input->account;
    require(account[0].signer, MISSING_SIGNER);
    check(check_fresh(input, &account[1], sizeof(struct run)));
    check(check_fresh(input, &account[2], sizeof(struct members)));
    check(check_fresh(input, &account[3], sizeof(struct rounds)));
    for (u64 i = 0; i < 7; i++) require(arguments->pad[i] == 0, BAD_INSTRUCTION_DATA);
    check(check_run_id(arguments->run_id, arguments->run_id_length));
    slice name = {arguments->run_id, arguments->run_id_length};
    check(check_address(input, &account[1], &name, 1, "run"));
    check(check_address(input, &account[2], &name, 1, "mem"));
    check(check_address(input, &account[3], &name, 1, "rnd"));
    check(check_limits(&arguments->limits));
    check(check_terms(&arguments->terms, &arguments->course));
    u64 slot;
    check(read_slot(&slot));

    struct run *run = account[1].data;
    struct members *members = account[2].data;
    struct header *header = account[3].data;
    run->discriminator = ACCOUNT_RUN;
    run->version = VERSION;
    run->phase = WAITING_FOR_MEMBERS;
    run->owner = *account[0].address;
    run->members = *account[2].address;
    run->rounds = *account[3].address;
    run->run_id_length = arguments->run_id_length;
    sol_memcpy_(run->run_id, arguments->run_id, 32);
    run->limits = arguments->limits;
    run->terms = arguments->terms;
    run->course = arguments->course;
    run->schedule_rounds = arguments->limits.total_rounds;
    run->join_authority = arguments->join_authority;
    run->checkpoint_root = arguments->terms.model_root;
    run->phase_slot = slot;
    run->created_slot = slot;
    run->revision = 1;
    mix_seed(&run->seed, account[1].address, sizeof(key));

    members->discriminator = ACCOUNT_MEMBERS;
    members->version = VERSION;
    members->run = *account[1].address;

    header->discriminator = ACCOUNT_ROUNDS;
    header->version = VERSION;
    header->phase = WAITING_FOR_MEMBERS;
    header->run = *account[1].address;
    header->due_slot = UNKNOWN_SLOT;
    header->grace_slot = UNKNOWN_SLOT;

    struct event_run_created event = {.mark = EVENT_RUN_CREATED, .run = header->run, .owner = run->owner};
    sol_memcpy_(event.run_id, run->run_id, 32);
    emit(event);
    return 0;
}
