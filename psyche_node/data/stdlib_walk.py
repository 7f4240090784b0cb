"""Questions and answers from the documentation that this interpreter's standard library carries.

Run as a process of its own (``python -I -S stdlib_walk.py``): it imports most of the standard library, and no process
that does anything else should. It writes one ``messages`` sample per line to standard output, and a JSON object of
counts as the last line of standard error. The output depends on the interpreter alone: sorted names, no addresses, no
hash order, and every choice of a template is a keyed hash of the documented object's name.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

MAX_ANSWER = 640
"""Longest answer, in characters; longer documentation ends at a line before it."""

# Opening a browser, printing a poem, drawing windows, waiting for a terminal, or running tests: no documentation is
# worth that. The rest are old, are data, or are another module's implementation under a second name.
_SKIP = frozenset(
    ["antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "nt", "ntpath", "nturl2path", "posix"]
) | {"posixpath", "pydoc_data", "test", "this", "turtle", "turtledemo"}
_SKIP_PACKAGES = frozenset(["encodings", "ctypes.macholib"])
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s")

_WHAT = (
    ("What does {name} do?", 10),
    ("Explain {name}.", 3),
    ("How do I use {name}?", 2),
    ("What is {name} for?", 2),
    ("Tell me about {name}.", 1),
)
_CLASS = (
    ("What is {name}?", 6),
    ("What does {name} do?", 6),
    ("Explain the class {name}.", 3),
    ("Tell me about {name}.", 1),
)
_MODULE = (
    ("What is the module {name} for?", 4),
    ("What does the {name} module do?", 4),
    ("Tell me about the module {name}.", 2),
)
_SIGNATURE = (
    ("Show the signature of {name}.", 5),
    ("How is {name} called?", 2),
    ("What is the signature of {name}?", 3),
)
_PARAMETERS = (
    ("What are the parameters of {name}?", 5),
    ("Which arguments does {name} take?", 3),
    ("List the arguments of {name}.", 2),
)
_SUMMARY = (
    ("Describe {name} in one sentence.", 3),
    ("Summarise {name}.", 2),
    ("In short, what does {name} do?", 3),
)
_MEMBERS = (
    ("Which public methods does {name} have?", 3),
    ("List the methods of {name}.", 2),
)
_CONTENTS = (
    ("What does the module {name} define?", 3),
    ("List the public names of {name}.", 2),
)


@dataclass(frozen=True, slots=True)
class Documented:
    """One documented object: its public dotted name, what it is, its cleaned docstring and its parameter list."""

    name: str
    kind: str
    doc: str
    signature: inspect.Signature | None
    members: tuple[str, ...] = ()


def choose(templates: tuple[tuple[str, int], ...], name: str) -> str:
    """Return one of the weighted templates, by a keyed hash of ``name``, filled in."""
    digest = hashlib.blake2b(f"{templates[0][0]}|{name}".encode(), key=b"psyche stdlib chat", digest_size=8).digest()
    ticket = int.from_bytes(digest, "little") % sum(weight for _, weight in templates)
    for text, weight in templates:
        if ticket < weight:
            return text.format(name=name)
        ticket -= weight
    raise AssertionError("the weights were summed above")


def bounded(text: str, limit: int = MAX_ANSWER) -> str:
    """Return ``text`` up to its last paragraph, line or word that ends within ``limit`` characters."""
    if len(text) <= limit:
        return text
    head = text[: limit + 1]
    for separator, least in (("\n\n", limit // 2), ("\n", limit // 3), (" ", 1)):
        if (end := head.rfind(separator)) >= least:
            return head[:end].rstrip()
    return head[:limit]


def modules() -> Iterator[tuple[str, types.ModuleType]]:
    """Yield the public modules by name, packages before what they contain, skipping what does not import here."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _SKIP:
            continue
        yield from _import(name)
        if name == "os":
            yield "os.path", importlib.import_module("os.path")


def _import(name: str) -> Iterator[tuple[str, types.ModuleType]]:
    try:
        module = importlib.import_module(name)
    except BaseException:  # a module of another platform, or one that exits: not documentation of this interpreter
        return
    yield name, module
    if name in _SKIP_PACKAGES or not hasattr(module, "__path__"):
        return
    for child in sorted(info.name for info in pkgutil.iter_modules(module.__path__)):
        if not child.startswith("_") and not child.startswith("test"):
            yield from _import(f"{name}.{child}")


def documented() -> Iterator[Documented]:
    """Yield every documented public object once, under the first public name it is found by."""
    seen: set[int] = set()
    texts: set[tuple[str, str]] = set()
    keep: list[object] = []  # an object that died would give its id to another one

    def fresh(item: object, short: str) -> str | None:
        if id(item) in seen:
            return None
        doc = _doc(item)
        if doc is None or (short, doc) in texts:
            return None
        seen.add(id(item))
        keep.append(item)
        texts.add((short, doc))
        return doc

    for module_name, module in modules():
        prefix = "" if module_name == "builtins" else f"{module_name}."
        names = _public(module, module_name)
        doc = fresh(module, module_name)
        if doc is not None:
            yield Documented(module_name, "module", doc, None, tuple(names))
        for short in names:
            item = getattr(module, short, None)
            if inspect.isclass(item):
                if (doc := fresh(item, short)) is None:
                    continue
                methods = tuple(
                    m for m in sorted(vars(item)) if not m.startswith("_") and callable(getattr(item, m, None))
                )
                yield Documented(prefix + short, "class", doc, _signature(item), methods)
                for attribute in sorted(vars(item)):
                    if attribute.startswith("_"):
                        continue
                    raw = vars(item)[attribute]
                    method = getattr(raw, "__func__", raw)
                    kind = "method" if inspect.isroutine(method) else "property" if _is_property(method) else ""
                    if kind and (doc := fresh(method, attribute)) is not None:
                        yield Documented(f"{prefix}{short}.{attribute}", kind, doc, _signature(method, method_of=item))
            elif inspect.isroutine(item) and (doc := fresh(item, short)) is not None:
                yield Documented(prefix + short, "function", doc, _signature(item))


def _is_property(item: object) -> bool:
    return isinstance(item, property) or inspect.isgetsetdescriptor(item) or inspect.ismemberdescriptor(item)


def _public(module: types.ModuleType, module_name: str) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted({name for name in listed if isinstance(name, str) and not name.startswith("_")})
    return sorted(
        name
        for name, item in vars(module).items()
        if not name.startswith("_") and (getattr(item, "__module__", None) == module_name or inspect.isbuiltin(item))
    )


def _doc(item: object) -> str | None:
    doc = getattr(item, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return None
    lines = [line.rstrip() for line in inspect.cleandoc(_ADDRESS.sub("", doc)).splitlines()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return text if text.isprintable() or all(c.isprintable() or c == "\n" for c in text) else None


def _signature(item: object, method_of: type | None = None) -> inspect.Signature | None:
    try:
        signature = inspect.signature(item)  # type: ignore[arg-type]
        str(signature)
    except Exception:  # none, or defaults and annotations that do not evaluate or print: it has none to show
        return None
    parameters = list(signature.parameters.values())
    if method_of is not None and parameters and parameters[0].name in ("self", "cls", "type"):
        parameters = parameters[1:]
    return signature.replace(parameters=parameters)


def _call(item: Documented) -> str:
    return _ADDRESS.sub("", f"{item.name}{item.signature}")


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL.name: "*", inspect.Parameter.VAR_KEYWORD.name: "**"}
    name = stars.get(parameter.kind.name, "") + parameter.name
    if parameter.default is inspect.Parameter.empty:
        return name
    return _ADDRESS.sub("", f"{name} (default {parameter.default!r})")


def questions(item: Documented) -> Iterator[tuple[str, str]]:
    """Yield the (question, answer) pairs of one object."""
    call = None if item.signature is None else _call(item)
    if call is not None and len(call) > MAX_ANSWER // 2:
        call = None
    templates = {"module": _MODULE, "class": _CLASS}.get(item.kind, _WHAT)
    head = f"{call}\n\n" if call is not None else ""
    yield choose(templates, item.name), head + bounded(item.doc, MAX_ANSWER - len(head))
    summary = bounded(_SENTENCE.split(" ".join(item.doc.split("\n\n")[0].split()), maxsplit=1)[0], MAX_ANSWER // 2)
    if len(summary.split()) >= 4 and item.kind != "module":
        yield choose(_SUMMARY, item.name), summary
    if call is not None and item.signature is not None and item.kind in ("function", "method", "class"):
        yield choose(_SIGNATURE, item.name), call
        parameters = [_parameter(p) for p in item.signature.parameters.values()]
        if parameters:
            listed = "\n".join(f"- {p}" for p in parameters)
            yield choose(_PARAMETERS, item.name), bounded(f"{item.name} takes:\n{listed}")
    if len(item.members) >= 3:
        templates = _CONTENTS if item.kind == "module" else _MEMBERS
        yield choose(templates, item.name), bounded(", ".join(item.members), MAX_ANSWER // 2).rstrip(",")


def main() -> None:
    """Write the samples to standard output and the counts to standard error."""
    warnings.simplefilter("ignore")
    counts: dict[str, int] = {}
    lines: list[str] = []
    # Some modules print when imported; nothing but samples may reach standard output.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for item in documented():
            counts[item.kind] = counts.get(item.kind, 0) + 1
            for question, answer in questions(item):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                lines.append(json.dumps({"group": item.name, "messages": messages}, ensure_ascii=False))
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())
    sys.stdout.buffer.flush()
    sys.stderr.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
