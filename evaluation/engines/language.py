"""Language models, asked by lm-eval: its tasks, models loaded into it, samples of what it logs.

The only file that imports lm-eval.
"""

from __future__ import annotations

import difflib
import functools
import gc
import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import torch
import transformers
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, get_model
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from evaluation import fingerprint, local_tasks
from evaluation.engines import EvaluationError, Options, Settings, included_tasks
from evaluation.engines.machine import check_device, check_dtype, default_device
from evaluation.sources import Source
from evaluation.store import Sample, TaskResult
from evaluation.suite import Suite, Task
from evaluation.worlds.tasks import write_tasks
from mergekit_monosoup.checkpoints import hub


class Engine:
    """A suite of lm-eval's tasks; a world's, and one's own, are written into the results folder."""

    def __init__(self, suite: Suite, options: Options, out: Path) -> None:
        quiet()
        self.suite = suite
        self._written = out / f"{suite.name}.tasks"
        if suite.world is not None:
            write_tasks(suite.world, self._written)
        local_tasks.write_questions(suite, self._written)
        self._manager = task_manager(suite, self._written)
        device = options.device or default_device()
        self.settings = Settings(
            options.backend or "hf", device, options.dtype or "auto", options.limit
        )
        check_tasks(self._manager, suite, self.settings.backend)
        check_settings(self.settings)

    @property
    def decides(self) -> Mapping[str, Any]:
        """Items of a world and one's own; lm-eval's are decided by its version and the suite."""
        world = self.suite.world is not None
        decides: dict[str, Any] = {
            "local_tasks": fingerprint.of_files(self._written, ("*.jsonl",)) if world else None
        }
        if self.suite.own:
            decides["own_questions"] = local_tasks.digest_of_questions(self.suite)
        if self.suite.included:
            configs = _included(self._manager, self.suite)
            decides["included_tasks"] = included_tasks.digests(self.suite.included, configs)
        return decides

    def warnings(self, models: Sequence[Source]) -> Iterator[str]:
        """Yield that a question is asked twice, and that tokenizers differ."""
        for asked in self.suite.own.values():
            yield from asked.repeated()
        if len({source.origin.fingerprint.tokenizer for source in models}) > 1:
            yield "the models' tokenizer files differ; end-of-text tokens and prompts may, too"

    def check(self, models: Sequence[Source]) -> None:
        """Check the length of contexts, and that there is data."""
        for source in models:
            if source.folder.is_file():
                raise EvaluationError(
                    f"{source.folder}: a file of weights alone; a language model is a folder with "
                    "its config.json and tokenizer"
                )
        check_contexts(self._manager, self.suite, [source.folder for source in models])
        check_data(self._manager, self.suite.tasks, self.suite.included)

    def model(self, source: Source) -> Model:
        """Load a checkpoint into lm-eval."""
        return Model(source.folder, self.suite, self.settings, self._manager)


def quiet() -> None:
    """Silence what hides the progress; LMEVAL_LOG_LEVEL still shows lm-eval's messages."""
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Building prompts: one bar per task, over at once.
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    # Answers: a line per task follows.
    lm_eval.models.huggingface.tqdm = functools.partial(tqdm, leave=False)
    # Both start other programs for every task. The hash is the current folder's, not lm-eval's, and
    # outside of a repository git prints an error; versions are recorded by `fingerprint`.
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    lm_eval.evaluator.add_env_info = lambda _results: None


def check_settings(settings: Settings) -> None:
    """Check that this machine has what the settings name, before any model is loaded.

    lm-eval takes a device that it does not know for the CPU, in silence.

    Raises:
        EvaluationError: there is no such device or dtype, or vLLM is not installed.
    """
    check_dtype(settings.dtype, auto=True)
    if settings.backend == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise EvaluationError(
                "--backend vllm: vLLM is not installed here, and no extra of this package brings it"
            )
        return
    check_device(settings.device)
    if torch.device(settings.device).type not in ("cpu", "cuda", "mps", "xpu", "npu", "hpu"):
        raise EvaluationError(
            f"--device {settings.device}: lm-eval's hf models run on "
            "cpu, cuda, cuda:1, …, mps, xpu, npu, hpu"
        )


# -- tasks ---------------------------------------------------------------------------------------


def task_manager(suite: Suite, written: Path) -> TaskManager:
    """Return the tasks of a suite: those in `written`, those of `include_path`, lm-eval's own.

    The last only if one of them is asked: their index takes ten seconds.
    """
    # Where names are the same, lm-eval takes the task of the later folder.
    folders = [*filter(None, [suite.included]), *filter(Path.is_dir, [written])]
    if folders:
        alone = TaskManager(include_path=[*map(str, folders)], include_defaults=False)
        if all(_complete(alone, task.task) for task in suite.tasks):
            return alone
    return TaskManager(include_path=[*map(str, folders)])


def _complete(manager: TaskManager, name: str) -> bool:
    """Whether a task is known with all its members."""
    try:
        return bool(leaves(manager, name))
    except KeyError:
        return False


def included_file(manager: TaskManager, name: str, folder: Path | None) -> Path | None:
    """Return the file of a task if it lies in the folder of `include_path`."""
    path = manager.task_index[name].yaml_path if folder else None
    return path if folder and path and path.is_relative_to(folder) else None


def _included(manager: TaskManager, suite: Suite) -> dict[str, tuple[Path, Any]]:
    """Return path and content of the task files of `include_path` that the suite asks, by task."""
    names = {name for task in suite.tasks for name in (task.task, *leaves(manager, task.task))}
    return {
        name: (path, manager.task_index[name].cfg or {})
        for name in names
        if (path := included_file(manager, name, suite.included))
    }


def check_tasks(manager: TaskManager, suite: Suite, backend: str = "hf") -> None:
    """Check every task, metric, filter and generation setting of the suite; reads no data.

    Raises:
        EvaluationError: the installed lm-eval does not have one of them.
    """
    unknown = [line for task in suite.tasks for line in _unknown(manager, task)]
    if unknown and suite.included:
        unknown += included_tasks.unreadable(suite.included)
    if backend == "hf":  # vLLM has names of its own
        unknown += [line for task in suite.tasks for line in _unknown_generation(task)]
    if unknown:
        raise EvaluationError("\n".join(f"suite {suite.name}: {line}" for line in unknown))


def _unknown(manager: TaskManager, task: Task) -> Iterator[str]:
    """Yield what lm-eval does not have of a task."""
    if task.task not in manager.task_index:
        yield (
            f"lm-eval has no task {task.task}{_suggestion(task.task, manager.all_tasks)}. For "
            "questions of your own write `{questions: FILE.jsonl}` in its place, for task files of "
            'your own `include_path: FOLDER` in the suite: docs/evaluation.md, "Your own questions"'
        )
        return
    if not _complete(manager, task.task):
        yield f"{task.task} is a group with members that lm-eval does not know by name"
        return
    for leaf in leaves(manager, task.task):
        config = manager.task_index[leaf].cfg or {}
        if "class" in config:
            yield f"{leaf} is a task of Python code, whose scores are not known before it is asked"
            continue
        if task.key not in scores(config):
            yield f"{leaf} has no {task.key}; it has {', '.join(scores(config))}"
        if task.num_fewshot and config.get("num_fewshot") == 0:
            yield (
                f"{leaf} sets num_fewshot 0, which lm-eval lets nobody change; "
                f"the suite wants {task.num_fewshot}"
            )
        if task.generation and config.get("output_type") != "generate_until":
            yield f"{leaf} generates nothing, so `generation` has no effect"


def _unknown_generation(task: Task) -> Iterator[str]:
    """Yield the generation settings that lm-eval's hf models do not know."""
    own = {"until", "max_gen_toks", "max_tokens", "max_completion_tokens"}
    known = own | set(vars(transformers.GenerationConfig()))
    for key in sorted(set(task.generation) - known):
        yield f"{task.task}: generation has no {key}{_suggestion(key, known)}"
    until = task.generation.get("until", [])
    if not isinstance(until, str | list):
        yield f"{task.task}: generation: until must be a text or a list of texts, not {until!r}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def leaves(manager: TaskManager, name: str) -> list[str]:
    """Return the tasks with items of that name: itself, or the members of a group or tag."""
    entry = manager.task_index[name]
    kind = entry.kind.name
    if kind == "TAG":
        return sorted(entry.tags)
    if kind != "GROUP":
        return [name]
    members = [
        member if isinstance(member, str) else member.get("task")
        for member in (entry.cfg or {})["task"]
    ]
    return [
        leaf for member in members if isinstance(member, str) for leaf in leaves(manager, member)
    ]


def scores(config: dict[str, Any]) -> list[str]:
    """Return the "metric,filter" pairs that a task reports."""
    listed = config.get("metric_list")
    metrics = (
        [str(m["metric"]) for m in listed]
        if listed
        else DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]
    )
    filters = [f["name"] for f in config.get("filter_list") or [{"name": "none"}]]
    return [f"{metric},{name}" for metric in metrics for name in filters]


def check_data(manager: TaskManager, tasks: Iterable[Task], included: Path | None = None) -> None:
    """Check that the items can be read, before any model is loaded.

    `included` is the folder of a person's own task files, whose faults are theirs to put right.

    Raises:
        EvaluationError: a data set is missing, or its items lack the field that clusters them; a
            task file in `included` does not fit its data.
    """
    for task in tasks:
        path = included_file(manager, task.task, included)
        try:
            loaded = manager.load([task.task])["tasks"]
            if path:
                _try_first(loaded.values())
        except Exception as error:  # of datasets, the hub's client and its network library
            explained = hub.explanation(error) is not None
            if path and not explained:
                words = " ".join(str(error).split())
                raise EvaluationError(f"{path}: {type(error).__name__}: {words}") from error
            if not explained and not isinstance(error, OSError | datasets.exceptions.DatasetsError):
                raise
            raise EvaluationError(_missing_data(manager, task, error)) from error
        for name, of_leaf in loaded.items():
            first = next(iter(of_leaf.eval_docs))
            if task.cluster not in (None, "doc_id", *first):
                raise EvaluationError(
                    f"{name}: items have no field {task.cluster} (cluster); "
                    f"they have {', '.join(first)}"
                )


def _try_first(tasks: Iterable[Any]) -> None:
    """Make the prompt and the answer of a first item, as a template that does not fit cannot."""
    for task in tasks:
        first = next(iter(task.eval_docs))
        task.doc_to_text(first)
        task.doc_to_target(first)


def _missing_data(manager: TaskManager, task: Task, error: Exception) -> str:
    configs = [manager.task_index[leaf].cfg or {} for leaf in leaves(manager, task.task)]
    paths = sorted({str(config.get("dataset_path")) for config in configs})
    needs = f"task {task.task} needs the data set {', '.join(paths)}"
    if "gated" in str(error):  # datasets keeps no more of what the hub said than this text
        return f"{needs}. {' '.join(str(error).split())} Log in with `hf auth login`."
    return (
        f"{needs}, which is neither on this "
        "machine nor to be had. On a machine with a network run the suite once with `--limit 1`, "
        "then copy its Hugging Face cache (HF_HOME) here. The suite `tiny` needs no network."
    )


def check_contexts(manager: TaskManager, suite: Suite, folders: Iterable[Path]) -> None:
    """Check that each model has room for a question beside the longest answer that is asked for.

    Raises:
        EvaluationError: the context of one is too short; lm-eval would stop half-way.
    """
    longest = {task.task: _longest_answer(manager, task) for task in suite.tasks}
    for folder in folders:
        try:
            length = resolve_max_length(transformers.AutoConfig.from_pretrained(folder))
        except (OSError, ValueError, KeyError):
            continue  # loading the model says what is wrong with its configuration
        for task, tokens in longest.items():
            if tokens >= length:
                raise EvaluationError(
                    f"{folder}: its context is {length} tokens, and {task} asks for answers of up "
                    f"to {tokens}, which leaves no room for the question. Copy the suite "
                    f"{suite.name} and set `generation: {{max_gen_toks: N}}` there, with N well "
                    f"below {length}, or take a model with a longer context"
                )


def _longest_answer(manager: TaskManager, task: Task) -> int:
    """Return how many tokens a task may generate; 0 if it generates none."""
    configs = [manager.task_index[leaf].cfg or {} for leaf in leaves(manager, task.task)]
    return max(
        normalize_gen_kwargs({**(config.get("generation_kwargs") or {}), **task.generation})[
            "max_gen_toks"
        ]
        if config.get("output_type") == "generate_until"
        else 0
        for config in configs
    )


# -- models --------------------------------------------------------------------------------------


class Model:
    """One checkpoint in lm-eval. Use as a context: leaving it frees the memory for the next."""

    def __init__(
        self, folder: Path, suite: Suite, settings: Settings, manager: TaskManager
    ) -> None:
        self.folder = folder
        self._suite, self._settings, self._manager = suite, settings, manager
        shared: dict[str, Any] = {
            "pretrained": str(folder),
            "dtype": settings.dtype,
            "enable_thinking": suite.enable_thinking,
        }
        # A checkpoint's generation_config.json holds sampling defaults (a repetition penalty, say)
        # that leak into greedy decoding, and mergekit does not always copy it: models would be
        # compared under different rules.
        if settings.backend == "vllm":
            self.lm = _loaded(
                folder,
                "vllm",
                **shared,
                batch_size="auto",
                seed=suite.seed,
                generation_config="vllm",
            )
            return
        self.lm = _loaded(
            folder, "hf", **shared, device=settings.device, batch_size=suite.batch_size
        )
        if suite.chat_template and not self.lm.tokenizer.chat_template:
            raise EvaluationError(
                f"{folder}: its tokenizer has no chat template, which suite {suite.name} asks for"
            )
        tokenizer = self.lm.tokenizer
        self.lm.model.generation_config = transformers.GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        del self.lm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def ask(self, task: Task) -> TaskResult:
        """Ask all items of one task.

        One call of lm-eval per task: shots and generation settings hold for a whole call, and what
        is finished can be kept. Never with lm-eval's `use_cache`, which does not ask which model
        answered.

        Raises:
            EvaluationError: answers could not end, or lm-eval did not do what was asked for.
        """
        if self.lm.tokenizer.eos_token_id is None and _longest_answer(self._manager, task):
            raise EvaluationError(
                f"{self.folder}: its tokenizer has no end-of-text token, at which the answers of "
                f"{task.task} would end: set eos_token in its tokenizer_config.json, as in the "
                "model that it was trained from"
            )
        self._check_room(task)
        results = lm_eval.evaluator.simple_evaluate(
            model=self.lm,
            tasks=[task.task],
            num_fewshot=task.num_fewshot,
            limit=self._settings.limit,
            gen_kwargs=dict(task.generation) or None,
            apply_chat_template=self._suite.chat_template,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=self._manager,
            random_seed=self._suite.seed,
            numpy_random_seed=self._suite.seed,
            torch_random_seed=self._suite.seed,
            fewshot_random_seed=self._suite.seed,
        )
        assert results is not None
        samples = [
            sample
            for leaf, logged in results["samples"].items()
            for sample in _samples(task, leaf, logged)
        ]
        info = _info(task, results)
        _check_results(task, results, samples, info["num_fewshot"])
        self._show_an_answer(task, samples)
        return TaskResult(task.task, samples, info)

    def _show_an_answer(self, task: Task, samples: Sequence[Sample]) -> None:
        """Show what a model wrote to one's own question if it got none right.

        Often it knows the answer, and says more than that or nothing at first.
        """
        asked = self._suite.own.get(task.task)
        if not asked or asked.multiple_choice or any(s.values[task.key] for s in samples):
            return
        question = asked.questions[samples[0].doc_id]
        wrote = str(samples[0].answers[task.filter][0])
        print(
            f"warning: {asked.path}: no answer is right. To line {question.line}, whose answer is "
            f"{question.answer!r:.60}, the model wrote {wrote!r:.60}; is the prompt such that the "
            'answer comes next? docs/evaluation.md, "Your own questions", says what can be set',
            file=sys.stderr,
        )

    def _check_room(self, task: Task) -> None:
        """Check that no question of one's own is too long: lm-eval cuts its beginning off."""
        if task.task not in self._suite.own:
            return
        asked, most = self._suite.own[task.task], int(self.lm.max_length)
        answer = _longest_answer(self._manager, task)
        for question in asked.questions:
            longest = max(question.choices, key=len, default="")
            tokens = len(self.lm.tok_encode(question.prompt + longest)) + answer
            if tokens > most:
                raise EvaluationError(
                    f"{asked.path}, line {question.line}: {tokens} tokens with its answer, but the "
                    f"context of {self.folder} is {most}; shorten the prompt, or set `generation: "
                    "{max_gen_toks: N}` in the suite if answers are shorter"
                )


def _check_results(
    task: Task, results: dict[str, Any], samples: Sequence[Sample], shots: dict[str, int]
) -> None:
    """Refuse results of other shots, or of a score that is not the mean over its items."""
    if task.num_fewshot is not None and any(n != task.num_fewshot for n in shots.values()):
        raise EvaluationError(
            f"{task.task}: lm-eval used {shots} shots, the suite asks for {task.num_fewshot}"
        )
    mean = sum(sample.values[task.key] for sample in samples) / len(samples)
    theirs = float(results["results"][task.task][task.key])
    if abs(mean - theirs) > 1e-9:
        # Averages, standard errors and pairing all take a score to be the mean over its items.
        raise EvaluationError(
            f"{task.task}: lm-eval says {theirs} for {task.key}, the mean over its items is {mean}"
        )


def _info(task: Task, results: dict[str, Any]) -> dict[str, Any]:
    """Return how lm-eval asked a task: shots, versions, settings and data of each of its own."""
    leaves = list(results["samples"])
    configs = {leaf: results["configs"][leaf] for leaf in leaves}
    totals = results["results"][task.task]
    return {
        "num_fewshot": {leaf: results["n-shot"][leaf] for leaf in leaves},
        "version": {leaf: results["versions"].get(leaf) for leaf in leaves},
        "generation": {
            leaf: _plain(config.get("generation_kwargs")) for leaf, config in configs.items()
        },
        "dataset": {
            leaf: [config.get("dataset_path"), config.get("dataset_name")]
            for leaf, config in configs.items()
        },
        "lm_eval_results": {k: v for k, v in totals.items() if isinstance(v, float)},
    }


def _loaded(folder: Path, backend: str, **given: Any) -> Any:
    """Return a model of lm-eval."""
    try:
        return get_model(backend)(**given)
    except Exception as error:  # of a tokenizer, a configuration, weights: each library has its own
        raise EvaluationError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): "
            "are config.json, the weights and the tokenizer's files whole?"
        ) from error


def _samples(task: Task, leaf: str, logged: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    """Yield one sample per item; lm-eval logs an item once per filter."""
    by_item: dict[int, list[dict[str, Any]]] = {}
    for entry in logged:
        by_item.setdefault(entry["doc_id"], []).append(entry)
    for doc_id, filtered in sorted(by_item.items()):
        first = filtered[0]
        values = {
            f"{metric},{entry['filter']}": float(entry[metric])
            for entry in filtered
            for metric in entry["metrics"]
            if not isinstance(entry[metric], list | tuple | str | dict)
        }
        # 64 bits of each digest tell any two items apart; whole ones would be most of the file.
        yield Sample(
            task.task,
            leaf,
            doc_id,
            first["doc_hash"][:16],
            first["prompt_hash"][:16],
            first["target_hash"][:16],
            _cluster(task, leaf, first),
            values,
            {entry["filter"]: _plain(entry["filtered_resps"]) for entry in filtered},
        )


def _cluster(task: Task, leaf: str, logged: dict[str, Any]) -> str:
    """Return the name that items about the same thing share."""
    if task.cluster is None:
        return f"{leaf} {logged['doc_id']}"
    if task.cluster == "doc_id":
        return f"doc_id {logged['doc_id']}"
    # Shortened: the field may be a whole question. Tasks share a cluster if the texts are equal.
    return hashlib.sha256(str(logged["doc"][task.cluster]).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return a value for JSON: NumPy's and torch's numbers as Python's, other things as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
