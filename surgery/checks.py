"""Checks that the model can do what the flags ask for."""

from common.cli import fail
from kv_cache.hf_layers import heights, stacks
from surgery.evaluator import prompt_ids
from surgery.subject import CodecTokenizer, OwnSubject


def check_ranks(points, layers, subject, per_group):
    """Refuse a rank above the largest rank of a matrix."""
    for point in (point for point in points if point.level == "rank"):
        widths = {"wte": subject.config.n_embd}
        for stack in [] if point.of_table else stacks(layers, point.targets, point.mode, per_group):
            name = "".join(dict.fromkeys(target for _, target in stack))
            widths[name] = min(sum(heights(stack)), stack[0][0].width, widths.get(name, subject.config.n_embd))
        for name, full in widths.items():
            if point.value > full:
                fail(f"--rank {point.value}: {name} has ranks 1 to {full}")


def check_window(args, name, subject):
    """Refuse a --window that is too long for the model. Call this before the text is read: its message then comes first."""
    if args.window > subject.longest:
        fail(f"--window {args.window}: {name} reads at most {subject.longest} tokens: lower --window")


def check_subject(args, name, points, subject, tokenizer):
    """Refuse a --prompt, --targets wte, --method joint or --out that does not fit the model. name: the model's."""
    if args.out and (isinstance(subject, OwnSubject) or isinstance(tokenizer, CodecTokenizer)):
        fail("--out writes Hugging Face models only, and --model or --tokenizer comes from train.py: drop --out")
    if args.answer_tokens and not 1 <= (length := len(prompt_ids(tokenizer, args.prompt))) <= subject.longest:
        fail(f"--prompt has {length} tokens, {name} reads 1 to {subject.longest}: give another prompt, or --answer_tokens 0")
    of_table = {p.method for p in points if p.of_table}
    if of_table and not subject.tables:
        fail(f"--targets wte: the table of {name} is factorized already: give its dense baseline, or --targets q,k,v")
    if "joint" in of_table and "head" in subject.tables:
        fail(f"--method joint needs one table for lookup and head, {name} has two: give --method fisher")
