"""How long things take, measured by turns."""

import statistics
import time


def by_turns(tasks, rounds, after_round=lambda i: None):
    """
    Measure tasks by turns, round after round, so that other load slows all alike. One more round before warms up.

    tasks: {name: (prepare, run)}: run() is timed, and must wait for its device. Returns {name: [seconds, one a round]}.
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
    """The median of some measurements, and the smallest and the largest of them."""
    return dict(median=statistics.median(values), low=min(values), high=max(values))
