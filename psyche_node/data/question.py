"""The first question of held-out data: something to ask a model that was trained on the rest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise, takewhile
from pathlib import Path

import numpy as np

from psyche_node.data.dataset import PackedDataset
from psyche_node.data.template import ChatTemplate

_FIRST, _ANSWER, _SECOND = "one question", "one answer", "another question"
_SEQUENCES = 16


def first_question(folder: Path, template: ChatTemplate) -> str | None:
    """Return what the user says before the first answer in the held-out sequences of a prepared folder.

    ``template`` is what the data was rendered with. None: the data has no conversations, or none of the first
    sequences' can be told apart in the template's text.
    """
    bounds = _bounds_of_questions(template)
    if bounds is None:
        return None
    before, after = bounds
    for text in _beginnings(folder, template):
        end = text.rfind(after)
        start = text.rfind(before, 0, max(end, 0))
        if start >= 0 and (question := text[start + len(before) : end].strip()):
            return question
    return None


def _bounds_of_questions(template: ChatTemplate) -> tuple[str, str] | None:
    """What a template writes before each question, and between the question and the answer."""
    turns = [("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND)]
    text = template.prompt([{"role": role, "content": content} for role, content in turns])
    if text is None or any(text.count(part) != 1 for _, part in turns):
        return None
    head, rest = text.split(_FIRST)
    between, after = rest.split(_ANSWER)[1].split(_SECOND)
    # Before the first question there may be a system prompt, before the second the end of an answer.
    ends = zip(reversed(head), reversed(between), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    return (head[len(head) - same :], after) if same and after else None


def _beginnings(folder: Path, template: ChatTemplate) -> Iterator[str]:
    """The text of each document up to its first trained token, as far as the first sequences go."""
    for row in islice(PackedDataset(folder, verify=False).heldout_rows(), _SEQUENCES):
        tokens, trained, places = row.tokens[0], row.trained[0], row.places[0]
        for start, end in pairwise([*np.flatnonzero(places == 0).tolist(), len(tokens)]):
            answers = np.flatnonzero(trained[start:end])
            if len(answers):
                ids = tokens[start : start + int(answers[0])].tolist()
                yield template.tokenizer.decode(ids, skip_special_tokens=False)
