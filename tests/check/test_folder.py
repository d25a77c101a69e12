"""What lies beside the weights: what is written of it, what is lost, and what does not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
import yaml
from helpers import checkpoints
from helpers.findings import messages
from safetensors.torch import load_file, save_file

from mergekit_monosoup.check import check

finds = pytest.mark.finds


def edit(folder: Path, file: str = "config.json", **keys) -> None:
    """Replace keys of a JSON file; None removes one."""
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {k: v for k, v in (content | keys).items() if v is not None}
    path.write_text(json.dumps(content))


@pytest.fixture
def base(models, tmp_path) -> Path:
    """A copy of the base model to spoil."""
    return Path(shutil.copytree(models[0], tmp_path / "BASE"))


@pytest.fixture
def tuned(models, tmp_path) -> Path:
    """A copy of a fine-tune to spoil."""
    return Path(shutil.copytree(models[1][0], tmp_path / "TUNED"))


@pytest.fixture
def said(write, base, tuned):
    """Findings of merging the two, `code where: message`, with some keys changed."""

    def find(**changes) -> list[str]:
        given = {"base_model": str(base), "models": [{"model": str(tuned)}]} | changes
        found = check(write(**given))
        text = [f"{f.code} {f.where}: {f.message}" for f in found]
        return [t.replace(str(base), "BASE").replace(str(tuned), "TUNED") for t in text]

    return find


# -- what is written -------------------------------------------------------------------------------

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


@finds("FOL605")
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (ROPE, "rope_parameters.rope_theta 1000000.0 (not 10000.0)"),
        ({"max_position_embeddings": 512}, "max_position_embeddings 512 (not 64)"),
        ({"eos_token_id": [5, 7]}, "eos_token_id [5, 7] (not none)"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 (not 1e-06)"),
        ({"id2label": {"0": "\x1b[31mbad"}}, "id2label.0 '\\x1b[31mbad'"),
    ],
)
def test_a_fine_tune_with_another_configuration(said, tuned, changed, expected):
    edit(tuned, **changed)
    (found,) = [text for text in said() if "FOL605" in text]
    assert "FOL605 config.json: the merged model gets that of BASE; TUNED has " in found
    assert expected in found and "write them into the merged config.json" in found


def test_what_changes_nothing_is_not_reported(said, tuned):
    """Another version of transformers writes other keys, and training its own."""
    edit(
        tuned,
        transformers_version="4.40.0",
        dtype="bfloat16",
        use_cache=False,
        attention_dropout=0.1,
        unsloth_version="1",
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling=None,
        sliding_window=None,
    )
    edit(tuned, "generation_config.json", do_sample=False, temperature=1.0, use_cache=False)
    edit(tuned, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizer", legacy=True)
    edit(tuned, "tokenizer_config.json", unk_token={"content": "<unk>", "lstrip": False})
    assert said() == []


@finds("FOL606")
def test_generation_settings(said, base, tuned):
    assert said(tokenizer={"source": "base"}) == []
    edit(tuned, "generation_config.json", temperature=0.6, do_sample=True, eos_token_id=[5, 0])
    (found,) = said()
    assert found.startswith("FOL606 generation_config.json: the merged model gets that of BASE")
    assert "temperature 0.6 (not none)" in found and "eos_token_id [5, 0]" in found
    (found,) = said(tokenizer={"source": str(tuned)})
    assert "with `tokenizer:` mergekit writes none; TUNED has" in found
    assert "copy generation_config.json of TUNED" in found
    shutil.copy(tuned / "generation_config.json", base)
    assert said() == []
    for lost in (
        {"tokenizer": {"source": "base"}},
        {"tokenizer_source": "union"},
        {"chat_template": "chatml"},
    ):
        (found,) = said(**lost)
        assert "writes none; BASE, TUNED have" in found


@finds("FOL607")
@pytest.mark.parametrize(
    "places",
    [
        {"chat_template.jinja": "{{ messages }}"},
        {"tokenizer_config.json": {"chat_template": "{{ messages }}"}},
        {"chat_template.json": {"chat_template": "{{ messages }}"}},
        {
            "tokenizer_config.json": {
                "chat_template": [{"name": "default", "template": "{{ messages }}"}]
            }
        },
    ],
)
def test_a_chat_template_wherever_it_is_kept(said, base, tuned, places):
    ((file, content),) = places.items()
    if isinstance(content, str):
        (tuned / file).write_text(content)
    else:
        edit(tuned, file, **content)
    (found,) = said()
    assert f"BASE, which has none; TUNED has one: where it is wanted, copy {file}" in found
    assert said(chat_template="auto") == said(chat_template="chatml") == []
    (base / "chat_template.jinja").write_text("{{ other }}")
    assert "BASE; TUNED has another one" in said()[0]
    assert "several are equally common" in said(chat_template="auto")[0]
    assert said(tokenizer={"source": str(tuned)}) == []


def test_a_tokenizer_of_other_settings_and_tokens(said, base, tuned):
    edit(tuned, "tokenizer_config.json", eos_token="w5", add_eos_token=True)
    (found,) = said()
    assert "tokenizer_config.json: the merged model gets that of BASE; TUNED has" in found
    assert "eos_token 'w5' (not none)" in found and "add_eos_token True (not False)" in found
    assert "write `tokenizer: {source: TUNED}`" in said(tokenizer={"source": "base"})[0]
    assert said(tokenizer={"source": str(tuned)}) == []
    shutil.copy(base / "tokenizer_config.json", tuned)
    content = json.loads((tuned / "tokenizer.json").read_text())
    content["model"]["vocab"]["<think>"] = content["model"]["vocab"].pop("w7")
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    (found,) = said()
    assert "tokenizer.json" in found and "other numbers: '<think>'; to keep them add" in found
    for file in base.glob("tokenizer*"):
        file.unlink()
    assert "FOL607 tokenizer: the merged model gets none, for BASE has none" in said()[0]


@finds("FOL611")
def test_chat_templates_that_mergekit_does_not_know(said):
    (found,) = said(chat_template="chatmll")
    assert "'chatmll' is neither a template nor the name of one" in found
    assert "did you mean `chatml`?" in found
    assert said(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}") == []


def test_without_a_base_the_files_are_of_any_model(said, base, tuned):
    edit(tuned, max_position_embeddings=512)
    entries = [{"model": str(m), "parameters": {"weight": 1}} for m in (base, tuned)]
    (found,) = said(merge_method="linear", base_model=None, models=entries)
    assert "gets that of any of the models, BASE for one" in found


def test_stages_have_the_files_of_their_base(write, base, tuned):
    edit(tuned, max_position_embeddings=512)
    first = {
        "name": "first",
        "merge_method": "monosoup",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
    }
    second = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": "first", "parameters": {"weight": 1}}],
    }
    found = check(write(yaml.safe_dump_all([first, second])))
    assert [f.where for f in found] == ["stage first: config.json"]
    second["base_model"], second["models"][0]["model"] = "first", str(tuned)
    found = check(write(yaml.safe_dump_all([first, second])))
    assert [f.where for f in found] == ["stage first: config.json", "document 2: config.json"]
    assert f"gets that of {base}" in found[1].message


# -- files that cannot be used ---------------------------------------------------------------------


@finds("FOL601")
@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_damaged_files_give_one_line(said, tuned, file, content):
    (tuned / file).write_bytes(content)
    (found,) = said()
    assert found.startswith(f"FOL601 TUNED: {file}: ") and "\n" not in found


def test_devices_and_numbers_that_never_end(said, tuned):
    edit(tuned, "tokenizer_config.json", added_tokens_decoder={"9" * 5000: {"content": "x"}})
    assert not [text for text in said() if "FOL601" in text]
    (tuned / "tokenizer_config.json").unlink()
    (tuned / "tokenizer_config.json").symlink_to("/dev/zero")
    (found,) = [text for text in said() if "FOL601" in text]
    assert "tokenizer_config.json: cannot be read: it is a device; give a file" in found


@finds("FOL602")
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model_type": "qwen99"}, "has no model_type 'qwen99'"),
        ({"architectures": None}, "must name one class, and names none"),
        ({"architectures": {"a": 1}}, "must name one class, and names"),
        ({"architectures": ["A", "B"]}, "and names 'A', 'B'"),
        ({"hidden_size": "wide"}, "cannot be loaded by transformers"),
    ],
)
def test_configurations_that_mergekit_cannot_use(said, tuned, changed, expected):
    edit(tuned, **changed)
    (found,) = said()
    assert found.startswith("FOL602 TUNED: config.json: ") and expected in found


@finds("FOL603")
def test_code_of_a_models_own_is_named_and_not_run(said, base, tuned):
    auto_map = {"AutoConfig": "configuration_my.C", "AutoModelForCausalLM": "modeling_my.M"}
    for folder in (base, tuned):
        (folder / "configuration_my.py").write_text("raise SystemExit('it ran')")
        (folder / "modeling_my.py").write_text("raise SystemExit('it ran')")
        edit(folder, auto_map=auto_map)
    (found,) = said()  # a type that transformers knows
    assert found.startswith("FOL603 BASE: ") and "copy configuration_my.py, modeling_my.py" in found
    for folder in (base, tuned):
        edit(folder, model_type="mine", architectures=["Mine"])
    (found,) = said()
    assert (
        found.startswith("FOL603 BASE, TUNED: ") and "stops at its start without --trust" in found
    )
    edit(base, model_type="qwen3", auto_map=None)
    edit(tuned, model_type="qwen3", auto_map=None)
    edit(tuned, "tokenizer_config.json", auto_map={"AutoTokenizer": ["other/repo--tok.T", None]})
    assert said() == []
    assert "FOL603 TUNED" in said(tokenizer={"source": "union"})[0]


@finds("FOL604")
@pytest.mark.parametrize(
    "leftover",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"load_in_8bit": True}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_a_leftover_quantization_config(said, base, tuned, leftover):
    edit(tuned, **leftover)
    assert [text for text in said() if "FOL604" in text] == []  # it is not written
    edit(base, **leftover)
    (found,) = [text for text in said() if "FOL604" in text]
    assert found.startswith("FOL604 BASE: config.json: ") and "does not load" in found


# -- other weights and modules ---------------------------------------------------------------------


@finds("FOL608")
def test_weights_and_modules_that_stay_behind(said, tuned):
    weights = {"linear.weight": torch.zeros(2, 2)}
    for harmless in ("original", "onnx", "checkpoint-500"):
        (tuned / harmless).mkdir()
        save_file(weights, tuned / harmless / "model.safetensors")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "consolidated.00.pth"):
        torch.save(weights, tuned / name)
    (tuned / "itself").symlink_to("itself")
    assert said() == []
    (tuned / "2_Dense").mkdir()
    save_file(weights, tuned / "2_Dense" / "model.safetensors")
    (tuned / "1_Pooling").mkdir()
    modules = [{"idx": n, "path": path} for n, path in enumerate(("", "1_Pooling", "2_Dense"))]
    (tuned / "modules.json").write_text(json.dumps(modules))
    torch.save(weights, tuned / "colbert_linear.pt")
    (found,) = said()
    assert (
        "FOL608 TUNED: mergekit neither merges nor copies modules.json, 1_Pooling, "
        "2_Dense/model.safetensors, colbert_linear.pt" in found
    )


# -- tokens and rows -------------------------------------------------------------------------------


def words(folder: Path, count: int, extra: tuple[str, ...] = (), kind: str = "WordLevel") -> None:
    vocabulary = {f"w{i}": i for i in range(count - 1)} | {"<unk>": count - 1}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>")
    if kind == "WordLevel":
        model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": list(extra)})
    made.save_pretrained(folder)


@finds("FOL609")
def test_tokens_without_a_row(said, base, tuned):
    """mergekit ends with a KeyError, or drops them, or they have no row in the merged model."""
    rows, more = checkpoints.VOCABULARY, ("<EOT>", "<MID>")
    words(tuned, rows, more)
    (found,) = said(tokenizer={"source": str(tuned)})
    assert "FOL609 TUNED: 2 token(s) have no row among the 96" in found and "KeyError" in found
    for source in ("base", "union"):
        (found,) = said(tokenizer={"source": source})
        assert "FOL610" in found and "'<EOT>', '<MID>'; they have no row" in found
    words(base, rows, more)
    assert "FOL609 BASE: 2 token(s) have no row among its 96, nor in the merged" in said()[0]
    assert "can drop them from a BPE tokenizer only" in said(tokenizer={"source": "base"})[0]
    words(base, rows, more, kind="BPE")
    words(tuned, rows)
    assert said(tokenizer={"source": "base"}) == []


@finds("FOL610")
def test_padding_rows_and_tokens_that_a_tokenizer_drops(write, tmp_path):
    base, (tuned,) = checkpoints.pair(tmp_path, vocabulary=128, tuned_vocabulary=192)
    words(base, 96)
    words(tuned, 96, ("<im_start>", "<im_end>"))

    def said(**tokenizer):
        path = write(base_model=str(base), models=[{"model": str(tuned)}], tokenizer=tokenizer)
        return messages(path, "warning")

    tokens, padding = said(source="base")
    assert (
        "2 token(s) of" in tokens
        and "'<im_start>', '<im_end>'; `tokenizer: {source: union}`" in (tokens)
    )
    assert "96 rows where" in padding and "`pad_to_multiple_of: 128`" in padding
    for source in ("union", str(tuned)):
        (padding,) = said(source=source)
        assert "the merged embedding has 98 rows where" in padding
        assert said(source=source, pad_to_multiple_of=64) == []


@finds("FOL612")
def test_rows_that_a_tokenizer_does_not_rearrange(write, tmp_path):
    size = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = transformers.T5EncoderModel(transformers.T5Config(**size))
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        words(tmp_path / name, 96)

    def said(**tokenizer):
        models = [{"model": str(tmp_path / "tuned")}]
        return messages(write(base_model=str(tmp_path / "base"), models=models, **tokenizer))

    assert said() == said(tokenizer={"source": "union"}) == []  # nothing is to be rearranged
    (padded,) = said(tokenizer={"source": "base", "pad_to_multiple_of": 64})
    assert "shared.weight: a row for each token" in padded
    words(tmp_path / "tuned", 95, ("<new>",))  # of the same size, and not the same tokens
    assert "shared.weight: a row" in said(tokenizer={"source": "base"})[0]


def test_an_adapter_has_a_tokenizer_of_its_own(write, models, tmp_path):
    shapes = {
        "model.embed_tokens.lora_embedding_A": (4, checkpoints.VOCABULARY),
        "model.embed_tokens.lora_embedding_B": (32, 4),
        "of.nobody.weight": (1, 1),
    }
    state = {f"base_model.model.{n}": torch.zeros(shape) for n, shape in shapes.items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    checkpoints.tokenizer(checkpoints.VOCABULARY).save_pretrained(tmp_path)
    path = write(models=[{"model": f"{models[0]}+{tmp_path}"}])
    assert check(path) == []
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (found,) = messages(path, "warning")
    assert f"copy chat_template.jinja of {tmp_path} into" in found


def test_single_files_have_nothing_beside_them(write, models):
    base, tuned = (f"{model}/model.safetensors" for model in (models[0], models[1][0]))
    assert check(write(base_model=base, models=[{"model": tuned}])) == []
    assert load_file(base).keys() == load_file(tuned).keys()
