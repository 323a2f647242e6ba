"""
Measures the cost of decoding and of training on this machine.

    python bench.py decode --runs model_weights/vdproj                      # trained models, their perplexity too
    python bench.py decode --shape gpt2 --context 512 --vs DIR              # random weights, beside a nanoGPT checkout
    python bench.py train --shape gpt2 --dtypes float32,bfloat16 --vs DIR   # a training step, beside a nanoGPT checkout
    python bench.py generate --models MODEL,smaller --contexts 512,2048     # Hugging Face models and surgery's folders
    python bench.py decode --help                                           # the flags

The models alternate: each round measures every model once, so other load on the machine slows all of them equally. A model's
speed is the median over the rounds.

decode measures the allocated bytes of the KV cache, tokens a second, and the perplexity through that cache. It measures each
model dense, with compressed values, and with compressed keys and values, in every number format of the cache. A compressed
model can attend in several ways; the first round chooses the fastest.

generate measures greedy decoding through the model's own cache and through an int8 cache, and the allocated bytes of both.

train measures one step of train.py with AdamW: tokens a second, milliseconds of each part, peak memory, FLOPs, and these FLOPs
as a share of the machine's own rate of matrix products.
"""

import sys

from benchmarks.commands import decode, generate, train
from common.cli import fail

COMMANDS = dict(decode=decode, generate=generate, train=train)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
    elif argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:], __doc__)
    else:
        fail(f"give decode, generate or train as the first word{f', not {argv[0]}' if argv else ''}")


if __name__ == "__main__":
    main()
