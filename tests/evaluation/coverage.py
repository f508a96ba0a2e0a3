"""How often a 95 % interval holds the truth: `python -m tests.evaluation.coverage` prints what docs/intervals.md says.

Questions are of random difficulty, seeds shift whole tasks, later stages lose some of a task: what all questions and
all seeds would give is then known.
"""

import numpy as np

from dymoe.evaluation.intervals import DRAWS, Answers, accuracy, metrics

LEVEL = np.array([1.5, 0.5, 0.0, -0.5])  # logits of the mean question of each task, as just learned
LOSS = np.array([0.6, 0.4, 0.2, 0.0])  # logits lost at the next stage
SPREAD = 1.5  # standard deviation of the questions' difficulty in logits


def logistic(values):
    return 1 / (1 + np.exp(-values))


def coverage(seeds, between, questions=100, streams=300, draws=DRAWS):
    """Metric -> (share of intervals that hold the truth, their mean width) over simulated streams.

    Args:
        seeds: of each stream's runs; a single one's shift belongs to the truth, since its interval is of it alone.
        between: standard deviation of the seeds' shifts of a task in logits.
        questions: of each task.
        streams: how many are simulated.
        draws: of each interval.
    """
    random = np.random.default_rng(7)
    noise = random.normal(0, 1, 40_000)
    found = {name: [] for name in ("MFT", "MFN", "MAA", "BWT")}
    for _ in range(streams):
        shifts = random.normal(0, between, (seeds, len(LEVEL)))
        difficulty = random.normal(LEVEL[:, None], SPREAD, (len(LEVEL), questions))
        runs = [_run(random, difficulty, shift, seed) for seed, shift in enumerate(shifts)]
        mean, spread = (LEVEL, np.hypot(SPREAD, between)) if seeds > 1 else (LEVEL + shifts[0], SPREAD)
        truth = _truth(mean, spread * noise)
        intervals = metrics(runs, draws)
        for name, rows in found.items():
            interval = intervals[name]
            rows.append((interval.low <= truth[name] <= interval.high, interval.high - interval.low))
    return {name: tuple(np.mean(rows, axis=0)) for name, rows in found.items()}


def _run(random, difficulty, shift, seed):
    names = [f"task {place}" for place in range(len(LEVEL))]
    scores = {}
    for place, name in enumerate(names):
        learned = difficulty[place] + shift[place]
        chances = [logistic(learned), *[logistic(learned - LOSS[place])] * (len(LEVEL) - 1 - place)]
        scores[name] = [(random.random(difficulty.shape[1]) < chance).astype(float) for chance in chances]
    return Answers(tuple(names), scores, dict.fromkeys(names, "the same"), seed)


def _truth(mean, noise):
    first = np.array([logistic(level + noise).mean() for level in mean])
    last = np.array([logistic(level - loss + noise).mean() for level, loss in zip(mean, LOSS, strict=True)])
    last[-1] = first[-1]
    stages = [np.mean([*last[:stage], first[stage]]) for stage in range(len(mean))]
    truth = {"MFT": first.mean(), "MFN": last.mean(), "MAA": np.mean(stages), "BWT": last.mean() - first.mean()}
    return {name: 100 * value for name, value in truth.items()}


def main():
    """Print shares and widths of streams, and shares of single accuracies."""
    print("| seeds | shift | MFT | MFN | MAA | BWT |", "|---|---|---|---|---|---|", sep="\n")
    for seeds, between in ((1, 0.0), (2, 0.3), (3, 0.0), (3, 0.3), (3, 0.6), (5, 0.4)):
        rows = coverage(seeds, between).values()
        print(
            f"| {seeds} | {between} |", " | ".join(f"{100 * share:.0f} % ({width:.1f})" for share, width in rows), "|"
        )
    random = np.random.default_rng(8)
    for questions in (30, 100):
        shares = []
        for chance in (0.02, 0.1, 0.5, 0.9, 0.98):
            intervals = [accuracy([(random.random(questions) < chance).astype(float)]) for _ in range(400)]
            shares.append(np.mean([interval.low <= 100 * chance <= interval.high for interval in intervals]))
        print(f"{questions} questions, right with 2, 10, 50, 90, 98 %:", *(f"{100 * share:.0f} %" for share in shares))


if __name__ == "__main__":
    main()
