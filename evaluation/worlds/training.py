"""Training of the checkpoints that MonoSoup needs: a pretrained model, and fine-tunes of it."""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from evaluation.worlds import finished
from evaluation.worlds.sums import OTHER_SKILLS, TUNED_SKILL, Item, World, build_tokenizer

IGNORED = -100  # cross_entropy's ignore_index
PRETRAINED, FINETUNED = "pretrained", "finetuned"  # folder names


@dataclass(frozen=True)
class Phase:
    """One training run over a uniform mixture of skills."""

    skills: tuple[str, ...]
    steps: int
    batch: int
    learning_rate: float  # peak: linear warm-up over the first twentieth, then cosine to zero


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, besides the world itself.

    The defaults train in about two minutes. The fine-tuning rate is high on purpose: the tuned
    model then forgets part of what it knew, the case that a soup is for. Embeddings are untied
    because a rate this high destroys a tied model altogether.
    """

    seed: int = 0
    hidden: int = 64
    intermediate: int = 192
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    pretraining: Phase = Phase(OTHER_SKILLS, steps=900, batch=96, learning_rate=3e-3)
    finetuning: Phase = Phase((TUNED_SKILL,), steps=300, batch=64, learning_rate=2.5e-3)


def fingerprint(recipe: Recipe, world: World) -> str:
    """Return a digest of what weights depend on: settings, items, this file, library versions."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode())
    for skill, items in sorted(world.train.items()):
        digest.update(json.dumps([skill, [(item.prompt, item.answer) for item in items]]).encode())
    digest.update(Path(__file__).read_bytes())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    return digest.hexdigest()


def train_pair(recipe: Recipe, world: World, folder: Path, *, fresh: bool = False) -> bool:
    """Train the checkpoints `folder`/pretrained and `folder`/finetuned, unless they are there.

    Returns:
        True if they were trained, False if the folder had them, made with the same settings.
    """
    pretrained, finetuned = folder / PRETRAINED, folder / FINETUNED
    mark = fingerprint(recipe, world)
    if not fresh and all(finished.is_finished(place, mark) for place in (pretrained, finetuned)):
        return False

    tokenizer = build_tokenizer(
        item for skill in sorted(world.train) for item in world.train[skill]
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    for phase, checkpoint in ((recipe.pretraining, pretrained), (recipe.finetuning, finetuned)):
        items = [world.train[skill] for skill in phase.skills]
        _train(model, tokenizer, items, phase, recipe.seed, checkpoint.name)
        _save(model, tokenizer, checkpoint, dataclasses.asdict(recipe), mark)
    return True


def fine_tune(
    source: Path,
    target: Path,
    items: Sequence[Item],
    phase: Phase,
    seed: int,
    *,
    rank: int | None = None,
) -> bool:
    """Fine-tune the checkpoint `source` on `items` into `target`, unless it is there.

    `rank` trains a LoRA adapter of that rank on every linear layer but the head (peft; alpha =
    2·rank) and merges it.

    Returns:
        True if it was trained, False if `target` was there, made with the same settings.
    """
    parent = json.loads((source / finished.RECIPE_FILE).read_text(encoding="utf-8"))
    questions = [(item.prompt, item.answer) for item in items]
    settings = {
        "source": parent["fingerprint"],
        "phase": dataclasses.asdict(phase),
        "seed": seed,
        "rank": rank,
    }
    mark = hashlib.sha256(json.dumps([settings, questions], sort_keys=True).encode()).hexdigest()
    if finished.is_finished(target, mark):
        return False
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(seed)
    if rank is None:
        _train(model, tokenizer, [items], phase, seed, target.name)
    else:
        import peft  # two seconds that only this needs

        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, config)
        _train(adapted, tokenizer, [items], phase, seed, target.name)
        model = cast(Qwen3ForCausalLM, adapted.merge_and_unload())
    _save(model, tokenizer, target, settings, mark)
    return True


def _train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Sequence[Item]],
    phase: Phase,
    seed: int,
    title: str,
) -> None:
    """Train in place on a uniform mixture of the lists in `items`."""
    encoded = [_encode(skill, tokenizer) for skill in items]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warm_up = max(1, phase.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / phase.steps)),
    )
    model.train()
    progress = tqdm(
        _batches(encoded, phase, seed, tokenizer), total=phase.steps, desc=title, unit="step"
    )
    for step, (inputs, targets) in enumerate(progress):
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == phase.steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _encode(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt and each answer.

    They are encoded apart, as at test time, where the prompt stands alone.
    """
    prompts = tokenizer([item.prompt for item in items])["input_ids"]
    answers = tokenizer([f" {item.answer}<end>" for item in items])["input_ids"]
    return list(zip(prompts, answers, strict=True))


def _batches(
    encoded: Sequence[Sequence[tuple[list[int], list[int]]]],
    phase: Phase,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `phase.steps` pairs of inputs and next-token targets, both (batch, length), int64.

    Only answers are targets. Rows are padded on the right: attention is causal, so no real token
    sees the padding and no mask is needed.
    """
    rng = random.Random(seed)
    for _ in range(phase.steps):
        rows = [rng.choice(rng.choice(encoded)) for _ in range(phase.batch)]
        length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        inputs = torch.full((phase.batch, length), tokenizer.pad_token_id)
        targets = torch.full((phase.batch, length), IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            tokens = torch.tensor(prompt + answer)
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
        yield inputs, targets


def _save(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    recipe: dict[str, Any],
    mark: str,
) -> None:
    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    finished.write(checkpoint, save, recipe, mark)
