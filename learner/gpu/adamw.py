"""A step of AdamW and the teacher's average in one pass over memory, as an operation of torch."""

import torch
from torch import Tensor

from sdft.learner.gpu.registry import ELEMENTS, kernels, operation


@operation(
    "adamw_(Tensor(a!) p, Tensor grad, Tensor(b!) mean, Tensor(c!) square, Tensor(d!)? teacher, int step,"
    " float lr, float beta1, float beta2, float eps, float weight_decay, float alpha) -> ()"
)
class AdamW:
    """AdamW (arXiv:1711.05101), then teacher += alpha (p - teacher).

    p, grad, mean, square, teacher: contiguous float32, of one size. step: of the parameter, counted from 1.
    """

    @staticmethod
    def cuda(
        p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, teacher: Tensor | None, step: int,
        lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, alpha: float,
    ) -> None:  # fmt: skip
        count = p.numel()
        size, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
        rates = 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, size, root, eps, alpha
        kernels().adamw[(-(-count // ELEMENTS),)](
            p, grad, mean, square, teacher, count, *rates, teacher is not None, ELEMENTS
        )

    @staticmethod
    def cpu(
        p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, teacher: Tensor | None, step: int,
        lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, alpha: float,
    ) -> None:  # fmt: skip
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.mul_(1 - lr * weight_decay)
        p.addcdiv_(mean, square.sqrt() * (1 - beta2**step) ** -0.5 + eps, value=-lr / (1 - beta1**step))
        if teacher is not None:
            teacher.lerp_(p, alpha)

    @staticmethod
    def meta(
        p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, teacher: Tensor | None, step: int,
        lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, alpha: float,
    ) -> None:  # fmt: skip
        pass


adamw = torch.ops.sdft.adamw_
