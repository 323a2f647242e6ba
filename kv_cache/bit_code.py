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

from kv_cache.bit_streams import Streams

WHOLE = 4  # first positions, not quantised: attention puts much weight on them, and their numbers have another size
LAYERS_BEFORE = 2  # previous layers that a forecast reads


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


def known_of(read, e):
    """Inputs of a layer's forecast (..., P). read: a list of the decoded previous layers; e: the token's embedding."""
    return torch.cat([*read[-LAYERS_BEFORE:], e], -1)
