"""Whether a model can be compared with another one, as far as their config.json tells: no weights are read."""

from __future__ import annotations

from alphatoken_curate.errors import ModelError
from alphatoken_curate.models.load import ModelSource, text_config

_SHAPE = {
    "model_type": "is a {} model",
    "num_hidden_layers": "has {} decoder blocks",
    "n_layer": "has {} decoder blocks",
    "hidden_size": "has a hidden size of {}",
    "n_embd": "has a hidden size of {}",
    "intermediate_size": "has an intermediate size of {}",
    "num_attention_heads": "has {} attention heads",
    "num_key_value_heads": "has {} key-value heads",
    "head_dim": "has heads of size {}",
}


def check_alike(model: ModelSource, reference: ModelSource) -> None:
    """Raise ModelError where a model cannot have been tuned from a reference: another architecture, size or depth.

    More tokens than the reference knows may have been added; fewer may not be known. GGUF files have no config.json:
    their models are compared once they are loaded.
    """
    if model.gguf or reference.gguf or model.folder == reference.folder:
        return
    mine, theirs = text_config(model), text_config(reference)
    for key, says in _SHAPE.items():
        if key in mine and key in theirs and mine[key] != theirs[key]:
            raise _unlike(model, reference, _said(says, mine[key]), _said(says, theirs[key]))
    known, wanted = mine.get("vocab_size"), theirs.get("vocab_size")
    if isinstance(known, int) and isinstance(wanted, int) and known < wanted:
        raise _unlike(model, reference, f"knows {known} tokens", f"knows {wanted}")


def _said(says: str, number: object) -> str:
    """`has 1 key-value head`, `has 2 key-value heads`."""
    said = says.format(number)
    return said.removesuffix("s") if number == 1 else said


def _unlike(model: ModelSource, reference: ModelSource, mine: str, theirs: str) -> ModelError:
    return ModelError(
        f"{model.name} {mine}, and the reference {reference.name} {theirs}: the one was not tuned from the other."
    )
