"""Train TopK and ReLU for longer and longer, each at the best learning rate for that length: the same grid for both.

    python tools/lengths.py [SUBJECT ...]      pygpt, synthetic

The rate is chosen by the first seed, by the normalized MSE at the subject's middle L0; the other seeds are then trained
at that rate. Every run reads the same activations: 3 million of `synthetic`, and of `pygpt` all that the standard
library gives, 2.5 million with Python 3.11, so that only the longest read some twice. Rows go to
saelib/rows/lengths.jsonl, which later calls go on from; chapters 6 and 8 draw them. Two hours on two cores.
"""
import argparse

from saelib import RunConfig, frontiers, sweep

N_SEEDS = 3
LENGTHS = (3_000_000, 1_000_000, 300_000, 100_000)
# subject: n_latents, the L0 to compare at, learning rates, L1 coefficients around that L0
SUBJECTS = {
    "pygpt": (1024, 32, (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), (0.03, 0.045, 0.07, 0.1, 0.15)),
    "synthetic": (256, 8, (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1, 2.56e-1), (0.1, 0.2, 0.3, 0.4, 0.5)),
}


def configs(subject, method, lrs, seeds, n_tokens):
    """The runs of a method at one length."""
    n_latents, l0, _, coefs = SUBJECTS[subject]
    return [RunConfig(subject, method, sparsity, n_latents, n_tokens, lr=lr, seed=seed, source_tokens=max(LENGTHS))
            for lr in lrs for sparsity in {"topk": (l0,), "relu": coefs}[method] for seed in seeds]


def lengthen(subject):
    _, l0, grid, _ = SUBJECTS[subject]
    for n_tokens in LENGTHS:
        searched = sweep([c for method in ("topk", "relu") for c in configs(subject, method, grid, (0,), n_tokens)],
                         frontiers.LENGTHS)
        best = {row["config"]["method"]: row["config"]["lr"] for row in frontiers.at_best_rates(searched, l0)}
        again = sweep([c for method, lr in best.items()
                       for c in configs(subject, method, (lr,), range(1, N_SEEDS), n_tokens)], frontiers.LENGTHS)
        ratios = frontiers.ratios(frontiers.at_best_rates(searched + again, l0), "relu", "topk")[l0]
        print(f"{subject}, {n_tokens} tokens: best rates {best}; error of ReLU over TopK's at L0 {l0}: {ratios}",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    asked = parser.parse_args()
    if unknown := set(asked.subjects) - set(SUBJECTS):
        parser.error(f"unknown subject {', '.join(unknown)}: one of {', '.join(SUBJECTS)}")
    for subject in asked.subjects or SUBJECTS:
        lengthen(subject)


if __name__ == "__main__":
    main()
