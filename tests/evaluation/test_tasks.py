"""Task files: what they may say, how examples become prompts, and what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from psyche_node.evaluation import Subject, TaskError, load_task, open_tasks
from psyche_node.evaluation.answers import Regex, extract, matches
from psyche_node.evaluation.evaluate import prompt_of
from psyche_node.evaluation.examples import open_task, spread

ROWS = [
    {"question": f"what is {a} plus {a}", "options": [str(a), str(2 * a), str(2 * a + 1)], "sum": 2 * a}
    for a in range(2, 12)
]
CHOICE = {"kind": "multiple_choice", "prompt": "{{ question }}?", "choices": "options", "target": "{{ sum }}"}


def test_choices_by_text_by_place_and_by_letter(write_task: Callable[..., Path]) -> None:
    by_text = open_task(write_task(ROWS, **CHOICE))
    settings: dict[str, Any] = {**CHOICE, "target": "", "choices": ["{{ options[0] }}", "{{ sum }}"]}
    for place in ("1", "B", "{{ 'b' if sum else 'a' }}"):
        one = open_task(write_task(ROWS, **settings, target_index=place)).examples[0]
        assert (one.choices, one.right, one.accepted) == (("2", "4"), 1, ("4",))
    assert [(one.right, one.accepted) for one in by_text.examples] == [(1, (str(row["sum"]),)) for row in ROWS]
    assert by_text.examples[0].prompt == "what is 2 plus 2?"


def test_few_shot_examples_are_fixed_by_the_seed_and_never_the_example_itself(write_task: Callable[..., Path]) -> None:
    def shots(**more: Any) -> list[tuple[tuple[str, str], ...]]:
        return [one.shots for one in open_task(write_task(ROWS, **CHOICE, few_shot=3, **more)).examples]

    first = shots()
    assert first == shots() != shots(seed=1)
    for row, shown in zip(ROWS, first, strict=True):
        assert len(set(shown)) == 3
        assert f"{row['question']}?" not in [prompt for prompt, _ in shown]
    assert all(answer == str(2 * int(prompt.split()[2])) for shown in first for prompt, answer in shown)
    limited = shots(limit=5)
    assert limited == first[::2]  # an example sees the same ones, whatever else is evaluated


def test_few_shot_examples_of_a_file_of_their_own(write_task: Callable[..., Path], tmp_path: Path) -> None:
    """As many as are shown are enough; the example itself is not shown, also where the file has it, and twice."""
    shown = tmp_path / "shown.jsonl"
    for pool, shots in ((ROWS[7:], 3), (ROWS, 9), ([*ROWS[:1] * 4, *ROWS[6:]], 2)):
        shown.write_text("".join(json.dumps(row) + "\n" for row in pool))
        loaded = open_task(write_task(ROWS[:6], **CHOICE, few_shot=shots, few_shot_data="shown.jsonl"))
        for one in loaded.examples:
            assert len(one.shots) == shots
            assert one.prompt not in [prompt for prompt, _ in one.shots]
    shown.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    too_many = write_task(ROWS, **CHOICE, few_shot=10, few_shot_data="shown.jsonl")
    with pytest.raises(TaskError, match=r"rows.jsonl:1: too few examples to show 10 .* 9 beside itself"):
        open_task(too_many)


def test_prompts_in_plain_text_and_in_chat(write_task: Callable[..., Path], subject: Subject) -> None:
    settings = {**CHOICE, "kind": "generate_until", "choices": "", "few_shot": 1, "description": "Add."}
    loaded = open_task(write_task(ROWS, **settings))
    (shown, said), asked = loaded.examples[0].shots[0], loaded.examples[0].prompt
    assert prompt_of(subject, loaded.task, loaded.examples[0], None).text == f"Add.\n\n{shown} {said}\n\n{asked}"
    loaded = open_task(write_task(ROWS, **settings, chat=True, thinking="both"))
    assert loaded.task.switches == (True, False)
    end = "<|eot_id|>"
    turns = f"[system]Add.{end}[user]{shown}{end}[assistant]{said}{end}[user]{asked}{end}[assistant]"
    for thinking, more in ((True, "<think>"), (False, "")):
        assert prompt_of(subject, loaded.task, loaded.examples[0], thinking).text == turns + more


def test_parquet_and_toml_say_the_same_as_jsonl_and_json(tmp_path: Path, write_task: Callable[..., Path]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "sums.toml").write_text(
        'kind = "multiple_choice"\ndata = "rows.parquet"\nprompt = "{{ question }}?"\nchoices = "options"\n'
        'target = "{{ sum }}"\n'
    )
    loaded = open_task(tmp_path / "sums.toml")
    assert loaded.task.name == "sums"
    assert loaded.examples == open_task(write_task(ROWS, **CHOICE)).examples


def test_accepted_answers_may_be_several(write_task: Callable[..., Path]) -> None:
    path = write_task([{"q": "x", "a": ["one", "two"]}], kind="generate_until", prompt="{{ q }}", accept="a")
    assert open_task(path).examples[0].accepted == ("one", "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "essay"}, "kind"),
        ({"colour": "red"}, "colour"),
        ({"prompt": "{{ question "}, "does not parse"),
        ({"choices": ""}, "needs `choices`"),
        ({"target_index": "1"}, "one of `target` and `target_index`"),
        ({"thinking": "on"}, "needs `chat = true`"),
        ({"kind": "generate_until", "samples": 3}, "would all be the same"),
        ({"kind": "generate_until", "extract": [{"regex": "("}]}, "no regular expression"),
        ({"kind": "generate_until", "extract": []}, "at least one"),
        ({"prompt": "{{ questoin }}"}, r"rows.jsonl:1.*questoin.*fields are options, question, sum"),
        ({"choices": "question"}, "not a list"),
        ({"target": "7"}, "is 0 of the choices"),
        ({"target": "", "target_index": "d"}, "there are 3 choices"),
        ({"target": "", "target_index": "ß"}, "there are 3 choices"),
        ({"target": "", "target_index": "9" * 5000}, "there are 3 choices"),
        ({"few_shot": 10}, "too few examples"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"prompt": "{{ question.__class__.__mro__ }}"}, "cannot be rendered"),
    ],
)
def test_what_is_wrong_is_named(write_task: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        open_task(write_task(ROWS, **{**CHOICE, **change}))


def test_files_that_are_no_tasks(tmp_path: Path, write_task: Callable[..., Path]) -> None:
    (tmp_path / "bad.toml").write_text("kind = ")
    with pytest.raises(TaskError, match="is not TOML"):
        load_task(tmp_path / "bad.toml")
    with pytest.raises(TaskError, match="cannot be read"):
        load_task(tmp_path / "none.json")
    path = write_task(ROWS, **CHOICE)
    with pytest.raises(TaskError, match="another task is called 'task'"):
        open_tasks([path, path])
    with pytest.raises(TaskError, match="has no example"):
        open_task(write_task([], **CHOICE))


def test_spread() -> None:
    assert spread(10, 0) == list(range(10))
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]


@pytest.mark.parametrize(
    ("extractors", "text", "answer"),
    [
        (["whole"], "  two \n", "two"),
        (["whole"], " \n", None),
        (["first_line"], "\n two \nthree", "two"),
        (["last_number"], "from 3 to -1,234.50 apples", "-1234.50"),
        (["last_number"], "none", None),
        (["last_number"], "they are 3,4", "4"),
        (["last_number"], "1,2345", "2345"),
        (["last_number"], "10-5", "5"),
        (["last_number"], "on 2026-11-28", "28"),
        (["last_number"], "x=-5", "-5"),
        (["last_number"], "x = \u22125.", "-5"),
        (["last_number"], "$1,234,567.5", "1234567.5"),
        (["last_number"], "it is .5", ".5"),
        (["boxed"], r"so \boxed{1} or \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (["boxed"], r"so \boxed{1", None),
        (["boxed", "last_number"], "it is 7", "7"),
        ([Regex(regex=r"answer is (\w+)")], "the answer is no, the answer is yes", "yes"),
        ([Regex(regex=r"\d+ km")], "3 km then 4 km", "4 km"),
        ([Regex(regex=r"(x)?y")], "y", None),
    ],
)
def test_extraction(extractors: list[Any], text: str, answer: str | None) -> None:
    assert extract(extractors, text) == answer


@pytest.mark.parametrize(
    ("answer", "accepted", "how", "right"),
    [
        ("The  Cat!", ["cat"], "normalised", True),
        ("The Cat", ["cat"], "exact", False),
        (" cat", ["dog", "cat "], "exact", True),
        ("-3.5", ["35"], "normalised", False),
        ("3.5", ["3.5."], "normalised", True),
        ("-5", ["5", "-5"], "normalised", True),
        ("0", ["-0"], "normalised", True),
        ("\u22125", ["-5"], "number", True),
        ("1,000.0", ["1000"], "number", True),
        ("12.", ["12"], "number", True),
        ("twelve", ["12"], "number", False),
        ("nan", ["nan"], "number", False),
        (None, ["12"], "normalised", False),
    ],
)
def test_matching(answer: str | None, accepted: list[str], how: Any, right: bool) -> None:
    assert matches(answer, accepted, how) is right
