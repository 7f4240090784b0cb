"""Tasks on a model: the figures are those that follow from its answers, whatever the batches and the pauses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from psyche_node.cli import app
from psyche_node.data import PackedDataset
from psyche_node.data.prepare import prepare
from psyche_node.evaluation import EvaluationError, Results, Subject, open_tasks, read_results, run_suite
from psyche_node.evaluation.answering import Reply, answer
from psyche_node.evaluation.evaluate import _grade
from psyche_node.evaluation.examples import Example
from psyche_node.evaluation.heldout import measure_heldout
from psyche_node.evaluation.likelihood import encode_pair
from psyche_node.evaluation.results import Measure, mean, perplexity, ratio
from psyche_node.evaluation.steps import finish
from psyche_node.evaluation.task import Task
from psyche_node.exits import Exit
from psyche_node.generation import Request
from psyche_node.training.forward import LossFunction
from psyche_node.training.session import heldout_loss

ROWS = [{"q": f"what is {a} plus {b}", "sum": a + b, "others": [str(a), str(a + b), str(9 * b + 11)]}
        for a in range(3, 9) for b in (1, 4)]  # fmt: skip


def results_of(subject: Subject, *files: Path, **options: Any) -> Results:
    return finish(run_suite(subject, open_tasks(files), **options))


def test_multiple_choice_is_the_likeliest_choice(subject: Subject, write_task: Callable[..., Path]) -> None:
    file = write_task(ROWS, kind="multiple_choice", prompt="{{ q }}?", choices="others", target="{{ sum }}")
    (found,) = results_of(subject, file).tasks
    right = by_length = 0
    encode = subject.engine.prompts.encode_text
    for row in ROWS:
        sums = []
        for choice in row["others"]:  # type: ignore[union-attr]
            pair = encode_pair(encode, (), f"{row['q']}?", f" {choice}", None)
            ids = subject.engine.prompts.encode_text(f"{row['q']}? {choice}")
            assert pair.tokens == ids
            with torch.no_grad():
                logprobs = subject.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(pair.start, len(ids))))
        right += sums.index(max(sums)) == 1
        scaled = [total / len(choice) for total, choice in zip(sums, row["others"], strict=True)]  # type: ignore[call-overload]
        by_length += scaled.index(max(scaled)) == 1
    n = len(ROWS)
    assert found.measures["accuracy"].value == pytest.approx(right / n)
    assert found.measures["accuracy_normalised"].value == pytest.approx(by_length / n)
    p = right / n
    assert found.measures["accuracy"].stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert (found.samples, found.thinking, found.kind) == (n, None, "multiple_choice")


def test_what_the_model_says_is_found_again(subject: Subject, write_task: Callable[..., Path]) -> None:
    """Its own greedy answers are exact matches, and greedy by log-likelihood."""
    prompts = [f"{row['q']}?" for row in ROWS]
    tokens = [subject.engine.prompts.encode_text(prompt) for prompt in prompts]
    said = subject.engine.generate(tokens, 4)
    rows = [{"q": prompt, "a": one.text} for prompt, one in zip(prompts, said, strict=True) if one.text.strip()]
    assert len(rows) > 4
    settings = {"prompt": "{{ q }}", "target": "{{ a }}", "delimiter": "", "match": "exact"}
    generated = write_task(rows, name="said", kind="generate_until", max_new_tokens=4, **settings)
    (found,) = results_of(subject, generated).tasks
    assert found.measures["exact_match"].value == 1.0
    assert found.measures["tokens"].value <= 4.0
    missing = write_task(
        [{**rows[0], "a": "no such words"}], name="x", kind="generate_until", max_new_tokens=4, **settings
    )
    (other,) = results_of(subject, missing).tasks
    assert other.measures["exact_match"] == Measure(value=0.0, stderr=None)


def test_thinking_on_and_off_are_measured_apart(subject: Subject, write_task: Callable[..., Path]) -> None:
    settings = {"kind": "generate_until", "prompt": "{{ q }}", "target": "{{ sum }}", "max_new_tokens": 6}
    file = write_task(ROWS[:3], **settings, chat=True, thinking="both")
    on, off = results_of(subject, file).tasks
    assert (on.thinking, off.thinking) == (True, False)
    # An untrained model closes nothing in six tokens.
    assert on.measures["unclosed"].value == on.measures["overlong"].value == 1.0
    assert off.measures["unclosed"].value == 0.0
    (only,) = finish(run_suite(subject, open_tasks([file], thinking="off"))).tasks
    assert only.measures == off.measures


@pytest.mark.parametrize("always", [False, True])
def test_a_template_without_a_switch_is_measured_as_it_is_and_says_so(
    folder: Path, write_task: Callable[..., Path], tmp_path: Path, always: bool
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    template = tmp_path / "chat_template.jinja"
    text = template.read_text().replace("{% if thinking %}<think>{% endif %}", "<think>\n" if always else "")
    template.unlink()
    template.write_text(text)
    settings = {"kind": "generate_until", "prompt": "{{ q }}", "target": "{{ sum }}", "max_new_tokens": 6, "chat": True}
    for asked in ("both", "on"):
        write_task(ROWS[:2], name=asked, thinking=asked, **settings)
    write_task(ROWS[:2], name="plain", **settings)
    words = ["eval", str(tmp_path), "--device", "cpu", "--json"]
    for name in ("both", "on", "plain"):
        words += ["--tasks", str(tmp_path / f"{name}.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    tasks = json.loads(done.stdout)["tasks"]
    # Asked for no reasoning, the template that always reasons did something else, too.
    other = ["both", "on", "plain"] if always else ["both", "on"]
    assert [(one["task"], one["thinking"], one.get("unswitched", False)) for one in tasks] == [
        (name, always, name in other) for name in ("both", "on", "plain")
    ]
    # An untrained model closes nothing in six tokens.
    assert {one["measures"]["unclosed"]["value"] for one in tasks} == {float(always)}
    measured = "measured with it, because its prompts begin inside" if always else "measured without"
    assert done.stderr.count(f"has no switch for reasoning: {measured}") == len(other)
    shown = CliRunner().invoke(app, [one for one in words if one != "--json"])
    assert shown.stdout.count("on, no switch" if always else "off, no switch") == len(other)


@pytest.mark.parametrize(
    ("text", "ended", "inside", "expected"),
    [
        ("<think>3+4</think>7", True, None, (1, 0, 0)),
        ("3+4</think>7", True, "<think>", (1, 0, 0)),
        ("3+4 is 7", True, "<think>", (0, 1, 1)),  # its reasoning never ended, so nothing was answered
        ("3+4</think>7 and", False, "<think>", (1, 1, 0)),
        ("7", True, None, (1, 0, 0)),
        ("</think>7", True, None, (0, 0, 0)),
    ],
)
def test_grades(text: str, ended: bool, inside: str | None, expected: tuple[int, int, int]) -> None:
    task = Task.model_validate(
        {"kind": "generate_until", "data": "x", "prompt": "x", "target": "7", "extract": [{"regex": r"^\d"}]}
    )
    grade = _grade(task, Example("x", ("7",), (), 0, ()), Reply(text, 9, ended), inside)
    assert (grade["exact_match"], grade["overlong"], grade["unclosed"]) == expected


def test_answers_that_were_cut_go_on_as_if_they_had_not_been(subject: Subject) -> None:
    tokens = [subject.engine.prompts.encode_text(f"{row['q']}?") for row in ROWS[:5]]
    requests = [Request(prompt, 24, stop=("0",)) for prompt in tokens]

    def every_third() -> Iterator[bool]:
        while True:
            yield from (False, False, True)

    def run(cut: Callable[[], bool]) -> tuple[list[Reply], int]:
        steps, count = answer(subject.engine, requests, cut), 0
        while True:
            with subject.measured():
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value, count
            count += 1

    whole, batches = run(lambda: False)
    turns = every_third()
    pieces, more = run(lambda: next(turns))
    assert pieces == whole
    assert more > batches


def test_sampling_is_fixed_by_the_seed(subject: Subject, write_task: Callable[..., Path]) -> None:
    settings = {"kind": "generate_until", "prompt": "{{ q }}", "target": "{{ sum }}", "max_new_tokens": 8}
    file = write_task(ROWS[:4], **settings, temperature=1.0, samples=3)
    first = results_of(subject, file)
    assert first.digest == results_of(subject, file).digest
    assert first.tasks[0].repeats == 3
    assert (
        first.digest != results_of(subject, write_task(ROWS[:4], **settings, temperature=1.0, samples=3, seed=1)).digest
    )


def test_a_model_is_left_as_it_was(subject: Subject, write_task: Callable[..., Path]) -> None:
    subject.model.train()
    advice = subject.model.generation_config
    settings = {"kind": "generate_until", "prompt": "{{ q }}", "target": "{{ sum }}", "max_new_tokens": 2}
    steps = run_suite(subject, open_tasks([write_task(ROWS[:2], **settings)]))
    next(steps)
    assert subject.model.training
    assert subject.model.generation_config is advice
    finish(steps)
    subject.model.eval()


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    lines = [{"prompt": f"what is {a}", "completion": f"it is {a} plus nothing, " * (a % 3 + 1)} for a in range(60)]
    (out / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(out / "chat.jsonl", folder, out / "data", 96, heldout=0.3)
    return out / "data"


def test_heldout_loss_is_a_sessions(subject: Subject, prepared: Path) -> None:
    data = PackedDataset(prepared)
    found = results_of(subject, data=data).heldout
    assert found is not None
    loss, tokens = heldout_loss(LossFunction(subject.model), data.heldout(), subject.device)
    assert found.loss.value == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (found.tokens, found.sequences) == (tokens, len(data.heldout().tokens))
    assert found.loss.stderr is not None
    assert found.perplexity is not None
    assert found.perplexity_stderr == pytest.approx(found.perplexity * found.loss.stderr)


def test_heldout_sequences_are_read_when_their_turn_comes(
    subject: Subject, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = PackedDataset(prepared), list[int]()
    one = data._read

    def note(split: Any, numbers: Any) -> Any:
        read.append(len(numbers))
        return one(split, numbers)

    monkeypatch.setattr(data, "_read", note)
    steps = measure_heldout(subject.model, subject.device, data, 3)
    with subject.measured():
        next(steps)
        assert read == [1]
        finish(steps)
    assert read == [1] * 3


def test_standard_errors() -> None:
    assert mean([0.0, 1.0, 1.0, 0.0]).stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert mean([3.0]) == Measure(value=3.0, stderr=None)
    equal = ratio([2.0, 4.0, 6.0], [1.0, 1.0, 1.0])  # with equal weights: the mean
    assert equal.value == 4.0
    assert equal.stderr == pytest.approx(mean([2.0, 4.0, 6.0]).stderr)
    assert ratio([2.0, 8.0], [1.0, 4.0]) == Measure(value=2.0, stderr=0.0)


def test_perplexity_has_a_standard_error() -> None:
    """By the delta method: the derivative of exp is exp."""
    found = perplexity(Measure(value=math.log(10), stderr=0.05))
    assert found is not None
    assert (found.value, found.stderr) == (pytest.approx(10.0), pytest.approx(0.5))
    of_samples = perplexity(ratio([1.0, 3.0], [1.0, 1.0]))  # 2 with a standard error of 1
    assert of_samples is not None
    assert (of_samples.value, of_samples.stderr) == (pytest.approx(math.e**2), pytest.approx(math.e**2))
    assert perplexity(Measure(value=1.0, stderr=None)) == Measure(value=math.e, stderr=None)
    assert perplexity(Measure(value=1000.0, stderr=1.0)) is None


def test_perplexity_without_its_error_hashes_as_it_did(tmp_path: Path) -> None:
    loss = '{"stderr":0.1,"value":1.0}'
    held = f'{{"data_manifest":"ab","loss":{loss},"perplexity":2.718281828459045,"sequences":2,"tokens":9}}'
    text = f'{{"fingerprint":null,"format":1,"heldout":{held},"model_root":null,"round":null,"tasks":[]}}'
    (tmp_path / "old.json").write_text(text)
    old = read_results(tmp_path / "old.json")
    assert old.canonical().decode() == text
    assert old.heldout is not None
    new = old.model_copy(update={"heldout": old.heldout.model_copy(update={"perplexity_stderr": 0.27})})
    assert '"perplexity_stderr":0.27' in new.canonical().decode()


def test_results_mean_the_same_in_any_layout(tmp_path: Path, subject: Subject, write_task: Callable[..., Path]) -> None:
    file = write_task(ROWS, kind="multiple_choice", prompt="{{ q }}?", choices="others", target="{{ sum }}")
    found = results_of(subject, file, round_number=7)
    pretty = tmp_path / "results.json"
    pretty.write_text(json.dumps(json.loads(found.canonical()), indent=4))
    assert read_results(pretty).digest == found.digest
    pretty.write_text(pretty.read_text().replace('"round": 7', '"round": 8'))
    assert read_results(pretty).digest != found.digest
    pretty.write_text('{"tasks": 7}')
    with pytest.raises(EvaluationError, match="tasks"):
        read_results(pretty)


def test_a_known_digest() -> None:
    """The bytes that are hashed are a format: changing them makes recorded digests worthless."""
    results = Results(model_root="ab" * 32, round=3)
    text = '{"fingerprint":null,"format":1,"heldout":null,"model_root":"' + "ab" * 32 + '","round":3,"tasks":[]}'
    assert results.canonical().decode() == text
    assert results.digest.hex() == "06f1ac834265ddc7f0b0ca3d4c08373da729c20aa343c99e4f1e3fd6b9d2831b"


def test_the_command(folder: Path, prepared: Path, tmp_path: Path, write_task: Callable[..., Path]) -> None:
    file = write_task(ROWS, kind="multiple_choice", prompt="{{ q }}?", choices="others", target="{{ sum }}")
    out = tmp_path / "results.json"
    flags = ["--tasks", str(file), "--data", str(prepared), "--limit", "4", "--device", "cpu"]
    done = CliRunner().invoke(app, ["eval", str(folder), *flags, "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert said.pop("sha256") == read_results(out).digest.hex()
    assert said["tasks"][0]["samples"] == 4
    assert said == json.loads(out.read_text())
    shown = CliRunner().invoke(app, ["eval", str(folder), *flags], env={"COLUMNS": "80"})
    assert f"SHA-256 of the results: {read_results(out).digest.hex()}\n" in shown.output, "on one line, to be copied"
    assert "accuracy_normalised" in shown.output
    (line,) = [line for line in shown.output.splitlines() if "perplexity" in line]
    assert len(line.split()) == 5, "the word, the value, its standard error, so many tokens"
    for wrong, why in ((tmp_path, "is a folder"), (tmp_path / "none" / "x.json", "there is no folder")):
        done = CliRunner().invoke(app, ["eval", str(tmp_path / "no-model"), *flags, "--out", str(wrong)])
        said = " ".join(done.output.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", "").split())
        assert (done.exit_code, why in said) == (Exit.USAGE, True), "before anything is read"
    done = CliRunner().invoke(app, ["eval", str(folder), *flags, "--out", "/dev/full"])
    assert done.exit_code == Exit.FILES
    assert "SHA-256 of the results" in done.output, "what was measured is not lost with the disk"
    missing = CliRunner().invoke(app, ["eval", str(folder), "--tasks", str(tmp_path / "none.toml")])
    assert missing.exit_code == Exit.DATA
    assert CliRunner().invoke(app, ["eval", str(folder)]).exit_code == Exit.USAGE
    assert CliRunner().invoke(app, ["eval", "--verify", str(out)]).exit_code == Exit.USAGE
