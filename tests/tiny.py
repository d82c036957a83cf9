"""A small Llama with sizes that no world size divides, and data for it, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 260  # 256 bytes and four special tokens
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)


def make_tokenizer():
    """Byte-level, no merges: any text, one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<s>", "</s>", "<pad>", "<unk>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def read_rows(path: Path) -> list:
    """The rows of `make_data` as the chat template has them, tokenised by hand."""
    from speft_ds.data.dataset import Row

    tokenizer, rows = make_tokenizer(), []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, response = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"<s>{row['prompt']}</s><s>", f"{row['response']}</s>")
        )
        rows.append(Row(prompt + response, [False] * len(prompt) + [True] * len(response)))
    return rows


def make_model(folder: Path, tied: bool = False, seed: int = 0, pruned: bool = False, **config) -> Path:
    """A two-layer fp32 Llama checkpoint: grouped-query attention, odd sizes (35 wide, 53 in the MLP).

    Args:
        pruned: the smaller half of each matrix is 0, and some of it -0.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 35,
        "intermediate_size": 53,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 258,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))
    for parameter in model.parameters() if pruned else ():
        if parameter.dim() == 2:
            parameter.data *= parameter.abs() > parameter.abs().median()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_data(folder: Path, num_rows: int = 48) -> Path:
    """Rows of unequal length: copy a word."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    words = ["ant", "bear", "cat", "dromedary", "eel", "fox", "gnu"]
    rows = [
        {"prompt": f"say {words[i % 7]} {'please ' * (i % 3)}", "response": f"{words[i % 7]} {i % 5}"}
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_task(folder: Path, data_path: Path) -> Path:
    """lm-eval tasks over the same rows: generation, choice, choice of one token, rolling, a group."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data_path}\ntest_split: test\n"
    (tasks / "tiny_generate.yaml").write_text(
        f"task: tiny_generate\n{common}output_type: generate_until\ndoc_to_text: '{{{{prompt}}}}'\n"
        "doc_to_target: '{{response}}'\ngeneration_kwargs:\n  until: ['</s>']\n  max_gen_toks: 8\n"
        "  do_sample: false\nmetric_list:\n  - metric: exact_match\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    (tasks / "tiny_choice.yaml").write_text(
        f"task: tiny_choice\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{prompt}}}}'\n"
        "doc_to_target: 0\ndoc_to_choice: ['{{response}}', 'zebra', 'yak 1', 'ox']\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tasks / "tiny_letters.yaml").write_text(
        f"task: tiny_letters\n{common}output_type: multiple_choice\n"
        'doc_to_text: "Question: {{prompt}}\\nAnswer:"\n'
        "doc_to_target: 0\ndoc_to_choice: ['a', 'b', 'c', 'd']\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tasks / "tiny_rolling.yaml").write_text(
        f"task: tiny_rolling\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{prompt}} {{response}}'\nmetric_list:\n  - metric: byte_perplexity\n"
    )
    (tasks / "tiny_group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_choice, tiny_letters]\naggregate_metric_list:\n  - metric: acc\n"
    )
    return tasks


def recipe_values(tiny: dict, checkpoint: str = "untied", **sections: dict | str) -> dict:
    """A short fp32 recipe, as in a file, of the paths `tiny`; `sections` override keys."""
    values = {
        "model": {"name_or_path": str(tiny[checkpoint]), "dtype": "float32"},
        "data": {"path": str(tiny["data"]), "max_length": 128},
        "mask": {"density": 0.05, "calibration_samples": 12},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2},
        "deepspeed": {"config": "zero3_cpu"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values
