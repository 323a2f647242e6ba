"""
What train.py calls, in the order of the calls.

    rules                        which flags contradict each other, and which may change in a resume
    start                        flags, text, model with weights, and the step at which the run starts
    checkpoint, factor_files     ckpt.pt and last.pt; the files of a factorized table
    device                       GPUs, processes, number formats, memory
    optimizer                    AdamW, and Muon for the matrices of the blocks
    step                         parts of a training step; checks whether the model compiles
    evaluate                     loss on fixed windows of the validation text
    progress, stopping           progress lines; signals
    run_folder, trackers         config.json, metrics.jsonl, summary.json; W&B and TensorBoard

A step is one update of the optimizer. It consists of micro-steps: one forward and backward pass each.
"""
