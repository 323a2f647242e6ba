"""Tiny random models of many families of transformers, built from their configs: build(name). FAMILIES: their names."""

import torch
import transformers

BASE = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GPT = dict(n_embd=32, n_head=4, n_layer=3, n_positions=256, vocab_size=300, bos_token_id=0, eos_token_id=0)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def rope(**parameters):
    return dict(rope_parameters=dict(rope_theta=1e4, **parameters))


# name: (class before "Config" and "ForCausalLM", what differs from BASE)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_biased": ("Llama", dict(attention_bias=True)),
    "llama3": ("Llama", rope(**LLAMA3)),
    "llama_linear": ("Llama", rope(rope_type="linear", factor=2.0)),
    "llama_yarn": ("Llama", rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)),
    "llama_dynamic": ("Llama", rope(rope_type="dynamic", factor=2.0)),
    "mistral": ("Mistral", dict(sliding_window=16, head_dim=8)),
    "mixtral": ("Mixtral", EXPERTS | dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen2_sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | dict(shared_expert_intermediate_size=24)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | dict(head_dim=8)),
    "qwen3_next": ("Qwen3Next", EXPERTS | dict(head_dim=8, shared_expert_intermediate_size=24, num_hidden_layers=4)),
    "gemma": ("Gemma", dict(head_dim=8)),
    "gemma2": ("Gemma2", dict(head_dim=8, sliding_window=16)),
    "gemma3": ("Gemma3", dict(head_dim=8, sliding_window=16, layer_types=MIXED)),
    "phi": ("Phi", {}),
    "phi_normed": ("Phi", dict(qk_layernorm=True)),
    "phi3": ("Phi3", {}),
    "stablelm": ("StableLm", {}),
    "stablelm_normed": ("StableLm", dict(qk_layernorm=True)),
    "olmo": ("Olmo", {}),
    "olmo_clipped": ("Olmo", dict(clip_qkv=0.2)),
    "olmo2": ("Olmo2", {}),
    "olmoe": ("Olmoe", EXPERTS),
    "bitnet": ("BitNet", {}),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1])),
    "granite": ("Granite", {}),
    "cohere": ("Cohere", dict(use_qk_norm=True)),
    "cohere2": ("Cohere2", dict(sliding_window=16, head_dim=8)),
    "starcoder2": ("Starcoder2", {}),
    "glm": ("Glm", dict(head_dim=8)),
    "glm4": ("Glm4", dict(head_dim=8)),
    "exaone4": ("Exaone4", dict(sliding_window=16, sliding_window_pattern=2)),
    "hunyuan": ("HunYuanDenseV1", dict(head_dim=8)),
    "gpt_oss": ("GptOss", EXPERTS | dict(head_dim=8, sliding_window=16, layer_types=MIXED)),
    "nemotron": ("Nemotron", {}),
    "persimmon": ("Persimmon", {}),
    "lfm2": ("Lfm2", dict(layer_types=["conv", "full_attention", "conv"])),
    "neox": ("GPTNeoX", {}),
    "opt": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "gpt2": ("GPT2", GPT),
    "gpt_neo": ("GPTNeo", dict(num_heads=4, attention_types=[[["global", "local", "global"], 1]])),
    "gptj": ("GPTJ", GPT | dict(rotary_dim=4)),
    "codegen": ("CodeGen", GPT | dict(rotary_dim=4)),
    "bloom": ("Bloom", dict(hidden_size=32, n_layer=3, n_head=4)),
    "falcon": ("Falcon", dict(new_decoder_architecture=False, multi_query=True)),
    "mpt": ("Mpt", dict(d_model=32, n_heads=4, n_layers=3, max_seq_len=256)),
    "mamba": ("Mamba", dict(state_size=8)),
}


def build(name):
    """A random model, float32, in eval mode. Its norms and biases are random too, so that leaving one out shows."""
    kind, changes = FAMILIES[name]
    config = getattr(transformers, f"{kind}TextConfig" if hasattr(transformers, f"{kind}TextConfig") else f"{kind}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**{**BASE, **changes})).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.15)
        else:
            p.data.normal_(p.data.mean().round().item() if p.numel() else 0, 0.2)
    return model.requires_grad_(False)
