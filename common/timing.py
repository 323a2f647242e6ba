"""Measures how long tasks take, alternating between them."""

import statistics
import time


def by_turns(tasks, rounds, after_round=lambda i: None):
    """
    Measure tasks alternately: each round runs every task once, so other load slows all of them equally. One extra warm-up round
    runs first.

    tasks: {name: (prepare, run)}. Only run() is timed; it must wait for its device. Returns {name: [seconds of each round]}.
    """
    seconds = {name: [] for name in tasks}
    for i in range(rounds + 1):
        for name, (prepare, run) in tasks.items():
            prepare()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        after_round(i)
    return {name: found[1:] for name, found in seconds.items()}


def spread(values):
    """The median, the smallest and the largest of some measurements."""
    return dict(median=statistics.median(values), low=min(values), high=max(values))
