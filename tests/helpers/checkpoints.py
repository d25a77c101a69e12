"""Small checkpoints of real architectures, with real loading code behind them."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

VOCABULARY = 96


def config(
    family: str = "qwen3", *, tied: bool = False, vocabulary: int = VOCABULARY
) -> transformers.PretrainedConfig:
    shared = dict(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    if family == "qwen3":
        return transformers.Qwen3Config(**shared)
    if family == "llama":
        return transformers.LlamaConfig(**shared)
    return transformers.Qwen3MoeConfig(
        **shared,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
    )


def pair(
    folder: Path,
    family: str = "qwen3",
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    sharded: bool = False,
    tuned: int = 1,
    size: float = 0.02,
    vocabulary: int = VOCABULARY,
    tuned_vocabulary: int = VOCABULARY,
) -> tuple[Path, list[Path]]:
    """Write a pretrained checkpoint and fine-tuned ones.

    Their updates are a few directions plus noise of relative ``size``.

    Stands in for training only where the *plumbing* is tested; the demo trains for real.
    """
    shard = {"max_shard_size": "20KB"} if sharded else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(family, tied=tied, vocabulary=vocabulary), dtype=dtype
    )
    model.save_pretrained(folder / "base", **shard)
    tokenizer(vocabulary).save_pretrained(folder / "base")
    paths = []
    for number in range(tuned):
        torch.manual_seed(100 + number)
        other = transformers.AutoModelForCausalLM.from_config(
            config(family, tied=tied, vocabulary=tuned_vocabulary), dtype=dtype
        )
        state = model.state_dict()
        with torch.no_grad():
            for name, weight in other.named_parameters():
                start = state[name]
                if start.shape != weight.shape:
                    continue
                update = torch.randn_like(start, dtype=torch.float32)
                if start.ndim >= 2:
                    update = 0.3 * update + torch.randn(*start.shape[:-1], 3) @ torch.randn(
                        3, start.shape[-1]
                    )
                weight.copy_(start + size * start.float().norm() / update.norm() * update)
        other.tie_weights()
        paths.append(folder / f"tuned{number}")
        other.save_pretrained(paths[-1], **shard)
        tokenizer(tuned_vocabulary).save_pretrained(paths[-1])
    return folder / "base", paths


def tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"<unk>": vocabulary - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved checkpoint, whatever its shards."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
