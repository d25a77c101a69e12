"""A person's own questions: a file of JSON lines, each with a prompt and its right answer.

    {"prompt": "What is 12 plus 30?", "answer": "42"}
    {"prompt": "Larger of 3 or 17:", "choices": ["3", "17"], "answer": "17"}

The answer to the first kind is written by the model, that to the second is the likeliest choice; a
file holds one kind. A field `cluster` names what a question is about, where several are about the
same thing. A suite names the file, see `suite.Task.questions`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoints.texts import UnreadableError, read_text

FIELDS = ("prompt", "answer", "choices", "cluster")
# Of a whole file: every line is checked and kept in memory, and 64 MB are some 300 000 questions.
MOST_BYTES = 2**26
IGNORED = r"^\s+|[\s.]+$"
"""What does not count where an answer is compared: blanks around it, full stops at its end."""


class QuestionsError(ValueError):
    """A file of questions cannot be used; each line of the message names a file and its line."""


@dataclass(frozen=True)
class Question:
    """One line of a file."""

    line: int
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()  # none: the model writes the answer
    cluster: str | None = None

    @property
    def kind(self) -> str:
        """How it is asked, in words."""
        return "has choices" if self.choices else "has no choices"


@dataclass(frozen=True)
class Questions:
    """All questions of a file, of one kind and either all or none with a cluster."""

    path: Path
    questions: tuple[Question, ...]

    @property
    def multiple_choice(self) -> bool:
        """Whether the model chooses among answers, and writes none."""
        return bool(self.questions[0].choices)

    @property
    def clustered(self) -> bool:
        """Whether questions say what they are about."""
        return self.questions[0].cluster is not None

    def repeated(self) -> Iterator[str]:
        """Yield a sentence for each question that is asked more than once."""
        lines: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
        for question in self.questions:
            lines[question.prompt, question.choices].append(question.line)
        for (prompt, _), same in lines.items():
            if len(same) > 1:
                numbers = ", ".join(map(str, same[:-1])) + f" and {same[-1]}"
                yield (
                    f"{self.path}: lines {numbers} ask the same question, {_short(prompt)}, which "
                    "counts as often"
                )


def read(path: Path) -> Questions:
    """Return the questions of a file.

    Raises:
        QuestionsError: it cannot be read, or a line is not a question; one line for each mistake.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except UnreadableError as error:
        raise QuestionsError(f"{path}: {error}") from error
    questions, mistakes = [], []
    # Not splitlines(): text may hold separators of other kinds, which JSON leaves as they are.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            try:
                questions.append(_question(number, line))
            except ValueError as error:
                mistakes.append(f"{path}, line {number}: {error}")
    mistakes = mistakes or [f"{path}, {mistake}" for mistake in _differences(questions)]
    if not questions and not mistakes:
        mistakes = [f"{path}: it holds no question; a line is {_example()}"]
    if mistakes:
        raise QuestionsError("\n".join(mistakes))
    return Questions(path, tuple(questions))


# -- in a suite ------------------------------------------------------------------------------------

_DECIDED = ("task", "filter", "num_fewshot")  # keys of a suite's entry that a file leaves no choice


def filled(suite: Path, data: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, Questions]]:
    """Return what a suite file holds, with what it and its files of questions imply; and these.

    The questions are by the name of their task. A suite of nothing but one's own questions need not
    say that they are not public.

    Raises:
        QuestionsError: a file, or an entry that names one, cannot be used.
    """
    whole = {"title": suite.stem, "version": 1, **data}
    own: dict[str, Questions] = {}
    mistakes: list[str] = []
    others = 0
    for group in ("ID", "OOD"):
        if not isinstance(data.get(group), list):
            continue
        whole[group] = list(data[group])
        for number, entry in enumerate(data[group]):
            if not isinstance(entry, Mapping) or "questions" not in entry:
                others += 1
                continue
            try:
                asked = _asked(suite, entry)
            except QuestionsError as error:
                mistakes += str(error).splitlines()
                continue
            fields = _fields(asked)
            whole[group][number] = {**fields, **entry}
            own[fields["task"]] = asked
    if mistakes:
        raise QuestionsError("\n".join(dict.fromkeys(mistakes)))
    if own and not others:
        whole.setdefault("public", False)
    return whole, own


def _asked(suite: Path, entry: Mapping[Any, Any]) -> Questions:
    given = entry["questions"]
    if not isinstance(given, str) or not given:
        raise QuestionsError(f"{suite}: questions: must be the name of a file, not {_short(given)}")
    for key in _DECIDED:
        if key in entry:
            hint = {
                "filter": "; `extract` takes the answer out of what a model writes",
                "num_fewshot": "; write worked examples into the prompts",
            }.get(key, "")
            raise QuestionsError(f"{suite}: questions {given}: takes no key `{key}`{hint}")
    return read(suite.parent / given)


def _fields(asked: Questions) -> dict[str, Any]:
    """Return the keys of a suite's entry that follow from the file."""
    stem = re.sub(r"[^\w-]+", "_", asked.path.stem)
    choice = asked.multiple_choice
    return {
        "task": f"own_{stem}",  # never the name of a task of lm-eval's
        "label": asked.path.stem,
        "metric": "acc" if choice else "exact_match",
        "filter": "none" if choice else "answer",
        "cluster": "cluster" if asked.clustered else None,
    }


# -- a line ----------------------------------------------------------------------------------------


def _example() -> str:
    return json.dumps({"prompt": "What is 12 plus 30?", "answer": "42"})


def _question(number: int, line: str) -> Question:
    """Return the question of a line.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        fields = json.loads(line, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nested too deep; a question holds text alone") from error
    if not isinstance(fields, dict):
        raise ValueError(f"not a question: a line is {_example()}")
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}"
            raise ValueError(f"unknown field {_short(name)}; {hint}")
    return Question(
        number,
        _text(fields, "prompt"),
        _answer(fields),
        _choices(fields),
        _text(fields, "cluster") if "cluster" in fields else None,
    )


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_short(twice)} appears twice")
    return fields


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f"{name} is missing")
    return _checked(fields[name], name)


def _checked(value: Any, name: str) -> str:
    """Return a text, or a whole number as text; anything else is refused, blank text too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text in quotes, not {_short(value)}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character")
    return value


def _choices(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if "choices" not in fields:
        return ()
    given = fields["choices"]
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"choices must be a list of two or more texts, not {_short(given)}")
    choices = tuple(_checked(choice, "a choice") for choice in given)
    if len(set(choices)) < len(choices):
        raise ValueError(f"choices has one twice: {_listed(choices)}")
    return choices


def _answer(fields: Mapping[str, Any]) -> str:
    answer, choices = _text(fields, "answer"), _choices(fields)
    if choices and answer not in choices:
        raise ValueError(f"answer {_short(answer)} is not among choices: {_listed(choices)}")
    if not choices and not re.sub(IGNORED, "", answer):
        # It would be right whatever else a model leaves out.
        raise ValueError(f"answer {_short(answer)} is nothing but full stops, which do not count")
    return answer


def _differences(questions: Iterable[Question]) -> Iterator[str]:
    """Yield in which lines a file is of two kinds, or names clusters in some alone."""
    yield from _different(questions, lambda question: question.kind, "put each kind in a file")
    yield from _different(
        questions,
        lambda question: "has no cluster" if question.cluster is None else "has a cluster",
        "give one to all or to none",
    )


def _different(
    questions: Iterable[Question], trait: Callable[[Question], str], advice: str
) -> Iterator[str]:
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(trait(question), question)
    if len(first) > 1:
        (a, one), (b, other) = first.items()
        yield f"line {other.line}: it {b}, and line {one.line} {a}; {advice}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _listed(values: Iterable[str]) -> str:
    texts = [_short(value) for value in values]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
