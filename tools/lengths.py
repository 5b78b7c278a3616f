"""Train TopK and ReLU on pygpt for longer and longer, each at the best learning rate for that length: the same grid for
both.

    python tools/lengths.py

The rate is chosen by the first seed, by the normalized MSE at L0 = 32; the other seeds are then trained at that rate.
Every run reads the same activations: all that the standard library gives, 2.5 million with Python 3.11, so that only
the longest read some twice. Rows go to saelib/rows/lengths.jsonl, which later calls go on from; chapter 6 draws them.
An hour on two cores.
"""
from saelib import RunConfig, frontiers, sweep

SUBJECT, N_LATENTS, L0, N_SEEDS = "pygpt", 1024, 32, 3
LENGTHS = (3_000_000, 1_000_000, 300_000, 100_000)
GRID = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
SPARSITIES = {"topk": (L0,), "relu": (0.03, 0.045, 0.07, 0.1, 0.15)}


def configs(method, lrs, seeds, n_tokens):
    """The runs of a method at one length."""
    return [RunConfig(SUBJECT, method, sparsity, N_LATENTS, n_tokens, lr=lr, seed=seed, source_tokens=max(LENGTHS))
            for lr in lrs for sparsity in SPARSITIES[method] for seed in seeds]


def main():
    for n_tokens in LENGTHS:
        searched = sweep([c for method in SPARSITIES for c in configs(method, GRID, (0,), n_tokens)], frontiers.LENGTHS)
        best = {row["config"]["method"]: row["config"]["lr"] for row in frontiers.at_best_rates(searched, L0)}
        again = sweep([c for method, lr in best.items() for c in configs(method, (lr,), range(1, N_SEEDS), n_tokens)],
                      frontiers.LENGTHS)
        ratios = frontiers.ratios(frontiers.at_best_rates(searched + again, L0), "relu", "topk")[L0]
        print(f"{n_tokens} tokens: best rates {best}; error of ReLU over TopK's at L0 {L0}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
