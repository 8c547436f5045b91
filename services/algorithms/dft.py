"""DFT: SFT with each token weighted by the student's own probability of it (Wu et al. 2025, arXiv 2508.05629)."""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.learner.config import Dft as DftLoss
from sdft.learner.config import Nll
from sdft.services.algorithms.sft import OnDemonstrations


class Dft(OnDemonstrations):
    """Dynamic fine-tuning on the demonstrations' tokens. No gradient flows through the weights."""

    divergence: ClassVar[Nll | DftLoss] = DftLoss()
    figure: ClassVar[str] = (
        "The {name} of the demonstrations' tokens; the loss weighs each by the student's probability of it."
    )

    type: Literal["dft"] = Field("dft", description="The algorithm")
