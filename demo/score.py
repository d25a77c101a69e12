"""Ask a model every test item, and turn right and wrong answers into accuracies with honest error bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM

from evaluation.statistics import estimate
from evaluation.worlds.sums import Item

BATCH = 256
ANSWER_TOKENS = 8  # longest answer seen, with its end token: 4

Values = Mapping[str, NDArray[np.float64]]
"""One number per test item, by skill: 1 right, 0 wrong; or the difference of two models' numbers, −1, 0 or 1."""


def grade(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, items: Mapping[str, Sequence[Item]]
) -> dict[str, NDArray[np.float64]]:
    """1.0 where the model's greedy answer is exactly the right one, else 0.0; by skill, in the order of the items."""
    # Given explicitly, so that no checkpoint is judged under sampling settings that came with it.
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        skill: np.array(
            [
                answer == item.answer
                for start in range(0, len(asked), BATCH)
                for item, answer in zip(
                    asked[start : start + BATCH],
                    _answers(
                        model,
                        tokenizer,
                        [item.prompt for item in asked[start : start + BATCH]],
                        greedy,
                    ),
                    strict=True,
                )
            ],
            dtype=np.float64,
        )
        for skill, asked in items.items()
    }


@torch.inference_mode()
def _answers(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    greedy: GenerationConfig,
) -> list[str]:
    batch = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
    )
    # (prompts, prompt length + answer length). Transformers' type for `self` of generate does not fit its own models.
    tokens = model.generate(**batch, generation_config=greedy)  # type: ignore[misc]
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [answer.strip() for answer in tokenizer.batch_decode(new, skip_special_tokens=True)]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both as fractions of 1."""

    mean: float
    standard_error: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Normal interval around the mean."""
        reach = float(norm.ppf(0.5 + confidence / 2)) * self.standard_error
        return self.mean - reach, self.mean + reach


def mean_over_skills(
    values: Values, items: Mapping[str, Sequence[Item]], skills: Sequence[str]
) -> Estimate:
    """The unweighted mean of the skills' own means, with its standard error over the choice of test items.

    Item i of skill k moves the mean by (v_i − mean_k) / (K n_k). Those moves are added up within each cluster before
    they are squared, because the four languages ask about the same pairs of numbers: counted as independent they would
    promise more precision than there is. With one item per cluster and one skill this is the binomial √(p(1−p)/n).
    """
    found = estimate(
        {skill: values[skill] for skill in skills},
        {skill: [item.cluster for item in items[skill]] for skill in skills},
    )
    return Estimate(found.mean, found.standard_error)


def paired_difference(model: Values, reference: Values) -> dict[str, NDArray[np.float64]]:
    """Per-item differences of two models' answers to the same items; feed them to `mean_over_skills`."""
    return {skill: model[skill] - reference[skill] for skill in reference}
