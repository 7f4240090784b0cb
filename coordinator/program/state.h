/* The three accounts of a run, as they lie in memory. Little-endian, natural alignment, padding written out, so that
 * offsets are the same for every compiler; coordinator/layout.py is the Python side, and a test compares field by
 * field.
 *
 * Who writes what: `run` is what every node subscribes to, written by ticks (and by the owner's instructions) only.
 * Joins, commits, attestations and votes go to `members` and `rounds`, whose header says when the next tick is due. */
#pragma once

#include "sbf.h"

#define VERSION 2
#define RECORD_VERSION 1 /* of grants and receipts */
#define MAX_MEMBERS 256
#define MAX_WITNESSES 32
#define ROUND_RING 4
#define INCLUSION_RING 8
#define MAX_RANGES 16
#define MAX_REQUEUE 512
#define MAX_BANNED 64
#define MAX_DELEGATES 32
#define COUNTER_PLANES 6 /* attestation counts go to 32: six bits */
#define MAX_SHARE 1000000
#define MAX_BATCH (1u << 24)
#define UNKNOWN_SLOT U64_MAX

enum phase {
    UNINITIALIZED = 0,
    WAITING_FOR_MEMBERS = 1,
    WARMUP = 2,
    ROUND_TRAIN = 3,
    ROUND_WITNESS = 4,
    COOLDOWN = 5,
    FINISHED = 6,
    PAUSED = 7,
};

enum status { EMPTY = 0, PENDING = 1, ACTIVE = 2, DESYNCED = 3, DROPPED = 4, LEFT = 5, STATUS_EJECTED = 6 };

/* What the owner has asked for and a tick has not brought about yet. */
enum request { REQUEST_NONE = 0, REQUEST_PAUSE = 1, REQUEST_FINISH = 2 };

enum round_state { ROUND_UNUSED = 0, ROUND_OPEN = 1, ROUND_CLOSED = 2, ROUND_IS_FINAL = 3 };

#define INCLUSION_PRESENT 1
#define INCLUSION_VOID 2

struct inclusion {
    u32 round;
    u32 flags;
    bitmap members;
};

/* Times in slots, batch in positions. */
struct limits {
    u32 init_min_members;
    u32 min_members;
    u32 max_members;
    u32 witnesses;
    u32 overlap;
    u32 max_missed;
    u32 join_grace;
    u32 warmup_time;
    u32 max_round_train_time;
    u32 round_witness_time;
    u32 cooldown_time;
    u32 adaptive_grace;
    u32 batch;
    u32 rounds_per_epoch;
    u32 total_rounds;
    u32 max_share; /* 0: MAX_SHARE */
};

struct terms {
    key model_root;
    key layout_digest;
    key data_manifest;
    u64 samples;
    u64 update_bytes;
    u32 sequence_length;
    u32 topk;
    u8 lookahead;
    u8 clip_votes;
    u8 schedule;
    u8 window;
    u32 warmup_rounds;
    u32 decay_rounds;
    u32 decay_bits;
    u32 peak_lr_bits;
    u32 final_lr_bits;
    u32 weight_decay_bits;
    u32 clip_norm_bits;
    u8 model_source[64];
    u8 data_source[64];
};

/* Terms that came later: behind everything else, so that runs made before them read as zeros, which is "none". */
struct course {
    u32 ramp_batch; /* positions of the first round under these terms */
    u32 ramp_rounds; /* rounds until a round has limits.batch positions; 0: from the first on */
    u32 z_loss_bits;
    u32 reserved;
};

struct run {
    u64 discriminator;
    u32 version;
    u8 phase;
    u8 run_id_length;
    u8 request;
    u8 resume_phase; /* of a paused run */
    key owner;
    key members;
    key rounds;
    key join_authority; /* whose grants admit members; zero: anyone may join */
    u8 run_id[32];
    u64 revision; /* counts writes: a client's key against duplicates */
    u64 phase_slot;
    u64 created_slot;
    u64 cursor; /* first position never assigned */
    u64 tokens; /* sum of all credit */
    u32 round;
    u32 epoch;
    u32 final_rounds; /* rounds below this are final and in the weights on which `round` is trained */
    u32 epoch_round; /* first round of the epoch */
    u32 member_count;
    u32 active_count;
    u32 checkpoint_round;
    u32 config_version;
    key seed;
    key checkpoint_root;
    struct inclusion inclusion[INCLUSION_RING]; /* at round % 8 */
    struct limits limits;
    struct terms terms;
    u64 reward_rate; /* lamports per million tokens of credit */
    u64 reward_paid;
    u64 reward_earned; /* sum of all members' rewards */
    u32 model_round; /* first round under the present terms: their learning-rate schedule counts from it */
    u32 schedule_rounds; /* and spans so many, whatever becomes of total_rounds meanwhile */
    struct limits next_limits; /* from the next round on; a batch of 0: none */
    struct course course;
    u8 reserved[448];
};

struct member {
    key wallet;
    key node_key;
    key grant; /* the authorization under which it joined */
    u64 credit;
    u64 updates_included;
    u64 reward_claimed;
    u64 joined_slot;
    u32 share; /* 0: it has not taken part yet */
    u32 next_share; /* what it asks for */
    u32 joined_round;
    u8 status;
    u8 ready;
    u8 missed; /* rounds without a commitment on the right weights, in a row */
    u8 excluded; /* since its last update that counted: those that did not, and rounds it kept waiting as a witness */
    u64 status_slot; /* when the status changed last */
    u64 reward; /* lamports earned, ever */
};

struct members {
    u64 discriminator;
    u32 version;
    u32 banned_count;
    key run;
    u8 unused[32];
    u64 archived_credit; /* in receipts */
    u64 archived_members;
    u8 reserved[160];
    key banned[MAX_BANNED];
    struct member member[MAX_MEMBERS];
};

struct range {
    u64 start;
    u64 count;
};

struct round {
    u32 round;
    u8 state;
    u8 witness_count;
    u8 range_count;
    u8 first_slot; /* the rotation: slices are laid out from this member on */
    u64 start_slot;
    u64 close_slot;
    u64 final_slot;
    u64 positions;
    u32 expected_count;
    u32 committed_count;
    u32 attested_count;
    u32 median_elapsed; /* slots from the start to commit number ceil(expected / 2) */
    u32 worst_requeue; /* at most so many ranges can come back from this round */
    u32 attested; /* bit per witness, in the order of `witness` */
    bitmap active;
    bitmap assigned; /* active with a slice that is not empty */
    bitmap expected; /* assigned and neither left nor ejected since */
    bitmap committed;
    bitmap eligible; /* committed, on the weights of the majority */
    bitmap included;
    u8 witness[MAX_WITNESSES];
    bitmap counter[COUNTER_PLANES]; /* bit-sliced: bit i of plane p is bit p of member i's count of attestations */
    bitmap attestation[MAX_WITNESSES];
    struct range range[MAX_RANGES];
    u32 slice_offset[MAX_MEMBERS];
    u32 slice_count[MAX_MEMBERS];
    key digest[MAX_MEMBERS];
    u64 length[MAX_MEMBERS];
    u64 tokens[MAX_MEMBERS];
    u64 fingerprint[MAX_MEMBERS];
    u64 commit_slot[MAX_MEMBERS];
};

/* First bytes of the rounds account: everything that moves between ticks. */
struct header {
    u64 discriminator;
    u32 version;
    u8 phase;
    u8 drain; /* this round is the last before a cooldown: it waits for its own inclusion set */
    u8 checkpoint_agreed;
    u8 pad;
    key run;
    u64 due_slot; /* first slot at which `tick` succeeds */
    u32 round;
    u32 members; /* pending, active and desynced */
    u32 active;
    u32 ready; /* pending or desynced, and ready */
    u32 committed;
    u32 attested;
    u32 requeue_head;
    u32 requeue_count;
    u64 requeued; /* positions in the queue */
    u32 checkpoint_votes;
    u32 checkpoint_round;
    bitmap checkpoint_voted;
    key checkpoint_root;
    u64 grace_slot; /* when the last of init_min_members joined */
    u8 reserved[80];
};

struct rounds {
    struct header header;
    struct range requeue[MAX_REQUEUE]; /* ring: first in, first out */
    key vote[MAX_MEMBERS]; /* checkpoint roots, of members in checkpoint_voted */
    struct round ring[ROUND_RING]; /* at round % 4 */
};

/* Who may join where the run has a join authority: the grantee (zero: anyone), and the keys of its other machines.
 * The account exists as long as the grant holds. */
struct grant {
    u64 discriminator;
    u32 version;
    u32 delegate_count;
    key run;
    key authority;
    key grantee;
    u64 created_slot;
    u64 run_slot; /* when the run was created: a later one of the same name is another */
    key delegate[MAX_DELEGATES];
};

/* The credit of a member whose slot was given to others. */
struct receipt {
    u64 discriminator;
    u32 version;
    u32 reserved;
    key run;
    key wallet;
    key payer;
    u64 credit;
    u64 updates_included;
    u64 reward;
    u64 reward_claimed;
    u64 archived_slot;
    u64 run_slot;
};

_Static_assert(sizeof(struct limits) == 64, "limits");
_Static_assert(sizeof(struct terms) == 280, "terms");
_Static_assert(sizeof(struct course) == 16, "course");
_Static_assert(sizeof(struct run) == 1536, "run");
_Static_assert(sizeof(struct member) == 160, "member");
_Static_assert(sizeof(struct members) == 43264, "members");
_Static_assert(sizeof(struct round) == 20192, "round");
_Static_assert(sizeof(struct header) == 256, "header");
_Static_assert(sizeof(struct rounds) == 97408, "rounds");
_Static_assert(sizeof(struct grant) == 1152, "grant");
_Static_assert(sizeof(struct receipt) == 160, "receipt");

/* The three accounts, checked to belong together, and the chain's slot. */
struct context {
    struct run *run;
    struct members *members;
    struct rounds *rounds;
    u64 slot;
};

/* What a paused run goes back to counts as its phase for those who come and go meanwhile. */
INLINE u64 stage_of(const struct run *run) { return run->phase == PAUSED ? run->resume_phase : run->phase; }

INLINE int live(u64 status) { return status == PENDING || status == ACTIVE || status == DESYNCED; }

INLINE u64 share_limit(const struct run *run) { return run->limits.max_share ? run->limits.max_share : MAX_SHARE; }

INLINE struct round *entry_of(struct rounds *rounds, u64 round) { return &rounds->ring[round % ROUND_RING]; }
