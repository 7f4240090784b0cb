"""Every line is a sample, or an error that names file, line, fault and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psyche_node.data import BadSample, DataError, read_samples
from psyche_node.data.formats import parse_record
from psyche_node.data.samples import Text, read_any


def parse(record: Any) -> Any:
    return parse_record(record, "chat.jsonl:7")


def test_three_formats_mean_the_same_conversation() -> None:
    chat = [
        parse({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        parse({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        parse({"prompt": "q", "completion": "a"}),
        parse({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}),
        parse(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a"},
                ]
            }
        ),
    ]
    expected = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert [sample.messages for sample in chat] == [expected] * 5
    assert {sample.train for sample in chat} == {(True,)}
    assert len({sample.key for sample in chat}) == 1, (
        "the same conversation falls on the same side of the held-out split"
    )


def test_system_tools_group_and_per_message_train() -> None:
    sample = parse(
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "bad", "train": False},
                {"from": "tool", "value": "t"},
                {"from": "gpt", "value": "good"},
            ],
            "tools": [{"name": "f"}],
            "group": "g",
        }
    )
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.train == (False, True)
    assert all("train" not in m for m in sample.messages), "the chat template must not see it"
    assert sample.tools == ({"name": "f"},)
    assert sample.key == b"g"


ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "plain"}, "no known format: the keys are text"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "hi"}, "`messages` is a string"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message to train on"),
        ({"messages": [{"role": "assistant", "content": "a", "train": False}]}, "no assistant message to train on"),
        ({"messages": [{"role": "robot", "content": "q"}, ANSWER]}, "`messages[0]` has the role 'robot'"),
        ({"messages": [{"role": "user"}, ANSWER]}, "the content of `messages[0]` is missing or null"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "the content of `messages[0]` is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "is of the type 'image'"),
        ({"messages": ["hello", ANSWER]}, "`messages[0]` is a string"),
        ({"messages": [{**ANSWER, "train": "no"}]}, "`train` of `messages[0]` is 'no'"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "`conversations[0]` is from 'narrator'"),
        ({"conversations": [{"from": "gpt"}]}, "the content of `conversations[0]` is missing"),
        ({"prompt": "q", "completion": None}, "the content of `completion` is missing"),
        ({"messages": [ANSWER], "tools": {}}, "`tools` is an object"),
        ({"messages": [ANSWER], "group": 5}, "`group` is a number"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_a_bad_line_says_where_what_and_what_to_do(record: Any, says: str) -> None:
    with pytest.raises(BadSample) as caught:
        parse(record)
    assert str(caught.value).startswith("chat.jsonl:7: ")
    assert says in caught.value.what
    assert caught.value.remedy[:1].isupper()


def test_not_json_names_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(json.dumps({"prompt": "q", "completion": "a"}).encode() + b"\n\n{broken\n")
    with pytest.raises(BadSample, match=r"chat\.jsonl:3: this is not JSON"):
        list(read_samples(path))


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="no sample in it"):
        list(read_samples(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="No such file"):
        list(read_samples(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("array.json", b'[{"text": "a"}]', "is an array, not an object.*jq -c '.\\[\\]' FILE"),
        ("indented.json", b'{\n "text": "a"\n}', "jq -c . FILE"),
        ("wide.jsonl", '{"text": "a"}\n'.encode("utf-16"), "wide.jsonl:1: .*not UTF-8.*iconv -f UTF-16"),
        ("null.jsonl", b"null", "this is null, not an object"),
        ("number.jsonl", b'{"text": NaN}', "`text` is a number"),
        ("image.jsonl", b'{"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "completion": "a"}',
         r"`\[0\]` of the content of `prompt\[0\]` is of the type 'image_url'. Only text is trained"),
        ("words.jsonl", b'{"prompt": [{"role": "user", "content": ["a"]}], "completion": "a"}', "is a string. Only"),
    ],
)  # fmt: skip
def test_what_people_have_instead_is_told_with_the_way_out(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BadSample, match=said):
        list(read_any(tmp_path / name))


@pytest.mark.parametrize(("name", "text"), [("a.txt", "h\xe9"), ("a.jsonl", '{"text": "h\xe9"}\r\n\r\n')])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert [sample.text for sample in read_any(tmp_path / name) if isinstance(sample, Text)] == ["h\xe9"]
