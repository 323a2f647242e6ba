"""
Imports a Pythia (GPT-NeoX) or a GPT-2 from the Hugging Face hub or a local folder as a checkpoint with the same logits.

    python util_factorization/import_hf.py --model EleutherAI/pythia-70m --out model_weights/pythia70m/ckpt.pt

The weights are stored in float32. A model that our GPT cannot represent is refused; the error names the part that does not fit.
"""

import importlib.util
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.cli import fail, finish, flag, parse
from common.files import claim_new

# Settings that are fixed in our GPT, by model_type. An old config may lack a setting; then it has this value.
GRANTED = dict(
    gpt_neox=dict(attention_bias=True, layer_norm_eps=1e-5),
    gpt2=dict(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, layer_norm_epsilon=1e-5
    ),
)
ACTIVATION = dict(gelu="gelu", gelu_new="gelu_tanh", gelu_fast="gelu_tanh", gelu_pytorch_tanh="gelu_tanh")  # theirs -> ours

# Our module names in a block -> theirs.
GPT_NEOX = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "attention.dense",
    "ln_2": "post_attention_layernorm",
    "mlp.mlp_up": "mlp.dense_h_to_4h",
    "mlp.mlp_down": "mlp.dense_4h_to_h",
}
GPT2 = {
    "ln_1": "ln_1",
    "attn.c_proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp.mlp_up": "mlp.c_fc",
    "mlp.mlp_down": "mlp.c_proj",
}


@dataclass
class Args:
    model: str = flag(help="hub id, or folder written by save_pretrained")
    out: str = flag(help="file to write; an existing file is not overwritten")
    dataset: str = flag("", "dataset that later programs use by default; default: wikitext103 for a GPT-2, pile for a Pythia")
    block_size: int | None = flag(None, "positions to keep; default: all", low=1)


DATASET = dict(gpt_neox="pile", gpt2="wikitext103")  # with the same tokenizer


def read_checkpoint(source, flag, block_size=None, dataset=""):
    """Read a GPT-2 or a Pythia from a hub id or a folder -> (our GPT, the other entries of its checkpoint)."""
    from common.hugging_face import read_config, read_model

    theirs = read_config(source, flag)
    config = gpt_config(theirs)  # refuse before the weights are downloaded
    if block_size and block_size > config.block_size:
        fail(f"--block_size {block_size}: {source} has {config.block_size} positions: give at most that")
    model = from_hugging_face(read_model(source, flag)[0], block_size)
    shape = {name: value for name, value in asdict(model.config).items() if name != "vocab_size"}
    facts = dict(args=shape | dict(dataset=dataset or DATASET[theirs.model_type]), iter_num=0, data_step=0)
    return model, facts | dict(tokens=None, starts_from=None, val_loss=None)  # its training tokens are unknown


def from_hugging_face(hf, block_size=None):
    """A GPTNeoXForCausalLM or a GPT2LMHeadModel -> our GPT in float32, ready to evaluate. block_size: positions to keep."""
    from model import GPT

    config = gpt_config(hf.config)
    config = replace(config, block_size=block_size or config.block_size)
    table, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    model = GPT(replace(config, tie_head=head is table)).eval()
    state = gpt_neox_state(hf, config.n_head) if hf.config.model_type == "gpt_neox" else gpt2_state(hf)
    if "transformer.wpe.weight" in state:
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][: config.block_size]
    model.load_state_dict({"transformer.wte.weight": table, "lm_head.weight": head} | state)
    return model


def gpt_config(theirs):
    """A transformers config -> GPTConfig without its tie_head, or an error that names the setting that does not fit."""
    from model import GPTConfig

    kind = theirs.model_type
    who = theirs.name_or_path or f"this {kind} model"
    if kind not in GRANTED:
        fail(f"{who} has model_type {kind}: give a Pythia (gpt_neox) or a GPT-2 (gpt2)")
    for name, ours in GRANTED[kind].items():
        if getattr(theirs, name, ours) != ours:
            fail(f"{who} has {name} {getattr(theirs, name)}, but our GPT has {ours}: give a model with that")
    d = theirs.hidden_size
    if kind == "gpt_neox":
        activation, width = theirs.hidden_act, theirs.intermediate_size
        positions = dict(rotary_pct=rotary_share(theirs, who), parallel_residual=theirs.use_parallel_residual)
    else:
        activation, width, positions = theirs.activation_function, theirs.n_inner or 4 * d, {}
    if activation not in ACTIVATION:
        fail(f"{who} has the activation {activation}: give a model with one of {', '.join(ACTIVATION)}")
    if width % d:
        fail(f"{who} has an MLP of width {width}, not a multiple of {d}: give a model whose MLP width is one")
    return GPTConfig(
        vocab_size=theirs.vocab_size,
        block_size=theirs.max_position_embeddings,
        n_layer=theirs.num_hidden_layers,
        n_head=theirs.num_attention_heads,
        n_embd=d,
        mlp_expansion_factor=width // d,
        activation=ACTIVATION[activation],
        bias=True,
        dropout=0.0,  # each run sets its own
        **positions,
    )


def rotary_share(theirs, who):
    """The share of each head that a GPT-NeoX rotates, or an error if our GPT cannot rotate like this."""
    rope = getattr(theirs, "rope_parameters", None)
    if rope is None:  # before transformers 5
        rope = dict(theirs.rope_scaling or {}, partial_rotary_factor=theirs.rotary_pct, rope_theta=theirs.rotary_emb_base)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope["rope_theta"] != 10000:
        fail(
            f"{who} has rope_type {kind} and rope_theta {rope['rope_theta']}, but our GPT has default and 10000: "
            "give a model with those"
        )
    n = theirs.hidden_size // theirs.num_attention_heads
    dims = int(n * rope["partial_rotary_factor"])  # transformers rounds down
    if not dims or dims % 2:
        fail(f"{who} rotates {dims} of the {n} numbers of a head: give a model that rotates an even number of them")
    return dims / n


def named(modules, conv1d=False):
    """{our name: their module} -> {our parameter's name: its tensor}. A Conv1D stores its weight as [in, out]."""
    state = {}
    for name, module in modules.items():
        state[f"{name}.weight"] = module.weight.T if conv1d and module.weight.ndim == 2 else module.weight
        state[f"{name}.bias"] = module.bias
    return state


def gpt_neox_state(hf, n_head):
    def split(rows):
        """[H 3 n, ...], with q, k and v side by side in each head -> q, k and v, each [H n, ...]"""
        return rows.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(1, 2)

    state = named({"transformer.ln_f": hf.gpt_neox.final_layer_norm})
    for i, layer in enumerate(hf.gpt_neox.layers):
        block, qkv = f"transformer.h.{i}", layer.attention.query_key_value
        state |= named({f"{block}.{ours}": layer.get_submodule(theirs) for ours, theirs in GPT_NEOX.items()})
        for name, weight, bias in zip("qkv", split(qkv.weight), split(qkv.bias)):
            state |= {f"{block}.attn.{name}_proj.weight": weight, f"{block}.attn.{name}_proj.bias": bias}
    return state


def gpt2_state(hf):
    state = named({"transformer.ln_f": hf.transformer.ln_f}) | {"transformer.wpe.weight": hf.transformer.wpe.weight}
    for i, layer in enumerate(hf.transformer.h):
        block, qkv = f"transformer.h.{i}", layer.attn.c_attn
        state |= named({f"{block}.{ours}": layer.get_submodule(theirs) for ours, theirs in GPT2.items()}, conv1d=True)
        for name, weight, bias in zip("qkv", qkv.weight.T.chunk(3), qkv.bias.chunk(3)):
            state |= {f"{block}.attn.{name}_proj.weight": weight, f"{block}.attn.{name}_proj.bias": bias}
    return state


def main(argv=None):
    args, _ = parse(Args, argv, description=__doc__)
    claim = claim_new(args.out)
    if importlib.util.find_spec("transformers") is None:
        fail("the package transformers is not installed: pip install transformers")

    from training import checkpoint

    model, facts = read_checkpoint(args.model, "--model", args.block_size, args.dataset)
    checkpoint.save_new(args.out, model, **facts)
    claim.release()
    counts = model.count_parameters()
    print(f"{args.model}: {counts['total']:,} numbers stored")
    finish(out=args.out, parameters=counts)


if __name__ == "__main__":
    main()
