"""Data that was rendered with another chat template than the model's own is told apart, and both are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from psyche_node.data import DataError, build_data, prepare, train_tokenizer
from psyche_node.data.agreement import rendering_of, template_warning
from psyche_node.data.rendering import find_template

LENGTH = 96


@pytest.fixture
def model(tokenizer: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer, tmp_path / "model"))


def test_the_templates_agree(chat: Path, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    manifest = prepare(chat, model, data, LENGTH)
    assert template_warning(data, manifest, model) is None
    assert (data / "chat_template.jinja").read_text() == (model / "chat_template.jinja").read_text()


@pytest.mark.parametrize("beside", [True, False])
def test_a_shipped_template_is_named(chat: Path, model: Path, tmp_path: Path, beside: bool) -> None:
    data = tmp_path / "data"
    manifest = prepare(chat, model, data, LENGTH, template="hermes-llama3")
    if not beside:  # as older versions prepared it
        (data / "chat_template.jinja").unlink()
    warning = template_warning(data, manifest, model)
    assert warning is not None
    assert f"{data} was rendered with the chat template hermes-llama3, and {model} has another one, its own" in warning
    assert f"psyche-node data template hermes-llama3 > {model / 'chat_template.jinja'}" in warning
    found = build_data(tmp_path / "cache", source=str(data), tokenizer=model, sequence_length=LENGTH)
    assert found.rendering.warning == warning
    assert found.rendering.template == "hermes-llama3"
    chosen = rendering_of(data, manifest, model, "hermes-llama3")
    assert chosen is not None
    assert chosen.warning is None, "it was asked for"
    (model / "chat_template.jinja").write_text(find_template("hermes-llama3").source)
    assert template_warning(data, manifest, model) is None


def test_a_template_of_ones_own_is_known_by_the_file_beside_the_manifest(
    chat: Path, model: Path, tmp_path: Path
) -> None:
    data, mine = tmp_path / "data", tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    manifest = prepare(chat, model, data, LENGTH, template=str(mine))
    warning = template_warning(data, manifest, model)
    assert warning is not None
    assert f"cp {data / 'chat_template.jinja'} {model / 'chat_template.jinja'}" in warning
    (data / "chat_template.jinja").write_text("{{ messages }}")  # which proves nothing
    warning = template_warning(data, manifest, model)
    assert warning is not None
    assert "another tokenizer than that of" in warning


def test_a_model_without_template_is_told_of_the_datas(chat: Path, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    manifest = prepare(chat, model, data, LENGTH)
    (model / "chat_template.jinja").unlink()
    warning = template_warning(data, manifest, model)
    assert warning is not None
    assert f"and {model} has none. " in warning


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_models_own_template_is_not_replaced_by_that_of_data(
    chat: Path, model: Path, embedded: bool, again: bool
) -> None:
    file, config = model / "chat_template.jinja", model / "tokenizer_config.json"
    if embedded:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": file.read_text()}))
        file.unlink()
    if again:  # with the model's own there is nothing to lose
        prepare(chat, model, model, LENGTH)
    before = {path: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(DataError, match=r"has a chat template of its own.*Name a new folder"):
        prepare(chat, model, model, LENGTH, template="hermes-llama3")
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_data_may_be_prepared_anew_with_another_template(chat: Path, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for template in (None, "hermes-llama3"):
        prepare(chat, model, data, LENGTH, template=template)
    assert (data / "chat_template.jinja").read_text() == find_template("hermes-llama3").source
    (data / "manifest.json").unlink()  # whose template it is, nobody knows now
    with pytest.raises(DataError, match="Name a new folder"):
        prepare(chat, model, data, LENGTH)


def test_another_tokenizer_is_no_matter_of_templates(chat: Path, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    manifest = prepare(chat, model, data, LENGTH)
    train_tokenizer(chat, 300, tmp_path / "other")
    assert rendering_of(data, manifest, tmp_path / "other") is None
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        rendering_of(data, manifest, tmp_path)
