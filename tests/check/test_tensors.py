"""Tensors, from file headers: what cannot be read, shapes, dtypes, and what the merge reads."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers import checkpoints
from helpers.findings import messages
from helpers.misfits import by_pytorch, fine_tuned, names_of, run_strictly
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
from safetensors.torch import load_file, save_file

from mergekit_monosoup import report
from mergekit_monosoup.check import check, planning
from mergekit_monosoup.checkpoints import headers
from mergekit_monosoup.planner import PlanningError

finds = pytest.mark.finds


@finds("TEN509")
def test_shapes_from_headers_alone(write, models, tmp_path, monkeypatch):
    _, (other,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "load_file", None)  # nothing may load a tensor
    found = messages(write(models=[{"model": str(other)}]))
    embedding = next(m for m in found if m.startswith("model.embed_tokens.weight"))
    assert (
        f"({checkpoints.VOCABULARY}, 32)" in embedding
        and f"({checkpoints.VOCABULARY + 8}, 32)" in embedding
    )
    assert "tokenizer: {source: base}" in embedding


def test_a_tokenizer_that_aligns_vocabularies(write, tmp_path):
    _, (other,) = checkpoints.pair(tmp_path, tuned_vocabulary=checkpoints.VOCABULARY + 8)
    assert messages(write(models=[{"model": str(other)}], tokenizer={"source": "base"})) == []


@finds("TEN502")
def test_a_hub_that_cannot_be_reached_is_a_warning(write, served, monkeypatch):
    """More of it is in tests/hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    path = write(models=[{"model": "Qwen/Qwen3-0.6B"}])
    assert messages(path) == []
    (message,) = messages(path, "warning")
    assert message.startswith(
        "Qwen/Qwen3-0.6B: shapes not checked: the hub (http://127.0.0.1:9) cannot be reached"
    )


@finds("TEN506")
def test_filters_that_match_nothing(write):
    path = write(
        parameters={
            "alpha": [{"filter": "selfattn", "value": 0.1}, {"filter": "mlp", "value": 0.9}]
        }
    )
    assert [m for m in messages(path, "warning") if "filter" in m] == [
        "parameters.alpha: filter 'selfattn' is part of no tensor's name "
        "(it is plain text, not a pattern)"
    ]


@finds("TEN506")
def test_filters_go_by_the_names_of_mergekit(write, tmp_path):
    """It stacks the experts that the files hold one by one."""
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3moe")
    given = {"base_model": str(base), "models": [{"model": str(tuned)}]}
    stored = set(checkpoints.state_dict(base))
    planned = {"gate_up_proj": True, "experts.0": any("experts.0." in name for name in stored)}
    for wanted, there in (("gate_up_proj", True), ("experts.0", False)):
        path = write(
            **given, parameters={"alpha": [{"filter": wanted, "value": 0.1}, {"value": 0.9}]}
        )
        found = [m for m in messages(path, "warning") if "filter" in m]
        assert bool(found) is not there, found
        assert not found or ("mergekit has them" in found[0]) is planned[wanted]


@finds("TEN501", "TEN511")
def test_tensors_that_a_model_lacks_and_damaged_files(write, models, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    state = load_file(Path(models[0]) / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    assert "lacks 1 tensor(s)" in messages(write(models=[{"model": str(folder)}]), "warning")[0]
    (folder / "model.safetensors").write_bytes(b"\x10")
    (damaged,) = messages(write(models=[{"model": str(folder)}]))
    assert "cannot be read" in damaged and "cut off in its header" in damaged


@pytest.mark.parametrize("lacking", ["base", "tuned"])
def test_files_of_which_one_has_no_head(write, tmp_path, lacking):
    """mergekit-pytorch drops in silence what only the base has, and stops at the contrary."""
    body = {"body.weight": torch.randn(4, 4)}
    files = {}
    for name in ("base", "tuned"):
        head = {} if name == lacking else {"head.weight": torch.randn(3, 4)}
        files[name] = str(tmp_path / f"{name}.safetensors")
        save_file({**body, **head}, files[name])
    path = write(base_model=files["base"], models=[{"model": files["tuned"]}])
    (said,) = messages(path, "warning")
    assert said.startswith(f"{files[lacking]}: lacks 1 tensor(s)") and "head.weight" in said
    config = RawPyTorchMergeConfig.model_validate(yaml.safe_load(path.read_text()))
    if lacking == "tuned":
        assert "leaves out what only the base has" in said
        assert len(plan_flat_merge(config, "out", False, False, MergeOptions())) == 2  # body, end
        return
    assert "stops at them, but for --tensor-union" in said
    with pytest.raises(RuntimeError, match="Missing tensors"):
        plan_flat_merge(config, "out", False, False, MergeOptions())


@finds("TEN508")
def test_tensors_that_the_merge_needs(write, tmp_path, monkeypatch):
    """A part of a stack of experts is missing; tied heads and experts stored one by one are not."""
    monkeypatch.chdir(tmp_path)
    base, (tuned,) = checkpoints.pair(tmp_path, "qwen3_moe", tied=True)
    path = write(base_model=str(base), models=[{"model": str(tuned)}])
    assert messages(path) == []
    state = checkpoints.state_dict(tuned)
    for gone in (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
    ):
        del state[gone]
    broken = tmp_path / "broken"
    shutil.copytree(tuned, broken)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    path = write(base_model=str(base), models=[{"model": str(broken)}])
    (error,) = messages(path)
    assert (
        error.startswith(f"{broken}: lacks 2 tensor(s) that the merge needs, whole or in part: ")
        and "q_proj" in error
    )
    assert not any("q_proj" in warning for warning in messages(path, "warning"))
    with pytest.raises(RuntimeError, match=r"required but not present|must match"):
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(path.read_text())),
            "out",
            MergeOptions(quiet=True),
        )


@finds("TEN507")
def test_tensors_that_mergekit_passes_by(write, tmp_path):
    """mergekit knows no biases of Llama's attention; they would be gone, and load as zeros."""
    paths = []
    for name in ("base", "tuned"):
        config = checkpoints.config("llama")
        config.attention_bias = True
        torch.manual_seed(len(paths))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        paths.append(str(tmp_path / name))
    base, tuned = paths
    said = [
        m
        for m in messages(write(base_model=base, models=[{"model": tuned}]), "warning")
        if "not read" in m
    ]
    assert len(said) == 1
    assert said[0].startswith(f"{base} and {tuned}: 8 tensor(s) that mergekit does not read")
    assert "model.layers.0.self_attn.k_proj.bias" in said[0]
    layers = [{"sources": [{"model": path, "layer_range": [0, 1]} for path in paths]}]
    (said,) = messages(write(base_model=base, models=None, slices=layers), "warning")
    assert "4 tensor(s) that mergekit does not read" in said, "layer 1 is left out on purpose"


def test_what_lies_beside_the_tensors_of_a_bin_file(write, models, tmp_path):
    shutil.copytree(models[1][0], tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "model.safetensors").unlink()
    torch.save({**state, "epoch": 3}, tmp_path / "other" / "pytorch_model.bin")
    assert messages(write(models=[{"model": str(tmp_path / "other")}])) == []


@finds("TEN504", "TEN505")
def test_adapters_and_codes_and_dtypes(write, models, tmp_path):
    assert (
        "the adapter ./no/lora: no such"
        in messages(write(models=[{"model": f"{models[1][0]}+./no/lora"}]))[0]
    )
    state = {"w": torch.randn(4, 4).to(torch.float8_e4m3fn), "b": torch.zeros(4)}
    save_file(state, tmp_path / "codes.safetensors")
    given = {
        "base_model": None,
        "models": [{"model": str(tmp_path / "codes.safetensors")}],
        "merge_method": "linear",
    }
    assert "is quantised: 1 tensor(s) hold F8_E4M3 codes, w for one" in messages(write(**given))[0]
    bf16 = checkpoints.pair(tmp_path / "bf16", dtype=torch.bfloat16)
    given = {"base_model": str(bf16[0]), "models": [{"model": str(bf16[1][0])}]}
    (message,) = messages(write(**given, out_dtype="float32"), "warning")
    assert "only stores wider what was rounded to BF16 before: add `dtype: float32`" in message
    (message,) = messages(write(out_dtype="bfloat16"), "warning")
    assert "is that of F32" in message
    assert (
        check(write(**given, out_dtype="bfloat16"))
        == []
        == check(write(**given, dtype="float32", out_dtype="float32"))
    )


def saved_adapter(folder: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    """Write what `check` reads of an adapter: peft's names and shapes."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    state = {f"base_model.model.{name}": torch.zeros(shape) for name, shape in tensors.items()}
    save_file(state, folder / "adapter_model.safetensors")
    return folder


DOWN = "model.layers.0.mlp.down_proj"  # (32, 48) in the base


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{DOWN}.lora_A.weight": (4, 48), f"{DOWN}.lora_B.weight": (32, 4)}, ""),
        ({f"{DOWN}.lora_A.weight": (4, 32), f"{DOWN}.lora_B.weight": (48, 4)}, ""),  # Conv1D
        ({"model.embed_tokens.lora_embedding_A": (4, 96)}
         | {"model.embed_tokens.lora_embedding_B": (32, 4)}, ""),
        (
            {f"{DOWN}.lora_A.weight": (4, 40), f"{DOWN}.lora_B.weight": (32, 4)},
            f"{DOWN}.weight is (32, 40) in the adapter and (32, 48) in its base: it was trained on",
        ),
        (
            {"lm_head.weight": (104, 32)},
            "lm_head.weight is (104, 32) in the adapter and (96, 32) in its base: the vocabulary "
            "was enlarged before training. Enlarge the base alike (`model.resize_token_embeddings"
            "(104)`",
        ),
        (
            {"model.embed_tokens.lora_embedding_A": (4, 104)}
            | {"model.embed_tokens.lora_embedding_B": (32, 4)},
            "model.embed_tokens.weight is (104, 32) in the adapter and (96, 32) in its base: the "
            "vocabulary was enlarged",
        ),
    ],
)  # fmt: skip
def test_an_adapter_is_compared_with_its_base(write, models, tmp_path, tensors, message):
    adapter = saved_adapter(tmp_path / "adapter", tensors)
    found = check(write(models=[{"model": f"{models[0]}+{adapter}"}]))
    assert [finding.code for finding in found] == ["TEN503"] * bool(message)
    assert not message or (found[0].message.startswith(message) and found[0].level == "error")


@finds("TEN501", "TEN503")
def test_adapters_that_cannot_be_compared(write, models, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (message,) = messages(write(models=[{"model": f"{models[0]}+{empty}"}]))
    assert f"{empty} is no adapter: peft looks for adapter_config.json" in message
    other = saved_adapter(tmp_path / "other", {"encoder.q.lora_A.weight": (2, 3)})
    path = write(models=[{"model": f"{models[0]}+{other}"}])
    assert messages(path) == []
    (message,) = messages(path, "warning")
    assert message.endswith("none of the adapter's tensors is called as in the base")


@finds("TEN510")
def test_another_architecture(write, tmp_path):
    files = []
    for name in ("left", "right"):
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_file({f"{name}.weight": torch.zeros(2, 2)}, files[-1])
    path = write(merge_method="linear", base_model=None, models=[{"model": f} for f in files])
    assert [m for m in messages(path) if "in common" in m] == [
        f"{files[1]}: has no tensor name in common with {files[0]}: another architecture?"
    ]
    assert messages(path, "warning") == [], "not also that each lacks the other's tensors"


@finds("TEN509")
def test_many_shapes_are_counted(write, tmp_path):
    files = []
    for size in (2, 3):
        files.append(str(tmp_path / f"{size}.safetensors"))
        save_file({f"{n}.weight": torch.zeros(size, 2) for n in range(7)}, files[-1])
    path = write(merge_method="linear", base_model=None, models=[{"model": f} for f in files])
    found = [m for m in messages(path) if "weight" not in m.split(":")[0]]
    assert f"{files[1]}: 2 more tensors differ in shape from {files[0]}" in found
    assert f"0.weight: (2, 2) in {files[0]} but (3, 2) in {files[1]}" in messages(path)


def test_shapes_on_the_hub(write, models, served, tmp_path):
    (tmp_path / "v1").mkdir()
    save_file({"model.norm.weight": torch.zeros(3, 5)}, tmp_path / "v1" / "model.safetensors")
    served.add("org/model", Path(models[1][0]), v1=tmp_path / "v1")
    assert messages(write(models=[{"model": "org/model"}])) == []
    (message,) = messages(write(models=[{"model": "org/model@v1"}]))
    assert message == f"model.norm.weight: (32,) in {models[0]} but (3, 5) in org/model@v1"


@pytest.fixture
def reads(monkeypatch):
    """How often each header is read, from now on."""
    counter = Counter()
    read_header = headers.read_header

    def counting(file, **given):
        counter[file] += 1
        return read_header(file, **given)

    monkeypatch.setattr(headers, "read_header", counting)
    return counter


@pytest.mark.parametrize("kind", ["single", "sharded", "bin"])
def test_each_header_is_read_once(write, tmp_path, monkeypatch, reads, kind):
    """Also where the shapes, the plan's reads and several stages need it."""
    base, tuned = checkpoints.pair(tmp_path, tuned=2, sharded=kind == "sharded")
    if kind == "bin":
        for folder in (base, *tuned):
            torch.save(checkpoints.state_dict(folder), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
    monkeypatch.setattr(ShardedTensorIndex, "from_file", None)  # mergekit's reader
    stage = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in tuned],
    }
    assert check(write(yaml.safe_dump_all([{"name": "first"} | stage, stage]))) == []
    assert not LoaderCache.loaders.keys() & {
        ModelReference.parse(str(p)) for p in (base, *tuned)
    }, "mergekit would take what it opened for this check for what lies there later"
    pattern = "*.bin" if kind == "bin" else "*.safetensors"
    files = {str(file) for folder in (base, *tuned) for file in folder.glob(pattern)}
    assert reads == dict.fromkeys(files, 1) and (len(files) > 3) == (kind == "sharded")


@finds("TEN501")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_read_once_too(write, tmp_path, reads, sharded):
    base, (tuned,) = checkpoints.pair(tmp_path, sharded=sharded)
    damaged = sorted(tuned.glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    stage = {"merge_method": "monosoup", "base_model": str(base), "models": [{"model": str(tuned)}]}
    found = messages(write(yaml.safe_dump_all([{"name": "first"} | stage, stage])))
    size = damaged.stat().st_size
    for label in ("stage first", "document 2"):
        assert (
            f"{label}: {tuned}: cannot be read: {damaged} is cut off: {size} of {size + 1} bytes"
            " are there; download it again" in found
        )
    assert reads[str(damaged)] == 1 and set(reads.values()) == {1}


# -- where mergekit's idea of an architecture does not fit -----------------------------------------

EXPERTS = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    tie_word_embeddings=False,
)


def deepseek(dense: int = 1):
    """mergekit infers it; where a first layer is dense, it misses the experts of the others."""
    config = transformers.DeepseekV3Config(
        **EXPERTS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=dense,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def mixture(**changes):
    config = transformers.Qwen3MoeConfig(**EXPERTS, num_experts=4, decoder_sparse_step=1, **changes)
    return transformers.AutoModelForCausalLM.from_config(config)


def rewrite(folder: Path, change) -> None:
    """Replace the tensors in a folder by what ``change`` makes of them."""
    state = change(checkpoints.state_dict(folder))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_extra_layer(state):
    """Add a layer for multi-token prediction, which no class of transformers has."""
    layer = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in state.items()}
    return layer | state | {"model.layers.2.eh_proj.weight": torch.randn(16, 32)}


LOST = {
    "experts": (lambda: deepseek(1), dict, "model.layers.1.mlp.experts.0.down_proj.weight"),
    "extra layer": (lambda: deepseek(0), with_extra_layer, "model.layers.2.eh_proj.weight"),
    "tower": (mixture, lambda s: {**s, "vision.0.w": torch.ones(4, 4)}, "vision.0.w"),
}


@finds("TEN507")
@pytest.mark.parametrize("kind", LOST)
def test_matrices_that_nobody_reads_are_an_error(write, tmp_path, kind):
    make, change, name = LOST[kind]
    path = fine_tuned(write, make(), tmp_path)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder in (base, tuned):
        rewrite(folder, change)
    (error,) = check(path)
    assert (error.level, error.code) == ("error", "TEN507")
    assert error.where == f"{base} and {tuned}" and name in error.message
    if kind == "experts":
        assert error.message.startswith("12 matrices that mergekit does not")
        assert by_pytorch(error.message, tmp_path) == names_of(base)


def test_run_refuses_to_lose_matrices_without_consent(write, tmp_path):
    path = fine_tuned(write, deepseek(1), tmp_path, parameters={"report": f"{tmp_path}/r.jsonl"})
    lost = {name for name in names_of(tmp_path / "base") if ".experts." in name}
    with pytest.raises(PlanningError, match="--allow-incomplete merges without them"):
        run_strictly(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "r.jsonl").exists()
    run_strictly(path, tmp_path / "out", allow_incomplete=True)
    assert names_of(tmp_path / "out") == names_of(tmp_path / "base") - lost
    records = report.read(tmp_path / "r.jsonl")
    assert {record.name for record in records if record.action == "left out"} == lost
    *rows, total = report.summarise(records)
    assert total.edited + total.copied == len(names_of(tmp_path / "out"))
    assert any("mergekit does not read it" in reason for row in rows for reason in row.reasons)


def test_mergekit_yaml_goes_on_and_the_report_says_what_is_missing(write, tmp_path, caplog):
    path = fine_tuned(write, mixture(), tmp_path, parameters={"report": f"{tmp_path}/r.jsonl"})
    for folder in ("base", "tuned"):
        rewrite(tmp_path / folder, lambda s: {**s, "tower.0.w": torch.ones(4, 4)})
    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True, copy_tokenizer=False))
    (warning,) = [r for r in caplog.records if r.name == "mergekit_monosoup" and r.levelno > 20]
    assert "1 matrices that mergekit does not read" in warning.getMessage()
    records = {record.name: record for record in report.read(tmp_path / "r.jsonl")}
    left = records["tower.0.w"]
    assert (left.action, left.shape, left.dtype) == ("left out", (4, 4), "float32")
    assert sum(record.action == "left out" for record in records.values()) == 1


@pytest.mark.parametrize("many", [1, 5000])
def test_an_inferred_architecture_that_is_merged_whole_is_fine(
    write, tmp_path, caplog, monkeypatch, many
):
    monkeypatch.setattr(planning, "_MANY", many)
    path = fine_tuned(write, deepseek(0), tmp_path)
    assert check(path) == []
    assert not caplog.records, "what mergekit says of inferring is not for the user of `check`"


def test_slices_leave_out_layers_but_no_experts(write, tmp_path):
    path = fine_tuned(write, deepseek(1), tmp_path)
    models = [str(tmp_path / name) for name in ("base", "tuned")]
    for layer, lost in (([0, 1], False), ([1, 2], True)):
        sources = [{"model": model, "layer_range": layer} for model in models]
        path = write(base_model=models[0], models=None, slices=[{"sources": sources}])
        assert [f.code for f in check(path)] == ["TEN507"] * lost


@finds("TEN507")
def test_what_may_be_missing(write, tmp_path):
    """Copies of tied weights are no loss, and buffers that a model computes are a warning."""
    model = transformers.GemmaForCausalLM(  # mergekit's definition has no head
        transformers.GemmaConfig(**{**EXPERTS, "tie_word_embeddings": True})
    )
    path = fine_tuned(write, model, tmp_path)
    head = {"lm_head.weight": torch.randn(32, 16)}
    rewrite(tmp_path / "tuned", lambda state: {**state, **head})
    assert check(path) == []
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
        "model.rotary_emb.cos_cached": torch.ones(4, 4),
    }
    rewrite(tmp_path / "tuned", lambda state: {**state, **buffers})
    (warning,) = check(path)
    assert (warning.level, warning.code) == ("warning", "TEN507")
    assert warning.message.startswith("3 tensor(s) that mergekit does not read")


def whisper():
    shared = dict(encoder_layers=1, decoder_layers=1, num_mel_bins=8, max_source_positions=8)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_target_positions=8)
    sizes = dict(vocab_size=32, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    config = transformers.WhisperConfig(**shared, **heads, **sizes, **tokens)
    return transformers.WhisperForConditionalGeneration(config)


def t5():
    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


@finds("TEN512")
@pytest.mark.parametrize("make", [whisper, t5])
def test_a_definition_that_fits_no_model(write, tmp_path, make):
    """Not "is the checkpoint complete?" of complete checkpoints."""
    path = fine_tuned(write, make(), tmp_path)
    (error,) = check(path)
    assert error.code == "TEN512" and "not the checkpoints are at fault" in error.message
    assert type(make()).__name__ in error.message
    assert by_pytorch(error.message, tmp_path) == names_of(tmp_path / "base")
    with pytest.raises(PlanningError, match="not the checkpoints are at fault"):
        run_strictly(path, tmp_path / "out")
    alone = {"merge_method": "linear", "base_model": None, "parameters": {}}
    only = [{"model": str(tmp_path / "tuned"), "parameters": {"weight": 1}}]
    (error,) = check(write(**alone, models=only))
    assert error.code == "TEN508" and "is the checkpoint complete? If it is" in error.message
    assert by_pytorch(error.message, tmp_path) == names_of(tmp_path / "base")
    path = fine_tuned(write, make(), tmp_path)
    # A tensor that only one of them lacks is that one's own.
    # Not any of them: of T5's encoder the definition names some otherwise, and some not at all.
    gone = min(
        n for n in names_of(tmp_path / "tuned") if n.removeprefix("model.").startswith("encoder.")
    )
    rewrite(tmp_path / "tuned", lambda s: {n: t for n, t in s.items() if n != gone})
    assert [(f.code, gone in f.message) for f in check(path) if f.level == "error"] == [
        ("TEN508", True),
        ("TEN512", False),
    ]


@finds("TEN513")
def test_layouts_of_experts(write, tmp_path):
    """Stacked in one model and one by one in the other is no difference, a missing expert is."""
    model = mixture()
    path = fine_tuned(write, model, tmp_path)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in names_of(tmp_path / "stacked"))
    mixed = {"base_model": str(tmp_path / "stacked"), "models": [{"model": f"{tmp_path}/tuned"}]}
    assert check(write(**mixed)) == []
    rewrite(tmp_path / "tuned", lambda s: {n: t for n, t in s.items() if "experts.3." not in n})
    for given in (mixed, mixed | {"base_model": str(tmp_path / "base")}):
        path = write(**given)
        (error,) = check(path)
        assert (error.code, error.where) == ("TEN513", f"{tmp_path}/tuned")
        assert error.message.startswith("has 3 experts where there are 4, in model.layers.0.mlp")


def test_layouts_of_experts_without_a_plan(write, tmp_path, monkeypatch):
    """As of hub repositories: by the names in the files alone."""
    monkeypatch.setattr(planning.Planning, "models", ())
    model = mixture()
    fine_tuned(write, model, tmp_path)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    path = write(base_model=str(tmp_path / "base"), models=[{"model": f"{tmp_path}/stacked"}])
    assert check(path) == []


def test_a_damaged_model_is_one_mistake(write, models, tmp_path):
    """It has no plan either."""
    shutil.copytree(models[1][0], tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"\x10")
    (error,) = check(write(models=[{"model": str(tmp_path / "other")}]))
    assert error.code == "TEN501"
