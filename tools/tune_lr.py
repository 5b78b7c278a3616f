"""Choose the learning rate of each method on each subject: the same grid and the same search for all.

    python tools/tune_lr.py [SUBJECT ...] [--methods METHOD ...]

The score is the normalized MSE at the subject's middle L0, ReLU's read between its runs. Rows go to
book/results/lr.jsonl, which later calls reuse; the winners belong in the table `LRS` of saelib/profiles.py.
"""
import argparse
import math
from pathlib import Path

from saelib import METHODS, RunConfig, frontiers, sweep

STORE = Path(__file__).parents[1] / "book" / "results" / "lr.jsonl"
GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1, 2.56e-1)
METHODS_TRIED = "topk", "relu", "relu_short"
# subject: n_latents, tokens, the L0 to compare at, L1 coefficients around it
SUBJECTS = {
    "synthetic": (256, 300_000, 8, (0.2, 0.3, 0.5, 0.8)),
    "pygpt": (1024, 300_000, 32, (0.03, 0.06, 0.1, 0.15, 0.22)),
    "minilm": (1536, 300_000, 32, (0.03, 0.06, 0.1, 0.15, 0.22)),
}


def score(subject, method, lr):
    """Normalized MSE at the subject's middle L0."""
    n_latents, n_tokens, l0, coefs = SUBJECTS[subject]
    sparsities = (l0,) if METHODS[method].knob == "k" else coefs
    rows = sweep([RunConfig(subject, method, k, n_latents, n_tokens, lr=lr) for k in sparsities], STORE, progress=False)
    points = [(row["metrics"]["l0"], row["metrics"]["normalized_mse"]) for row in rows]
    return frontiers.metric_at(rows, method, l0)[0], points


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=METHODS_TRIED)
    asked = parser.parse_args()
    if unknown := set(asked.subjects) - set(SUBJECTS):
        parser.error(f"unknown subject {', '.join(unknown)}: one of {', '.join(SUBJECTS)}")
    for subject in asked.subjects or SUBJECTS:
        for method in asked.methods:
            scores = {}
            for lr in GRID:
                scores[lr], points = score(subject, method, lr)
                where = " ".join(f"({l0:.1f}, {mse:.4f})" for l0, mse in points)
                print(f"{subject} {method} lr {lr:g}: {scores[lr]:.4f} at the middle L0; (L0, normalized MSE): {where}",
                      flush=True)
            reached = {lr: value for lr, value in scores.items() if not math.isnan(value)}
            print(f"{subject} {method}: best lr {min(reached, key=reached.get):g}" if reached
                  else f"{subject} {method}: no run reached that L0", flush=True)


if __name__ == "__main__":
    main()
