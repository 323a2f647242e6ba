"""Models and tokenizers of Hugging Face in, or one line that says why not."""

from common.cli import fail


def read(kind, what, source, flag, **options):
    """kind.from_pretrained(source, **options), or one line. kind: an Auto class. what: its name in the message."""
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # the network, the folder and every reader raise errors of their own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        fail(f"{flag} {source} has no {what} that loads ({why}): give an id on the hub, or a folder of save_pretrained")


def read_model(source, flag, **options):
    """A causal language model with all of its weights -> (the model, from_pretrained's report on its weights)."""
    from transformers import AutoModelForCausalLM

    model, info = read(AutoModelForCausalLM, "weights", source, flag, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):  # from_pretrained fills them with random numbers
        fail(f"{flag} {source} lacks {len(missing)} weights, first {missing[0]}: give a complete model")
    return model, info
