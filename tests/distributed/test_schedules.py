"""The schedules on real ranks, against a plain dense single-process reference of the same algorithms."""

import pytest
import torch

from distributed import checks, schedule_checks
from distributed.reference import make_recipe, read_entries
from distributed.schedule_reference import Reference, count
from speft_ds.sparse.mask import Mask, read_mask, save_mask

FIVE_CHANGES = {"update_every": 5}  # of a run of 30 steps: after 5, 10, 15, 20 and 25
PERIODIC = {"schedule": "periodic", **FIVE_CHANGES}
AG = {"schedule": "drop_grow", "drop_rate": 0.37, "growth": "sft_ag", "growth_steps": 3, **FIVE_CHANGES}
MA = {"schedule": "drop_grow", "drop_rate": 0.37, "growth": "sft_ma", **FIVE_CHANGES}
TOPK = {"schedule": "grad_topk", "topk_fraction": 0.3}
HALF = {"layer_gate": "half", "gate_every": 4}
SAMPLED = {"layer_gate": "sampled", "gate_every": 4, "gate_layers": 1}
IMPORTANCE = {"layer_gate": "importance", "gate_every": 2, "gate_layers": 1}
CASES = {
    "periodic": PERIODIC,
    "periodic per_layer": {**PERIODIC, "budget": "per_layer"},
    "periodic magnitude": {**PERIODIC, "salience": "magnitude"},
    "sft_ag": AG,
    "sft_ag cosine per_layer": {**AG, "drop_anneal": "cosine", "budget": "per_layer"},
    # Fewer entries outside the mask than are to be dropped; one step to choose and to accumulate.
    "sft_ag crowded": {**AG, "density": 0.9, "growth_steps": 1},
    "sft_ma": MA,
    "sft_ma cosine per_layer": {**MA, "drop_anneal": "cosine", "budget": "per_layer"},
    "sft_ma crowded": {**MA, "density": 0.9},
    "periodic columns": {**PERIODIC, "compute": 0.3},
    "sft_ag columns": {**AG, "compute": 0.3},
    "sft_ma columns per_layer": {**MA, "compute": 0.4, "budget": "per_layer"},
    "periodic pruned": {**PERIODIC, "only_nonzero": True},
    # More entries are to be grown than there are outside the mask that are not zero.
    "sft_ag pruned": {**AG, "only_nonzero": True, "density": 0.4},
    "sft_ma pruned per_layer": {**MA, "only_nonzero": True, "budget": "per_layer"},
    "periodic nf4": PERIODIC,
    "sft_ag int8": AG,
    "grad_topk": TOPK,
    "half": HALF,
    "sampled": SAMPLED,
    "importance": IMPORTANCE,
    "periodic half": {**PERIODIC, **HALF},
    "periodic importance": {**PERIODIC, **IMPORTANCE},
    "periodic sampled": {**PERIODIC, **SAMPLED},
    "grad_topk half": {**TOPK, **HALF},
    "grad_topk sampled": {**TOPK, **SAMPLED},
    "grad_topk importance": {**TOPK, **IMPORTANCE},
}
TRAIN = {
    "periodic columns": {"sparse_backend": "columns"},
    "sft_ag": {"activation_checkpointing": "reentrant"},
    "sft_ma": {"activation_checkpointing": "non_reentrant"},
    "sft_ag crowded": {"reduce_bucket": 5000},  # 16,065 entries
    "periodic half": {"activation_checkpointing": "reentrant", "sparse_backend": "dense"},
}
MODEL = {"periodic nf4": {"base_format": "nf4"}, "sft_ag int8": {"base_format": "int8"}}
OTHER_WORLD_SIZES = [
    "periodic",
    "periodic nf4",
    "sft_ag pruned",
    "importance",
    "sft_ag cosine per_layer",
    "sft_ma",
    "grad_topk half",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The reference's tensors are small: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(tiny, folder, case):
    # eps: where a gradient is almost zero, Adam's first step is g / (abs(g) + eps), which with 1e-8 makes
    # 2e-5 of the last bits of one entry in 10,000.
    optimizer = {"weight_decay": 0.1, "eps": 1e-5}
    train = {"steps": 30, **TRAIN.get(case, {})}
    model = MODEL.get(case, {})
    checkpoint = "pruned" if "pruned" in case else "untied"
    sections = {"optimizer": optimizer, "train": train, "model": model}
    return make_recipe(tiny, folder, checkpoint, mask=CASES[case], **sections)


@pytest.fixture(scope="module")
def reference(tiny):
    """case -> its reference run, computed once."""
    runs = {}

    def of(case):
        if case not in runs:
            runs[case] = Reference(recipe_of(tiny, tiny["folder"], case))
        return runs[case]

    return of


@pytest.mark.parametrize(
    ("case", "world_size"),
    [(case, 2) for case in CASES] + [(case, size) for size in (1, 4) for case in OTHER_WORLD_SIZES],
)
def test_dense_reference_agrees(ranks, tiny, tmp_path, reference, case, world_size):
    """The same indices after every change, the same entry_steps; deltas, weights and losses to 1e-5."""
    runs = ranks(world_size)(schedule_checks.check_schedule, recipe=recipe_of(tiny, tmp_path, case))
    expected = reference(case)
    assert all(run == runs[0] for run in runs)
    run = runs[0]
    assert run["losses"] == pytest.approx(expected.losses, abs=1e-5)
    assert run["grad_norms"] == pytest.approx(expected.grad_norms, rel=1e-4)
    assert run["changes"] == expected.changes
    assert_worth_looking_at(case, expected)
    moments = torch.load(tmp_path / "moments.pt")
    for number, (got, wanted) in enumerate(zip(moments, expected.moments, strict=True)):
        for name in expected.names:
            where = (name, 5 * number + 5)
            assert torch.equal(got["mask"][name], wanted["mask"][name]), where
            assert torch.equal(got["entry_step"][name], wanted["entry_step"][name]), where
            assert (got["delta"][name] - wanted["delta"][name]).abs().max() < 1e-5, where
            assert (got["weight"][name] - wanted["weight"][name]).abs().max() < 1e-5, where
    entries = read_entries(tmp_path)
    assert entries.keys() == {name for name, where in expected.touched.items() if where.any()}
    for name, (index, delta) in entries.items():
        where = expected.touched[name]
        assert index.tolist() == where.view(-1).nonzero()[:, 0].tolist(), name
        assert (delta - expected.delta[name][where]).abs().max() < 1e-5, name


def assert_worth_looking_at(case, run):
    """The reference's run does what its schedule is about."""
    if "update_every" in CASES[case]:
        assert [change["step"] for change in run.changes] == [5, 10, 15, 20, 25]
        assert all(change["dropped"] == change["grown"] > 0 for change in run.changes)
        assert count(run.touched) > count(run.mask) or "periodic" not in case
        assert run.returned or "periodic" not in case
    else:
        entry_steps = torch.cat([run.entry_step[name][mask] for name, mask in run.mask.items()])
        assert entry_steps.min() < entry_steps.max() and not run.changes
    assert run.losses[-1] < run.losses[0]


TWO = {"update_every": 2}
CHANGING = {
    "periodic": {"schedule": "periodic", **TWO},
    "periodic half": {"schedule": "periodic", **TWO, "layer_gate": "half", "gate_every": 3},
    "sft_ag": {"schedule": "drop_grow", **TWO, "growth": "sft_ag", "growth_steps": 2},
    "sft_ma": {"schedule": "drop_grow", **TWO, "growth": "sft_ma"},
    "periodic block": {"schedule": "periodic", **TWO, "granularity": "block", "block_size": 6},
    "periodic channel": {"schedule": "periodic", **TWO, "granularity": "channel", "density": 0.4},
    "periodic few": {"schedule": "periodic", **TWO, "density": None, "num_trainable": 3},
    "sft_ag few": {
        **{"schedule": "drop_grow", **TWO, "growth": "sft_ag", "growth_steps": 2, "drop_rate": 0.7},
        **{"density": None, "num_trainable": 3},
    },
    "grad_topk": {"schedule": "grad_topk"},
    "sampled": {"layer_gate": "sampled", "gate_every": 2, "gate_layers": 1},
}
FOUR_RANKS = ["periodic", "sft_ag", "periodic few", "sft_ag few"]
IN_FEW_BITS = ["periodic", "sft_ma", "sft_ag few"]


@pytest.mark.parametrize(
    ("case", "world_size", "model"),
    [(case, 2, {"dtype": dtype}) for case in CHANGING for dtype in ("float32", "bfloat16")]
    + [(case, 4, {"dtype": dtype}) for case in FOUR_RANKS for dtype in ("float32", "bfloat16")]
    + [(case, 2, {"dtype": "bfloat16", "base_format": "nf4"}) for case in IN_FEW_BITS],
)
def test_invariants_under_a_changing_mask(ranks, recipe, case, world_size, model):
    made = recipe(mask=CHANGING[case], model=model, train={"steps": 7})
    seen = ranks(world_size)(schedule_checks.check_changing_mask, recipe=made)[0]
    assert seen["moved"] > 0
    assert seen["changes"] == (3 if "update_every" in CHANGING[case] else 0)
    assert (seen["returned"] > 0) == ("periodic" in case)
    assert (seen["reverted"] > 0) == ("sft" in case)


@pytest.mark.parametrize("base_format", [None, "nf4"])
@pytest.mark.parametrize("salience", ["synflow", "grasp"])
def test_scoring_in_mid_run_gives_the_trained_weights_back(ranks, recipe, salience, base_format):
    """These two change the weights to score them."""
    mask = {"schedule": "periodic", **TWO, "salience": salience}
    made = recipe(mask=mask, model={"base_format": base_format})
    seen = ranks(2)(schedule_checks.check_changing_mask, recipe=made)[0]
    assert seen["changes"] == 2 and seen["moved"] > 0


@pytest.mark.parametrize("growth", [{"growth": "sft_ag", "growth_steps": 2}, {"growth": "sft_ma"}])
def test_nothing_left_to_grow(ranks, recipe, growth):
    """A mask of all entries stays as it is."""
    mask = {"schedule": "drop_grow", **TWO, **growth, "density": 1.0, "drop_rate": 0.5}
    for run in ranks(2)(schedule_checks.run_steps, recipe=recipe(mask=mask)):
        assert [(change["dropped"], change["grown"]) for change in run["changes"]] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("gate", [{}, HALF])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equal_gradients_step_by_global_index(ranks, recipe, world_size, gate):
    """The edge cuts through gradients of one size and either sign; shut entries never step."""
    mask = {"schedule": "grad_topk", "topk_fraction": 0.3, "salience": "random", **gate}
    answers = ranks(world_size)(schedule_checks.check_ties, recipe=recipe(mask=mask))
    ranked = []
    for number, (name, index) in enumerate(answers[0][0].items()):
        sizes = schedule_checks.tied_gradient(number, torch.tensor(index)).abs().tolist()
        ranked += [(-size, number, i, name) for size, i in zip(sizes, index, strict=True)]
    ranked.sort()
    assert 300 < len(ranked) < 600 if gate else len(ranked) == 892
    wanted = round(0.3 * len(ranked))
    assert ranked[0][0] == ranked[wanted][0] == -2
    expected = sorted((name, i) for _, _, i, name in ranked[:wanted])
    assert all(active == expected for _, active in answers)


@pytest.mark.parametrize(
    ("gate", "num_open"),
    [({"layer_gate": "sampled", "gate_layers": 1}, 7), ({"layer_gate": "half"}, 7)],
)
def test_shut_weights_cost_nothing_and_stay(ranks, recipe, gate, num_open):
    made = recipe(mask={**gate, "gate_every": 2, "budget": "per_layer"})
    for answer in ranks(2)(schedule_checks.check_shut_weights, recipe=made):
        assert answer == [num_open] * 5


def test_candidates_cost_something_in_their_window_alone(ranks, recipe):
    """Two steps before each change; none before the end, where the mask does not change any more."""
    mask = {"schedule": "drop_grow", "update_every": 5, "growth": "sft_ag", "growth_steps": 2}
    for steps in ranks(2)(schedule_checks.check_growth_window, recipe=recipe(mask=mask, train={"steps": 15})):
        assert steps == [4, 5, 9, 10]


@pytest.fixture(scope="module")
def scored(ranks, tiny, tmp_path_factory):
    """Keys of the mask section -> the path of a mask chosen by them in fp32, on 2 ranks."""
    paths = {}

    def of(**mask):
        key = str(mask)
        if key not in paths:
            paths[key] = tmp_path_factory.mktemp("scored") / "mask.safetensors"
            recipe = make_recipe(tiny, paths[key].parent / "run", mask=mask)
            ranks(2)(schedule_checks.write_mask, recipe=recipe, path=paths[key])
        return paths[key]

    return of


def with_entries_in(path, source, keep):
    """A copy of a mask file without the entries of the weights that `keep` says no to."""
    mask, facts = read_mask(source)
    index = {name: index if keep(name) else index[:0] for name, index in mask.index.items()}
    save_mask(path, Mask(index, mask.shape), facts)
    return path


@pytest.mark.parametrize("schedule", [{}, {"schedule": "grad_topk"}])
def test_a_step_with_nothing_open_moves_nothing(ranks, recipe, tmp_path, scored, schedule):
    """The sampled gate opens a layer without entries every now and then."""
    path = with_entries_in(tmp_path / "mask.safetensors", scored(), lambda name: ".layers.0." in name)
    gate = {"layer_gate": "sampled", "gate_every": 1, "gate_layers": 1}
    mask = {"load": str(path), **gate, **schedule}
    # Weight decay and moments would move what steps, even by a gradient of zero.
    made = recipe(mask=mask, optimizer={"weight_decay": 0.1}, train={"steps": 8})
    ranks(2)(schedule_checks.check_nothing_open, recipe=made)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", ["static", "periodic", "sft_ag"])
def test_a_loaded_mask_trains_as_a_chosen_one(ranks, recipe, scored, case, world_size):
    where = {"layers": [1, 1], "density": 0.03}
    schedule = CHANGING.get(case, {})
    chosen = recipe(folder="chosen", mask={**where, **schedule})
    # Its own density, layers and so on are the file's, not the recipe's.
    loaded = recipe(folder="loaded", mask={"load": str(scored(**where)), **schedule})
    expected = ranks(world_size)(schedule_checks.run_steps, recipe=chosen)
    runs = ranks(world_size)(schedule_checks.run_steps, recipe=loaded)
    assert runs == expected
    assert set(runs[0]["sizes"]) == {round(0.03 * 17850 / 2)} and len(runs[0]["shape"]) == 7


def test_a_folder_is_a_mask_file_too(ranks, recipe, scored):
    run = ranks(2)(schedule_checks.run_steps, recipe=recipe(mask={"load": str(scored().parent)}))[0]
    assert run["first"] == read_mask(scored())[0].sha256


def test_a_mask_of_fp32_loads_in_bf16(ranks, recipe, scored):
    """One checkpoint, two dtypes: its weights rounded to bf16 are the same."""
    made = recipe(mask={"load": str(scored())}, model={"dtype": "bfloat16"})
    run = ranks(2)(schedule_checks.run_steps, recipe=made)[0]
    assert run["first"] == read_mask(scored())[0].sha256 and run["losses"][0] != run["losses"][-1]


def test_periodic_keeps_the_number_of_entries_of_a_loaded_mask(ranks, recipe, scored):
    path = scored(density=None, num_trainable=300)
    made = recipe(mask={"load": str(path), "schedule": "periodic", **TWO})
    run = ranks(2)(schedule_checks.run_steps, recipe=made)[0]
    assert set(run["sizes"]) == {300}
    assert all(change["grown"] > 0 for change in run["changes"]) and len(run["changes"]) == 2


@pytest.fixture
def refuses(ranks, recipe):
    """refuses(path, parts of the message, checkpoint, mask section): a mask file that every rank refuses."""

    def check(path, *parts, checkpoint="untied", **mask):
        made = recipe(checkpoint, mask={"load": str(path), **mask})
        messages = ranks(2)(checks.check_refused, recipe=made)
        assert all(part in message for message in messages for part in parts), messages

    return check


@pytest.mark.parametrize("checkpoint", ["bias", "tied"])  # weights of the same shapes, from other seeds
def test_a_mask_of_another_base_is_refused(scored, refuses, checkpoint):
    refuses(scored(), "the mask was scored on another base", str(scored()), checkpoint=checkpoint)


@pytest.mark.parametrize(
    "facts", [{"salience": "gradient"}, {"base": "owner/name"}, {"fingerprint_bfloat16": None}]
)
def test_a_mask_that_names_no_base_is_refused(tmp_path, scored, refuses, facts):
    path = tmp_path / "mask.safetensors"
    save_mask(path, read_mask(scored())[0], facts)
    refuses(path, "the mask was scored on another base")


def test_a_mask_without_entries_is_refused(tmp_path, scored, refuses):
    """A run would train nothing."""
    path = with_entries_in(tmp_path / "mask.safetensors", scored(), lambda name: False)
    refuses(path, str(path))


@pytest.mark.parametrize("how", [{"granularity": "row"}, {"budget": "per_row"}])
def test_a_loaded_mask_too_small_to_be_chosen_anew_is_refused(scored, refuses, how):
    """30 entries are no row of 35 or 53, and less than one in each row: later there would be none."""
    path = scored(density=None, num_trainable=30)
    refuses(path, str(path), schedule="periodic", **TWO, **how)


OTHER_MODELS = {
    "shape": ("model.layers.0.self_attn.q_proj.weight", (40, 34)),  # it has (40, 35)
    "name": ("model.layers.2.self_attn.q_proj.weight", (40, 35)),  # layers 0 and 1 are there
    "no linear": ("model.layers.0.input_layernorm.weight", (1, 35)),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_mask_of_another_model_is_refused(tmp_path, refuses, kind):
    name, shape = OTHER_MODELS[kind]
    path = tmp_path / "mask.safetensors"
    save_mask(path, Mask({name: torch.tensor([1, 4])}, {name: shape}), {})
    refuses(path, f"the mask is for another model: {name}")


def test_a_mask_with_indices_out_of_range_is_refused(tmp_path, scored, refuses):
    mask, facts = read_mask(scored())
    name = next(iter(mask.shape))
    beyond = torch.tensor([3, mask.numel(name)], dtype=torch.int32)
    path = tmp_path / "mask.safetensors"
    save_mask(path, Mask({**mask.index, name: beyond}, mask.shape), facts)
    size = mask.numel(name)
    refuses(path, f"{name}: indices from 3 to {size}, the weight has {size} elements")
