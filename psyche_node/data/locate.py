"""Where data is: files, folders as `datasets` saves them or as dataset repositories have them, URLs, the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from psyche_node.data.errors import DataError
from psyche_node.data.files import is_url, read_object
from psyche_node.data.manifest import NAME
from psyche_node.data.readers import SUFFIXES, suffix_of

HUB = "hf://datasets/"
LARGEST_DOWNLOAD = 1 << 40
"""Bytes of one file, unless another limit is given."""
_AGAIN = "Save the data set again"
_OTHER_SPLITS = frozenset(["test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation"])
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?")


def is_remote(source: str) -> bool:
    """Whether ``source`` is fetched, and not a path."""
    return is_url(source) or source.startswith("hf://")


def find_files(
    source: str, cache: Path, limit: int = LARGEST_DOWNLOAD, note: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Return the local data files of ``source``, in order; what is remote is fetched into ``cache`` first.

    ``source`` is a file; a folder (of `Dataset.save_to_disk`, or any with data files in it); ``http(s)://...``; or
    ``hf://datasets/OWNER/NAME[@REVISION][/PATH]``. Of a set with splits the training split is taken; ``note`` hears
    what is passed over, and the SHA-256 of what was fetched. ``limit`` bounds the bytes of each remote file.

    Raises:
        DataError: there is nothing that can be read, or it cannot be fetched.
    """
    if is_url(source):
        from psyche_node.data.download import download  # late: who reads files does not wait for an HTTP client

        path = download(source, cache, limit)
        note(f"{source} has SHA-256 {path.name[:64]}")
        return [path]
    if source.startswith(HUB):
        return _hub(source, cache, limit, note)
    if not source.strip():  # a variable of a shell that is not set; Path would take it for the current folder
        raise DataError("the name of a data file is empty. Name data files, folders or URLs")
    path = Path(source)
    if path.is_dir():
        return _folder(path, note)
    if not path.exists():
        raise DataError(f"{source}: there is no such file or folder. Name data files, folders or URLs")
    if suffix_of(path.name) is None:
        raise DataError(f"{source}: no known kind of file. Known are {', '.join(SUFFIXES)}")
    return [path]


def _folder(folder: Path, note: Callable[[str], None]) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json", _AGAIN).get("splits", [])
        if "train" not in splits:
            raise DataError(f"{folder} has the splits {', '.join(splits)}. Name one of these folders inside it")
        if others := [split for split in splits if split != "train"]:
            note(f"{folder}: takes the split train, and not {', '.join(others)}")
        return _folder(folder / "train", note)
    if (folder / "state.json").is_file():
        state = read_object(folder / "state.json", _AGAIN)
        if state.get("_indices_data_files"):
            raise DataError(f"{folder} is a selection of rows. Save it again after `flatten_indices()`")
        if names := [Path(part["filename"]).name for part in state.get("_data_files", [])]:
            return [folder / name for name in names]
    found = sorted(
        (path.relative_to(folder).as_posix(), path)
        for path in folder.rglob("*")
        if path.is_file() and suffix_of(path.name) and path.name != NAME
    )
    names = _training([name for name, _ in found if not _hidden(name)], str(folder), note)
    return [folder / name for name in names]


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _training(names: list[str], where: str, note: Callable[[str], None]) -> list[str]:
    """The files that belong to no other split than that for training, by their names and folders."""
    # A repository describes itself in JSON: where there are files of another kind, those are the data.
    names = [name for name in names if not name.endswith(".json")] or names
    others = [name for name in names if set(re.split(r"[^a-z]+", name.lower())) & _OTHER_SPLITS]
    kept = [name for name in names if name not in others]
    if not kept:
        what = f"only other splits ({', '.join(others[:4])})" if others else "no data file"
        raise DataError(f"{where} holds {what}. Name the files themselves; known are {', '.join(SUFFIXES)}")
    if others:
        note(f"{where}: passes over {', '.join(others[:4])}{' and more' if len(others) > 4 else ''}: other splits")
    return kept


def _hub(source: str, cache: Path, limit: int, note: Callable[[str], None]) -> list[Path]:
    parts = _REPOSITORY.fullmatch(source.removeprefix(HUB))
    if parts is None:
        raise DataError(f"{source} is not {HUB}OWNER/NAME[@REVISION][/PATH]")
    from huggingface_hub import HfApi, get_token, hf_hub_url  # late: it takes as long as all the rest
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from psyche_node.data.download import download

    # Without a network it raises the errors of its HTTP client, which one differs between versions.
    bases = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    lost: tuple[type[Exception], ...] = (*bases, OfflineModeIsEnabled, OSError)
    name, path = parts["name"], parts["path"] or ""
    try:
        info = HfApi().dataset_info(name, revision=parts["revision"], files_metadata=False, timeout=30)
    except lost as error:
        raise DataError(
            f"{source} cannot be looked up ({' '.join(str(error).split())[:200]}). Check name, access (HF_TOKEN) and "
            "network; offline, name a folder with its files"
        ) from error
    names = sorted(one.rfilename for one in info.siblings or ())
    inside = [one for one in names if suffix_of(one) and (one == path or one.startswith(f"{path}/" if path else ""))]
    chosen = inside if path in inside else _training([one for one in inside if not _hidden(one)], source, note)
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # By the commit, not the branch: all files are of one version, whatever is pushed meanwhile.
    note(f"{source} is commit {info.sha}")
    urls = [hf_hub_url(name, one, repo_type="dataset", revision=info.sha) for one in chosen]
    return [download(url, cache, limit, headers) for url in urls]
