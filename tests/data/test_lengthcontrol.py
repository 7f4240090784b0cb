"""Overlong reasoning is ended at the budget, and nothing but its end is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psyche_node.data import BadSample, ChatTemplate, DataError, PackedDataset, prepare
from psyche_node.data.formats import Sample, parse_record
from psyche_node.data.lengthcontrol import close_reasoning

LONG = "alpha beta gamma delta epsilon zeta"
ASKED = {"role": "user", "content": "Q"}


def parse(*messages: dict[str, Any], **more: Any) -> Sample:
    return parse_record({"messages": [ASKED, *messages], **more}, "here:1")


def said(content: str, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


@pytest.fixture(scope="module", params=["hermes-llama3", "chatml"])
def template(request: pytest.FixtureRequest, seed_tokenizer: Path) -> ChatTemplate:
    return ChatTemplate(seed_tokenizer, request.param)


def pieces(template: ChatTemplate, sample: Sample) -> tuple[str, list[str]]:
    """The assistant's last turn, and the trained tokens."""
    ((ids, trained),) = template.encode([sample])
    text = template.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    turn = text[text.rindex("assistant") + len("assistant") :].removeprefix("<|end_header_id|>\n").lstrip("\n")
    return turn, [template.tokenizer.id_to_token(token) for token in ids[trained].tolist()]


def cut_text(template: ChatTemplate, budget: int) -> str:
    ids = template.tokenizer.encode(LONG, add_special_tokens=False).ids
    assert len(ids) > budget
    return str(template.tokenizer.decode(ids[:budget]))


@pytest.mark.parametrize("message", [said("Yes.", LONG), said(f"<think>\n{LONG}\n</think>\nYes.")])
def test_golden(template: ChatTemplate, message: dict[str, Any]) -> None:
    closed = close_reasoning(parse(message), template.tokenizer, 3)
    turn, trained = pieces(template, closed)
    end = trained[-1]
    assert end in ("<|eot_id|>", "<|im_end|>")
    assert turn.rstrip("\n") == f"<think>\n{cut_text(template, 3)}\n</think>\nYes.{end}"
    assert trained == ["</think>", end]


def test_reasoning_that_never_ended_is_ended_where_it_stops(template: ChatTemplate) -> None:
    closed = close_reasoning(parse(said(f"<think>\n{LONG}")), template.tokenizer, 1000)
    turn, trained = pieces(template, closed)
    assert turn.startswith(f"<think>\n{LONG}\n</think>\n")
    assert trained == ["</think>"], "without an answer, the end token would teach to stop after the reasoning"


def test_what_is_within_the_budget_stays_as_it_is(template: ChatTemplate) -> None:
    exact = len(template.tokenizer.encode(LONG, add_special_tokens=False).ids)
    for sample in (parse(said("Yes.", LONG)), parse(said(f"<think>{LONG}</think>Yes.")), parse(said(LONG))):
        assert close_reasoning(sample, template.tokenizer, exact) is sample
    assert close_reasoning(parse(said("Yes.", LONG)), template.tokenizer, exact - 1).closed


def test_the_conversation_ends_with_the_first_overlong_message(template: ChatTemplate) -> None:
    sample = parse(said("One.", "eta"), ASKED, said("Two.", LONG), ASKED, said("Three.", LONG))
    closed = close_reasoning(sample, template.tokenizer, 3)
    assert [m["content"] for m in closed.messages] == ["Q", "One.", "Q", "Two."]
    assert pieces(template, closed)[1][0] == "</think>"
    assert len(pieces(template, closed)[1]) == 2


def test_messages_that_are_not_trained_are_left_alone(template: ChatTemplate) -> None:
    sample = parse(said("One.", LONG, train=False), ASKED, said("Two.", "eta"))
    assert close_reasoning(sample, template.tokenizer, 3) is sample


def test_reasoning_may_spell_its_own_end(template: ChatTemplate) -> None:
    closed = close_reasoning(parse(said("Yes.", f"</think> {LONG}")), template.tokenizer, 6)
    assert [token for token in pieces(template, closed)[1] if token == "</think>"] == ["</think>"]


def test_templates_that_do_not_know_reasoning(tokenizer: Path) -> None:
    own = ChatTemplate(tokenizer)
    closed = close_reasoning(parse(said("Yes.", LONG)), own.tokenizer, 3)
    assert pieces(own, closed)[1] == ["</think>", "<|eot_id|>"]


def test_a_template_that_does_not_close_reasoning_is_named(seed_tokenizer: Path, tmp_path: Path) -> None:
    body = "{{ m['content'] + (m['reasoning_content'] if m['reasoning_content'] is defined else '') }}"
    source = "{% for m in messages %}{% generation %}" + body + "{% endgeneration %}{% endfor %}"
    (tmp_path / "t.jinja").write_text(source)
    open_ended = ChatTemplate(seed_tokenizer, str(tmp_path / "t.jinja"))
    sample = parse(said("Yes.", LONG))
    sample = parse_record({"messages": list(sample.messages[1:])}, "here:1")
    with pytest.raises(BadSample, match="does not close the reasoning"):
        open_ended.encode([close_reasoning(sample, open_ended.tokenizer, 3)])


def test_prepared_and_counted(seed_tokenizer: Path, tmp_path: Path) -> None:
    lines = [{"messages": [ASKED, said("Yes.", LONG if n % 2 else "eta")]} for n in range(10)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(name: str, template: str, budget: int) -> Any:
        return prepare(data, seed_tokenizer, tmp_path / name, 64, heldout=0, template=template, length_control=budget)

    closed = made("a", "hermes-llama3", 3)
    assert (closed.length_control, closed.counts.closed, closed.counts.train) == (3, 5, 10)
    batch = PackedDataset(tmp_path / "a").batch([0, 1], b"")
    assert batch.trained_tokens > 0
    whole = made("b", "hermes-llama3", 0)
    assert (whole.length_control, whole.counts.closed) == (0, 0)
    assert whole.trained_tokens > closed.trained_tokens
    other = made("c", "chatml", 0)
    assert other.tokenizer != whole.tokenizer, "the template is part of what a run's data is"
    with pytest.raises(DataError, match="no budget"):
        made("d", "chatml", -1)
