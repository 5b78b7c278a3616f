"""The criteria of the claims about speed (see `saelib.criteria`)."""


def cheap_step(topk: float, auxk: float, fit: float):
    return (f"a step {topk:.2f} products, with dead latents and AuxK {auxk:.2f}, a step of a whole fit {fit:.2f}",
            [topk <= 1.5, auxk <= 2.0, fit <= 1.5])


def cheap_wide(topk: float):
    return f"a step {topk:.2f} products", [topk <= 1.0]


def faster(ours: float, others: dict[str, float]):
    least = {"plain loop": 5.0, "sparsify": 2.8, "SAELens, dense": 8.0}
    measured = {name: others[name] / ours for name in least if name in others}
    missing = [name for name in least if name not in others]
    text = ", ".join(f"{ratio:.1f} times faster than {'the ' * (name == 'plain loop')}{name}"
                     for name, ratio in measured.items())
    return (f"{text}{'; not measured: ' + ', '.join(missing) if missing else ''}",
            [ratio >= least[name] for name, ratio in measured.items()] + [False] * len(missing))


def cheap_relu(by_precision: dict[str, float], others: dict[str, float]):
    most = {"bf16": 2.4, "fp32": 5.0}
    text = ", ".join(f"{precision} {ratio:.2f}" for precision, ratio in by_precision.items())
    return (f"a step in products, {text}; the fastest other {min(others.values()):.2f}",
            [ratio <= most[precision] for precision, ratio in by_precision.items()]
            + [min(by_precision.values()) < min(others.values())])


def cheap_on_gpu(steps: dict[tuple[int, int], tuple[float, float]], excess: float):
    most = {(32768, 8192): 3.0, (32768, 65536): 2.3, (131072, 8192): 2.2, (131072, 65536): 1.7}
    text = "; ".join(f"n = {n}, batch {batch}: {own:.2f} products, {plain / own:.1f} times faster"
                     for (n, batch), (own, plain) in steps.items())
    return (f"{text}; error {excess:+.2%} against the dense loop's",
            [*(size in steps and steps[size][0] <= limit for size, limit in most.items()),
             *(plain >= 3 * own for own, plain in steps.values()), excess <= 0.01])


def quick_frontier(members: int, seconds: float):
    return f"{members} members in {seconds:.0f} s", [members == 12, seconds < 180]


def equal_error(ours: dict[str, float], plain: float):
    text = ", ".join(f"{name} {mse / plain - 1:+.2%}" for name, mse in ours.items())
    return (f"normalized MSE {plain:.4f} for the plain loop; against it {text}",
            [mse <= 1.01 * plain for mse in ours.values()])


def small_memory(ratios: dict[str, float]):
    text = ", ".join(f"{size}: {ratio:.3f}" for size, ratio in ratios.items())
    return f"peak over what must be held: {text}", [ratio < 1.3 for ratio in ratios.values()]


def data_keeps_up(speeds: dict[str, float], loaders: dict[str, float]):
    text = ", ".join(f"{name} harvested at {speed:.2f} of the forward passes' speed, "
                     f"loader {loaders[name]:.3f} of a step" for name, speed in speeds.items())
    return text, [*(speed > 0.9 for speed in speeds.values()), *(share < 0.05 for share in loaders.values())]


def predicted(step: float, parts: dict[str, tuple[float, float]]):
    total = sum(guess for guess, _ in parts.values())
    large = {name: took / guess for name, (guess, took) in parts.items() if took > 0.05 * step}
    text = ", ".join(f"{name} {ratio:.1f}" for name, ratio in large.items())
    return (f"the predictions add up to {total / step:.2f} of the step; measured over predicted: {text}",
            [0.5 <= total / step <= 1, *(1 / 3 <= ratio <= 3 for ratio in large.values())])
