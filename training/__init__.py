"""
What train.py calls, in the order in which it does.

    rules                        flags that contradict each other; what a resume may change
    start                        the flags settled, the text, the model with its weights, how far an earlier run had come
    checkpoint, factor_files     ckpt.pt and last.pt; the files of a factorized table
    device                       cards, processes, dtypes, memory
    optimizer                    AdamW, and Muon for matrices
    step                         the parts of a step; whether a model compiles
    evaluate                     the loss on fixed windows
    progress, stopping           what a person sees; signals
    run_folder, trackers         config.json, metrics.jsonl, summary.json; W&B and TensorBoard

A step is one update of the optimizer. It has micro-steps, one forward and backward pass each.
"""
