"""The only file that imports lm-eval: finds its tasks, loads models into it, and turns what it logs into rows."""

from __future__ import annotations

import difflib
import functools
import gc
import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, get_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from evaluation.store import Row, TaskResult
from evaluation.suite import Suite, Task


class EngineError(RuntimeError):
    """lm-eval cannot do what the suite asks for; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """What decides answers besides suite and model."""

    backend: str = "hf"
    device: str = "cpu"
    dtype: str = "auto"
    limit: int | None = None


def quiet() -> None:
    """Silence what hides the progress; LMEVAL_LOG_LEVEL still shows lm-eval's messages."""
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lm_eval.api.task.tqdm = functools.partial(
        tqdm, disable=True
    )  # building prompts: one bar per task, over at once
    lm_eval.models.huggingface.tqdm = functools.partial(
        tqdm, leave=False
    )  # a line per task follows
    # Both start other programs for every task. The hash is the current folder's, not lm-eval's, and outside of a repository
    # git prints an error; versions are recorded by `fingerprint`.
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    lm_eval.evaluator.add_env_info = lambda _results: None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_settings(settings: Settings) -> None:
    """Before any model is loaded. lm-eval takes a device that it does not know for the CPU, in silence.

    Raises:
        EngineError: this machine does not have such a device, torch no such dtype, or vLLM is not installed.
    """
    if settings.dtype != "auto" and not isinstance(
        getattr(torch, settings.dtype, None), torch.dtype
    ):
        raise EngineError(
            f"--dtype {settings.dtype}: not one of torch's; take float32, bfloat16, float16 or auto"
        )
    if settings.backend == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "--backend vllm: vLLM is not installed here, and no extra of this package brings it"
            )
        return
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(
            f"--device {settings.device}: {str(error).partition(chr(10))[0]}"
        ) from error
    if torch.device(settings.device).type not in ("cpu", "cuda", "mps", "xpu", "npu", "hpu"):
        raise EngineError(
            f"--device {settings.device}: lm-eval's hf models run on cpu, cuda, cuda:1, …, mps, xpu, npu, hpu"
        )


# -- tasks ---------------------------------------------------------------------------------------------------------------


def task_manager(folder: Path | None = None) -> TaskManager:
    """lm-eval's own tasks, whose index takes it ten seconds; or only those in `folder`."""
    return (
        TaskManager()
        if folder is None
        else TaskManager(include_path=str(folder), include_defaults=False)
    )


def check_tasks(manager: TaskManager, suite: Suite, backend: str = "hf") -> None:
    """Every task, metric, filter and generation setting of the suite exists in the installed lm-eval. Reads no data."""
    wrong = [
        f"suite {suite.name}: {line}" for task in suite.tasks for line in _unknown(manager, task)
    ]
    if backend == "hf":  # vLLM has names of its own
        wrong += [
            f"suite {suite.name}: {line}"
            for task in suite.tasks
            for line in _unknown_generation(task)
        ]
    if wrong:
        raise EngineError("\n".join(wrong))


def _unknown(manager: TaskManager, task: Task) -> Iterator[str]:
    if task.task not in manager.task_index:
        near = difflib.get_close_matches(task.task, manager.all_tasks, n=3)
        yield f"lm-eval has no task {task.task}" + (
            f"; did you mean {', '.join(near)}?" if near else ""
        )
        return
    for leaf in leaves(manager, task.task):
        config = manager.task_index[leaf].cfg or {}
        if task.key not in scores(config):
            yield f"{leaf} has no {task.key}; it has {', '.join(scores(config))}"
        if task.num_fewshot and config.get("num_fewshot") == 0:
            yield f"{leaf} sets num_fewshot 0, which lm-eval lets nobody change; the suite wants {task.num_fewshot}"
        if task.generation and config.get("output_type") != "generate_until":
            yield f"{leaf} generates nothing, so `generation` has no effect"


def _unknown_generation(task: Task) -> Iterator[str]:
    known = {
        "until",
        "max_gen_toks",
        "max_tokens",
        "max_completion_tokens",
        *vars(transformers.GenerationConfig()),
    }
    for key in sorted(set(task.generation) - known):
        near = difflib.get_close_matches(key, known, n=3)
        yield f"{task.task}: generation has no {key}" + (
            f"; did you mean {', '.join(near)}?" if near else ""
        )
    until = task.generation.get("until", [])
    if not isinstance(until, str | list):
        yield f"{task.task}: generation: until must be a text or a list of texts, not {until!r}"


def leaves(manager: TaskManager, name: str) -> list[str]:
    """The tasks with items that a name stands for: itself, or the members of a group or tag."""
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
    """The "metric,filter" pairs that a task reports."""
    listed = config.get("metric_list")
    metrics = (
        [m["metric"] for m in listed] if listed else DEFAULT_METRIC_REGISTRY[config["output_type"]]
    )
    filters = [f["name"] for f in config.get("filter_list") or [{"name": "none"}]]
    return [f"{metric},{name}" for metric in metrics for name in filters]


def check_data(manager: TaskManager, tasks: Iterable[Task]) -> None:
    """The items can be read, before any model is loaded."""
    for task in tasks:
        try:
            loaded = manager.load([task.task])["tasks"]
        except (
            OSError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            datasets.exceptions.DatasetsError,
        ) as error:
            paths = {
                str((manager.task_index[leaf].cfg or {}).get("dataset_path"))
                for leaf in leaves(manager, task.task)
            }
            raise EngineError(
                f"task {task.task} needs the data set {', '.join(sorted(paths))}, which is neither on this machine nor to "
                "be had. On a machine with a network run the suite once with `--limit 1`, then copy its Hugging Face cache "
                "(HF_HOME) here. The suite `tiny` needs no network."
            ) from error
        for name, each in loaded.items():
            first = next(iter(each.eval_docs))
            if task.cluster not in (None, "doc_id", *first):
                raise EngineError(
                    f"{name}: items have no field {task.cluster} (cluster); they have {', '.join(first)}"
                )


# -- models --------------------------------------------------------------------------------------------------------------


class Model:
    """One checkpoint in lm-eval. Use as a context: leaving it frees the memory for the next."""

    def __init__(self, folder: Path, suite: Suite, settings: Settings) -> None:
        shared: dict[str, Any] = {
            "pretrained": str(folder),
            "dtype": settings.dtype,
            "enable_thinking": suite.enable_thinking,
        }
        # A checkpoint's generation_config.json holds sampling defaults (a repetition penalty, say) that leak into greedy
        # decoding, and mergekit does not always copy it: models would be compared under different rules.
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
            raise EngineError(
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

    def ask(self, task: Task, suite: Suite, settings: Settings, manager: TaskManager) -> TaskResult:
        """All items of one task. One call per task: shots and generation settings hold for a whole call of lm-eval, and
        what is finished can be kept. Never with lm-eval's `use_cache`, which does not ask which model answered."""
        results = lm_eval.evaluator.simple_evaluate(
            model=self.lm,
            tasks=[task.task],
            num_fewshot=task.num_fewshot,
            limit=settings.limit,
            gen_kwargs=dict(task.generation) or None,
            apply_chat_template=suite.chat_template,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=manager,
            random_seed=suite.seed,
            numpy_random_seed=suite.seed,
            torch_random_seed=suite.seed,
            fewshot_random_seed=suite.seed,
        )
        assert results is not None
        shots = {leaf: results["n-shot"][leaf] for leaf in results["samples"]}
        if task.num_fewshot is not None and any(
            number != task.num_fewshot for number in shots.values()
        ):
            raise EngineError(
                f"{task.task}: lm-eval used {shots} shots, the suite asks for {task.num_fewshot}"
            )
        rows = [
            row
            for leaf, samples in results["samples"].items()
            for row in _rows(task, leaf, samples)
        ]
        mean = sum(row.values[task.key] for row in rows) / len(rows)
        theirs = float(results["results"][task.task][task.key])
        if abs(mean - theirs) > 1e-9:
            # Averages, standard errors and pairing all take a score to be the mean over its items.
            raise EngineError(
                f"{task.task}: lm-eval says {theirs} for {task.key}, the mean over its items is {mean}"
            )
        configs = {leaf: results["configs"][leaf] for leaf in results["samples"]}
        return TaskResult(
            task.task,
            rows,
            {
                "num_fewshot": shots,
                "version": {leaf: results["versions"].get(leaf) for leaf in shots},
                "generation": {
                    leaf: _plain(config.get("generation_kwargs"))
                    for leaf, config in configs.items()
                },
                "dataset": {
                    leaf: [config.get("dataset_path"), config.get("dataset_name")]
                    for leaf, config in configs.items()
                },
                "lm_eval_results": {
                    k: v for k, v in results["results"][task.task].items() if isinstance(v, float)
                },
            },
        )


def _loaded(folder: Path, backend: str, **given: Any) -> Any:
    try:
        return get_model(backend)(**given)
    except Exception as error:  # of a tokenizer, a configuration, weights: each library has its own
        raise EngineError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): are config.json, the weights and the tokenizer's "
            "files whole?"
        ) from error


def _rows(task: Task, leaf: str, samples: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """lm-eval logs an item once per filter; here it is one row."""
    by_item: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        by_item.setdefault(sample["doc_id"], []).append(sample)
    for doc_id, filtered in sorted(by_item.items()):
        first = filtered[0]
        values = {
            f"{metric},{sample['filter']}": float(sample[metric])
            for sample in filtered
            for metric in sample["metrics"]
            if not isinstance(sample[metric], list | tuple | str | dict)
        }
        # 64 bits of each digest tell any two items apart; whole ones would be most of the file.
        yield Row(
            task.task,
            leaf,
            doc_id,
            first["doc_hash"][:16],
            first["prompt_hash"][:16],
            first["target_hash"][:16],
            _cluster(task, leaf, first),
            values,
            {s["filter"]: _plain(s["filtered_resps"]) for s in filtered},
        )


def _cluster(task: Task, leaf: str, sample: dict[str, Any]) -> str:
    if task.cluster is None:
        return f"{leaf} {sample['doc_id']}"
    if task.cluster == "doc_id":
        return f"doc_id {sample['doc_id']}"
    # Shortened: the field may be a whole question. Tasks share a cluster if the texts are equal.
    return hashlib.sha256(str(sample["doc"][task.cluster]).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """For JSON: NumPy's and torch's numbers as Python's, what is neither as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
