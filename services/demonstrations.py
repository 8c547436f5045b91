"""Demonstrations and questions from files or the hub: every row is checked before any is used."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from services.config import DataConfig, EvaluationSet, resolve_path
from services.errors import UserError
from services.files import existing_file, is_data_file, is_hub_name, near_names
from services.graders import GRADERS
from services.rows import BadRow, Row, hub_rows, jsonl_rows, parquet_rows
