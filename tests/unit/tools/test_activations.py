"""The fake-tensor run against a real one, and ZeRO-3's gathers by hand."""

from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

from speft_ds.model.codecs import codec
from speft_ds.tools.plan import activations
from speft_ds.tools.plan.activations import LiveBytes, Pass, run_pass
from speft_ds.tools.plan.gathered_weights import ModuleUse, pass_peak
from speft_ds.tools.plan.geometry import read_geometry
from speft_ds.tools.plan.setup import Setup


def test_live_bytes_counts_storages_while_they_live():
    with LiveBytes() as live:
        one = torch.zeros(100)
        view = one.view(10, 10)
        assert live.now == 400
        two = one + 1
        del one
        assert (live.now, live.peak) == (800, 800)
        del view
        assert (live.now, live.peak) == (400, 800)
        del two
        assert live.now == 0


@pytest.mark.parametrize("stash", [None, "bfp4"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
def test_a_fake_run_counts_what_a_real_run_holds(recipe, checkpointing, stash):
    """The same code on real tensors: the same uses of modules, and the storages that live, to the byte."""
    walks = checkpointing == "reentrant"
    one = Pass(3, 24, "entries", checkpointing, False, walks, "sampled", "cpu", True, stash=stash)
    geometry = read_geometry(recipe())
    made = run_pass(geometry, one)
    assert made == run_pass(geometry, one, fake=False)
    assert max(use.peak for use in made.uses) > 3 * 24 * 260 * 4  # the logits


def test_stashed_activations_are_counted_as_the_codec_packs_them(tmp_path, recipe, monkeypatch):
    """The same run with the real codec; and far less than without."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 32}
    model = make_model(tmp_path / "wide", **sizes, num_hidden_layers=4)
    geometry = read_geometry(recipe(model={"name_or_path": str(model)}))
    peaks = {}
    for stash in (None, "bfp8", "bfp4"):
        one = Pass(8, 128, "entries", "none", False, True, "sampled", "cpu", True, stash=stash)
        peaks[stash] = max(use.peak for use in run_pass(geometry, one).uses)
        if stash is not None:
            monkeypatch.setattr(activations, "SizesOnly", lambda name, device: codec(name))
            # What codecs make once is there, or it would count.
            codec(stash).decode(*codec(stash).encode(torch.ones(1, 16)), (1, 16), torch.float32)
            real = max(use.peak for use in run_pass(geometry, one, fake=False).uses)
            assert peaks[stash] == pytest.approx(real, rel=0.1)
            monkeypatch.undo()
    assert peaks["bfp4"] < 0.9 * peaks["bfp8"] and peaks["bfp8"] < 0.7 * peaks[None], peaks


@pytest.fixture
def peak(recipe):
    """A function: uses of weights of 10 elements, such as `forward a`, and what differs from no prefetch and
    no reuse on two GPUs -> (most gathered, gathered in forward, recompute, backward, bytes at the peak).

    A use ends before the next one begins; `backward a ...` goes on, up to `end a`.
    """

    def run(order, persistent="", world_size=2, device="cuda", **zero) -> tuple:
        uses = []
        for kind, module, *goes_on in (use.split() for use in order):
            if kind == "end":
                uses[-1].ended.append(("backward", module))
            else:
                ended = [] if goes_on else [(kind, module)]
                uses.append(ModuleUse(kind, module, tuple(module), 100, ended))
        zero = {"prefetch_bucket_size": 0, "max_reuse_distance": 0, **zero}
        geometry = SimpleNamespace(
            numel=dict.fromkeys("abc", 10), trained=set("abc") - set(persistent), dtype="float32"
        )
        zero = {f"stage3_{key}": value for key, value in zero.items()}
        setup = Setup(recipe(), geometry, zero, world_size, device)
        got = pass_peak(uses, setup, setup.storage())
        return got.most_gathered, *(each.total() for each in got.traffic.values()), got.num_bytes

    return run


PLAIN = [*(f"forward {name}" for name in "abc"), *(f"backward {name}" for name in "cba")]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (10, 30, 0, 30, 140)),
        ({"max_reuse_distance": 1}, (10, 30, 0, 20, 140)),  # c is needed next
        ({"max_reuse_distance": 1000}, (30, 30, 0, 0, 220)),
        # The forward of c prefetches b for the backward, whose start prefetches a while c and b are there. At
        # its own end c is released, though it is needed next.
        ({"prefetch_bucket_size": 10}, (30, 40, 0, 20, 220)),
        ({"prefetch_bucket_size": 10, "device": "cpu"}, (30, 40, 0, 20, 260)),  # a is assembled in a buffer
        ({"prefetch_bucket_size": 10, "max_live_parameters": 20}, (20, 40, 0, 20, 180)),  # a waits for c
        ({"persistent": "ab"}, (10, 10, 0, 10, 140)),
        ({"world_size": 1}, (0, 0, 0, 0, 100)),
    ],
)
def test_gathers_of_three_modules_by_hand(peak, changes, expected):
    assert peak(PLAIN, **changes) == expected


def test_gathers_of_a_recomputed_layer_by_hand(peak):
    forward, recompute = ["forward a", "forward b"], ["recompute a", "recompute b"]
    # In a backward that goes on, as that of the whole model: what is recomputed stays.
    around = [*forward, "backward c ...", *recompute, "backward b", "backward a"]
    assert peak(around) == (30, 20, 20, 10, 220)
    # The backward of b recomputes, and what that gathers is released with b.
    inside = [*forward, "backward b ...", *recompute, "end b", "backward a"]
    assert peak(inside) == (20, 20, 10, 20, 180)
