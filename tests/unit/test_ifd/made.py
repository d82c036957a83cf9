"""Pairs to score, and a scorer whose weights are edited."""

from safetensors.torch import load_file, save_file

PAIRS = [
    ("say cat ", "cat 1"),
    ("", "a response without any prompt"),
    ("x", "y"),
    ("please " * 20, "e"),
    ("a", "long " * 30),
    ("héllo wörld ", "ünïcode ✓ done"),
    ("say eel please ", "eel 4, and then a few words more"),
    ("<s>a prompt that brings its own first token ", "fox 2"),
]


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
