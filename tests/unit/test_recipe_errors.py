"""Bad recipes, files and overrides: what is wrong, where, what to type."""

import pytest

from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import RecipeError
from unit.written import refused

pytestmark = pytest.mark.usefixtures("own_folder")


BAD = {  # text appended to MINIMAL (so its first line is line 5) -> what the error must hold
    "seed: '3'": ["seed is '3': must be a valid integer", "mine.yaml:5 (seed)", "without quotes", "seed=0"],
    "seed: true": ["seed is True: must be a valid integer"],
    "seed: 1.0": ["seed is 1.0: must be a valid integer"],
    "mask:\n  desnity: 0.1": ["unknown key mask.desnity", "mine.yaml:6", "did you mean mask.density?"],
    "density: 0.1": ["unknown key density", "mine.yaml:5", "did you mean mask.density?"],
    "mask: {lr: 1}": ["unknown key mask.lr", "did you mean optimizer.lr?"],
    "optimiser: {lr: 1}": ["unknown key optimiser", "did you mean optimizer?"],
    "mask: {chat_template: true}": ["did you mean data.chat_template or eval.chat_template?"],
    "mask: {zzz: 1}": ["unknown key mask.zzz", "choose from: mask.salience, mask.density"],
    "mask.density: 0.1": ["mask.density is not a YAML key", "nest it: `mask:`"],
    "name: x": ["name is not a key", "rename the file"],
    "7: x": ["unknown key 7", "mine.yaml:5"],
    "? [a]\n: x": ["unknown key (a list or mapping)", "mine.yaml:5"],
    "mask: {salience: gradiant}": ["mask.salience is 'gradiant'", "did you mean gradient?"],
    "mask: {budget: 7}": ["mask.budget is 7", "choose from: global, per_layer"],
    "mask: 3": ["mask must be a section, not 3", "mine.yaml:5 (mask)"],
    "mask: {density: 0}": ["mask.density is 0: must be greater than 0", "mask.density=0.005"],
    "mask: {density: 1.1}": ["mask.density is 1.1: must be less than or equal to 1"],
    "mask: {density: .nan}": ["mask.density is nan"],
    "mask: {density: true}": ["mask.density is True: must be a valid number"],
    "mask: {density: '0.1'}": ["mask.density is '0.1'", "without quotes"],
    "mask: {density: 0.1, num_trainable: 5}": [
        "mask.num_trainable and mask.density are both given",
        "the command line sets the other aside",
    ],
    "mask: {density: null}": ["mask.num_trainable and mask.density are both null"],
    "mask: {num_trainable: 0}": ["mask.num_trainable is 0: must be greater than or equal to 1"],
    "mask: {targets: q_proj}": ["mask.targets is 'q_proj': must be a valid list"],
    "mask: {targets: []}": ["mask.targets is []"],
    "mask: {targets: [a, 1]}": ["mask.targets[1] is 1: must be a valid string"],
    "mask: {granularity: blok}": ["mask.granularity is 'blok'", "did you mean block?"],
    "mask: {granularity: block, block_size: 1}": ["mask.block_size is 1: must be greater than or equal to 2"],
    "mask: {salience: lift, lift_rank: 0}": ["mask.lift_rank is 0: must be greater than or equal to 1"],
    "mask: {score_device: gpu}": ["mask.score_device is 'gpu'", "choose from: device, host"],
    "mask: {calibration_seed: -1}": ["mask.calibration_seed is -1: must be greater than or equal to 0"],
    "mask: {calibration_path: 3}": ["mask.calibration_path is 3: must be a valid string"],
    "mask: {load: ''}": ["mask.load is ''"],
    "mask: {schedule: dynamic}": ["mask.schedule is 'dynamic'", "static, periodic, drop_grow, grad_topk"],
    "mask: {schedule: periodic, update_every: 0}": ["mask.update_every is 0"],
    "mask: {schedule: drop_grow, drop_rate: 1}": ["mask.drop_rate is 1: must be less than 1"],
    "mask: {schedule: drop_grow, drop_anneal: cos}": ["mask.drop_anneal is 'cos'", "mean cosine?"],
    "mask: {schedule: drop_grow, growth: ag}": ["mask.growth is 'ag'", "sft_ag"],
    "mask: {schedule: drop_grow, growth_steps: 0}": ["mask.growth_steps is 0"],
    "mask: {schedule: grad_topk, topk_fraction: 1.5}": ["mask.topk_fraction is 1.5: must be less than or"],
    "mask: {layer_gate: haft}": ["mask.layer_gate is 'haft'", "did you mean half?"],
    "mask: {layer_gate: half, gate_every: 0}": ["mask.gate_every is 0"],
    "mask: {layer_gate: sampled, gate_layers: 0}": ["mask.gate_layers is 0"],
    "mask: {layers: 3}": ["mask.layers is 3: must be a valid list", "[first, last] decoder layers"],
    "mask: {layers: [3]}": ["mask.layers is [3]: list should have at least 2 items"],
    "mask: {layers: [0, 1, 2]}": ["mask.layers is [0, 1, 2]: list should have at most 2 items"],
    "mask: {layers: [-1, 2]}": ["mask.layers[0] is -1: must be greater than or equal to 0"],
    "mask: {layers: [0, 1.5]}": ["mask.layers[1] is 1.5: must be a valid integer"],
    "mask:\n  layers: [4, 1]": [
        "mask.layers is [4, 1]: the first is after the last",
        "mine.yaml:6 (mask.layers)",
        "fix: mask.layers=[1,4]",
    ],
    "train: {steps: 1, epochs: 1}": ["train.epochs and train.steps are both given"],
    "train: {epochs: null}": ["train.epochs and train.steps are both null"],
    "train: {steps: 1e3}": ["train.steps is '1e3': must be a valid integer"],
    "train: {global_batch: 6}": ["train.micro_batch=4 does not divide train.global_batch=6", "1, 2, 3, 6"],
    "train: {micro_batch: 0}": ["train.micro_batch is 0"],
    "train: {steps: 5}\noptimizer:\n  warmup_steps: 6": [
        "optimizer.warmup_steps=6 is more than train.steps=5",
        "mine.yaml:7 (optimizer.warmup_steps)",
    ],
    "optimizer: {betas: [0.9]}": ["optimizer.betas is [0.9]: list should have at least 2 items"],
    "optimizer: {betas: [0.9, 1]}": ["optimizer.betas[1] is 1: must be less than 1", "[0.9, 0.999]"],
    "optimizer: {lr: fast}": ["optimizer.lr is 'fast': must be a valid number", "optimizer.lr=0.001"],
    "optimizer: {lr: null}": ["optimizer.lr is null"],
    "optimizer: {name: adam}": ["did you mean adamw?"],
    "data: {path: b}": ["data is set twice", "mine.yaml:5 (data)", "mine.yaml:3 (data)"],
    "seed: 1\nseed: 2": ["seed is set twice", "mine.yaml:6 (seed)", "mine.yaml:5 (seed)"],
    "mask:\n  budget: global\n  budget: global": ["mask.budget is set twice", "mine.yaml:7"],
    "output_dir: 2024-99-99": ["output_dir cannot be read", "mine.yaml:5"],
    "output_dir: !!python/name:os.system": ["output_dir cannot be read"],
    "mask: [": ["not readable as YAML", "mine.yaml:5"],
    "\tmask: 1": ["not readable as YAML", "mine.yaml:5"],
    "eval: {limit: *nowhere}": ["not readable as YAML", "undefined alias", "mine.yaml:5"],
}


@pytest.mark.parametrize("text", BAD)
def test_bad_yaml(tmp_path, text):
    shown = str(refused(tmp_path, text))
    for part in BAD[text]:
        assert part in shown
    assert "pydantic" not in shown


BAD_OVERRIDES = {
    "mask.desnity=1": ["unknown key mask.desnity", "command line: mask.desnity=1", "mean mask.density?"],
    "foo.density=1": ["unknown key foo.density", "did you mean mask.density?"],
    "foo.bar=1": ["unknown key foo.bar", "choose from: extends, model, data, mask"],
    "seed.x=1": ["unknown key seed.x"],
    "name=x": ["name is not a key"],
    "mask={density: 1}": ["mask is a section", "like mask.salience=..."],
    "--resume": ["'--resume' is not key=value"],
    "=3": ["unknown key"],
    "mask.density=2": ["mask.density is 2", "command line: mask.density=2"],
    "mask.targets=*_proj": ["'*_proj' is not readable as YAML", """mask.targets='"*_proj"'"""],
    "model.name_or_path=": ["model.name_or_path is null", "command line: model.name_or_path="],
    "train.steps='80'": ["train.steps is '80'", "without quotes"],
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides(tmp_path, override):
    shown = str(refused(tmp_path, "", override))
    for part in BAD_OVERRIDES[override]:
        assert part in shown


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the recipe is empty"),
        (b"# only a comment\n", "the recipe is empty"),
        (b"- model\n- data\n", "the top level must be keys"),
        (b"model", "the top level must be keys"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"seed: \x01", "not readable as YAML"),
        (b"seed: 1\n---\nseed: 2\n", "not readable as YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, what):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=what):
        load_recipe("mine.yaml")


def test_missing_keys_are_named_one_by_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1")
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml")
    whats = [problem.what for problem in caught.value.problems]
    assert whats == ["model.name_or_path is missing"]
    assert "mine.yaml (model.name_or_path)" in str(caught.value)


def test_unknown_recipes():
    with pytest.raises(RecipeError, match=r"no recipe 'quickstrat'(.|\n)*did you mean quickstart\?"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"No such file(.|\n)*nowhere/x\.yaml"):
        load_recipe("nowhere/x.yaml")


def test_three_mistakes_are_shown_at_once_with_their_lines(tmp_path):
    text = "mask:\n  desnity: 0.1\n  salience: gradiant\ntrain: {steps: 10}\noptimizer:\n  lr: -1\n"
    error = refused(tmp_path, text)
    assert [p.where for p in error.problems] == [
        "mine.yaml:6 (mask.desnity)",
        "mine.yaml:7 (mask.salience)",
        "mine.yaml:10 (optimizer.lr)",
    ]
    assert str(error).startswith("recipe mine: 3 problems\n  1. unknown key mask.desnity\n")


def test_mistakes_of_one_section_do_not_hide_each_other(tmp_path):
    error = refused(tmp_path, "mask: {density: 0.1, num_trainable: 5, budget: x}\ntrain: {micro_batch: 3}")
    assert len(error.problems) == 3
    error = refused(tmp_path, "mask: {lift_rank: 2, gate_every: 3, topk_fraction: 0.1, layers: [2, 1]}")
    assert len(error.problems) == 4


def test_a_wrong_key_is_reported_once(tmp_path):
    error = refused(
        tmp_path, "mask: {schedule: drop_gro, update_every: 3, growth_steps: 7, layer_gate: half}"
    )
    assert [problem.what.partition(" is ")[0] for problem in error.problems] == ["mask.schedule"]


def test_errors_survive_a_trip_to_another_process(tmp_path):
    import pickle

    error = refused(tmp_path, "seed: x\nmask: 3")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
