"""
Tools that every program uses. Nothing here imports another room.

    cli, versions                flags of a dataclass, one-line errors; which packages work together
    files, untrusted             files written completely or not at all; untrusted files, checked before they are read
    tokenizer, texts, dataset    text into token ids; text files into documents; train.bin and val.bin
    hugging_face, gguf_file      models and tokenizers of Hugging Face; GGUF files, and what transformers leaves out of them
    modules                      small modules, and a check that a model is filled
    timing, plots                alternating measurements; figures
"""
