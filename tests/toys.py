"""Tiny models of Hugging Face with random weights, their tokenizer and their text. ImportError where these cannot be had."""

import json

import torch
import transformers

from common.tokenizer import train_bpe

if not transformers.utils.is_torch_available():
    raise ImportError("this transformers wants a newer torch")

TEXT = "".join(f"{i} is {'odd' if i % 2 else 'even'}, and {i * i} is its square; " for i in range(3000))


def redrawn(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def llama(**changes):
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0, bos_token_id=0)
    return redrawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)))


def neox():
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(max_position_embeddings=64, eos_token_id=0, bos_token_id=0)
    return redrawn(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)))


def save_tokenizer(folder, size=300):
    bpe = train_bpe([TEXT], size)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)


def write_gguf(path, tokenizer, hf, arch="llama", keys=(), tensors=()):
    """
    A Llama in float32 under llama.cpp's names, which has the two numbers that a rotation turns side by side.

    keys: {key after the architecture's name, or whole if it begins with "tokenizer.": value}. tensors: {name: tensor}, others
    """
    import gguf

    out, c = gguf.GGUFWriter(path, arch), hf.config
    shape = dict(block_count=c.num_hidden_layers, context_length=c.max_position_embeddings, embedding_length=c.hidden_size)
    shape |= dict(
        feed_forward_length=c.intermediate_size, head_count=c.num_attention_heads, head_count_kv=c.num_key_value_heads
    )
    shape |= dict(layer_norm_rms_eps=c.rms_norm_eps, rope_freq_base=c.rope_parameters["rope_theta"], vocab_size=c.vocab_size)
    for name, value in dict(shape, rope_dimension_count=c.hidden_size // c.num_attention_heads).items():
        getattr(out, f"add_{name}")(value)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    out.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    out.add_token_types([1] * len(bpe["vocab"]))
    out.add_eos_token_id(0)
    for key, value in dict(keys).items():
        add = {bool: out.add_bool, int: out.add_uint32, float: out.add_float32, str: out.add_string}[type(value)]
        add(key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, p in hf.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(stem.rsplit(".", 1)[-1])
        p = p.detach() if heads is None else p.detach().unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        out.add_tensor(f"{names.get_name(stem)}.{suffix}", p.contiguous().numpy())
    for name, tensor in dict(tensors).items():
        out.add_tensor(name, tensor.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
