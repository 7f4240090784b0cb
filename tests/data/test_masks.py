"""What is trained: against transformers' generation masks, by message, by span, by both ways of finding it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_node.data import BadSample, ChatTemplate, DataError
from psyche_node.data.formats import Sample, parse_sample
from psyche_node.data.rendering import SHIPPED, find_template

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
QUESTION = {"role": "user", "content": "Is it warm?"}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [QUESTION, {"role": "assistant", "content": "alpha beta"}]},
    "system": {
        "messages": [{"role": "system", "content": "Be brief."}, QUESTION, {"role": "assistant", "content": "Yes."}]
    },
    "multi-turn": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "Yes 🐍"},
            QUESTION,
            {"role": "assistant", "content": ""},
        ]
    },
    "thinking": {
        "messages": [QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "July, so\n\nwarm"}],
        "thinking": True,
    },
    "inline": {"messages": [QUESTION, {"role": "assistant", "content": "<think>\nJuly\n</think>\nYes."}]},
    "earlier reasoning": {
        "messages": [
            *(QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "July"}),
            *(QUESTION, {"role": "assistant", "content": "Still.", "reasoning_content": "Still July"}),
        ],
    },
    "all reasoning": {
        "messages": [
            *(QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "July"}),
            *(QUESTION, {"role": "assistant", "content": "Still.", "reasoning_content": "Still July"}),
        ],
        "chat_template_kwargs": {"keep_cots": True},
    },
    "tools": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            QUESTION,
            {"role": "assistant", "content": None, "reasoning_content": "Ask", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": '{"t": 25}'},
            {"role": "tool", "content": "26"},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "25 is warm"},
        ],
        "tools": TOOLS,
        "thinking": True,
    },
}


def parse(record: dict[str, Any]) -> Sample:
    return parse_sample(json.dumps(record).encode(), "here:1")


def trained_text(template: ChatTemplate, sample: Sample) -> str:
    ((ids, trained),) = template.encode([sample])
    return str(template.tokenizer.decode(ids[trained].tolist(), skip_special_tokens=False))


@pytest.fixture(scope="module", params=SHIPPED)
def template(request: pytest.FixtureRequest, seed_tokenizer: Path) -> ChatTemplate:
    return ChatTemplate(seed_tokenizer, request.param)


@pytest.fixture(scope="module")
def hermes(seed_tokenizer: Path) -> ChatTemplate:
    return ChatTemplate(seed_tokenizer, "hermes-llama3")


def unmarked(template: ChatTemplate, folder: Path) -> ChatTemplate:
    """The same template without its marks."""
    source = re.sub(r"\{%- (end)?generation %\}", "", template.source)
    (folder / "plain.jinja").write_text(source)
    return ChatTemplate(template.folder, str(folder / "plain.jinja"))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_masks_equal_those_of_transformers(template: ChatTemplate, name: str) -> None:
    from transformers import AutoTokenizer

    reference: Any = AutoTokenizer.from_pretrained(template.folder)
    sample = parse(CONVERSATIONS[name])
    ((ids, trained),) = template.encode([sample])
    expected = reference.apply_chat_template(
        list(sample.messages),
        tools=None if sample.tools is None else list(sample.tools),
        chat_template=template.source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **sample.options,
    )
    assert ids.tolist() == expected["input_ids"]
    assert trained.astype(int).tolist() == expected["assistant_masks"]
    assert 0 < trained.sum() < len(ids)


def test_golden_hermes_with_tools_and_thinking(hermes: ChatTemplate) -> None:
    rendered = hermes.render(parse(CONVERSATIONS["tools"]))
    assert rendered.text == (
        "<seed:bos><|start_header_id|>system<|end_header_id|>\n\n"
        "Reason step by step inside <think> and </think> before you answer.\n\n"
        "You can call these functions:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}\n'
        '</tools>\nTo call one, write <tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>. '
        "Results come in <tool_response>.\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it warm?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nAsk\n</think>\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|eot_id|>'
        "<|start_header_id|>tool<|end_header_id|>\n\n"
        '<tool_response>\n{"t": 25}\n</tool_response>\n<tool_response>\n26\n</tool_response><|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n25 is warm\n</think>\nYes.<|eot_id|>"
    )
    said = [rendered.text[a:b] for a, b in rendered.spans]
    assert [(text[:12], text[-10:]) for text in said] == [
        ("<think>\nAsk\n", "<|eot_id|>"),
        ("<think>\n25 i", "<|eot_id|>"),
    ]


def test_golden_chatml(seed_tokenizer: Path) -> None:
    chatml = ChatTemplate(seed_tokenizer, "chatml")
    rendered = chatml.render(parse(CONVERSATIONS["multi-turn"]))
    assert rendered.text == (
        "<|im_start|>user\nIs it warm?<|im_end|>\n<|im_start|>assistant\nYes 🐍<|im_end|>\n"
        "<|im_start|>user\nIs it warm?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["Yes 🐍<|im_end|>", "<|im_end|>"]


def test_an_answer_whose_reasoning_was_taken_away_is_not_trained(hermes: ChatTemplate) -> None:
    assert trained_text(hermes, parse(CONVERSATIONS["earlier reasoning"])) == (
        "<think>\nStill July\n</think>\nStill.<|eot_id|>"
    )
    assert trained_text(hermes, parse(CONVERSATIONS["all reasoning"])) == (
        "<think>\nJuly\n</think>\nYes.<|eot_id|><think>\nStill July\n</think>\nStill.<|eot_id|>"
    )


def test_prefix_rendering_refuses_a_template_that_takes_reasoning_away(hermes: ChatTemplate, tmp_path: Path) -> None:
    plain = unmarked(hermes, tmp_path)
    assert not plain.marked
    with pytest.raises(BadSample, match=r"renders message 1 differently inside the whole conversation"):
        plain.encode([parse(CONVERSATIONS["earlier reasoning"])])


TEXT = st.text("ab <>\n.é🐍", max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        for more in range(draw(st.integers(1, 2))):
            if more:
                messages.append({"role": "tool", "content": draw(TEXT)})
            said: dict[str, Any] = {"role": "assistant", "content": draw(TEXT)}
            if draw(st.booleans()):
                said["reasoning_content"] = draw(TEXT)
            if draw(st.booleans()):
                said["tool_calls"] = [CALL]
            said["train"] = draw(st.booleans())
            messages.append(said)
    messages[-1]["train"] = True
    record: dict[str, Any] = {"messages": messages, "chat_template_kwargs": {"keep_cots": draw(st.booleans())}}
    if draw(st.booleans()):
        record |= {"tools": TOOLS, "thinking": draw(st.booleans())}
    return record


@settings(max_examples=150, deadline=None)
@given(record=conversations())
def test_prefix_rendering_equals_the_marks_wherever_it_exists(
    template: ChatTemplate, plain: ChatTemplate, record: dict[str, Any]
) -> None:
    sample = parse(record)
    ((ids, trained),) = template.encode([sample])
    assert trained.any()
    try:
        ((others, by_prefix),) = plain.encode([sample])
    except BadSample:
        last = max(i for i, m in enumerate(sample.messages) if m["role"] == "user")
        assert not sample.options["keep_cots"]
        assert any("reasoning_content" in m for m in sample.messages[:last]), "nothing was taken away"
        return
    assert ids.tolist() == others.tolist()
    assert trained.tolist() == by_prefix.tolist()


@pytest.fixture(scope="module")
def plain(template: ChatTemplate, tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    """The folder's end token is Hermes's; ChatML ends turns with another."""
    return unmarked(template, tmp_path_factory.mktemp("plain"))


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant", "content": content, **more}]}


def test_spans_leave_out_characters_of_an_answer(template: ChatTemplate) -> None:
    end = "<|eot_id|>" if "eot_id" in template.source else "<|im_end|>"
    spans = [{"start": 5, "end": 11, "train": False}]
    assert trained_text(template, parse(answer("alpha, beta, gamma", spans=spans))) == f"alpha, gamma{end}"
    record = answer("alpha, beta, gamma", spans=[{"start": 5, "end": 11}], train=False, reasoning_content="zeta")
    assert trained_text(template, parse(record)) == ", beta"


def test_spans_are_found_where_the_text_repeats(hermes: ChatTemplate) -> None:
    record = answer("beta beta", reasoning_content="beta", spans=[{"start": 4, "end": 9}], train=False)
    record["messages"][0] = {"role": "user", "content": "beta beta"}
    (span,) = hermes.render(parse(record)).spans
    text = hermes.render(parse(record)).text
    assert (text[: span.start].endswith("</think>\nbeta"), text[span.start : span.end]) == (True, " beta")


def test_a_token_across_the_bound_of_a_span_is_not_trained(hermes: ChatTemplate) -> None:
    ids = hermes.tokenizer.encode(" alpha", add_special_tokens=False).ids
    assert len(ids) == 1, "the test needs a token with a blank"
    inside = parse(answer("beta alpha", spans=[{"start": 5, "end": 10}], train=False))
    assert trained_text(hermes, inside) == "", "the blank before it is not trained, so the token is not"
    whole = parse(answer("beta alpha", spans=[{"start": 4, "end": 10}], train=False))
    assert trained_text(hermes, whole) == " alpha"
    touching = [{"start": 0, "end": 6}, {"start": 6, "end": 10}]
    assert trained_text(hermes, parse(answer("beta alpha", spans=touching, train=False))) == "beta alpha"


def test_a_token_across_the_header_is_not_trained(hermes: ChatTemplate, tmp_path: Path) -> None:
    """`\\n\\n` of the header and `\\n` of the answer may be one token, which no prompt ends before."""
    from tokenizers import Tokenizer

    shutil.copytree(hermes.folder, tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "tokenizer.json").read_bytes())
    number = max(state["model"]["vocab"].values()) + len(state["added_tokens"]) + 1
    merged = ["Ċ", "ĊĊ", "ĊĊĊ"]
    for left, right in [(merged[0], merged[0]), (merged[1], merged[0])]:
        if left + right not in state["model"]["vocab"]:
            state["model"]["vocab"][left + right] = (number := number + 1)
            state["model"]["merges"].append([left, right])
    Tokenizer.from_str(json.dumps(state)).save(str(tmp_path / "tokenizer.json"))
    assert trained_text(ChatTemplate(tmp_path, "hermes-llama3"), parse(answer("\nalpha"))) == "alpha<|eot_id|>"


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("0-5", "`spans` of .* is a string"),
        ([{"start": 0}], r"has \{\"start\": 0\}"),
        ([{"start": 0, "end": 6}], "within 5 characters"),
        ([{"start": 2, "end": 2}], "within 5 characters"),
        ([{"start": 0, "end": 3}, {"start": 2, "end": 4}], "after 3"),
        ([{"start": 0, "end": 3, "train": 1}], "has"),
        ([{"start": True, "end": 3}], "has"),
    ],
)
def test_wrong_spans_are_named(spans: Any, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        parse(answer("alpha", spans=spans))


def test_spans_belong_to_assistants() -> None:
    with pytest.raises(BadSample, match="is from the user"):
        parse({"messages": [{**QUESTION, "spans": [{"start": 0, "end": 2}]}, {"role": "assistant", "content": "a"}]})


def test_a_template_that_trims_hides_a_span(hermes: ChatTemplate, tmp_path: Path) -> None:
    source = "{% for m in messages %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}{% endfor %}"
    (tmp_path / "trim.jinja").write_text(source)
    record = {"messages": answer("  alpha", spans=[{"start": 1, "end": 3, "train": False}])["messages"][1:]}
    with pytest.raises(BadSample, match="hides where their parts"):
        ChatTemplate(hermes.folder, str(tmp_path / "trim.jinja")).encode([parse(record)])


def test_reasoning_is_written_for_templates_that_do_not_know_it(tokenizer: Path) -> None:
    own = ChatTemplate(tokenizer)
    record = answer("Yes.", reasoning_content="July", spans=[{"start": 3, "end": 4, "train": False}])
    assert trained_text(own, parse(record)) == "<think>\nJuly\n</think>\nYes<|eot_id|>"
    assert parse(answer("Yes.", reasoning="July")).messages[1]["reasoning_content"] == "July"


def test_the_switch_has_the_names_that_templates_use() -> None:
    off = parse({**answer("a"), "thinking": False}).options
    assert off == {"thinking": False, "enable_thinking": False, "thinking_budget": 0}
    both = parse({**answer("a"), "thinking": True, "chat_template_kwargs": {"thinking": False, "x": 1}}).options
    assert both == {"thinking": False, "enable_thinking": True, "x": 1}
    with pytest.raises(BadSample, match="`thinking` is a string"):
        parse({**answer("a"), "thinking": "on"})
    with pytest.raises(BadSample, match="`chat_template_kwargs` is a list"):
        parse({**answer("a"), "chat_template_kwargs": []})


def test_a_record_cannot_replace_its_messages(hermes: ChatTemplate) -> None:
    record = {**answer("alpha"), "chat_template_kwargs": {"messages": [], "bos_token": "x"}}
    assert hermes.render(parse(record)).text == hermes.render(parse(answer("alpha"))).text


def test_a_shipped_template_needs_its_tokens(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token <\|im_end\|>, which the chat template chatml is made of"):
        ChatTemplate(tokenizer, "chatml")
    with pytest.raises(DataError, match="Name a file, or one of hermes-llama3, chatml"):
        find_template("hermes")


def test_no_template_tells_the_date(hermes: ChatTemplate, tmp_path: Path) -> None:
    date = "{{ 'fixed' if strftime_now is not defined else strftime_now('%Y') }}"
    (tmp_path / "t.jinja").write_text(date + "{% for message in messages %}{{ message.content }}{% endfor %}")
    dated = ChatTemplate(hermes.folder, str(tmp_path / "t.jinja"))
    assert dated._template.render({})[0] == "fixed"
