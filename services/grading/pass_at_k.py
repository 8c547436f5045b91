"""pass@k: the share of questions that at least one of k sampled answers gets right.

From n answers to a question, c of them right, 1 - C(n - c, k) / C(n, k) is unbiased; drawing k of them is not needed
(Chen et al. 2021, arXiv 2107.03374).
"""

from math import comb


def pass_at_k(n: int, right: int, k: int) -> float:
    """Of one question. ValueError unless right <= n and 1 <= k <= n."""
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {right} right answers among {n}")
    return 1.0 - comb(n - right, k) / comb(n, k)
