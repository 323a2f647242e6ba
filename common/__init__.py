"""
Tools that every program uses. Nothing here imports another room.

    cli, versions                flags of a dataclass, one-line errors; which packages work together
    files, untrusted             files written completely or not at all; untrusted files, checked before they are read
    tokenizer, texts, dataset    text into token ids; text files into documents; train.bin and val.bin
    hugging_face, gguf_head      models and tokenizers of Hugging Face; checks of a GGUF file's header
    gguf_rest                    sets what transformers leaves out of a GGUF file, or refuses it
    modules, loss                small modules, and a check that a model is filled; the head's loss
    timing, plots                alternating measurements; figures
"""
