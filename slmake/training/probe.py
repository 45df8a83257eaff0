"""Whether a replacement computes what the original does."""

import torch


def close(values: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two results are equal but for rounding.

    Their difference, as root mean square, is below `tolerance` times the spread of `expected`. False for values that are
    not finite.
    """
    values, expected = values.float(), expected.float()
    return bool((values - expected).square().mean().sqrt() < tolerance * expected.std())
