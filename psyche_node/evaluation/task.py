"""A task: a TOML or JSON file that says where examples are, how they become prompts, and what counts as right."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coordinator.wording import problems
from psyche_node.evaluation.answers import EXTRACTORS, Extractor
from psyche_node.evaluation.errors import TaskError
from psyche_node.evaluation.templates import check_expression, check_template

Kind = Literal["multiple_choice", "generate_until", "loglikelihood"]
Thinking = Literal["on", "off", "both"]


class Task(BaseModel):
    """One task. Unknown keys are errors. Templates are Jinja, rendered in a sandbox with an example's fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="", max_length=64)
    """What the results call it. Default: the file's name."""
    kind: Kind
    """`multiple_choice`: the choice of the highest log-likelihood. `generate_until`: an answer is generated, extracted
    and compared. `loglikelihood`: whether the target is what the model would say, and its loss."""
    data: Path
    """Examples: a JSONL or parquet file, relative to the task file."""
    limit: int = Field(default=0, ge=0)
    """Only so many examples, spread evenly over the file. 0: all of them."""
    prompt: str
    """Template of what the model is given."""
    target: str = ""
    """Template of the right answer. `multiple_choice`: its text, or use `target_index`."""
    accept: str = ""
    """`generate_until`: expression that gives a list of right answers, instead of `target`; the first one is shown in
    few-shot examples."""
    choices: list[str] | str = ""
    """`multiple_choice`: a list of templates, or one expression that gives a list, such as `options`."""
    target_index: str = ""
    """`multiple_choice`: template of the right choice's place, a number from 0 or a letter from A."""
    description: str = ""
    """Text before everything else; the system message, if `chat`."""
    delimiter: str = " "
    """Between prompt and target in plain text."""
    shot_delimiter: str = "\n\n"
    """Between few-shot examples in plain text."""
    few_shot: int = Field(default=0, ge=0, le=64)
    """Examples with their answers shown before each prompt, chosen by `seed`, never the example itself."""
    few_shot_data: Path | None = None
    """File of the few-shot examples. Default: `data`."""
    seed: int = Field(default=0, ge=0)
    """Of the choice of few-shot examples, and of sampling."""
    chat: bool = False
    """Put the prompt as a user's message through the model's chat template."""
    thinking: Thinking = "off"
    """`generate_until` with `chat`: the template's switch for reasoning; `both` makes two results."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer, reasoning included: the budget that an overlong one exceeds."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end an answer."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sampling from the smallest set of tokens with this probability."""
    samples: int = Field(default=1, ge=1)
    """Answers per example; more than one make sense with a temperature only."""
    extract: list[Extractor] = ["whole"]
    """Where the answer is in the text, the first that finds one: `whole`, `last_number`, `boxed`, `first_line`, or
    `{ regex = "..." }` (its last match; the first group, if it has one)."""
    match: Literal["exact", "normalised", "number"] = "normalised"
    """`normalised` ignores case, articles, punctuation and blanks; `number` compares as numbers."""

    @field_validator("extract")
    @classmethod
    def _known(cls, extract: list[Extractor]) -> list[Extractor]:
        if not extract:
            raise ValueError(f"name at least one of {', '.join(EXTRACTORS)} or a regex")
        return extract

    @field_validator("prompt", "target", "target_index", "description")
    @classmethod
    def _parses(cls, template: str) -> str:
        return check_template(template)

    @field_validator("accept")
    @classmethod
    def _evaluates(cls, expression: str) -> str:
        return check_expression(expression) if expression else expression

    @field_validator("choices")
    @classmethod
    def _choices_parse(cls, choices: list[str] | str) -> list[str] | str:
        if isinstance(choices, str):
            return check_expression(choices) if choices else choices
        return [check_template(template) for template in choices]

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "multiple_choice":
            if not self.choices:
                raise ValueError("multiple_choice needs `choices`")
            if bool(self.target) == bool(self.target_index):
                raise ValueError("multiple_choice needs one of `target` and `target_index`")
        elif self.kind == "generate_until":
            if bool(self.target) == bool(self.accept):
                raise ValueError("generate_until needs one of `target` and `accept`")
        elif not self.target:
            raise ValueError("loglikelihood needs `target`")
        if self.thinking != "off" and not (self.chat and self.kind == "generate_until"):
            raise ValueError("`thinking` needs `chat = true` and generate_until")
        if self.samples > 1 and self.temperature == 0.0:
            raise ValueError(f"{self.samples} samples would all be the same; set a `temperature`")
        return self

    @property
    def switches(self) -> tuple[bool | None, ...]:
        """The settings of the template's switch that it is measured with; None where there is no switch."""
        if self.kind != "generate_until" or not self.chat:
            return (None,)
        return {"on": (True,), "off": (False,), "both": (True, False)}[self.thinking]

    @property
    def sha256(self) -> str:
        """Digest of what it says, paths and defaults included, whatever the file's notation."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_task(path: Path) -> tuple[Task, Path]:
    """Return a task file's task and the folder that its paths start from. Raises TaskError."""
    try:
        text = path.read_text(encoding="utf-8")
        values: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror or error}. Name a task file") from error
    except ValueError as error:
        raise TaskError(f"{path} is not {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}. Mend it") from error
    try:
        task = Task.model_validate(values)
    except ValidationError as error:
        lines = [f"  {where or 'the task'}: {words}" for where, words in problems(error, Task)]
        raise TaskError(f"{path} is not a task:\n" + "\n".join(lines)) from error
    return (task if task.name else task.model_copy(update={"name": path.stem[:64]})), path.parent
