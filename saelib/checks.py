"""Bad input, in one line."""


def require(holds: bool, name: str, value, rule: str) -> None:
    """Raise ValueError, naming the argument, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}: it must be {rule}")
