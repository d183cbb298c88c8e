"""Find the candidates of an exact search with a bfloat16 product, which some CPUs compute several times faster.

Rounding to bfloat16 changes a dot product q·g by at most |q||g| times a known factor, so no candidate is missed.
"""

import math

import torch
from torch import Tensor

# Each factor is rounded by at most 2**-9 of its value, and the stored sum by as much again: together at most
# 1.5 * 2**-8 of |q||g| (Cauchy-Schwarz). The rest covers sums in float32, up to 8,192 dimensions.
RELATIVE_ERROR = 2**-7
MIN_QUERIES = 64  # for fewer, rounding the gallery takes longer than the product
MIN_ROWS_PER_MATCH = 64  # gallery rows per k: in a smaller gallery too many rows are candidates
COLUMNS_PER_GROUP = 32
NEGATIVE_INF = torch.tensor(-torch.inf, dtype=torch.bfloat16)
MAX_PASSED_FRACTION = 1 / 16  # of the pairs: if more pass, the float32 product is faster than scoring single pairs


def prefilter_pays(queries: Tensor, rows: int, k: int) -> bool:
    """Return whether this CPU has fast bfloat16 and the product dominates a search for the best k of `rows` rows."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = queries.device.type == "cpu" and (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return bool(fast) and len(queries) >= MIN_QUERIES and rows >= MIN_ROWS_PER_MATCH * k


class Bf16Prefilter:
    """Find the pairs of a query and a gallery row that may be among the best k, one chunk of the gallery at a time."""

    def __init__(self, queries: Tensor, k: int):
        self.queries, self.norms, self.k = queries.bfloat16(), queries.norm(dim=1, keepdim=True), k
        self.num_pairs = self.num_passed = 0

    def candidates(self, chunk: Tensor, skip: int, kth: Tensor) -> tuple[Tensor, Tensor]:
        """Find every pair of a query and a row of chunk[skip:] whose dot product may exceed kth, and some more.

        chunk (C,D); kth (Q,1): each query's k-th best score so far, nan if it has fewer -> query (P,) ascending, row
        (P,) of the chunk.
        """
        rows = chunk.float().bfloat16()  # several times faster than converting float16 to bfloat16 directly
        with torch.autocast(rows.device.type, enabled=False):
            approximate = self.queries @ rows.T
        error = RELATIVE_ERROR * self.norms * torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).max()
        threshold = kth - error
        if kth.isnan().any() and len(chunk) - skip >= self.k:
            # At least k exact scores of this chunk exceed its k-th approximate score minus the error. An approximate
            # score that is lower by another error cannot belong to the best k.
            lower_bound = approximate[:, skip:].topk(self.k).values[:, -1:].float() - 2 * error
            threshold = torch.where(threshold.isnan(), lower_bound, threshold)
        # nextafter keeps the rounded threshold at or below the exact one.
        query, row = _find_at_least(approximate, threshold.bfloat16().nextafter(NEGATIVE_INF))
        self.num_pairs, self.num_passed = self.num_pairs + approximate.numel(), self.num_passed + len(row)
        return query[row >= skip], row[row >= skip]

    def is_ineffective(self) -> bool:
        """Return whether so many pairs pass that a float32 product is faster: the embeddings are nearly identical."""
        allowance = 4 * self.k * len(self.queries)  # more pairs must pass until each query has its first k matches
        return self.num_passed > MAX_PASSED_FRACTION * self.num_pairs + allowance


def _find_at_least(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Find the scores (Q,C) that are not below threshold (Q,1), nan included -> row (P,) ascending, column (P,)."""
    # First compare the maxima of groups of columns, since few groups contain a candidate.
    groups = scores.unflatten(1, (math.gcd(scores.shape[1], COLUMNS_PER_GROUP), -1))
    row, group = (~(groups.amax(1) < threshold)).nonzero(as_tuple=True)
    pair, member = (~(groups[row, :, group] < threshold[row])).nonzero(as_tuple=True)
    return row[pair], member * groups.shape[2] + group[pair]
