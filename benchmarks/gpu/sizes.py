"""What is measured on a device: lengths in tokens, and how many sequences."""

import argparse
from dataclasses import dataclass

from benchmarks.measure import device_parser
from benchmarks.shapes import SHAPES


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens."""

    prompt: int  # of the student
    teacher_prompt: int
    completion: int  # of a sequence that is trained
    new_tokens: int  # sampled by an engine
    k: int
    sequences: int  # of a batch
    cache_gib: float  # of an engine


SIZES = {"cuda": Sizes(384, 576, 640, 512, 64, 32, 4), "cpu": Sizes(24, 40, 40, 12, 8, 4, 1)}


def shape_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with --device and --shape. doc: as of device_parser."""
    parser = device_parser(doc)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    return parser
