"""What a model folder says about generation: the tokens that end a reply, and defaults of sampling.

The ends are used. The defaults are not: a rollout is sampled from the model's own distribution, with the temperature
and top-p of the configuration, because the learner computes the log-probs of that distribution.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft.services.base.errors import UserError, first_line
from sdft.services.base.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULTS = "generation_config.json"
EOS_FILES = (DEFAULTS, "config.json")
# Settings with which transformers changes greedy decoding too, and the value that changes nothing.
PENALTIES: dict[str, float] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
}
# All settings that change which token is drawn, and the values that change nothing. top_k -1 is vLLM's word for 0.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    **{name: (neutral,) for name, neutral in PENALTIES.items()},
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}


def end_ids(folder: Path, *names: str) -> dict[int, Path]:
    """Return the tokens that files of a model folder name as ends of a reply, each with the file that names it.

    names: of the files; none: all EOS_FILES. A missing file names no token.

    UserError if a file is no JSON object, or eos_token_id neither a token id nor a list of them.
    """
    found: dict[int, Path] = {}
    for path in (folder / name for name in names or EOS_FILES):
        named = _read(path).get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(
                f"{path}: eos_token_id must be a token id or a list of token ids, not {json.dumps(named)[:60]}; "
                f"correct it, or download the model again"
            )
        for i in ids:
            found.setdefault(i, path)
    return found


def known_ends(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the tokenizer's eos_token and the tokens of `end_ids`, each once."""
    of_tokenizer = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys([*of_tokenizer, *end_ids(Path(tokenizer.name_or_path))]))


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return the settings of generation_config.json that would change which tokens are sampled, with their values."""
    given = _read(folder / DEFAULTS)
    return {
        name: given[name]
        for name, neutral in _NEUTRAL.items()
        if given.get(name) is not None and given[name] not in neutral
    }


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON object ({first_line(error)}); download the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download the model again")
    return content
