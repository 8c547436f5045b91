"""pass@k: the share of questions for which at least one of k sampled replies is right.

For n replies to a question, c of them right, the unbiased estimator is 1 - C(n - c, k) / C(n, k), without drawing
subsets of k (Chen et al. 2021, arXiv 2107.03374).
"""

from math import comb


def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimate pass@k of one question, `right` of n replies right. ValueError unless 0 <= right <= n, 1 <= k <= n."""
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} is not defined for {right} right replies among {n}")
    return 1.0 - comb(n - right, k) / comb(n, k)
