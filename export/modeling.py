"""What a compact model is beyond its standard class. bundle.py makes the file beside the weights out of this."""

from surgery.low_rank_modules import install


class LowRankModel:
    """
    Before a standard class of Hugging Face: config.surgery says which parts have factors, and the cache holds latents.

    Keys are counted from the first in the cache, so a text can be padded on the left. A static cache is refused.
    """

    _supports_flash_attn = _supports_flex_attn = _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        install(self, config.surgery)
        self.requires_grad_(True)
        self.post_init()
