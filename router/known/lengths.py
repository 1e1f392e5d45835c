"""How long answers are, learned from those that have ended: what is likely to come of one that may end by itself."""

WEIGHT = 0.05  # of the newest answer in the running mean
MOST_MODELS = 256


class Lengths:
    """A running mean of output tokens for each model."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def ended(self, model: str, num_tokens: int) -> None:
        """Note an answer that ended by itself, or at its limit."""
        mean = self._means.pop(model, float(num_tokens))
        self._means[model] = (1 - WEIGHT) * mean + WEIGHT * num_tokens
        if len(self._means) > MOST_MODELS:
            del self._means[next(iter(self._means))]

    def expected(self, model: str, *, most: int, is_exact: bool) -> int:
        """Return how many tokens an answer of at most ``most`` will have; ``is_exact`` says that it will not stop."""
        mean = self._means.get(model)
        return max(1, most if is_exact or mean is None else min(most, round(mean)))
