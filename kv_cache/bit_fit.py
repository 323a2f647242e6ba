"""
Fits a quantised cache to calibration text: forecasts, bases and levels of bit_code.py, and the bits of each component. Nothing
here runs while a model is used.

Shapes: B texts of T tokens, N tokens, D numbers of a token in a layer, K of its components with bits, P inputs of a forecast.
"""

import torch
from torch.nn import functional as F

from bits.budget import spend
from bits.trellis import FAST_WINDOW, distortion, gaussian_codes
from common.cli import fail
from kv_cache.bit_code import LAYERS_BEFORE, WHOLE, LayerCode, known_of
from kv_cache.bit_streams import GAIN_BITS, GAINS, Streams, nearest_gain, windows_and_gain
from kv_cache.hf_attention import head_size, rotary_tables, usual_parts
from kv_cache.hf_bits import STREAMS, first_norm, id_bytes, install_cache, rows_of
from kv_cache.hf_layers import find_layers
from kv_cache.hf_same import check_same
from util_factorization.spectrum import root

RIDGE = 1e-5  # times the mean variance of a forecast's inputs
DAMPING = 1e-3  # times the metric's mean eigenvalue: directions without a gradient keep a little weight
PASSES = 3  # of fit(): a layer's forecast depends on the rounding of the layers before it
LLOYD_ROUNDS = 3
SAMPLE = 8192  # number of tokens for fitting levels
WHOLE_RANGE = 5  # components with at least this many bits are never clipped
PRIOR = 4  # weight of a level's old value, counted in numbers that choose it
BLOCK = 48  # numbers of a block of keys, about; at least two per head. Restoring one number takes BLOCK products
LEAST = 9 - GAIN_BITS  # bits of a stream, without its scale: it takes at least 2 bytes, because the C loop reads two at once


def fit(x, e, G, budget, blocks=None):
    """
    Fit to calibration text -> a LayerCode for each layer.

    x           a list over layers of (B, T, D), keys and values
    e           (B, T, d), normalised rows of the table
    G           a list over layers of [D,D], E[g g^T] of the gradient at x
    budget      bits per token, over all layers, including the scales
    blocks      for each stream of a layer a list of blocks. A block is a tensor of indices into D and gets its own basis; there
                are no forecasts then. Default: one stream, one basis and a forecast per layer
    Raises ValueError if the budget is too small for one component, if no component matters to the loss, or if the texts have
    at most WHOLE tokens.
    """
    streams = len(blocks or [0])
    if budget < (least := least_bits(len(x), streams)):
        raise ValueError(f"{budget:.0f} bits per token are too few for the scales and one component: give {least} or more")
    if e.shape[1] <= WHOLE:
        raise ValueError(f"texts of {e.shape[1]} tokens: the first {WHOLE} are not quantised, give longer ones")
    codes, draw = gaussian_codes(FAST_WINDOW), torch.Generator().manual_seed(0)
    errors = torch.tensor(distortion(codes)[1], dtype=torch.float64)
    steps, level = -errors.diff(), 0.0  # level: saving of the last bit that was spent
    for _ in range(1 if blocks else PASSES):
        found, read = [], []
        for now, metric in zip(x, G):
            known = e[..., :0] if blocks else known_of(read, e)
            layer = Fitted(coded(now), coded(known), metric, blocks or [[torch.arange(now.shape[-1])]])
            found.append(layer)
            if blocks:
                continue  # without forecasts no other layer reads this one
            error = errors[(layer.variances[:, None] * steps >= level).sum(1)]  # the smallest error in the first pass
            as_read = layer.as_read(coded(now), coded(known), error, draw).unflatten(0, (len(now), -1))
            read = [*read[1 - LAYERS_BEFORE :], torch.cat([now[:, :WHOLE].float(), as_read], 1)]
        variances = torch.stack([layer.variances for layer in found])
        stream = torch.stack([streams * i + layer.stream for i, layer in enumerate(found)])
        bits = spend_on_streams(variances, stream, budget - GAIN_BITS * streams * len(x), distortion(codes))
        if not bits.any():
            raise ValueError("no component of the keys and values matters to the loss: give more bytes, or another model")
        level = (variances * steps[bits - 1])[bits > 0].min().item()
    levels = torch.stack([torch.zeros(2**FAST_WINDOW), *(code.levels[:, 0] for code in codes)])
    return [layer.code(b, levels) for layer, b in zip(found, bits)]


def spend_on_streams(variances, stream, budget, distortion):
    """spend() on components [layers, D]. If a stream gets fewer than LEAST bits, drop the least important one, spend again."""
    worth = variances.clone()
    while True:
        bits = spend(worth.view(1, -1), torch.ones(1), budget, distortion).view_as(worth)
        total = torch.zeros(stream.max() + 1, dtype=bits.dtype).scatter_add_(0, stream.flatten(), bits.flatten())
        short = ((total > 0) & (total < LEAST)).nonzero()[:, 0]
        if not len(short):
            return bits
        left = torch.zeros(len(total), dtype=worth.dtype).scatter_add_(0, stream.flatten(), (worth * (bits > 0)).flatten())
        worth[stream == short[left[short].argmin()]] = 0


def least_bits(layers, streams=1):
    """Smallest budget: the scales of all streams, and LEAST bits for one of them."""
    return GAIN_BITS * layers * streams + LEAST


def blocks_of(groups, n, turned):
    """
    Blocks for fit(), for a layer with `groups` kv heads of n numbers -> [the blocks of the keys, [the values]].

    turned: the first numbers of a head that are rotated, number i with number i + turned / 2. A block never splits a pair, and
    contains its pairs in all heads.
    """
    key, number = torch.arange(groups * n), torch.arange(n)
    pair = torch.where(number < turned, number % max(1, turned // 2), number // 2)  # unrotated numbers: neighbours
    block = (pair // max(1, round(BLOCK / 2 / groups))).repeat(groups)
    return [[key[block == b] for b in block.unique()], [groups * n + key]]


def coded(x):
    """(B, T, n) -> the positions that are quantised [N,n], float32."""
    return x[:, WHOLE:].flatten(0, 1).float()


class Fitted:
    """
    A layer's forecast and coordinates, fitted to x [N,D], known [N,P] (inputs of the forecast) and the metric G [D,D].

    variances [D] of the coordinates (x - forecast) @ to_z, falling within a stream; stream [D]: the stream of each coordinate;
    from_z: the inverse of to_z; sample: coordinates of some tokens.
    """

    def __init__(self, x, known, G, blocks):
        centre, centre_known = x.mean(0), known.mean(0)
        self.forecast = least_squares(known - centre_known, x - centre)
        self.mean = centre - centre_known @ self.forecast
        left = x - self.expected(known)
        S = (left.T @ left).double() / len(x)
        mean_eigenvalue = (G.trace() / len(G)).clamp(min=1e-9)  # it is 0 for a layer without influence on the loss
        metric = G.double() + DAMPING * mean_eigenvalue * torch.eye(len(G), dtype=torch.float64)
        parts = [coordinates(S, metric, stream) for stream in blocks]
        self.variances, to_z, self.from_z = (torch.cat([part[i] for part in parts]) for i in range(3))
        self.stream = torch.cat([torch.full((len(part[0]),), i) for i, part in enumerate(parts)])
        self.to_z = to_z.T
        self.sample = left[:: -(-len(x) // SAMPLE)] @ self.to_z.float()

    def expected(self, known):
        return torch.addmm(self.mean, known, self.forecast)

    def as_read(self, x, known, error, draw):
        """x [N,D] with simulated rounding (the test channel). error [D]: of each component, as a share of its variance."""
        expected = self.expected(known)
        z = (x - expected) @ self.to_z.float()
        noise = torch.randn(z.shape, generator=draw) * (error * (1 - error) * self.variances).sqrt().float()
        if (kept := (error < 1) & (self.variances > 0)).any():
            noise *= (z[:, kept].square() / self.variances[kept].float()).mean(1, keepdim=True).sqrt()
        return torch.addmm(expected, (1 - error.float()) * z + noise, self.from_z.float())

    def code(self, bits, levels):
        """bits [D] -> LayerCode"""
        order = (bits + self.stream * (bits.max() + 1)).argsort(stable=True)  # by stream, then by bits
        order = order[bits[order] > 0]
        scale, stream = self.variances[order].sqrt().float(), self.stream[order]
        parts = [stream == i for i in range(self.stream[-1] + 1)]
        bits = [bits[order][part].tolist() for part in parts]
        fitted = []
        for part, b in zip(parts, bits):
            z = self.sample[:, order[part]] / scale[part]
            wider = beyond(z, b, levels) if b else 1
            scale[part] *= wider
            fitted.append(fit_levels(z / wider, b, levels) if b else levels)
        to_z, from_z = self.to_z[:, order] / scale, scale[:, None] * self.from_z[order]
        return LayerCode(self.mean, self.forecast, to_z, from_z, bits, torch.stack(fitted))


def coordinates(S, metric, blocks):
    """
    One basis per block of indices -> (variances [k], falling; directions [k,D] of the coordinates; their inverse [k,D]).
    """
    found = []
    for block in blocks:
        half = root(metric[block][:, block])
        variances, V = torch.linalg.eigh(half @ S[block][:, block] @ half)
        directions = S.new_zeros(2, len(block), len(S))
        directions[:, :, block] = torch.stack([V.T @ half, V.T @ torch.linalg.inv(half)])
        found.append((variances.clamp(min=0), *directions))
    variances, to_z, from_z = (torch.cat(parts) for parts in zip(*found))
    order = variances.argsort(descending=True)
    return variances[order], to_z[order], from_z[order]


def beyond(z, bits, levels):
    """
    Largest |z| of each component over its largest level [K], at least 1; only for components with WHOLE_RANGE bits or more.

    Their errors cost the most. When they were clipped, one token in a hundred caused half of a layer's error.
    """
    size = (z / GAINS[nearest_gain(z), None]).abs().amax(0) / levels[bits].amax(1)
    return torch.where(torch.tensor(bits) >= WHOLE_RANGE, size.clamp(min=1), 1)


def fit_levels(z, bits, levels):
    """Lloyd's algorithm: fit levels to z [N,K], rows divided by their scales. It starts from levels for Gaussian numbers."""
    offsets = torch.tensor(bits, dtype=torch.long) * levels.shape[1]
    for _ in range(LLOYD_ROUNDS):
        windows, gain = windows_and_gain(Streams([bits]).write(z, levels[None]), bits)
        chosen, now = (windows + offsets).flatten(), (z / GAINS[gain, None]).flatten()
        sums = torch.zeros(levels.numel()).scatter_add_(0, chosen, now)
        counts = torch.bincount(chosen, minlength=levels.numel()).view_as(levels)
        levels = (sums.view_as(levels) + PRIOR * levels) / (counts + PRIOR)
    return levels.half().float()  # as they are stored


def least_squares(known, x):
    """Ridge regression of x [N,D] on known [N,P], both of mean 0 -> [P,D]."""
    gram = (known.T @ known).double()
    gram += RIDGE * gram.diag().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, (known.T @ x).double()).float()


# -- for a model -----------------------------------------------------------------------------------------------------


def gather(subject, windows):
    """
    Collect the inputs of fit() on windows of text, a list of (x (1, T), y) -> (keys and values, a list over layers of
    (windows, T, D) float16; e; G, a list over layers of [D,D]). The loss is that of labels drawn from the model's predictions.
    """
    hf, layers = subject.model, find_layers(subject.model)
    made, x, G = {}, [[] for _ in layers], [0] * len(layers)
    linears = [list(layer.linears.values()) for layer in layers]
    rows = [torch.cat([layer.rows["k"], layer.rows["v"]]) for layer in layers]  # of the linears' joined outputs
    hooks = [m.register_forward_hook(lambda m, inputs, output: made.__setitem__(m, output)) for m in sum(linears, [])]
    try:
        for ids, _ in windows:
            logits = subject.logits(subject.trunk(subject.lookup(ids).requires_grad_(True)))[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients = dict(zip(made, torch.autograd.grad(loss, list(made.values()))))
            for i, found in enumerate(x):
                found.append(torch.cat([made[m] for m in linears[i]], -1)[..., rows[i]].detach().half().cpu())
                g = torch.cat([gradients[m] for m in linears[i]], -1)[0, WHOLE:, rows[i]].double().cpu()
                G[i] = G[i] + g.T @ g / (len(g) * len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    ids = torch.cat([ids for ids, _ in windows]).to(hf.device)
    with torch.no_grad():
        e = rows_of(hf.get_input_embeddings(), first_norm(hf) or torch.nn.Identity(), ids)  # the form `fast` does without
    return [torch.cat(found) for found in x], e.float().cpu(), G


def code_cache(subject, windows, share, form, parts):
    """
    Calibrate on windows of text, and give the model, in place, a cache of at most this share of its float16 bytes -> the codes.

    The share counts all bytes of a token, including its id. The first WHOLE positions are not counted. form: a key of STREAMS.
    parts: see install_cache().
    """
    codes = fit(*gather(subject, windows), cache_bits(subject.model, share, form), blocks_for(subject.model, form))
    install_cache(subject.model, codes, parts)
    return codes


def blocks_for(hf, form):
    """The argument `blocks` of fit(): None for the form `small`."""
    if form == "small":
        return None
    layer = find_layers(hf)[0]
    attn = hf.get_submodule(layer.name)
    (cos, _), n = rotary_tables(hf)(attn, usual_parts(attn))(1, hf.get_input_embeddings().weight), head_size(attn)
    return blocks_of(len(layer.rows["k"]) // n, n, 2 * cos.shape[-1])


def numbers_of(hf):
    """(number of layers, numbers of a token's keys and values in a layer)"""
    layers = find_layers(hf)
    return len(layers), len(layers[0].rows["k"]) + len(layers[0].rows["v"])


def cache_bits(hf, share, form):
    """
    Bits per token that fit() may spend: the share of float16's bytes, minus the id and the padding of streams to bytes.
    """
    layers, numbers = numbers_of(hf)
    ends = 7 * layers * STREAMS[form]  # padding bits at most: a stream fills entire bytes
    return share * 16 * layers * numbers - 8 * kept_of_id(hf, form) - ends


def kept_of_id(hf, form):
    """Bytes of a token's id in the cache: forecasts need it."""
    return id_bytes(hf) if form == "small" else 0


def check_cache(hf, share, window, form):
    """
    Refuse a model, a --cache_bytes share or a --window that allows no cache, before anything is measured -> {layer: Parts}, for
    install_cache().
    """
    kind = hf.config.model_type
    layers, numbers = numbers_of(hf)
    if slides(hf.config.get_text_config()):
        fail(f"--cache_bytes: this {kind} drops positions outside a sliding window: drop --cache_bytes, or give another model")
    if form == "small" and first_norm(hf) is None:
        fail(f"--cache_form small needs a norm of the embeddings, and a {kind} has no input_layernorm: give --cache_form fast")
    least = least_bits(layers, STREAMS[form])
    if (found := cache_bits(hf, share, form)) < least:
        lowest = share + (least - found) / (16 * layers * numbers)
        fail(f"--cache_bytes {share} is too small for the scales and one component: give {lowest + 0.0005:.3f} or more")
    if window <= WHOLE:
        fail(f"--window {window}: the first {WHOLE} positions are not quantised, give a longer one")
    return check_same(hf, find_layers(hf), "--cache_bytes", by_bits=True)


def slides(config):
    """Whether a layer's cache drops positions outside a sliding window: the first positions would get lost."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
