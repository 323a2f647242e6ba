"""
Exports our models as folders that AutoModelForCausalLM.from_pretrained() of Hugging Face opens without this repository.

    __main__                   the program
    sources                    reads the source of an export: a run of train.py, or a folder of surgery
    standard, multiplied       --dense: a GPT-2 or GPT-NeoX; low-rank factors multiplied out
    compact, modeling, bundle  --compact: the smaller form; its classes; one file of code from the repository's modules
    tokenizer, card, write     the tokenizer; README.md; the folder is written, read back and compared
    reallmasic                 a checkpoint for the original scripts
"""
