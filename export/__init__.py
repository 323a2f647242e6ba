"""
Our models out: folders that AutoModelForCausalLM.from_pretrained() of Hugging Face opens without this repository.

    __main__                   the program
    sources                    what is exported: a run of train.py, or a folder of surgery
    standard, multiplied       --dense: a GPT-2 or GPT-NeoX; low-rank factors multiplied out
    compact, modeling, bundle  --compact: smaller; its classes; one file of code out of the repository's modules
    tokenizer, card, write     the tokenizer, README.md; written whole, read back and compared
    reallmasic                 a checkpoint for the original scripts
"""
