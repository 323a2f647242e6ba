"""Tiny models of Hugging Face with random weights, their tokenizer and their text. ImportError where these cannot be had."""

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
