"""
A quantised cache: each component of each layer's keys and values gets as many bits as its error matters to the loss.

x_l [D] are the keys (before rotation) and the values of one token in layer l, side by side. The cache stores z instead of them.
z says how x_l differs from a forecast:

    x_l = mean_l + F_l [x'_(l-2), x'_(l-1), e] + scale A_l z

x'_(l-1) are the decoded keys and values of the previous layer; e is the normalised embedding of the token. Both are known
before layer l is decoded, so a forecast needs no bytes per token. Neighbouring layers write into one residual stream,
therefore the forecast explains most of the variance. Keys and values of the first layer are a function of e alone and need no
bits at all.

z are the coordinates of the difference in its `fisher` basis, divided by their standard deviation. S is the covariance of the
difference, and G = E[g g^T] of the loss's gradient at x_l. Decompose G^(1/2) S G^(1/2) = V diag(variance) V^T. Then
z = V^T G^(1/2) (x - forecast) / variance^(1/2). An error in z costs its variance in nats, for all components of all layers
alike. So one call of spend() (bits/budget.py) chooses the bits of all layers.

Rare words differ most from their forecast: their z is several times larger. With the same levels for all tokens, a few percent
of the tokens cause most of the loss. So each token has a scale in each layer: the root mean square of z, in 16 steps.

The components of a token in a layer form one stream of bits (bit_streams.py): a trellis, whose error at 2 bits is two thirds of
that of a scalar quantiser. The first numbers of a stream have fewer choices, so components with the fewest bits come first.
The levels are fitted to each stream.

The forecast is fitted to decoded inputs, which contain rounding errors. We simulate them by the test channel of a codebook of
error c: z' = (1 - c) z + (c (1 - c))^(1/2) scale noise has the error c, uncorrelated with z'.

**A form that is read in place.** A forecast needs all positions of all previous layers at every step. Without forecasts, and
with a basis for each small block of numbers, a step restores little: the values need only sums of z, and a key needs only the z
of its block. A block of keys has neighbouring rotary frequencies of all heads: heads correlate most at equal frequencies. The
values are one block. Keys and values have separate streams and scales, since some tokens have large keys but not large values.

Shapes: N tokens, B texts of T tokens, D numbers of a token in a layer, K of its components with bits, P inputs of a forecast.
"""

import torch
import torch.nn as nn

from bits.budget import spend
from bits.trellis import FAST_WINDOW, distortion, gaussian_codes
from kv_cache.bit_streams import GAIN_BITS, GAINS, Streams, nearest_gain, windows_and_gain
from util_factorization.spectrum import root

WHOLE = 4  # first positions, not quantised: attention puts much weight on them, and their numbers have another size
RIDGE = 1e-5  # times the mean variance of a forecast's inputs
DAMPING = 1e-3  # times the metric's mean eigenvalue: directions without a gradient keep a little weight
PASSES = 3  # of fit(): a layer's forecast depends on the rounding of the layers before it
LLOYD_ROUNDS = 3
SAMPLE = 8192  # number of tokens for fitting levels
WHOLE_RANGE = 5  # components with at least this many bits are never clipped
PRIOR = 4  # weight of a level's old value, counted in numbers that choose it
LAYERS_BEFORE = 2  # previous layers that a forecast reads
BLOCK = 48  # numbers of a block of keys, about; at least two per head. Restoring one number takes BLOCK products
LEAST = 9 - GAIN_BITS  # bits of a stream, without its scale: it takes at least 2 bytes, because the C loop reads two at once


class LayerCode(nn.Module):
    """
    Encodes the keys and values of a token in one layer as bytes, and decodes them.

    mean [D], forecast [P,D], to_z [D,K], from_z [K,D]; bits: a list per stream, above 0 and rising, K entries in all; levels
    (streams, most bits + 1, 2^FAST_WINDOW): the value of each window at each depth.
    """

    def __init__(self, mean, forecast, to_z, from_z, bits, levels):
        super().__init__()
        self.bits, self.streams = bits, Streams(bits)
        for name, tensor in dict(mean=mean, forecast=forecast, to_z=to_z, from_z=from_z, levels=levels).items():
            self.register_buffer(name, tensor.float())

    def tensors(self):
        """Tensors to store, in 16 bits. to_z divides by small deviations, so it can be too large for float16."""
        stored = {name: getattr(self, name).half() for name in ("mean", "forecast", "from_z", "levels")}
        return stored | dict(to_z=self.to_z.bfloat16())

    def expected(self, known):
        """known [N,P]: inputs of the forecast, None if there is none -> forecast of x [N,D] or [D]."""
        return self.mean if known is None else torch.addmm(self.mean, known, self.forecast)

    def write(self, x, known):
        """x [N,D] -> uint8 [N, bytes_per_token]"""
        return self.streams.write((x - self.expected(known)) @ self.to_z, self.levels)

    def read(self, rows, known):
        """The inverse of write(), up to rounding."""
        return self.expected(known) + self.streams.read(rows, self.levels) @ self.from_z

    @property
    def bytes_per_token(self):
        return self.streams.size


# -- fitting ----------------------------------------------------------------------------------------------------------


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


def known_of(read, e):
    """Inputs of a layer's forecast (..., P). read: a list of the decoded previous layers; e: the token's embedding."""
    return torch.cat([*read[-LAYERS_BEFORE:], e], -1)


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
