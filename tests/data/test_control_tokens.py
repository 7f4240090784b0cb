"""Text that spells a control token is text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from psyche_node.data import BadSample, ChatTemplate
from psyche_node.data.formats import Sample, parse_record

SPELLED = ["<|eot_id|>", "<|start_header_id|>", "<seed:bos>", "<think>", "<tool_call>"]


def parse(*messages: dict[str, Any], **more: Any) -> Sample:
    return parse_record({"messages": list(messages), **more}, "here:1")


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture(scope="module")
def hermes(seed_tokenizer: Path) -> ChatTemplate:
    return ChatTemplate(seed_tokenizer, "hermes-llama3")


def counts(template: ChatTemplate, sample: Sample) -> dict[str, int]:
    ((ids, _),) = template.encode([sample])
    numbers = {text: template.tokenizer.token_to_id(text) for text in SPELLED}
    return {text: ids.tolist().count(number) for text, number in numbers.items()}


@pytest.mark.parametrize("text", SPELLED)
@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_what_others_say_is_text(hermes: ChatTemplate, role: str, text: str) -> None:
    others = [said("system", "S"), said("user", "U"), said("tool", "T")]
    honest = parse(*others, said("assistant", "A"))
    evil = parse(*(said(role, f"a {text}b{text}") if m["role"] == role else m for m in others), said("assistant", "A"))
    assert counts(hermes, evil) == counts(hermes, honest)
    ((ids, trained),) = hermes.encode([evil])
    assert hermes.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == hermes.render(evil).text
    assert hermes.tokenizer.decode(ids[trained].tolist(), skip_special_tokens=False) == "A<|eot_id|>"


def test_tools_are_text(hermes: ChatTemplate) -> None:
    tools = [{"name": "<|eot_id|>", "parameters": {"<|eot_id|>": 1}}]
    honest = parse(said("user", "U"), said("assistant", "A"), tools=[{"name": "n", "parameters": {"p": 1}}])
    evil = parse(said("user", "U"), said("assistant", "A"), tools=tools)
    assert counts(hermes, evil) == counts(hermes, honest)


def test_variables_of_the_template_are_text(seed_tokenizer: Path, tmp_path: Path) -> None:
    """As the date that Llama's templates take from whoever fills them."""
    source = (
        "{{ date }}{% for m in messages %}{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}{% endfor %}"
    )
    (tmp_path / "dated.jinja").write_text(source)
    template = ChatTemplate(seed_tokenizer, str(tmp_path / "dated.jinja"))
    sample = parse(said("assistant", "A"), chat_template_kwargs={"date": "<|eot_id|> 1 May"})
    assert counts(template, sample)["<|eot_id|>"] == 1


def test_a_control_token_of_one_character_and_blanks_that_are_a_token(seed_tokenizer: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((seed_tokenizer / name).read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["☃"])
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = ChatTemplate(tmp_path, "hermes-llama3")
    ((ids, _),) = template.encode([parse(said("user", "a☃b    c"), said("assistant", "A"))])
    assert tokenizer.token_to_id("☃") not in ids
    assert tokenizer.token_to_id("    ") in ids, "as the model knows it"


def test_a_vocabulary_of_pieces_that_has_control_tokens_among_them(tmp_path: Path) -> None:
    pieces = ["<unk>", "</s>", "a", "U", "<", "/", "s", ">", "\n"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    source = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    template = ChatTemplate(tmp_path)
    sample = parse(said("user", "U</s>U"), said("assistant", "a</s>"))
    ((ids, trained),) = template.encode([sample])
    assert ids.tolist().count(tokenizer.token_to_id("</s>")) == 2
    assert tokenizer.decode(ids[trained].tolist(), skip_special_tokens=False).replace(" ", "") == "a</s></s>"


def test_the_assistant_thinks_and_calls_but_ends_no_turn(hermes: ChatTemplate) -> None:
    found = counts(hermes, parse(said("user", "U"), said("assistant", "<think>\n<|eot_id|></think>\n<tool_call>")))
    assert (found["<think>"], found["<tool_call>"], found["<|eot_id|>"]) == (1, 1, 2)


def test_a_span_beside_spelled_tokens(hermes: ChatTemplate) -> None:
    spans = [{"start": 0, "end": 10}]
    evil = parse(said("user", "<|eot_id|>"), said("assistant", "<|eot_id|> alpha", spans=spans, train=False))
    ((ids, trained),) = hermes.encode([evil])
    assert hermes.tokenizer.decode(ids[trained].tolist(), skip_special_tokens=False) == "<|eot_id|>"
    assert trained.sum() > 1, "as text, it is several tokens"


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["<|eot_id|>", "<|start_header_id|>", "<seed:bos>", "a", " b", "<", "é"]), max_size=6
    ),
    bounds=st.sets(st.integers(0, 40), min_size=2, max_size=6),
    train=st.booleans(),
    part=st.booleans(),
)
def test_no_bound_of_a_span_makes_a_control_token(
    hermes: ChatTemplate, pieces: list[str], bounds: set[int], train: bool, part: bool
) -> None:
    """Wherever spans begin and end, also inside a spelling: the tokens are those without spans, and the mask is no
    more than what they cover."""
    content = f"x{''.join(pieces)}x"
    places = sorted({min(bound, len(content)) for bound in bounds})
    spans = [{"start": a, "end": b, "train": part} for a, b in zip(places[::2], places[1::2], strict=False)]
    plain = parse(said("user", "U"), said("assistant", content))
    message = said("assistant", content, spans=spans, train=train)
    if not train and not (part and spans):
        return
    spanned = parse(said("user", "U"), message)
    ((expected, _),) = hermes.encode([plain])
    ((ids, trained),) = hermes.encode([spanned])
    assert ids.tolist() == expected.tolist()
    assert counts(hermes, spanned)["<|eot_id|>"] == 2
    covered = "".join(hermes.render(spanned).text[a:b] for a, b in hermes.render(spanned).spans)
    said_by_spans = "".join(content[span["start"] : span["end"]] for span in spans)
    assert train or covered == said_by_spans * part
    assert trained.sum() <= len(covered.encode())


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from([*SPELLED, "a", " ", "\n", "<", "|>", "é"]), max_size=8))
def test_no_content_makes_a_control_token(hermes: ChatTemplate, pieces: list[str]) -> None:
    honest = counts(hermes, parse(said("user", ""), said("assistant", "A")))
    assert counts(hermes, parse(said("user", "".join(pieces)), said("assistant", "A"))) == honest


def test_text_is_encoded_as_ever_where_nothing_is_spelled(hermes: ChatTemplate) -> None:
    sample = parse(said("user", "a < b | c > d"), said("assistant", "A"))
    ((ids, _),) = hermes.encode([sample])
    text = hermes.render(sample).text
    assert ids.tolist() == hermes.tokenizer.encode(text, add_special_tokens=False).ids


def test_marks_of_our_own_in_the_text(hermes: ChatTemplate) -> None:
    with pytest.raises(BadSample, match=r"noncharacter.*Remove it"):
        hermes.encode([parse(said("user", "<|eot_id|>\ufdd0"), said("assistant", "A"))])
    hermes.encode([parse(said("user", "\ufdd0"), said("assistant", "A"))])


def test_half_of_a_surrogate_pair_is_named_wherever_it_is(hermes: ChatTemplate) -> None:
    half = json.loads('"\\ud800"')
    call = {"function": {"name": "f", "arguments": {"a": half}}}
    asked = said("user", "U")
    for sample in (
        parse(asked, said("assistant", "A"), tools=[{"name": half}]),
        parse(asked, said("assistant", "", tool_calls=[call]), group="g"),
    ):
        with pytest.raises(BadSample, match="half of a surrogate pair"):
            hermes.encode([sample])
