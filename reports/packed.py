"""The last table that `python -m surgery --bytes` prints."""

from reports.markdown import table


def packed_table(record):
    """The packed model's bytes, loss and decoding speed, compared with the untouched model."""
    untouched, whole = record["models"]["untouched"], record["float16_bytes"]
    names = list(untouched["texts"])
    lines = []
    for name, m in record["models"].items():
        size = record["bytes"]["on_disk"] if name != "untouched" else whole
        lost = [f"{m['texts'][text]['nats']:+.4f} ± {m['texts'][text]['nats_se'] or 0:.4f}" for text in names]
        lines.append([name, f"{size / 1e6:.1f}", f"{size / whole:.1%}", *lost, f"{m['kl']:.4f}", f"{m['top1']:.1%}"])
    speeds = ", ".join(f"{name} {sorted(x)[len(x) // 2]:.1f}" for name, x in record["tokens_per_second"].items())
    cache = cache_line(record["cache"])
    header = ["model", "MB", "of float16", *(f"nats lost, {name}" for name in names), "KL", "top-1"]
    return (
        f"{table(header, lines)}\n\nTokens/s after 64 tokens: {speeds}. In memory {record['bytes']['in_memory'] / 1e6:.1f} MB. "
        f"{cache}"
    )


def cache_line(cache):
    """The cache's bytes a token, its share of float16, and the number of tokens at which its saving exceeds its constants."""
    float16, packed = cache["bytes_per_token"]["untouched"] / 2, cache["bytes_per_token"]["packed"]  # measured in float32
    form = f" ({cache['form']})" if cache["asked"] else ""
    line = f"Cache{form}: {packed:,.0f} bytes a token at {cache['tokens']} tokens, float16 {float16:,.0f}"
    if not cache["asked"]:
        return line + "."
    constants = cache["constants"]
    saved = f"saved after {constants / (float16 - packed):,.0f} tokens"
    return f"{line} ({packed / float16:.1%}); its constants take {constants / 1e6:.1f} MB, {saved}."
