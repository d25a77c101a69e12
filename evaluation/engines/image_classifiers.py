"""Image classifiers of timm, open_clip and transformers, loaded from files and folders.

    FILE.pt    a CLIP with `classification_head`, as model-soups saves it; its size is known by the
               shapes of its tensors
    FILE       any state dict of a timm model whose config.json lies beside it, or whose
               architecture is named
    FOLDER     of timm (`timm.models.save_for_hf`, its models on the hub), or of an image classifier
               of transformers

Pickles are opened without running code.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file
from torch import Tensor, nn

from evaluation.engines import EvaluationError
from mergekit_monosoup.checkpoints import hub
from mergekit_monosoup.checkpoints.pickles import load as load_pickle
from mergekit_monosoup.checkpoints.pickles import named_tensors
from mergekit_monosoup.checkpoints.reader import NAMES_IN_MESSAGE, listed
from mergekit_monosoup.checkpoints.stored import LackingError

HEAD = "classification_head."  # of model-soups' wrapper
CLIP_SIZES = tuple(name for name in open_clip.list_openai_models() if name.endswith("-quickgelu"))
"""OpenAI's CLIPs as open_clip names them; all were trained with QuickGELU."""

State = dict[str, Tensor]


class CheckpointError(EvaluationError):
    """A checkpoint is no image classifier of the wanted classes; the message names it."""


@dataclass(frozen=True)
class Classifier:
    """A loaded model, and how an image becomes its input."""

    module: nn.Module  # images (n, channels, height, width) → logits (n, classes)
    transform: Callable[[Any], Tensor]  # a PIL image, RGB
    preprocessing: str  # the same in words, to compare and to record
    architecture: str
    labels: tuple[str, ...] = ()  # names of its classes, if the checkpoint has any
    remarks: tuple[str, ...] = ()  # of what was done to the names of its tensors


def load(place: Path, classes: int | None, architecture: str | None = None) -> Classifier:
    """Return the classifier at `place`, in float32, on the CPU.

    Args:
        place: a file or folder, see above.
        classes: how many it has to have; None: as many as it has.
        architecture: of timm, or open_clip for a CLIP, for files that do not say it.

    Raises:
        CheckpointError: it is none, has no head, another number of classes, or other tensors than
            its architecture.
    """
    folder = place if place.is_dir() else place.parent
    config = _config(folder)
    try:
        if is_of_transformers(config) and (place.is_dir() or place.name in hub.WEIGHTS):
            return _of_transformers(folder, classes)
        state, remarks = read_state(_weights(place) if place.is_dir() else place)
        if any(name.startswith("model.visual.") or name.startswith(HEAD) for name in state):
            loaded = _of_clip(place, state, classes, architecture)
        elif "architecture" in config or architecture:
            loaded = _of_timm(place, state, classes, config, architecture)
        else:
            raise CheckpointError(_unknown(place, state))
    except LackingError as error:
        raise CheckpointError(str(error)) from error
    return Classifier(**{**vars(loaded), "remarks": remarks})


def _config(folder: Path) -> dict[str, Any]:
    """Return what config.json says, {} if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def is_of_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of transformers: it names classes, timm's one architecture."""
    return "architectures" in config or "model_type" in config


def _weights(folder: Path) -> Path:
    """Return the only file of weights of a folder, safetensors before pickles."""
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: has {len(found)} files of weights "
                f"({', '.join(file.name for file in found[:NAMES_IN_MESSAGE])}); name one of them"
            )
        if found:
            return found[0]
    raise CheckpointError(f"{folder}: has no weights (model.safetensors, say)")


def read_state(file: Path) -> tuple[State, tuple[str, ...]]:
    """Return the tensors of a file, and remarks on what stood around them.

    Raises:
        LackingError: it cannot be read, or would run code.
    """
    remarks = []
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except Exception as error:  # safetensors has an error of its own, and OSError
            raise LackingError(f"{file} cannot be read as safetensors: {error}") from error
    else:
        state = named_tensors(str(file), "cpu", unwrap=True)
        if not state.keys() <= set(load_pickle(str(file), "meta")):
            remarks.append("its tensors lie in a dictionary inside of it")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        remarks.append("its names begin with module., which is left out")
    return state, tuple(remarks)


def _unknown(place: Path, state: State) -> str:
    if any(name.startswith("visual.") for name in state):
        return (
            f"{place}: a CLIP without a classification head: model-soups' checkpoints have "
            f"{HEAD}weight beside model.visual.…"
        )
    return (
        f"{place}: does not say what model its {len(state)} tensors ({listed(list(state))}) are "
        "of: put timm's config.json beside it, or give --architecture NAME (of timm)"
    )


# -- CLIP ----------------------------------------------------------------------------------------


class ClipClassifier(nn.Module):
    """The image tower of a CLIP, its features normalised, and a linear head.

    As model-soups (Wortsman et al., 2022) fine-tuned them: logits = W f/‖f‖ + b.
    """

    def __init__(self, visual: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.visual = visual
        self.classification_head = head

    def forward(self, images: Tensor) -> Tensor:
        features = self.visual(images)
        logits: Tensor = self.classification_head(features / features.norm(dim=-1, keepdim=True))
        return logits


def _of_clip(
    place: Path, state: State, classes: int | None, architecture: str | None
) -> Classifier:
    head = {name.removeprefix(HEAD): t for name, t in state.items() if name.startswith(HEAD)}
    if head.keys() != {"weight", "bias"}:
        raise CheckpointError(
            f"{place}: has no classification head: it lacks "
            f"{listed([HEAD + name for name in sorted({'weight', 'bias'} - head.keys())])}"
        )
    _check_classes(place, len(head["weight"]), classes)
    start = "model.visual."
    tower = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
    name = architecture or _clip_size(place, tower)
    visual = _tower(name)
    _fill(place, visual, tower, name)
    linear = nn.Linear(head["weight"].shape[1], len(head["weight"]))
    linear.load_state_dict(head)
    features = int(visual.output_dim)
    if features != head["weight"].shape[1]:
        raise CheckpointError(
            f"{place}: its head takes {head['weight'].shape[1]} features, {name} has {features}"
        )
    config = PreprocessCfg(**visual.preprocess_cfg)
    return Classifier(
        ClipClassifier(visual, linear).eval().float(),
        image_transform_v2(config, is_train=False),
        f"open_clip {config}",
        f"CLIP {name}",
    )


def _tower(name: str) -> Any:
    """Return open_clip's image tower of that name, a module without numbers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that no weights are loaded
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", load_weights=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"--architecture {name}: open_clip has no model of this name; without the option "
            "OpenAI's CLIPs are known by their shapes"
        ) from error
    finally:
        logging.disable(before)
    return model.visual


@functools.cache
def _tower_shapes(name: str) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in _tower(name).state_dict().items()}


def _clip_size(place: Path, tower: State) -> str:
    shapes = {name: tensor.shape for name, tensor in tower.items()}
    for name in CLIP_SIZES:
        if _tower_shapes(name) == shapes:
            return name
    raise CheckpointError(
        f"{place}: its image tower of {len(tower)} tensors is none of OpenAI's CLIPs "
        f"({', '.join(name.removesuffix('-quickgelu') for name in CLIP_SIZES)}): name open_clip's "
        "architecture with --architecture"
    )


# -- timm ----------------------------------------------------------------------------------------


def _of_timm(
    place: Path,
    state: State,
    classes: int | None,
    config: Mapping[str, Any],
    architecture: str | None,
) -> Classifier:
    name = architecture or str(config["architecture"])
    arguments = {} if architecture else dict(config.get("model_args") or {})
    described = {} if architecture else dict(config.get("pretrained_cfg") or config)
    arguments.pop("num_classes", None)
    try:
        if classes is None:
            classes = _own_classes(state, name, arguments)
        module = timm.create_model(name, pretrained=False, num_classes=classes, **arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{place}: timm cannot make {name}: {error}") from error
    _check_head(place, module, state, classes)
    _fill(place, module, state, name)
    if described:
        known = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}
        module.pretrained_cfg.update({k: described[k] for k in known & described.keys()})
    data = timm.data.resolve_model_data_config(module)
    return Classifier(
        module.eval().float(),
        timm.data.create_transform(**data, is_training=False),
        f"timm {dict(sorted(data.items()))}",
        name,
        tuple(map(str, config.get("label_names") or ())),
    )


def _own_classes(state: State, name: str, arguments: Mapping[str, Any]) -> int:
    """Return how many classes the head of a state dict has; the model's default without a head."""
    with torch.device("meta"):
        module = timm.create_model(name, pretrained=False, **arguments)
    head = f"{module.pretrained_cfg.get('classifier')}.weight"
    return len(state[head]) if head in state else int(module.num_classes)


def _check_head(place: Path, module: Any, state: State, classes: int) -> None:
    """Check that a state dict has the head of a timm model, of as many classes."""
    heads = module.pretrained_cfg.get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        weight = f"{head}.weight"
        if weight not in module.state_dict():
            continue
        if weight not in state:
            raise CheckpointError(
                f"{place}: has no classification head: it lacks {weight}. `python -m "
                "evaluation.pair BODY HEAD` puts the head of a fine-tuned model on it"
            )
        _check_classes(place, len(state[weight]), classes)


# -- transformers --------------------------------------------------------------------------------


def _of_transformers(folder: Path, classes: int | None) -> Classifier:
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it reports a head without weights
    transformers.utils.logging.disable_progress_bar()
    try:
        module, info = transformers.AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of a configuration, weights, a processor: each has its own
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} cannot be loaded as an image classifier of transformers "
            f"({type(error).__name__}: {text[:300]}): are config.json, preprocessor_config.json "
            "and the weights whole?"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder}: has no classification head: it lacks {listed(missing)}, which "
            f"{type(module).__name__} needs"
        )
    labels = module.config.id2label or {}
    _check_classes(folder, len(labels), classes)
    return Classifier(
        _Logits(module).eval(),
        functools.partial(_processed, processor),
        f"transformers {_plain(processor.to_dict())}",
        type(module).__name__,
        tuple(str(labels[number]) for number in sorted(labels)),
    )


class _Logits(nn.Module):
    """A model of transformers as a function of images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def _processed(processor: Any, image: Any) -> Tensor:
    pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return pixels


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in sorted(settings) if not key.startswith("_")}


# -- what all have in common ---------------------------------------------------------------------


def _check_classes(place: Path, found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise CheckpointError(
            f"{place}: its head has {found} classes, the suite asks for {wanted}"
            + (
                ". `python -m evaluation.pair BODY HEAD` puts the head of a fine-tuned model on it"
                if found > wanted
                else ""
            )
        )


def _fill(place: Path, module: nn.Module, state: State, name: str) -> None:
    """Load all tensors of a module, or say how the checkpoint is of another architecture."""
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state.keys())
        if wanted[key].shape != state[key].shape
    ]
    found = [
        f"{what}: {listed(names)}"
        for what, names in (("it lacks", missing), ("it has", extra), ("of other shapes", shapes))
        if names
    ]
    if found:
        raise CheckpointError(f"{place}: is not of the architecture {name}; {'; '.join(found)}")
    module.load_state_dict(state, assign=True)
