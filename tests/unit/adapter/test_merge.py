"""Merging, against dense sums of complete matrices: the files, what transformers loads, what is refused."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from speft_ds import apply_adapter
from speft_ds.adapter import merge as module
from speft_ds.adapter.compose import compose
from speft_ds.adapter.export import export_peft
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.merge import merge, parse_size
from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import UserError
from speft_ds.jobs.preflight import check_inputs
from speft_ds.model.codecs import codec
from speft_ds.model.targets import find_targets, target_shapes
from unit.adapter.samples import (
    SCORES,
    assert_same,
    classifier,
    load,
    make_adapter,
    make_classifier,
    read,
    refused,
    trained,
    values,
)


def tensors(folder):
    paths = sorted(folder.glob("*.safetensors"))
    return {key: value for path in paths for key, value in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", ["untied", "tied"])
def test_a_merged_checkpoint_is_the_trained_model(tiny, tmp_path, checkpoint, dtype):
    base, merged = tiny[checkpoint], tmp_path / "merged"
    adapter = make_adapter(tmp_path / "a", base, dtype)
    done = merge(None, adapter, merged, scores=SCORES)
    stored = tensors(base)
    assert_same(tensors(merged), trained(adapter, {k: v.to(dtype) for k, v in stored.items()}))
    assert done.num_bytes == sum(value.numel() * dtype.itemsize for value in stored.values())
    assert done.num_changed == Adapter.open(adapter).num_entries and done.note is None
    # In transformers, without a word about the dtype: what apply_adapter makes of the base, and its logits.
    model, live = AutoModelForCausalLM.from_pretrained(merged), load(base, dtype)
    apply_adapter(live, adapter)
    assert_same(values(model), values(live))
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, live(ids).logits)
    tokens = [AutoTokenizer.from_pretrained(folder)("a b").input_ids for folder in (base, merged)]
    assert tokens[0] == tokens[1]
    assert {path.name for path in merged.iterdir()} == {path.name for path in base.iterdir()} | {"README.md"}
    card = ModelCard.load(merged / "README.md").data
    about = [getattr(card, key) for key in ("library_name", "pipeline_tag")]
    assert about == ["transformers", "text-generation"]
    assert [result.metric_value for result in card.eval_results] == [score["value"] for score in SCORES]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "merged"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_interpolated_in_another_dtype(tiny, tmp_path, alpha, dtype):
    """The base as the run saw it, in bfloat16, and fp32 sums, each rounded once."""
    adapter = make_adapter(tmp_path / "a", tiny["untied"], torch.bfloat16)
    merge(tiny["untied"], adapter, tmp_path / "merged", alpha, dtype, scores=SCORES)
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.eval_results is None  # of other weights
    seen = {key: value.bfloat16() for key, value in tensors(tiny["untied"]).items()}
    assert_same(tensors(tmp_path / "merged"), trained(adapter, seen, alpha, getattr(torch, dtype)))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == dtype and "torch_dtype" not in config


def test_what_else_a_base_has_is_carried_along(tiny, tmp_path):
    base = shutil.copytree(tiny["untied"], tmp_path / "base")
    kept = ["processor_config.json", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"]
    left = [".cache/x.json", "original/consolidated.00.pth", "onnx/model.onnx"]
    left += ["checkpoint-5/config.json", "checkpoint-5/model.safetensors", "checkpoint-5/deeper/x.json"]
    left += ["adapters/a/adapter.json", "runs/a/recipe.yaml", "runs/a/eval/before.json"]
    for name in [*kept, *left, "README.md"]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (tmp_path / "secret.json").write_text("of the user")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("in_the_cache.json")
    (base / "link.json").symlink_to(tmp_path / "secret.json")
    (base / "in_the_cache.json").symlink_to(tmp_path / "blobs" / "abc")
    (base / "dangling.json").symlink_to(tmp_path / "nowhere")
    adapter = make_adapter(tmp_path / "a", base)
    for merged in (tmp_path / "merged", base / "merged"):  # the second one: into the base's own folder
        merge(base, adapter, merged)
        assert all((merged / name).read_text() == name for name in (*kept, "in_the_cache.json"))
        unwanted = (*left, "link.json", "dangling.json", "merged", "merged.tmp")
        assert not any((merged / name).exists() for name in unwanted)
        assert (merged / "README.md").read_text().startswith("---\n")  # not the base's


def test_files_are_split_as_the_bases_or_as_asked_for(tiny, tmp_path):
    load(tiny["untied"]).save_pretrained(tmp_path / "base", max_shard_size="50KB")
    names = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert len(names) > 2
    adapter = make_adapter(tmp_path / "a", tmp_path / "base")
    merge(None, adapter, tmp_path / "same")
    assert {path.name for path in (tmp_path / "same").glob("*.safetensors")} == names
    merge(None, adapter, tmp_path / "one", max_shard_size="1GB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    merge(tiny["untied"], adapter, tmp_path / "many", max_shard_size=20_000)
    assert all(path.stat().st_size < 41_000 for path in (tmp_path / "many").glob("*.safetensors"))
    expected = trained(adapter, tensors(tiny["untied"]))
    for name in ("same", "one", "many"):
        assert_same(tensors(tmp_path / name), expected)
        assert_same(values(load(tmp_path / name)), expected)


def test_a_checkpoint_of_the_decoder_alone(tiny, tmp_path):
    """Its keys have no `model.` in front."""
    LlamaModel.from_pretrained(tiny["tied"]).save_pretrained(tmp_path / "base")
    assert "norm.weight" in tensors(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", tmp_path / "base")
    assert merge(None, adapter, tmp_path / "merged").note is None
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "base").keys()
    assert_same(values(load(tmp_path / "merged")), trained(adapter, values(load(tmp_path / "base"))))


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "converted keys"])
def test_other_checkpoints_are_merged_in_memory(tiny, tmp_path, kind, dtype):
    base = tmp_path / "base"
    if kind == "converted keys":  # experts are apart in the files, and stacked in the model
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **sizes)
        MixtralForCausalLM(config).save_pretrained(base)
    else:
        shutil.copytree(tiny["untied"], base)
        torch.save(load_file(base / "model.safetensors"), base / kind)
        (base / "model.safetensors").unlink()
    adapter = make_adapter(tmp_path / "a", base)
    assert merge(None, adapter, tmp_path / "merged", 0.5, dtype).note
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = trained(adapter, values(load(base)), 0.5, getattr(torch, dtype or "float32"))
    assert_same(values(model), expected)
    refuse(tmp_path, None, make_adapter(tmp_path / "b", base, fingerprint="0" * 64), where=tmp_path / "b")


def test_a_classifier_is_merged_with_its_head(tiny, tmp_path):
    adapter, head = make_classifier(tmp_path / "a", tiny["untied"])
    merge(None, adapter, tmp_path / "merged", dtype="bfloat16")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert "lm_head.weight" not in tensors(tmp_path / "merged")
    expected = trained(adapter, values(classifier(tiny["untied"])), dtype=torch.bfloat16)
    assert_same(values(merged), {**expected, "score.weight": head.bfloat16()})
    assert merged.config.id2label == {0: "no", 1: "maybe", 2: "yes"} and merged.config.num_labels == 3
    assert merged.config.architectures == ["LlamaForSequenceClassification"]
    assert (merged.config.pad_token_id, merged.config.label2id["yes"]) == (7, 2)


def refuse(tmp_path, base, adapter, output="refused", where="", what="", **options):
    """Check that a merge is refused, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    refused(lambda: merge(base, adapter, tmp_path / output, **options), where, what)
    assert sorted(tmp_path.rglob("*")) == before


def in_few_bits(folder, of, base_format="nf4", dtype=torch.bfloat16, start="zero"):
    """An adapter of a base whose decoder linears are in few bits."""
    names = list(target_shapes(find_targets(load(of, dtype), None)))
    return make_adapter(folder, of, dtype, base_format=base_format, quantised=names, start=start)


def test_a_base_in_few_bits_is_merged_as_it_was_trained_or_onto_the_original(tiny, tmp_path):
    base, adapter = tiny["untied"], in_few_bits(tmp_path / "a", tiny["untied"])
    stored = {name: weight.to(torch.bfloat16) for name, weight in tensors(base).items()}
    merge(None, adapter, tmp_path / "original", onto="original")
    assert_same(tensors(tmp_path / "original"), trained(adapter, stored))
    merge(None, adapter, tmp_path / "trained")
    coder, decoded = codec("nf4"), dict(stored)
    for name in Adapter.open(adapter).facts["quantised"]:
        weight = stored[name]
        decoded[name] = coder.decode(*coder.encode(weight), tuple(weight.shape), weight.dtype)
    assert any(not torch.equal(stored[name], decoded[name]) for name in stored)
    assert_same(tensors(tmp_path / "trained"), trained(adapter, decoded))
    # An exact start put into the deltas what the entries had lost: on the original they come to the same.
    exact = in_few_bits(tmp_path / "exact", base, start="exact")
    merge(None, exact, tmp_path / "exact_original", onto="original")
    merge(None, exact, tmp_path / "exact_trained")
    both = [tensors(tmp_path / name) for name in ("exact_original", "exact_trained")]
    for name, weight in stored.items():
        is_entry = read(exact)[name] != 0 if name in read(exact) else torch.zeros_like(weight, dtype=bool)
        assert torch.allclose(both[0][name][is_entry], both[1][name][is_entry], rtol=2**-7), name
        assert torch.equal(both[0][name][~is_entry], weight[~is_entry]), name
    plain = make_adapter(tmp_path / "b", base)
    refuse(tmp_path, None, plain, onto="original", where="--onto")


def test_an_adapter_of_a_base_in_few_bits_goes_onto_nothing_else(tiny, tmp_path):
    base, adapter = tiny["untied"], in_few_bits(tmp_path / "a", tiny["untied"])
    other = in_few_bits(tmp_path / "b", base, "int8")
    refused(lambda: apply_adapter(load(base, torch.bfloat16), adapter), adapter, "nf4")
    refused(lambda: export_peft(adapter, tmp_path / "peft"), adapter, "nf4")
    refused(lambda: compose([adapter, other], tmp_path / "both"), adapter, "nf4 and int8")
    exact = in_few_bits(tmp_path / "exact", base, start="exact")
    refused(lambda: compose([adapter, exact], tmp_path / "both"), exact, "exact")
    compose([adapter, adapter], tmp_path / "twice")
    facts, own = (Adapter.open(tmp_path / name).facts for name in ("twice", "a"))
    assert all(facts[key] == own[key] for key in ("base_format", "quantised", "start"))
    refused(lambda: in_few_bits(tmp_path / "c", base, "int3"), tmp_path / "c", "base_format")
    for number, name in enumerate(("model.norm.weight", "model.layers.7.mlp.up_proj.weight")):
        odd = make_adapter(tmp_path / f"d{number}", base, base_format="nf4", quantised=[name])
        refused(lambda odd=odd: merge(None, odd, tmp_path / "e"), odd, name)


def test_what_cannot_be_merged_is_refused(tiny, tmp_path, monkeypatch):
    adapter, other = make_adapter(tmp_path / "a", tiny["untied"]), tmp_path / "other"
    shutil.copytree(tiny["untied"], other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-7
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    refuse(tmp_path, other, adapter, where=adapter)
    narrow = {name: [1, 2**20] for name in Adapter.open(adapter).names}
    make_adapter(tmp_path / "b", tiny["untied"], shapes=narrow)
    refuse(tmp_path, None, tmp_path / "b", where=tmp_path / "b")
    refuse(tmp_path, None, adapter, "other", where="OUTPUT")
    refuse(tmp_path, "nobody/nothing", adapter, where="--base", what="nobody/nothing")
    refuse(tmp_path, None, adapter, dtype="int8", where="--dtype")
    refuse(tmp_path, None, adapter, alpha=float("nan"), where="--alpha")
    for size in ("large", "-5GB", "infGB"):
        refuse(tmp_path, None, adapter, max_shard_size=size, where="--max-shard-size", what=size)
    large = make_adapter(tmp_path / "c", tiny["untied"], scale=1e6)
    refuse(tmp_path, None, large, dtype="float16", where="--dtype")
    (other / "config.json").write_text("{}")
    refuse(tmp_path, other, adapter, where=other)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    refuse(tmp_path, None, adapter, where="refused.tmp")


def test_a_file_name_in_the_index_that_leads_elsewhere_is_refused(tiny, tmp_path):
    load(tiny["untied"]).save_pretrained(tmp_path / "base", max_shard_size="50KB")
    adapter, index = make_adapter(tmp_path / "a", tmp_path / "base"), tmp_path / "base" / module.INDEX
    shard = min((tmp_path / "base").glob("*.safetensors"))
    shard.rename(tmp_path / shard.name)
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    refuse(tmp_path, None, adapter, where=tmp_path / "base", what=f"../{shard.name}")


def test_what_reads_back_differently_does_not_count(tiny, tmp_path, monkeypatch):
    adapter, write = make_adapter(tmp_path / "a", tiny["untied"]), module.write_tensors
    size = (tiny["untied"] / "model.safetensors").stat().st_size
    for position in (20_000, size // 2, size - 1):

        def damaged(path, headers, tensors, position=position):
            write(path, headers, tensors)
            content = bytearray(path.read_bytes())
            content[position] ^= 1
            path.write_bytes(content)

        monkeypatch.setattr(module, "write_tensors", damaged)
        refuse(tmp_path, None, adapter, what="model.safetensors")


def test_sizes():
    sizes = {None: None, 7: 7, "7": 7, "5GB": 5 * 10**9, "1.5 mb": 1_500_000}
    assert {size: parse_size(size) for size in sizes} == sizes


@pytest.fixture
def sharded(tiny, tmp_path):
    """sharded(name): a base whose last key is in a shard of this name; it lies where the name leads."""

    def make(name):
        base = tmp_path / "downloads" / "base"
        shutil.copytree(tiny["untied"], base)
        stored = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        *first, last = sorted(stored)
        second = base / name
        second.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: stored[key] for key in first}, base / "model-1.safetensors", {"format": "pt"})
        save_file({last: stored[last]}, second, {"format": "pt"})
        weight_map = {**dict.fromkeys(first, "model-1.safetensors"), last: name}
        (base / module.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return base, second

    return make


@pytest.mark.parametrize("name", ["../mine.safetensors", "/mine.safetensors", "a/../../mine.safetensors"])
def test_a_shard_elsewhere_is_neither_read_nor_written(tiny, tmp_path, sharded, name):
    """Neither the file that the name leads to from the base nor the one that it leads to from the output."""
    base, outside = sharded(f"{tmp_path}{name}" if name[0] == "/" else name)
    beside = tmp_path / "out" / "mine.safetensors"
    beside.parent.mkdir()
    beside.write_bytes(b"the user's")
    before = outside.read_bytes()
    adapter = make_adapter(tmp_path / "a", tiny["untied"])
    refuse(tmp_path, base, adapter, "out/merged", where=base)
    assert beside.read_bytes() == b"the user's" and outside.read_bytes() == before
    with pytest.raises(UserError):  # what trains on it, too
        check_inputs(load_recipe("quickstart", [f"model.name_or_path={base}"]), "evaluate", 1)


def test_a_shard_in_a_subfolder_stays_in_one(tiny, tmp_path, sharded):
    base, _ = sharded("shards/model-2.safetensors")
    adapter = make_adapter(tmp_path / "a", tiny["untied"])
    merge(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "shards" / "model-2.safetensors").is_file()
    assert_same(values(load(tmp_path / "merged")), trained(adapter, values(load(tiny["untied"])), 1.0))
