"""A first look in bfloat16 at which products can be among the largest, several times faster than float32 on some CPUs.

Rounding to bfloat16 moves a product q·g by at most |q||g| times a known factor, so nothing that could enter is missed.
"""

import math

import torch
from torch import Tensor

# Each factor of a product is rounded by at most 2**-9 of itself, the sum again by as much when it is stored: together
# at most 1.5 * 2**-8 of |q||g| (Cauchy-Schwarz). The rest is for sums in float32, up to 8,192 dimensions.
RELATIVE_ERROR = 2**-7
FEWEST_QUERIES = 64  # for fewer, rounding the gallery takes longer than the products do
SMALLEST_GALLERY = 64  # times k: in a smaller one too many rows could enter
COLUMNS_PER_GROUP = 32
LOWEST = torch.tensor(-torch.inf, dtype=torch.bfloat16)
LARGEST_SHARE = 1 / 16  # of the pairs: with more to score one by one, a plain product is faster


def prefilter_pays(queries: Tensor, rows: int, k: int) -> bool:
    """Whether bfloat16 is fast here, and products are most of the search of that many gallery rows for the best k."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = queries.device.type == "cpu" and (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return bool(fast) and len(queries) >= FEWEST_QUERIES and rows >= SMALLEST_GALLERY * k


class Bf16Prefilter:
    """Finds the pairs of queries and gallery rows that may be among the best k, a chunk of the gallery at a time."""

    def __init__(self, queries: Tensor, k: int):
        self.queries, self.norms, self.k = queries.bfloat16(), queries.norm(dim=1, keepdim=True), k
        self.seen = self.passed = 0

    def candidates(self, chunk: Tensor, skip: int, kth: Tensor) -> tuple[Tensor, Tensor]:
        """Find the pairs of a query and a row of chunk[skip:] whose product may be above kth.

        chunk (C,D); kth (Q,1) each query's k-th best so far, nan where it has fewer -> query (P,) ascending, row (P,)
        of the chunk. None is missed, some are spare.
        """
        rows = chunk.float().bfloat16()  # several times faster than straight from float16
        with torch.autocast(rows.device.type, enabled=False):
            coarse = self.queries @ rows.T
        error = RELATIVE_ERROR * self.norms * torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).max()
        floor = kth - error
        if kth.isnan().any() and len(chunk) - skip >= self.k:
            # k products of this chunk are surely above its k-th coarse one less the error: others must reach that.
            own = coarse[:, skip:].topk(self.k).values[:, -1:].float() - 2 * error
            floor = torch.where(floor.isnan(), own, floor)
        query, row = _at_least(coarse, floor.bfloat16().nextafter(LOWEST))  # at or below the floor, once rounded
        self.seen, self.passed = self.seen + coarse.numel(), self.passed + len(row)
        return query[row >= skip], row[row >= skip]

    def is_useless(self) -> bool:
        """Whether so many pairs pass that a plain product is faster: the embeddings are nearly all alike."""
        filling = 4 * self.k * len(self.queries)  # until each query has its first k, more must pass
        return self.passed > LARGEST_SHARE * self.seen + filling


def _at_least(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Find the scores (Q,C) that are not below floor (Q,1), nan included -> row (P,) ascending, column (P,)."""
    # Maxima of groups of columns first: the groups that have any are few.
    groups = scores.unflatten(1, (math.gcd(scores.shape[1], COLUMNS_PER_GROUP), -1))
    row, group = (~(groups.amax(1) < floor)).nonzero(as_tuple=True)
    which, member = (~(groups[row, :, group] < floor[row])).nonzero(as_tuple=True)
    return row[which], member * groups.shape[2] + group[which]
