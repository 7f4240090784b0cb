"""The exit codes of `psyche-node` and `psyche-sim`, numbered in ranges per component.

Each code says what it means and how to resolve it; ``docs/reference/exit-codes.md`` is generated from here. Codes from
126 belong to the shell (126, 127, and 128 plus a signal's number), so the ranges end before.
"""

from __future__ import annotations

import os

from coordinator.exit_code import ExitCode

RANGES = (
    (0, 9, "General"),
    (10, 19, "Settings, keys and files"),
    (20, 29, "Chain"),
    (30, 39, "Network"),
    (40, 49, "Data"),
    (50, 59, "Training"),
    (60, 69, "Processes of a node"),
    (70, 79, "Simulation"),
    (80, 89, "As in `psyche-admin`"),
    (90, 99, "Talking to a model, and measuring it"),
    (128, 159, "Signals"),
)
"""(first, last, component)"""


class Exit(ExitCode):
    """How a command ended."""

    OK = (0, "Everything that was asked for is done.", "Nothing to do.")
    UNEXPECTED = (
        1,
        "Something happened that the program does not know how to handle.",
        "The log ends with a traceback. Start it again; if it repeats, report it with that traceback and the version.",
    )
    USAGE = (
        2,
        "A flag is unknown, or its value cannot be used.",
        "The message names the flag. `--help` lists all of them.",
    )
    CONFIG = (
        10,
        "A setting is missing, unknown or wrong, a path is not there, or this node's model or data is not the run's.",
        "The message names the setting and what to write. After a wrong model root or data manifest: get the run's own "
        "model and data, as its owner published them.",
    )
    WALLET = (
        11,
        "The wallet cannot be used: no file, not a Solana keypair, or readable by others.",
        "Make one with `psyche-admin keys new FILE`, or run `chmod 600 FILE` on the one you have.",
    )
    NODE_KEY = (
        12,
        "The node key cannot be used: not a key, or readable by others.",
        "Run `chmod 600` on it, or restore it from your backup. Without one, remove it: the node makes a new key and "
        "goes on under that one.",
    )
    FILES = (
        13,
        "A file or folder could not be read or written.",
        "The message names it. Look at permissions, free space (`df -h`) and whether the output folder is new.",
    )
    FOLDER_IN_USE = (
        14,
        "Another process runs a node with this folder.",
        "The message names the process. Stop it, or give this one a `--folder` of its own: two nodes need two wallets.",
    )
    CHAIN_UNAVAILABLE = (
        20,
        "No RPC endpoint answered, after all retries.",
        "Check the URLs with `psyche-admin run show RUN --rpc URL`. Give more than one `--rpc`: the node fails over.",
    )
    TRANSACTION_FAILED = (
        21,
        "The wallet has too little, or the cluster refused a transaction before the program saw it.",
        "The message says which, and how much to send to the wallet. `psyche-admin keys show FILE --rpc URL` shows "
        "what it has.",
    )
    PROGRAM_REFUSED = (
        22,
        "The coordinator program refused an instruction with one of its numbered errors.",
        "The message has the error's name and the program's log. Compare with `psyche-admin run show RUN`: the run may "
        "have gone on without this node.",
    )
    JOIN_REFUSED = (
        23,
        "The run does not take this node now.",
        "The message says why. Too late: the next run, or this one when it gets a new model. Another host with this "
        "wallet: one wallet is one node.",
    )
    STATE_UNREADABLE = (
        24,
        "An account of the run does not decode.",
        "Check that RUN is a run's account and that the program is a version this release knows; upgrade the node.",
    )
    EJECTED = (
        25,
        "The run's owner has put this node out of the run.",
        "Ask the owner why. After a kick the node may join again; after a ban only when the owner lifts it.",
    )
    RUN_NOT_FOUND = (
        26,
        "There is no run where one was looked for, or several have that name.",
        "Compare RUN with the address that the owner published, and `--rpc` with its chain: `psyche-admin run list "
        "--rpc URL` lists the runs there.",
    )
    DROPPED = (
        27,
        "The run has dropped this node again and again, though it has joined again each time.",
        "The message says why: rounds missed (a slow device or link), updates that others could not get (ports, "
        "firewall), or a warm-up that was too short. Mend that; a node that starts anew takes part in the owner's next "
        "run, or in this one when it gets a new model.",
    )
    RUN_FINISHED = (
        28,
        "The run was finished before this node was started.",
        "Nothing to do: its members have the model. Switch the service off, or name another run.",
    )
    LEFT = (
        29,
        "This wallet has left the run (`psyche-admin member leave`).",
        "Nothing to do. Rewards that are not paid yet: `psyche-admin member claim`. Start the node to join again.",
    )
    NETWORK = (
        30,
        "The network process could not listen or start.",
        "The message names the setting, and who has the port: choose another `--p2p-port`, `--grpc-port` or "
        "`--bulk-port`, or 0 for any free one.",
    )
    UPDATE_MISSING = (
        31,
        "An update that the chain counts could not be had from anyone in time.",
        "Check the link and the firewall (both ports must be reachable), raise `update_timeout` on a slow link.",
    )
    DATA = (
        40,
        "Data or a task file cannot be read, or data cannot be prepared.",
        "The message names the file and what is wrong there. Formats: messages, ShareGPT `conversations`, "
        "prompt/completion, text, tokens. `psyche-node data prepare --help` says where data may be.",
    )
    DATA_MISMATCH = (
        41,
        "The prepared data set is not the one the run trains on, or a shard is damaged.",
        "The message names the file. Copy the prepared folder again, or prepare it with the run's settings.",
    )
    MODEL = (
        50,
        "The model cannot be loaded or is not one that can be trained.",
        "The folder must hold config.json and safetensors that `transformers` loads.",
    )
    SEPARATION = (
        51,
        "The start-up self-test found that packed documents see each other, or tokens what comes after them.",
        "Do what the message says, or use a version of transformers that the project pins; it would silently train the "
        "wrong thing.",
    )
    TRAINING = (
        52,
        "A step of training failed for good, or its numbers are not finite.",
        "Lower the learning rate of the run or `micro_batch` of this node; the log says at which round.",
    )
    DESYNCED = (
        53,
        "This node's weights are not those of the majority, or it missed too much to go on.",
        "A node that starts anew takes part in the owner's next run, or in this one when it gets a new model. If it "
        "repeats on one host only, suspect its memory or its GPU.",
    )
    NO_ROOM = (
        54,
        "The planned model does not fit into the memory of these GPUs.",
        "The plan lists what makes it fit: each line is a flag to add, on top of the lines before.",
    )
    CHILD_PROCESS = (
        60,
        "The training or network process of this node ended or stopped answering.",
        "The message says by which signal or with which status, and its own last lines are in the log above. SIGKILL "
        "is usually the kernel's, for want of memory.",
    )
    SIMULATION = (
        70,
        "The simulated network could not be started, or did not finish its run.",
        "The message says what is wrong, or it names the part and its log under `OUT/logs`, which is kept then.",
    )
    REPLICAS_DIFFER = (
        71,
        "The run ended, and the nodes' weights are not byte-identical.",
        "This is a defect: report it with `report.json`, which says from which check on they differ.",
    )
    RPC_REFUSED = (
        85,
        "The RPC endpoint understood a request and refused it.",
        "The message is the endpoint's. Public ones limit how much is asked of them: name another with `--rpc`.",
    )
    CONVERSATION = (
        90,
        "The conversation does not fit the model: its chat template refuses it, or its context window is too small.",
        "The message says which. Shorten the question or the system prompt, or use a template that knows these roles.",
    )
    SERVE = (
        91,
        "The server could not listen, or its key file cannot be used.",
        "The message names the address or the file. Choose another `--port`; the key file must be yours alone "
        "(`chmod 600 FILE`).",
    )
    EVALUATION = (
        92,
        "A model cannot be measured by a task, or results are not those that are on chain.",
        "The message names the task and the example, or the file of results and the run.",
    )
    INTERRUPTED = (
        130,
        "Stopped by Ctrl-C or SIGTERM; no process is left behind.",
        "Nothing to do. What was trained and credited stays on chain.",
    )


NOTHING_TO_DO = (Exit.OK, Exit.RUN_FINISHED, Exit.LEFT, Exit.INTERRUPTED)
"""Ends that are no fault: nobody need look."""

SAID = (
    Exit.CONFIG,
    Exit.WALLET,
    Exit.NODE_KEY,
    Exit.FOLDER_IN_USE,
    Exit.CHAIN_UNAVAILABLE,
    Exit.TRANSACTION_FAILED,
    Exit.JOIN_REFUSED,
    Exit.EJECTED,
    Exit.RUN_NOT_FOUND,
    Exit.DROPPED,
    Exit.RUN_FINISHED,
    Exit.LEFT,
    Exit.NETWORK,
    Exit.DATA,
    Exit.DATA_MISMATCH,
    Exit.DESYNCED,
)
"""Ends whose errors say themselves what to do, for their own cause: what fits all of them would only be beside it."""

_EXITS: dict[str, Exit] = {
    "psyche_node.node.config.ConfigError": Exit.CONFIG,
    "coordinator.run_config.ConfigError": Exit.CONFIG,
    "psyche_node.planning.errors.PlanError": Exit.CONFIG,
    "psyche_node.relay.spec.BadSpec": Exit.CONFIG,
    "coordinator.wallet.WalletError": Exit.WALLET,
    "psyche_node.metrics.MetricsUnavailable": Exit.CONFIG,
    "psyche_node.identity.IdentityError": Exit.NODE_KEY,
    "coordinator.rpc.ChainUnavailable": Exit.CHAIN_UNAVAILABLE,
    "coordinator.failures.ProgramError": Exit.PROGRAM_REFUSED,
    "coordinator.urls.BadUrl": Exit.CONFIG,
    "coordinator.jsonrpc.RpcError": Exit.RPC_REFUSED,
    "coordinator.pulses.RunNotFound": Exit.RUN_NOT_FOUND,
    "coordinator.jsonrpc.ChainError": Exit.TRANSACTION_FAILED,
    "coordinator.state.MalformedAccount": Exit.STATE_UNREADABLE,
    "psyche_node.node.standing.JoinRefused": Exit.JOIN_REFUSED,
    "psyche_node.node.standing.RunFinished": Exit.RUN_FINISHED,
    "psyche_node.node.standing.Dropped": Exit.DROPPED,
    "psyche_node.node.standing.Ejected": Exit.EJECTED,
    "psyche_node.node.standing.Left": Exit.LEFT,
    "psyche_node.network.addresses.NetworkError": Exit.NETWORK,
    "psyche_node.network.ports.PortUnavailable": Exit.NETWORK,
    "psyche_node.network.server.ServerUnavailable": Exit.NETWORK,
    "psyche_node.network.blobs.StoreError": Exit.FILES,
    "psyche_node.node.folder.FolderInUse": Exit.FOLDER_IN_USE,
    "psyche_node.node.exchange.UpdateMissing": Exit.UPDATE_MISSING,
    "psyche_node.data.errors.DataMismatch": Exit.DATA_MISMATCH,
    "psyche_node.data.errors.BadSample": Exit.DATA,
    "psyche_node.data.errors.DataError": Exit.DATA,
    "psyche_node.evaluation.errors.TaskError": Exit.DATA,
    "psyche_node.evaluation.errors.EvaluationError": Exit.EVALUATION,
    "psyche_node.generation.errors.PromptError": Exit.CONVERSATION,
    "psyche_node.generation.errors.GenerationError": Exit.MODEL,
    "psyche_node.serving.errors.ServeError": Exit.SERVE,
    "psyche_node.training.errors.NotTheRuns": Exit.CONFIG,
    "psyche_node.training.errors.DeviceError": Exit.CONFIG,
    "psyche_node.training.errors.ModelError": Exit.MODEL,
    "psyche_node.training.errors.SeparationError": Exit.SEPARATION,
    "psyche_node.training.errors.TrainingError": Exit.TRAINING,
    "optimizer.errors.NonFiniteGradient": Exit.TRAINING,
    "optimizer.errors.OptimizerError": Exit.TRAINING,
    "optimizer.native.StaleKernels": Exit.FILES,
    "psyche_node.node.roundloop.Desynced": Exit.DESYNCED,
    "psyche_node.node.roundloop.TermsChanged": Exit.CONFIG,
    "psyche_node.ipc.IpcError": Exit.CHILD_PROCESS,
    "psyche_node.sim.world.SimulationFailed": Exit.SIMULATION,
    "builtins.TimeoutError": Exit.UNEXPECTED,
    "builtins.ConnectionError": Exit.UNEXPECTED,
    "builtins.OSError": Exit.FILES,
}
"""By name, so that a command does not import torch to say how it ended."""
_BY_NUMBER = {code.value: code for code in Exit}


class Reported:
    """Part of the errors that stand for one of another process. ``exit_code`` is what it means there, None if that is
    not known; ``there`` are its class and message, where they have come apart."""

    exit_code: int | None = None
    there: tuple[str, str] | None = None


def in_words(error: BaseException) -> str:
    """Return what ended a command, as a line of the log. Of a group, the first member; of what a child process
    reported, what it was there. An error that has an exit code of its own says all in its message; of any other the
    class is part of it."""
    error = _first(error)
    code, there = exit_for(error), error.there if isinstance(error, Reported) else None
    kind, message = there or (type(error).__name__, message_of(error))
    unforeseen = code is (Exit.UNEXPECTED if there is None else Exit.CHILD_PROCESS)
    return f"{kind}: {message}" if unforeseen else message


def message_of(error: BaseException) -> str:
    """An error's message; of the system's, without its number and Python's quotes."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, (str, os.PathLike)):
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)


def exit_for(error: BaseException) -> Exit:
    """Return the code of what ended a command: that of its nearest known class, or UNEXPECTED.

    Of a group, the first member's. What another process reported counts as what it was there.
    """
    error = _first(error)
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(error, Reported) and error.exit_code is not None:
        return _BY_NUMBER.get(error.exit_code, Exit.CHILD_PROCESS)
    for one in type(error).__mro__:
        if (code := _EXITS.get(f"{one.__module__}.{one.__qualname__}")) is not None:
            return code
    return Exit.UNEXPECTED


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
