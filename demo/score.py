"""Grading: ask a model every test item, and average right and wrong answers over skills."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM

from evaluation.statistics import Estimate, Values, estimate
from evaluation.worlds.sums import Item
from evaluation.worlds.tasks import ANSWER_TOKENS

BATCH = 256

Items = Mapping[str, Sequence[Item]]
"""The test items by skill; `Values` are numbers in the same order.

1 right, 0 wrong; or the difference of two models' numbers, −1, 0 or 1.
"""


def grade(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, items: Items
) -> dict[str, NDArray[np.float64]]:
    """Return 1.0 where the model's greedy answer is exactly the right one, else 0.0, by skill."""
    # Given explicitly, so that no checkpoint is judged under sampling settings that came with it.
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    grades = {}
    for skill, of_skill in items.items():
        prompts = [item.prompt for item in of_skill]
        answers = [
            answer
            for start in range(0, len(prompts), BATCH)
            for answer in _answers(model, tokenizer, prompts[start : start + BATCH], greedy)
        ]
        right = [answer == item.answer for item, answer in zip(of_skill, answers, strict=True)]
        grades[skill] = np.array(right, dtype=np.float64)
    return grades


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
    # (prompts, prompt length + answer length). Transformers' type for `self` of generate does not
    # fit its own models.
    tokens = model.generate(**batch, generation_config=greedy)  # type: ignore[misc, unused-ignore]
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [answer.strip() for answer in tokenizer.batch_decode(new, skip_special_tokens=True)]


def mean_over_skills(values: Values, items: Items, skills: Sequence[str]) -> Estimate:
    """Return the unweighted mean of the skills' means, with its error over the choice of items.

    Items of a cluster count together, because the four languages ask about the same pairs of
    numbers: counted as independent they would promise more precision than there is. See
    `evaluation.statistics.estimate`.
    """
    return estimate(
        {skill: values[skill] for skill in skills},
        {skill: [item.cluster for item in items[skill]] for skill in skills},
    )
