"""
What every program uses. Nothing here imports another room.

    cli, versions                flags of a dataclass, one-line errors; which packages work together
    files, untrusted             files written whole or not at all; files of strangers, checked before they are read
    tokenizer, texts, dataset    text into token ids; texts of real models; train.bin and val.bin
    hugging_face, gguf_head      models and tokenizers of Hugging Face; what a GGUF file declares
    modules, loss                small modules, and whether a model is filled; the loss of the head
    timing, plots                alternating measurements; figures
"""
