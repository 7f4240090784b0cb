"""Tokens and masks equal what transformers makes of the same folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from psyche_node.data import BadSample, ChatTemplate, DataError, read_samples, train_tokenizer
from psyche_node.data.formats import Sample, parse_record

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|eot_id|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer: Path, folder: Path, template: str) -> ChatTemplate:
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return ChatTemplate(folder)


def sample(*messages: tuple[str, str], **more: object) -> Sample:
    record = {"messages": [{"role": role, "content": content} for role, content in messages], **more}
    return parse_record(record, "here:1")


def trained_text(template: ChatTemplate, one: Sample) -> str:
    ((ids, trained),) = template.encode([one])
    return str(template.tokenizer.decode(ids[trained].tolist(), skip_special_tokens=False))


def test_masks_equal_the_generation_mask_of_transformers(chat: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer)
    samples = list(read_samples(chat))
    samples.append(sample(("user", "naïve 🐍 q"), ("assistant", "\n leading blank, 🐍🐍 and é"), ("assistant", "")))
    for one, (ids, trained) in zip(samples, ChatTemplate(tokenizer).encode(samples), strict=True):
        expected = reference.apply_chat_template(
            list(one.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids.tolist() == expected["input_ids"]
        assert trained.astype(int).tolist() == expected["assistant_masks"]
        assert 0 < trained.sum() < len(ids)


def test_golden_rendering(tokenizer: Path) -> None:
    one = sample(("system", "S"), ("user", "Q"), ("assistant", "A"))
    text, spans, _, _ = ChatTemplate(tokenizer).render(one)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    )
    assert [text[a:b] for a, b in spans] == ["A<|eot_id|>"]


def test_generation_prompt_is_what_precedes_an_answer(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template(
        [{"role": "user", "content": "Q"}], add_generation_prompt=True, tokenize=False
    )
    text, spans, _, _ = ChatTemplate(tokenizer).render(sample(("user", "Q"), ("assistant", "A")))
    assert text[: spans[0][0]] == prompt


def test_only_the_chosen_messages_are_trained(tokenizer: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "alpha", "train": False},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "beta"},
        ]
    }
    one = parse_record(record, "here:1")
    assert trained_text(ChatTemplate(tokenizer), one) == "beta<|eot_id|>"


def test_prefix_rendering_where_a_template_has_no_marks(tokenizer: Path, tmp_path: Path) -> None:
    template = with_template(tokenizer, tmp_path / "chatml", CHATML)
    assert not template.marked
    one = sample(("user", "q"), ("assistant", "alpha beta"), ("user", "q"), ("assistant", "gamma"))
    assert trained_text(template, one) == "alpha beta<|eot_id|>gamma<|eot_id|>", (
        "the end token, not the line feed after it"
    )


def test_prefix_rendering_equals_the_marks(chat: Path, tokenizer: Path, tmp_path: Path) -> None:
    marked = ChatTemplate(tokenizer)
    source = marked.source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    plain = with_template(tokenizer, tmp_path / "plain", source)
    assert not plain.marked
    assert marked.marked
    samples = list(read_samples(chat))[:40]
    for (ids_a, mask_a), (ids_b, mask_b) in zip(marked.encode(samples), plain.encode(samples), strict=True):
        assert ids_a.tolist() == ids_b.tolist()
        assert mask_a.tolist() == mask_b.tolist()


def test_a_template_that_rewrites_history_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    only_last = "{% for m in messages %}{{ m['role'] if not loop.last else m['content'] }}{% endfor %}"
    template = with_template(tokenizer, tmp_path / "t", only_last)
    with pytest.raises(BadSample, match=r"here:1: .*renders message 1 differently.*generation"):
        template.encode([sample(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b"))])


def test_a_template_that_raises_names_the_sample(tokenizer: Path, tmp_path: Path) -> None:
    template = with_template(tokenizer, tmp_path / "t", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadSample, match=r"here:1: the chat template of .* refuses it: roles must alternate"):
        template.encode([sample(("user", "q"), ("assistant", "a"))])


def test_templates_are_sandboxed(tokenizer: Path, tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    template = with_template(tokenizer, tmp_path / "t", escape)
    with pytest.raises(BadSample, match="unsafe"):
        template.encode([sample(("user", "q"), ("assistant", "a"))])


def test_folders_without_tokenizer_or_template(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        ChatTemplate(tmp_path)
    with pytest.raises(DataError, match=f"there is no folder {tmp_path / 'nowhere'}"):
        ChatTemplate(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tokenizer\.json is a file\. Name the Hugging Face folder"):
        ChatTemplate(tokenizer / "tokenizer.json")
    shutil.copytree(tokenizer, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        ChatTemplate(tmp_path / "t")


def test_tokenizer_is_deterministic_and_loses_nothing(chat: Path, tokenizer: Path, tmp_path: Path) -> None:
    train_tokenizer(chat, 400, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (tokenizer / name).read_bytes()
    loaded = ChatTemplate(tokenizer).tokenizer
    text = "tabs\tand  spaces\r\n — naïve 🐍 \x00 12345"
    assert loaded.decode(loaded.encode(text).ids, skip_special_tokens=False) == text
    with pytest.raises(DataError, match="too small"):
        train_tokenizer(chat, 100, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "it has tools,"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}]},
         "it has tool calls,"),
        ({"messages": [{"role": "tool", "content": "blue"}]}, "it has tool results,"),
    ],
    ids=["tools", "calls", "results"],
)  # fmt: skip
def test_tools_that_the_template_does_not_write(
    change: dict[str, Any], says: str, tokenizer: Path, tmp_path: Path
) -> None:
    """They would be trained as empty answers, and as answers to nothing."""
    source = "{% for m in messages %}{% if m.role != 'tool' %}[{{ m.role }}]{% generation %}{{ m.content }}"
    path = tmp_path / "plain.jinja"
    path.write_text(source + "{% endgeneration %}{% endif %}{% endfor %}")
    template = ChatTemplate(tokenizer, str(path))
    asked, said = {"role": "user", "content": "look"}, {"role": "assistant", "content": "It is blue."}
    record = {"messages": [asked, *change.get("messages", []), said], "tools": change.get("tools")}
    one = parse_record(record, "a.jsonl:7")
    with pytest.raises(BadSample, match=rf"a.jsonl:7: {says} .*--template hermes-llama3"):
        template.encode([one])
