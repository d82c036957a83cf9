"""What a step costs a device that runs beside the host, and the order of what is sent."""

import pytest

from distributed import step_checks
from distributed.reference import make_recipe

TRAIN = {"steps": 3, "global_batch": 8, "micro_batch": 2}  # on two ranks two micro-batches


def test_a_step_reads_the_device_once(ranks, tiny, tmp_path):
    """Loss, norm and flags in one, however many micro-batches there are, packed or not."""
    for packing in (False, True):
        recipe = make_recipe(tiny, tmp_path / str(packing), train=TRAIN, data={"packing": packing})
        for reads in ranks(2)(step_checks.count_reads, recipe=recipe):
            assert reads == {"_accumulate": 1}


HOW = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.1}},
    "lion": {"optimizer": {"name": "lion"}},
    "8 bits": {"optimizer": {"name": "adamw_8bit"}},
    "entries that count their steps": {
        "mask": {"schedule": "periodic", "update_every": 3},
        "train": {"steps": 4},
    },
    "few columns": {"mask": {"compute": 0.3}, "train": {"sparse_backend": "columns"}},
    "blocks": {"mask": {"granularity": "block", "block_size": 4}},
    "norms by layer": {"optimizer": {"clip": "per_layer"}},
}


@pytest.mark.parametrize("name", HOW)
def test_however_it_steps_it_reads_the_device_once(ranks, tiny, tmp_path, name):
    sections = {**HOW[name], "train": {**TRAIN, **HOW[name].get("train", {})}}
    expected = {"_accumulate": 1, **({"__call__": 1} if name == "norms by layer" else {})}
    for reads in ranks(2)(step_checks.count_reads, recipe=make_recipe(tiny, tmp_path, **sections)):
        assert reads == expected


def test_reads_of_grad_topk_do_not_grow_with_the_weights(ranks, tiny, tmp_path):
    counts = []
    for layers in ([0, 0], None):
        recipe = make_recipe(tiny, tmp_path, mask={"schedule": "grad_topk", "layers": layers}, train=TRAIN)
        counts.append(sum(ranks(2)(step_checks.count_reads, recipe=recipe)[0].values()))
    assert counts[0] == counts[1]


def test_every_group_has_its_collectives_in_one_order(ranks, tiny, tmp_path):
    recipe = make_recipe(tiny, tmp_path, train={**TRAIN, "reduce_bucket": 300})
    first, second = ranks(2)(step_checks.record_collectives, recipe=recipe)
    assert first == second
    assert first["ours"] and first["all"]


def test_gathers_wait_for_every_write_to_a_shard(ranks, tiny, tmp_path):
    recipes = [
        make_recipe(tiny, tmp_path / str(number), mask=mask, train=TRAIN)
        for number, mask in enumerate(
            [
                {"salience": "grasp", "schedule": "periodic", "update_every": 2},
                {"salience": "synflow"},
                {"schedule": "drop_grow", "update_every": 2, "growth_steps": 1},
            ]
        )
    ]
    for seen in ranks(2)(step_checks.check_gathers_wait, recipes=recipes):
        assert all(seen)


def test_a_single_rank_trains_alike_with_weights_that_are_gathered(ranks, tiny, tmp_path):
    """The two ways that one GPU and several take, each of them dense autograd's."""
    runs = []
    for keep in (True, False):
        recipe = make_recipe(tiny, tmp_path / str(keep), deepspeed={"keep_unpartitioned": keep})
        runs += ranks(1)(step_checks.check_keeps, recipe=recipe)
    assert runs[0] == runs[1]
