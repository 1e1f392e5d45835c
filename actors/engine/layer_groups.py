"""Which layers' KV is reported together, so that pages leave while later layers still compute."""


def layer_groups(num_layers: int, num_groups: int) -> dict[int, tuple[int, int]]:
    """Cut the layers into groups of nearly equal size: from a group's last layer to ``(layer_begin, layer_end)``."""
    num_groups = max(1, min(num_groups, num_layers))
    ends = [num_layers * (i + 1) // num_groups for i in range(num_groups)]
    return {end - 1: (begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)}
