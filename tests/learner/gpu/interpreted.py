"""Compare Triton's kernels with the plain formulas, on a CPU in Triton's interpreter or on a GPU.

TRITON_INTERPRET=1 python -m tests.learner.gpu.interpreted      prints the dtypes that agree
"""

import torch

from sdft.learner.gpu import adamw, operations
from sdft.learner.gpu.check import BOUND, cases, fault, step_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if __name__ == "__main__":
    for dtype in BOUND:
        for programs, elements in ((operations.PROGRAMS, operations.ELEMENTS), (3, 16)):
            # The second sizes are less than the tensors': a program adds up several rows, and a row takes several.
            operations.PROGRAMS, operations.ELEMENTS, adamw.ELEMENTS = programs, elements, elements
            for kind, of in ((dtype, cases), (torch.float32, step_cases)):
                why = fault(DEVICE, kind, "cuda", of)
                assert why is None, why
        operations.PROGRAMS, operations.ELEMENTS, adamw.ELEMENTS = 512, 4096, 4096
        print(str(dtype).removeprefix("torch."))
