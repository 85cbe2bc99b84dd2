"""Which settings of a scoring go together, and what those that were not given are beside the others.

The config of each is a `config.ScoreConfig`, as far as it is read by then.
"""

from __future__ import annotations

from typing import Any

from alphatoken_curate.errors import UsageError

REHEARSED_ONLY = ("rehearse_lora", "rehearse_window", "rehearse_simpo")
"""Settings that are refused with another direction: values of another kind than was asked for would come of it."""


def defaults_beside(config: Any) -> dict[str, Any]:
    """What estimator, layers and parameters are where they were not given."""
    if not config.rehearses:
        return {"estimator": "published", "layers": 3, "parameters": "linear"}
    # Paths are those of linear maps.
    whole = config.estimator in (None, "influence") and config.rehearse_lora is None
    return {"estimator": "influence", "layers": "all", "parameters": "all" if whole else "linear"}


def check_together(config: Any) -> None:
    """Raise UsageError for settings that exclude each other, or of which one needs another."""
    if (config.drift == "lookahead") != (config.lookahead_lr is not None):
        raise UsageError("--drift lookahead and --lookahead-lr X go together: give both, or neither.")
    if config.fisher_prompts is not None and config.fisher != "generate":
        raise UsageError("--fisher-prompts is read with --fisher generate only.")
    if config.precondition_stability and config.precondition == "none":
        raise UsageError("--precondition-stability needs --precondition adam, kfac, ekfac or astra.")
    if config.trunk_device is not None:
        _check_trunk(config)
    if config.parameters == "all":
        _check_all_parameters(config)
    if config.rehearses != (config.rehearse_lr is not None):
        raise UsageError(
            "--direction rehearsal and --rehearse-lr X go together: give both, or neither. X is the learning rate of"
            " the training that is to come."
        )
    if config.rehearses:
        _check_rehearsal(config)
        return
    for name in REHEARSED_ONLY:
        if getattr(config, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} goes with --direction rehearsal and --rehearse-lr X: give them too.")


def _check_trunk(config: Any) -> None:
    asked = f"--trunk-device {config.trunk_device} with"
    if config.layers == "all":
        raise UsageError(
            f"{asked} --layers all: no block is left that could lie elsewhere. Give --layers K, or several cards:"
            " --device cuda:0,cuda:1."
        )
    if config.parameters == "all":
        raise UsageError(
            f"{asked} --parameters all: gradients of the embeddings go through every block, and all would be held."
            " Give --parameters linear, or several cards: --device cuda:0,cuda:1."
        )


def _check_all_parameters(config: Any) -> None:
    if config.estimator != "influence":
        raise UsageError(
            f"--parameters all with --estimator {config.estimator}: direct and causal paths are those of linear maps."
            " Give --estimator influence, or --parameters linear."
        )
    if config.dtype in ("bfloat16", "float16") and not config.rehearses:
        raise UsageError(
            f"--dtype {config.dtype} with --parameters all: what every weight adds to a tangent is lost in that"
            " dtype. Give --dtype float32; weights stored in another are read as they are."
        )
    if config.precondition != "none":
        raise UsageError(
            f"--precondition {config.precondition} with --parameters all: only linear maps have that curvature here."
            " Give --precondition none, or --parameters linear."
        )


def _check_rehearsal(config: Any) -> None:
    beside = "with --direction rehearsal"
    if "," in config.device:
        raise UsageError(f"--device {config.device} {beside}: a training is rehearsed on one device. Name one.")
    if config.estimator == "published":
        raise UsageError(
            f"--estimator published {beside}: its gradient is not the true one, which steps are taken along. Give"
            " influence, exact or exact+influence."
        )
    if config.precondition != "none":
        raise UsageError(
            f"--precondition {config.precondition} {beside}: the optimiser that is rehearsed scales each step itself."
            " Give --precondition none."
        )
    if config.drift == "lookahead":
        raise UsageError(f"--drift lookahead {beside}: the rehearsal drifts by its own steps. Leave --drift out.")
    if config.dtype == "float16":
        raise UsageError(
            f"--dtype {config.dtype} {beside}: its range is too small for second derivatives. Give --dtype float32, or"
            " bfloat16, in which products are taken then; weights are float32 in both."
        )
    if config.rehearse_lora is not None:
        _check_lora(config)


def _check_lora(config: Any) -> None:
    beside = f"with --rehearse-lora {config.rehearse_lora}"
    if config.parameters == "all":
        raise UsageError(
            f"--parameters all {beside}: a LoRA stands beside linear maps, and no weight of the model trains. Give"
            " --parameters linear, or leave --rehearse-lora out."
        )
    if config.trunk_device == "disk" and config.dtype == "bfloat16":
        raise UsageError(
            f"--trunk-device disk {beside} and --dtype bfloat16: blocks are read as their files have them, and only"
            " linear maps are rounded here. Give --trunk-device cpu."
        )
