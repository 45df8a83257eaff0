"""The arithmetic of a merge: an adapter's update of one weight, in float32."""

from dataclasses import dataclass, field

ROWS = 32  # least rows of B in one product with A


@dataclass
class Update:
    """W' of one weight W: its trained rows, then W + s B A (Hu et al. 2021, arXiv:2106.09685), then DoRA's magnitudes.

    DoRA (Liu et al. 2024, arXiv:2402.09353) scales every output's weights to their trained norm. All matrices are float32.

    Attributes:
        scaling: s.
        transposed: W is [in, out], and the update is (B A)'.
        a, b: [r, in] and [out, r].
        magnitude: [out].
        bias: [out], added to a bias as s times itself.
        rows: [n, width], in the place of W's rows at `indices`.
    """

    scaling: float
    transposed: bool
    indices: list[int] = field(default_factory=list)
    a: object = None
    b: object = None
    magnitude: object = None
    bias: object = None
    rows: object = None

    @property
    def whole(self) -> bool:
        """Whether W cannot be merged by rows: the norm of an output is over a column of it."""
        return self.transposed and self.magnitude is not None

    def add_to(self, tensor, first: int, last: int, buffers) -> None:
        """Merge the rows from `first` to `last` of W, float32, in place."""
        import torch

        if self.rows is not None:
            for position, index in enumerate(self.indices):
                if first <= index < last:
                    tensor[index - first] = self.rows[position]
        if self.bias is not None:
            tensor.add_(self.bias[first:last] * self.scaling)
        if self.a is None:
            return
        # Never of fewer rows: such a product uses another kernel, which may round differently from the whole one.
        start = max(0, min(first, last - ROWS))
        b, a = (self.b, self.a[:, start:last]) if self.transposed else (self.b[start:last], self.a)
        product = torch.mm(b, a, out=buffers.get("update", (len(b), a.shape[1]), torch.float32))
        product = (product.T if self.transposed else product)[first - start :]
        tensor.add_(product.mul_(self.scaling))
        if self.magnitude is not None:
            dim = 0 if self.transposed else 1
            norm = torch.linalg.norm(tensor.T if self.transposed else tensor, dim=1)
            factor = (self.magnitude if self.transposed else self.magnitude[first:last]) / norm
            tensor.mul_(factor.unsqueeze(dim))
