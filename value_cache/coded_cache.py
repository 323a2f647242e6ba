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

A token's components in a layer are one stream of bits: a trellis (trellis.py) whose step t adds bits[t] bits. At 2 bits it
has two thirds of the error of single levels. A stream's first numbers have less choice, so those of the fewest bits come first.
The levels are fitted to each layer. The gain stands at the end, in four bits.

The forecast is fitted to what will be read back. The rounding is simulated for that, by the test channel of a code of error c:
z' = (1 - c) z + (c (1 - c))^(1/2) gain noise has the error c, uncorrelated with z'.

Shapes: N tokens, B texts of T tokens, D numbers of a token in a layer, K of its components with bits, P known numbers.
"""

import torch
import torch.nn as nn

from util_factorization.bits import spend
from util_factorization.packing import pack_rows, row_bytes, unpack_rows
from util_factorization.spectrum import root
from util_factorization.trellis import FAST_WINDOW, distortion, gaussian_codes

WHOLE = 4  # first positions, which are kept whole: attention rests on them, and their numbers are of another size
RIDGE = 1e-5  # of the mean variance of what a forecast reads
DAMPING = 1e-3  # of the metric's mean eigenvalue: directions without a gradient keep a little weight
PASSES = 3  # of fit(): what a layer needs depends on the rounding of the layers before it
AT_ONCE = 512  # tokens encoded together
IMPOSSIBLE = 1e30  # a cost
LLOYD_ROUNDS = 3
SAMPLE = 4096  # tokens to which levels are fitted
PRIOR = 4  # what a level weighs that no number has chosen, in numbers
GAIN_BITS = 4
GAINS = 2 ** ((torch.arange(2**GAIN_BITS) - 7.5) / 2.5)  # from 1/8 to 8
LAYERS_BEFORE = 2  # that a forecast reads


class LayerCode(nn.Module):
    """
    This is how a token's keys and values become bytes in one layer, and back. A layer without bits has no gain either.

    mean [D], forecast [P,D], to_z [D,K], from_z [K,D], bits: a list of K numbers above 0, rising; levels (most bits + 1,
    2^FAST_WINDOW): the value of each window at each depth.
    """

    def __init__(self, mean, forecast, to_z, from_z, bits, levels):
        super().__init__()
        self.bits, self.stream = bits, bits + [GAIN_BITS] * bool(bits)
        for name, tensor in dict(mean=mean, forecast=forecast, to_z=to_z, from_z=from_z, levels=levels).items():
            self.register_buffer(name, tensor.float())
        self.offsets = None

    def tensors(self):
        """What is stored, in 16 bits. to_z is as large as differences from the forecast are small: beyond float16, at times."""
        stored = {name: getattr(self, name).half() for name in ("mean", "forecast", "from_z", "levels")}
        return stored | dict(to_z=self.to_z.bfloat16())

    def expected(self, known):
        """known [N,P]: what is at hand when the layer is read -> forecast of x [N,D]. Without a forecast none is read."""
        return torch.addmm(self.mean, known[:, : len(self.forecast)], self.forecast)

    def encode(self, x, known):
        """x [N,D] -> the windows of the trellis and the gain's number, together [N, K + 1]; [N,0] without bits."""
        if not self.bits:
            return torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
        z = (x - self.expected(known)) @ self.to_z
        gain = nearest_gain(z)
        parts = (z / GAINS.to(z)[gain, None]).split(AT_ONCE)
        return torch.cat([torch.cat([encode_rows(part, self.bits, self.levels) for part in parts]), gain[:, None]], 1)

    def decode(self, windows, known):
        """The inverse, to rounding: -> x [N,D]."""
        if not self.bits:
            return self.expected(known)
        if self.offsets is None or self.offsets.device != windows.device:
            self.offsets = torch.tensor(self.bits, dtype=torch.long, device=windows.device) * self.levels.shape[1]
        gain = GAINS.to(self.levels)[windows[:, -1:].long() & 2**GAIN_BITS - 1]
        z = self.levels.flatten()[windows[:, :-1] + self.offsets] * gain
        return torch.addmm(self.expected(known), z, self.from_z)

    def pack(self, windows):
        """-> uint8 [N, bytes_per_token]"""
        return pack_rows(windows, self.stream)

    def unpack(self, packed):
        return unpack_rows(packed, self.stream, FAST_WINDOW)

    @property
    def bytes_per_token(self):
        return row_bytes(self.stream)


def nearest_gain(z):
    """z [N,K] -> the number of the gain next to each row's root mean square [N]."""
    size = z.square().mean(1, keepdim=True).sqrt()
    return (size.clamp(min=1e-9).log() - GAINS.to(z).log()).abs().argmin(1)


def encode_rows(z, bits, levels):
    """
    z [N,K] of variance 1 -> the windows [N,K] of least squared error in each row (see trellis.viterbi).

    Here each number has a depth of its own, and the stream before the first number is 0.
    """
    (N, K), L, z, levels = z.shape, FAST_WINDOW, z.float().T.contiguous(), levels.float()
    cost, oldest = z.new_full((2**L, N), IMPOSSIBLE), []
    cost[0] = 0
    for t, b in enumerate(bits):
        high, kept = 2**b, 2 ** (L - b)
        names = torch.arange(high, dtype=torch.int32, device=z.device).view(-1, 1, 1)
        named = cost.view(torch.int32).view(high, kept, N).bitwise_and_(-high).bitwise_or_(names)
        best = named.view(torch.float32).amin(0)
        oldest.append((best.view(torch.int32) & high - 1).to(torch.uint8))
        best = best - best.amin(0)  # costs keep their precision
        cost = (z[t] - levels[b].view(kept, high, 1)).square_().add_(best[:, None]).flatten(0, 1)
    windows, window = torch.empty(K, N, dtype=torch.long, device=z.device), cost.argmin(0)
    for t in range(K - 1, -1, -1):
        windows[t] = window
        shared = window >> bits[t]
        window = oldest[t].gather(0, shared[None])[0].long() << (L - bits[t]) | shared
    return windows.T


# -- fitting ----------------------------------------------------------------------------------------------------------


def fit(x, e, G, budget, forecasts=True):
    """
    Calibration text -> a LayerCode for each layer.

    x           a list over layers of (B, T, D), keys and values
    e           (B, T, d), normalised rows of the table
    G           a list over layers of [D,D], E[g g^T] of the gradient at x
    budget      bits of a token, over all layers, the gains' too
    forecasts   false: x_l = mean_l + A_l z, for comparison
    Raises ValueError where no component is paid for, or worth anything, or the texts are not longer than what is kept whole.
    """
    if budget < least_bits(len(x)):
        raise ValueError(f"a budget of {budget:.0f} bits a token pays for the gains at most: give {least_bits(len(x))} or more")
    if e.shape[1] <= WHOLE:
        raise ValueError(f"texts of {e.shape[1]} tokens have none after the first {WHOLE}: give longer ones")
    codes, draw = gaussian_codes(FAST_WINDOW), torch.Generator().manual_seed(0)
    errors = torch.tensor(distortion(codes)[1], dtype=torch.float64)
    steps, level = -errors.diff(), 0.0  # level: what the last bit that is paid for is worth
    for _ in range(PASSES if forecasts else 1):
        found, read = [], []
        for now, metric in zip(x, G):
            known = known_of(read, e) if forecasts else e[..., :0]
            layer = Fitted(coded(now), coded(known), metric)
            error = errors[(layer.variances[:, None] * steps >= level).sum(1)]  # least at the first pass
            as_read = layer.as_read(coded(now), coded(known), error, draw).unflatten(0, (len(now), -1))
            read = [*read[1 - LAYERS_BEFORE :], torch.cat([now[:, :WHOLE].float(), as_read], 1)]
            found.append(layer)
        variances = torch.stack([layer.variances for layer in found])
        bits = spend(variances.view(1, -1), torch.ones(1), budget - GAIN_BITS * len(x), distortion(codes)).view_as(variances)
        if not bits.any():
            raise ValueError("the loss does not depend on keys and values, no component is worth a bit: give another model")
        level = (variances * steps[bits - 1])[bits > 0].min().item()
    levels = torch.stack([torch.zeros(2**FAST_WINDOW), *(code.levels[:, 0] for code in codes)])
    return [layer.code(b, levels) for layer, b in zip(found, bits)]


def least_bits(layers):
    """Of a budget: the gains, and a bit."""
    return GAIN_BITS * layers + 1


def coded(x):
    """(B, T, n) -> the positions that are coded [N,n], float32."""
    return x[:, WHOLE:].flatten(0, 1).float()


def known_of(read, e):
    """What is at hand when a layer is read (..., P): the layers before, as they were read back, a list, and the token's row."""
    return torch.cat([*read[-LAYERS_BEFORE:], e], -1)


class Fitted:
    """
    A layer's forecast and coordinates, fitted to x [N,D], known [N,P] and the metric G [D,D].

    variances [D], falling, of the coordinates (x - forecast) @ to_z; from_z: the inverse of to_z; sample: some coordinates.
    """

    def __init__(self, x, known, G):
        centre, centre_known = x.mean(0), known.mean(0)
        self.forecast = least_squares(known - centre_known, x - centre)
        self.mean = centre - centre_known @ self.forecast
        left = x - self.expected(known)
        mean_eigenvalue = (G.trace() / len(G)).clamp(min=1e-9)  # of a layer that the loss does not reach, it is 0
        half = root(G.double() + DAMPING * mean_eigenvalue * torch.eye(len(G), dtype=torch.float64))
        S = (left.T @ left).double() / len(x)
        variances, V = torch.linalg.eigh(half @ S @ half)
        self.variances, V = variances.clamp(min=0).flip(0), V.flip(1)
        self.to_z, self.from_z = half @ V, V.T @ torch.linalg.inv(half)
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
        order = bits.argsort(stable=True)[(bits == 0).sum() :]  # of the components that have bits
        std, bits = self.variances[order].sqrt(), bits[order].tolist()
        levels = fit_levels((self.sample[:, order] / std).float(), bits, levels) if bits else levels
        return LayerCode(self.mean, self.forecast, self.to_z[:, order] / std, std[:, None] * self.from_z[order], bits, levels)


def fit_levels(z, bits, levels):
    """Lloyd's algorithm for the levels of numbers z [N,K], each row over its gain, from the levels for Gaussian ones."""
    z = z / GAINS[nearest_gain(z), None]
    offsets = torch.tensor(bits, dtype=torch.long) * levels.shape[1]
    for _ in range(LLOYD_ROUNDS):
        chosen = torch.cat([encode_rows(part, bits, levels) for part in z.split(AT_ONCE)]).add_(offsets).flatten()
        sums = torch.zeros(levels.numel()).scatter_add_(0, chosen, z.flatten())
        counts = torch.bincount(chosen, minlength=levels.numel()).view_as(levels)
        levels = (sums.view_as(levels) + PRIOR * levels) / (counts + PRIOR)
    return levels.half().float()  # as they are stored


def least_squares(known, x):
    """Ridge regression of x [N,D] on known [N,P], both without their means -> [P,D]."""
    gram = (known.T @ known).double()
    gram += RIDGE * gram.diag().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, (known.T @ x).double()).float()
