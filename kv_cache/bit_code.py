"""
A cache kept by bits: each component of each layer's keys and values has the bits that it is worth.

x_l [D] are the keys (before their rotation) and the values of one token in layer l, side by side. The cache does not keep them.
It keeps z, which says how they differ from a forecast:

    x_l = mean_l + F_l [x'_(l-2), x'_(l-1), e] + gain A_l z

x'_(l-1) is what was read back for the layer before, e the token's normalised row of the table. They are at hand when layer l is
read, so a forecast costs no byte of a token. Neighbouring layers write into one residual stream: the forecast explains most of
the variance. Keys and values of the first layer are a function of e alone, and need no bits at all.

z are coordinates of the difference in its `fisher` basis, scaled to variance 1. S is the covariance of the difference, and
G = E[g g^T] of the loss's gradient at x_l. Decompose G^(1/2) S G^(1/2) = V diag(variance) V^T. Then
z = V^T G^(1/2) (x - forecast) / variance^(1/2). In nats an error of z costs its variance, in all components of all layers
alike. So bits.spend() gives the bits of all layers at once.

Rare words differ from their forecast most: their z is several times that of others. With the same levels for all tokens a few
tokens in a hundred make most of the loss. So a token has a gain in each layer: the root mean square of z, in 16 steps.

A token's components in a layer are one stream of bits (streams.py): a trellis, which at 2 bits has two thirds of the error of
single levels. A stream's first numbers have less choice, so those of the fewest bits come first. The levels are fitted to each
stream.

The forecast is fitted to what will be read back. The rounding is simulated for that, by the test channel of a code of error c:
z' = (1 - c) z + (c (1 - c))^(1/2) gain noise has the error c, uncorrelated with z'.

**A form to be read where it lies.** Forecasts need all positions of all layers before at every step. Without them, and with
bases of small blocks, a step restores little: sums of the values' z suffice, and each key needs the z of its block. A block of
the keys has neighbouring rotary frequencies of all heads: heads correlate most where they turn alike. The values are one
block. Keys and values have a stream and a gain each: the keys of some tokens are large where their values are not.

Shapes: N tokens, B texts of T tokens, D numbers of a token in a layer, K of its components with bits, P known numbers.
"""

import torch
import torch.nn as nn

from bits.budget import spend
from bits.trellis import FAST_WINDOW, distortion, gaussian_codes
from kv_cache.bit_streams import GAIN_BITS, GAINS, Streams, nearest_gain, windows_and_gain
from util_factorization.spectrum import root

WHOLE = 4  # first positions, which are kept whole: attention rests on them, and their numbers are of another size
RIDGE = 1e-5  # of the mean variance of what a forecast reads
DAMPING = 1e-3  # of the metric's mean eigenvalue: directions without a gradient keep a little weight
PASSES = 3  # of fit(): what a layer needs depends on the rounding of the layers before it
LLOYD_ROUNDS = 3
SAMPLE = 8192  # tokens to which levels are fitted
WHOLE_RANGE = 5  # bits from which on no number of a component is clipped
PRIOR = 4  # what a level weighs that no number has chosen, in numbers
LAYERS_BEFORE = 2  # that a forecast reads
BLOCK = 48  # numbers of keys, about; two of each head at least. To restore a number of a key takes so many products
LEAST = 9 - GAIN_BITS  # bits of a stream's numbers: with its gain it fills more than a byte, and two are what it takes


class LayerCode(nn.Module):
    """
    This is how a token's keys and values become bytes in one layer, and back.

    mean [D], forecast [P,D], to_z [D,K], from_z [K,D]; bits: a list for each stream, of numbers above 0, rising, K in all;
    levels (streams, most bits + 1, 2^FAST_WINDOW): the value of each window at each depth.
    """

    def __init__(self, mean, forecast, to_z, from_z, bits, levels):
        super().__init__()
        self.bits, self.streams = bits, Streams(bits)
        for name, tensor in dict(mean=mean, forecast=forecast, to_z=to_z, from_z=from_z, levels=levels).items():
            self.register_buffer(name, tensor.float())

    def tensors(self):
        """What is stored, in 16 bits. to_z is as large as differences from the forecast are small: beyond float16, at times."""
        stored = {name: getattr(self, name).half() for name in ("mean", "forecast", "from_z", "levels")}
        return stored | dict(to_z=self.to_z.bfloat16())

    def expected(self, known):
        """known [N,P]: what is at hand when the layer is read, None without forecasts -> forecast of x [N,D] or [D]."""
        return self.mean if known is None else torch.addmm(self.mean, known, self.forecast)

    def write(self, x, known):
        """x [N,D] -> uint8 [N, bytes_per_token]"""
        return self.streams.write((x - self.expected(known)) @ self.to_z, self.levels)

    def read(self, rows, known):
        """The inverse, to rounding."""
        return self.expected(known) + self.streams.read(rows, self.levels) @ self.from_z

    @property
    def bytes_per_token(self):
        return self.streams.size


# -- fitting ----------------------------------------------------------------------------------------------------------


def fit(x, e, G, budget, blocks=None):
    """
    Calibration text -> a LayerCode for each layer.

    x           a list over layers of (B, T, D), keys and values
    e           (B, T, d), normalised rows of the table
    G           a list over layers of [D,D], E[g g^T] of the gradient at x
    budget      bits of a token, over all layers, the gains' too
    blocks      a list for each stream of a layer. It has blocks, lists of numbers; each block gets its own basis. Nothing is
                forecast then. Left out, a layer has one stream, one basis and a forecast
    Raises ValueError where no component is paid for, or worth anything, or the texts are not longer than what is kept whole.
    """
    streams = len(blocks or [0])
    if budget < (least := least_bits(len(x), streams)):
        raise ValueError(f"a budget of {budget:.0f} bits a token pays for the gains at most: give {least} or more")
    if e.shape[1] <= WHOLE:
        raise ValueError(f"texts of {e.shape[1]} tokens have none after the first {WHOLE}: give longer ones")
    codes, draw = gaussian_codes(FAST_WINDOW), torch.Generator().manual_seed(0)
    errors = torch.tensor(distortion(codes)[1], dtype=torch.float64)
    steps, level = -errors.diff(), 0.0  # level: what the last bit that is paid for is worth
    for _ in range(1 if blocks else PASSES):
        found, read = [], []
        for now, metric in zip(x, G):
            known = e[..., :0] if blocks else known_of(read, e)
            layer = Fitted(coded(now), coded(known), metric, blocks or [[torch.arange(now.shape[-1])]])
            found.append(layer)
            if blocks:
                continue  # no other layer needs what this one reads
            error = errors[(layer.variances[:, None] * steps >= level).sum(1)]  # least at the first pass
            as_read = layer.as_read(coded(now), coded(known), error, draw).unflatten(0, (len(now), -1))
            read = [*read[1 - LAYERS_BEFORE :], torch.cat([now[:, :WHOLE].float(), as_read], 1)]
        variances = torch.stack([layer.variances for layer in found])
        stream = torch.stack([streams * i + layer.stream for i, layer in enumerate(found)])
        bits = spend_on_streams(variances, stream, budget - GAIN_BITS * streams * len(x), distortion(codes))
        if not bits.any():
            raise ValueError("no component of the keys and values is worth a bit: give more bytes, or another model")
        level = (variances * steps[bits - 1])[bits > 0].min().item()
    levels = torch.stack([torch.zeros(2**FAST_WINDOW), *(code.levels[:, 0] for code in codes)])
    return [layer.code(b, levels) for layer, b in zip(found, bits)]


def spend_on_streams(variances, stream, budget, distortion):
    """spend() on components [layers, D], each of a stream: the one that is worth least of those under LEAST bits gets none."""
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
    """Of a budget: the gains, and what a stream has at least beside its own."""
    return GAIN_BITS * layers * streams + LEAST


def blocks_of(groups, n, turned):
    """
    A layer with so many heads of keys, of n numbers each, and as many of values -> [the blocks of the keys, [the values]].

    turned: how many first numbers of a head are rotated, number i with number i + turned / 2. A block has whole pairs, of all
    heads.
    """
    key, number = torch.arange(groups * n), torch.arange(n)
    pair = torch.where(number < turned, number % max(1, turned // 2), number // 2)  # a pair for each frequency, and of the rest
    block = (pair // max(1, round(BLOCK / 2 / groups))).repeat(groups)
    return [[key[block == b] for b in block.unique()], [groups * n + key]]


def coded(x):
    """(B, T, n) -> the positions that are coded [N,n], float32."""
    return x[:, WHOLE:].flatten(0, 1).float()


def known_of(read, e):
    """What is at hand when a layer is read (..., P): the layers before, as they were read back, a list, and the token's row."""
    return torch.cat([*read[-LAYERS_BEFORE:], e], -1)


class Fitted:
    """
    A layer's forecast and coordinates, fitted to x [N,D], known [N,P] and the metric G [D,D].

    variances [D] of the coordinates (x - forecast) @ to_z, falling within a stream; stream [D]; from_z: the inverse of to_z;
    sample: some coordinates.
    """

    def __init__(self, x, known, G, blocks):
        centre, centre_known = x.mean(0), known.mean(0)
        self.forecast = least_squares(known - centre_known, x - centre)
        self.mean = centre - centre_known @ self.forecast
        left = x - self.expected(known)
        S = (left.T @ left).double() / len(x)
        mean_eigenvalue = (G.trace() / len(G)).clamp(min=1e-9)  # of a layer that the loss does not reach, it is 0
        metric = G.double() + DAMPING * mean_eigenvalue * torch.eye(len(G), dtype=torch.float64)
        parts = [coordinates(S, metric, stream) for stream in blocks]
        self.variances, to_z, self.from_z = (torch.cat([part[i] for part in parts]) for i in range(3))
        self.stream = torch.cat([torch.full((len(part[0]),), i) for i, part in enumerate(parts)])
        self.to_z = to_z.T
        self.sample = left[:: -(-len(x) // SAMPLE)] @ self.to_z.float()

    def expected(self, known):
        return torch.addmm(self.mean, known, self.forecast)

    def as_read(self, x, known, error, draw):
        """x [N,D] as it will be read back, where each component has an `error` [D] of its variance (the test channel)."""
        expected = self.expected(known)
        z = (x - expected) @ self.to_z.float()
        noise = torch.randn(z.shape, generator=draw) * (error * (1 - error) * self.variances).sqrt().float()
        if (kept := (error < 1) & (self.variances > 0)).any():
            noise *= (z[:, kept].square() / self.variances[kept].float()).mean(1, keepdim=True).sqrt()
        return torch.addmm(expected, (1 - error.float()) * z + noise, self.from_z.float())

    def code(self, bits, levels):
        """bits [D] -> LayerCode"""
        order = (bits + self.stream * (bits.max() + 1)).argsort(stable=True)  # each stream's by bits
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
    The bases of blocks of numbers -> (variances [k], falling; directions [k,D] of the coordinates, and of their inverse [k,D]).
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
    How far the numbers z [N,K] of components with many bits lie beyond the levels [K], 1 at least.

    They have so many bits because their errors are dear. Clipped, a token in a hundred made half of a layer's error.
    """
    size = (z / GAINS[nearest_gain(z), None]).abs().amax(0) / levels[bits].amax(1)
    return torch.where(torch.tensor(bits) >= WHOLE_RANGE, size.clamp(min=1), 1)


def fit_levels(z, bits, levels):
    """Lloyd's algorithm for the levels of numbers z [N,K], each row over its gain, from the levels for Gaussian ones."""
    offsets = torch.tensor(bits, dtype=torch.long) * levels.shape[1]
    for _ in range(LLOYD_ROUNDS):
        windows, gain = windows_and_gain(Streams([bits]).write(z, levels[None]), bits)
        chosen, now = (windows + offsets).flatten(), (z / GAINS[gain, None]).flatten()
        sums = torch.zeros(levels.numel()).scatter_add_(0, chosen, now)
        counts = torch.bincount(chosen, minlength=levels.numel()).view_as(levels)
        levels = (sums.view_as(levels) + PRIOR * levels) / (counts + PRIOR)
    return levels.half().float()  # as they are stored


def least_squares(known, x):
    """Ridge regression of x [N,D] on known [N,P], both without their means -> [P,D]."""
    gram = (known.T @ known).double()
    gram += RIDGE * gram.diag().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, (known.T @ x).double()).float()
