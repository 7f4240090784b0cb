"""The numbered errors of the on-chain program.

The numbers are the interface: they appear in transaction results as `Custom(n)`. `program/errors.h` is the same list
for the C side; a test compares the two.
"""

from __future__ import annotations

from enum import IntEnum

FIRST_ERROR = 6000


class ErrorCode(IntEnum):
    """Number of every error that the program returns by itself. Texts: `ERROR_TEXT`."""

    UNKNOWN_INSTRUCTION = 6000
    BAD_INSTRUCTION_DATA = 6001
    MISSING_ACCOUNTS = 6002
    MISSING_SIGNER = 6003
    ACCOUNT_NOT_WRITABLE = 6004
    WRONG_ACCOUNT_OWNER = 6005
    WRONG_ACCOUNT_SIZE = 6006
    WRONG_ACCOUNT_TYPE = 6007
    WRONG_ACCOUNT_VERSION = 6008
    ACCOUNT_MISMATCH = 6009
    ALREADY_INITIALIZED = 6010
    WRONG_ADDRESS = 6011
    BAD_RUN_ID = 6012
    BAD_MEMBER_LIMITS = 6013
    BAD_WITNESSES = 6014
    BAD_OVERLAP = 6015
    BAD_MAX_MISSED = 6016
    BAD_TIMES = 6017
    BAD_BATCH = 6018
    BAD_ROUNDS = 6019
    BAD_DATA_TERMS = 6020
    BAD_UPDATE_TERMS = 6021
    BAD_OPTIMIZER_TERMS = 6022
    BAD_SOURCE = 6023
    WRONG_PHASE = 6024
    WRONG_ROUND = 6025
    NOT_A_MEMBER = 6026
    ALREADY_A_MEMBER = 6027
    NODE_KEY_IN_USE = 6028
    RUN_FULL = 6029
    BAD_SHARE = 6030
    BANNED = 6031
    NOT_PERMISSIONLESS = 6032
    MEMBER_NOT_ACTIVE = 6033
    WRONG_MODEL_ROOT = 6034
    ALREADY_READY = 6035
    NOTHING_ASSIGNED = 6036
    ALREADY_COMMITTED = 6037
    WRONG_LENGTH = 6038
    TOO_MANY_TOKENS = 6039
    NOT_A_WITNESS = 6040
    ALREADY_ATTESTED = 6041
    ROUND_NOT_CLOSED = 6042
    ROUND_FINAL = 6043
    ATTESTED_UNCOMMITTED = 6044
    ALREADY_VOTED = 6045
    NOT_DUE = 6046
    RUN_FINISHED = 6047
    NOT_OWNER = 6048
    NOT_AUTHORITY = 6049
    NOT_AUTHORIZED = 6050
    NOT_THE_GRANTEE = 6051
    BAD_KEY = 6052
    ALREADY_BANNED = 6053
    NOT_BANNED = 6054
    BAN_LIST_FULL = 6055
    ALREADY_A_DELEGATE = 6056
    NOT_A_DELEGATE = 6057
    DELEGATES_FULL = 6058
    ALREADY_REQUESTED = 6059
    NOT_PAUSED = 6060
    NOT_FINISHED = 6061
    REWARDS_OWED = 6062
    SLOT_IN_USE = 6063
    NOTHING_TO_ARCHIVE = 6064
    WRONG_RECEIPT = 6065
    BAD_REWARD_RATE = 6066
    NOTHING_TO_CLAIM = 6067
    REWARDS_UNFUNDED = 6068
    NOT_CLOSED = 6069
    GRANT_FULL = 6070
    BAD_RAMP = 6071


ERROR_TEXT: dict[ErrorCode, str] = {
    ErrorCode.UNKNOWN_INSTRUCTION: "the instruction is not one of this program's; check the program id and its version",
    ErrorCode.BAD_INSTRUCTION_DATA: (
        "the instruction's data has the wrong length or a reserved field that is not zero; "
        "build it with the client library of this version"
    ),
    ErrorCode.MISSING_ACCOUNTS: (
        "the instruction names fewer accounts than it needs; pass signers first, then run, members, rounds"
    ),
    ErrorCode.MISSING_SIGNER: "a key that must sign this instruction has not signed it; sign with it",
    ErrorCode.ACCOUNT_NOT_WRITABLE: "an account that this instruction writes was passed read-only; mark it writable",
    ErrorCode.WRONG_ACCOUNT_OWNER: "an account does not belong to this program; check the run's address",
    ErrorCode.WRONG_ACCOUNT_SIZE: (
        "an account does not have the size of its kind; check the run's address and the program's version"
    ),
    ErrorCode.WRONG_ACCOUNT_TYPE: (
        "an account is not of the kind expected here (run, members, rounds, in that order); pass them in that order"
    ),
    ErrorCode.WRONG_ACCOUNT_VERSION: "the account was written by another version of the program; migrate the run",
    ErrorCode.ACCOUNT_MISMATCH: (
        "the run, members and rounds accounts do not belong together; derive them from owner and run id"
    ),
    ErrorCode.ALREADY_INITIALIZED: "the account already holds a run; choose another run id",
    ErrorCode.WRONG_ADDRESS: (
        "an account's address is not the one derived from owner and run id; derive it with this program's id"
    ),
    ErrorCode.BAD_RUN_ID: "a run id has 1 to 32 bytes, zero-padded and without NUL; choose another run id",
    ErrorCode.BAD_MEMBER_LIMITS: (
        "member limits must hold 1 <= min_members <= init_min_members <= max_members <= 256; change the limits"
    ),
    ErrorCode.BAD_WITNESSES: (
        "witnesses must be 0 (all, up to 32) or 1 to 32 and at most min_members; change the setting"
    ),
    ErrorCode.BAD_OVERLAP: "overlap must be 0 or 1; change the setting",
    ErrorCode.BAD_MAX_MISSED: "max_missed must be 1 to 255; change the setting",
    ErrorCode.BAD_TIMES: (
        "every phase time must be above 0 and adaptive_grace at most max_round_train_time; change the setting"
    ),
    ErrorCode.BAD_BATCH: "batch must be min_members to 16777216 positions; change the setting",
    ErrorCode.BAD_ROUNDS: (
        "rounds_per_epoch and total_rounds must be above 0, total_rounds below 2^31; change the settings"
    ),
    ErrorCode.BAD_DATA_TERMS: "samples must be above 0 and sequence_length 1 to 16777216; change the settings",
    ErrorCode.BAD_UPDATE_TERMS: "update_bytes must be 1 to 2^40 and topk 1 to 65536; change the settings",
    ErrorCode.BAD_OPTIMIZER_TERMS: (
        "schedule, flags or an fp32 value of the optimizer terms is out of range; change the setting"
    ),
    ErrorCode.BAD_SOURCE: "model_source and data_source are at most 64 bytes, zero-padded; shorten it",
    ErrorCode.WRONG_PHASE: (
        "the run is not in a phase that allows this instruction; "
        "look at the phase (psyche-admin run show) and wait for it"
    ),
    ErrorCode.WRONG_ROUND: (
        "the round named is not the one that this instruction can act on now; "
        "read the run again and use its present round"
    ),
    ErrorCode.NOT_A_MEMBER: "the wallet is not a member of the run; join first",
    ErrorCode.ALREADY_A_MEMBER: "the wallet is already a member of the run; there is nothing to do",
    ErrorCode.NODE_KEY_IN_USE: "another member uses this node key; every node needs its own",
    ErrorCode.RUN_FULL: (
        "the run has no room for another member; "
        "wait until a member leaves, archive the credit of one that is gone, or ask the owner to raise max_members"
    ),
    ErrorCode.BAD_SHARE: "a share must be 1 to 1000000, and within the run's max_share; choose another one",
    ErrorCode.BANNED: "the owner has banned this wallet, node key or grantee from the run; ask the owner to lift it",
    ErrorCode.NOT_PERMISSIONLESS: "the run admits members only with a grant of its join authority; ask for one",
    ErrorCode.MEMBER_NOT_ACTIVE: (
        "the member's status does not allow this instruction (dropped, left or out of sync); "
        "join again, or catch up and send ready"
    ),
    ErrorCode.WRONG_MODEL_ROOT: "the model root is not the run's; load the run's model or checkpoint again",
    ErrorCode.ALREADY_READY: "the member has already reported ready; there is nothing to do",
    ErrorCode.NOTHING_ASSIGNED: (
        "the member has no positions in this round, so there is nothing to commit; wait for the next round"
    ),
    ErrorCode.ALREADY_COMMITTED: "the member has already committed an update for this round; the first one counts",
    ErrorCode.WRONG_LENGTH: "the update's length is not the run's update_bytes; use the run's settings",
    ErrorCode.TOO_MANY_TOKENS: (
        "more tokens than the member's slice can hold; count only the tokens of the positions assigned"
    ),
    ErrorCode.NOT_A_WITNESS: "the member is not an elected witness of this round; only elected witnesses attest",
    ErrorCode.ALREADY_ATTESTED: "the witness has already attested to this round; the first one counts",
    ErrorCode.ROUND_NOT_CLOSED: "the round still takes commitments; attest after it closes",
    ErrorCode.ROUND_FINAL: "the round's inclusion set is final; go on with the next round",
    ErrorCode.ATTESTED_UNCOMMITTED: (
        "the attestation names a member that has not committed in this round; name only members that have committed"
    ),
    ErrorCode.ALREADY_VOTED: "the member has already reported a checkpoint root for this round; the first one counts",
    ErrorCode.NOT_DUE: "no transition is due at this slot; wait for the header's due_slot",
    ErrorCode.RUN_FINISHED: "the run is finished; nothing more will happen in it",
    ErrorCode.NOT_OWNER: "only the run's owner may do this; sign with the owner's wallet",
    ErrorCode.NOT_AUTHORITY: "only the run's join authority may do this; sign with its wallet",
    ErrorCode.NOT_AUTHORIZED: "the grant is not of the present join authority, or is not for this wallet; ask for one",
    ErrorCode.NOT_THE_GRANTEE: "only the grantee may delegate its grant; sign with the grantee's wallet",
    ErrorCode.BAD_KEY: "a key of zeros cannot be banned or delegated to; name another key",
    ErrorCode.ALREADY_BANNED: "the key is banned already; there is nothing to do",
    ErrorCode.NOT_BANNED: "the key is not banned; there is nothing to lift",
    ErrorCode.BAN_LIST_FULL: "64 keys are banned, which is the most; lift one, or admit members by grants instead",
    ErrorCode.ALREADY_A_DELEGATE: "the key is a delegate of this grant already; there is nothing to do",
    ErrorCode.NOT_A_DELEGATE: "the key is no delegate of this grant; there is nothing to remove",
    ErrorCode.DELEGATES_FULL: "the grant has 32 delegates, which is the most; remove one, or ask for another grant",
    ErrorCode.ALREADY_REQUESTED: (
        "the run is paused, or about to pause or finish; "
        "wait for the transition that is due (psyche-admin run tick makes it)"
    ),
    ErrorCode.NOT_PAUSED: "the run is neither paused nor about to be; there is nothing to resume",
    ErrorCode.NOT_FINISHED: "only a finished run can be closed; finish it first",
    ErrorCode.REWARDS_OWED: "members have rewards to claim; fund the run, or wait 6480000 slots after its end",
    ErrorCode.SLOT_IN_USE: "the member takes part, or has work in a round that is not final; archive its credit later",
    ErrorCode.NOTHING_TO_ARCHIVE: "the slot is empty or its member has no credit; a joiner can have it as it is",
    ErrorCode.WRONG_RECEIPT: "the receipt belongs to another wallet; sign with the wallet that it names",
    ErrorCode.BAD_REWARD_RATE: (
        "a reward rate is at most 10000000000 lamports (10 SOL) per million tokens; choose a lower rate"
    ),
    ErrorCode.NOTHING_TO_CLAIM: (
        "everything that this member has earned is paid, or it has earned nothing; the next included update earns more"
    ),
    ErrorCode.REWARDS_UNFUNDED: "the run account holds nothing above its rent; ask the owner to fund the run",
    ErrorCode.NOT_CLOSED: "the run still exists; a grant is revoked and a receipt restored while it does",
    ErrorCode.GRANT_FULL: "33 members are here by this grant, the most there can be; wait until one leaves",
    ErrorCode.BAD_RAMP: (
        "ramp_batch must be 1 to 16777216 positions where there are ramp_rounds, and 0 where there are none; "
        "change the setting"
    ),
}
