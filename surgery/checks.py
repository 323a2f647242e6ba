"""What the flags ask for, held against the model."""

from common.cli import fail
from kv_cache.hf_layers import heights, stacks
from surgery.evaluator import prompt_ids
from surgery.subject import CodecTokenizer, OwnSubject


def check_ranks(points, layers, subject, per_group):
    """No rank is above that of the matrices."""
    for point in (point for point in points if point.level == "rank"):
        widths = {"wte": subject.config.n_embd}
        for stack in [] if point.of_table else stacks(layers, point.targets, point.mode, per_group):
            name = "".join(dict.fromkeys(target for _, target in stack))
            widths[name] = min(sum(heights(stack)), stack[0][0].width, widths.get(name, subject.config.n_embd))
        for name, full in widths.items():
            if point.value > full:
                fail(f"--rank {point.value}: {name} has ranks 1 to {full}")


def check_window(args, name, subject):
    """The model can read a window. To be called before text is read, which may be shorter than a wrong --window."""
    if args.window > subject.longest:
        fail(f"--window {args.window}: {name} reads {subject.longest} tokens at most, lower --window")


def check_subject(args, name, points, subject, tokenizer):
    """The model can read what it is given, its table can be cut, and --out can write it. name: of the model."""
    if args.out and (isinstance(subject, OwnSubject) or isinstance(tokenizer, CodecTokenizer)):
        fail("--out writes a model and a tokenizer of Hugging Face, and --model or --tokenizer is train.py's: drop --out")
    if args.answer_tokens and not 1 <= (length := len(prompt_ids(tokenizer, args.prompt))) <= subject.longest:
        fail(f"--prompt has {length} tokens, {name} reads 1 to {subject.longest}: give another, or --answer_tokens 0")
    of_table = {p.method for p in points if p.of_table}
    if of_table and not subject.tables:
        fail(f"--targets wte: {name} has a table that is factorized already: give its dense baseline, or --targets q,k,v")
    if "joint" in of_table and "head" in subject.tables:
        fail(f"--method joint needs one table for lookup and head, {name} has two: give --method fisher")
