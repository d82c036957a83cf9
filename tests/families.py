"""Tiny models of every decoder family that `transformers` has, with random weights."""

from __future__ import annotations

from pathlib import Path

from tiny import make_tokenizer

MAX_ELEMENTS = 3_000_000  # a family that cannot be made smaller is left out

# Sizes by every name that configurations give them; a configuration takes those that it knows.
SIZES = dict(
    vocab_size=264, pad_token_id=258, bos_token_id=256, eos_token_id=257, initializer_range=0.1,
    hidden_size=32, n_embd=32, d_model=32, emb_dim=32, embed_dim=32, embedding_size=32,
    word_embed_proj_dim=32, intermediate_size=48, ffn_dim=48, d_ff=48, n_inner=48, ffn_hidden_size=48,
    decoder_ffn_dim=48, encoder_ffn_dim=48, num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2,
    decoder_layers=2, encoder_layers=1, num_attention_heads=4, n_head=4, n_heads=4, num_heads=4,
    decoder_attention_heads=4, encoder_attention_heads=4, num_key_value_heads=2, num_attention_groups=2,
    head_dim=8, d_kv=8, rotary_dim=4, max_position_embeddings=256, n_positions=256, n_ctx=256,
    sliding_window=64, attention_window_size=64, num_experts=4, num_local_experts=4, n_routed_experts=4,
    moe_num_experts=4, num_experts_per_tok=2, moe_k=2, moe_topk=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1,
    n_group=1, topk_group=1, first_k_dense_replace=1, moe_layer_start_index=1, q_lora_rank=16,
    kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, state_size=8, time_step_rank=4,
    mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_dt_rank=4, mamba_d_conv=4, lru_width=32,
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_num_heads=4, linear_head_dim=8,
    index_n_heads=2, index_head_dim=8, index_topk=256, mtp_num_hidden_layers=0, num_nextn_predict_layers=0,
    hidden_dropout=0.0, attention_dropout=0.0, dropout=0.0,
)  # fmt: skip
PADDED_BY_ONE = "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xglm"
LATENT_ATTENTION = "axk1 axk2 deepseek_v2 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3"
NO_HEAD_DIM = ("falcon", "dots3_note", "dots3_note_text", "xlstm")
OTHERS = {
    **{family: {"pad_token_id": 1} for family in PADDED_BY_ONE.split()},
    **{family: {"num_key_value_heads": 4} for family in LATENT_ATTENTION.split()},
    **{family: {"num_key_value_heads": 4, "head_dim": 4} for family in ("deepseek_v3", "youtu")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Each shows something: biases, transposed weights, experts of four kinds, what is bypassed or never reached,
# buffers that are computed in a dtype of their own.
TESTED_FAMILIES = (
    "llama", "qwen2", "gpt2", "falcon", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text",
    "jetmoe", "mamba", "recurrent_gemma", "bart", "bert",
)  # fmt: skip


def family_names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **more):
    """The configuration of a family's tiny model."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(family)
    leave = {"head_dim", "v_head_dim"} if family in NO_HEAD_DIM or family.startswith("gemma4") else set()
    values = {key: value for key, value in SIZES.items() if key not in leave and hasattr(known, key)}
    per_layer = ("layer_types", "layers_block_type", "mlp_layer_types")  # made anew for two layers
    values |= {key: None for key in known.to_dict() if key.startswith(per_layer)}
    text = getattr(known, "text_config", None)
    if hasattr(text, "to_dict"):
        values["text_config"] = {key: value for key, value in SIZES.items() if hasattr(text, key)}
    return AutoConfig.for_model(family, **{**values, **OTHERS.get(family, {}), **more})


def make_family(folder: Path, family: str, **config) -> Path | None:
    """A checkpoint of the family's tiny model; None where it cannot be made tiny, or does not run."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        values = tiny_config(family, **config)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(values).parameters())
        if size > MAX_ELEMENTS:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(values, dtype=torch.float32)
        model(input_ids=torch.arange(5, 25)[None], use_cache=False)
    except Exception:  # whatever a family of others' code raises for sizes that it was not made for
        return None
    for parameter in model.parameters():  # biases and norms that are not all alike
        if parameter.dim() == 1:
            parameter.data += 0.05 * torch.randn(parameter.shape)
        elif parameter.std() < 1e-3:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
