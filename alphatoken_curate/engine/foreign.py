"""Adapters for attention modules of transformers that do not use its attention interface.

In the scoring blocks alone, the piece of each such module between its queries, keys and values and the mixed values is
replaced by our attention function; everything else runs as the module has it. Whether logits stay is judged by who
installs this.
Shapes: B rows, H query heads, K key/value heads, Q queries, T keys, D head size; masks (B or 1, 1 or H, Q, T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alphatoken_curate.engine.attention import Tape, attention_forward, listen


def install(blocks: list[nn.Module], tape: Tape) -> Callable[[], None]:
    """Give the known foreign attention modules in `blocks` our function, and the tape it writes to.

    Returns what undoes it.
    """
    changed: list[tuple[nn.Module, str]] = []
    for module in (m for block in blocks for m in block.modules()):
        adapter = _ADAPTERS.get(type(module).__name__)
        if adapter is None or not type(module).__module__.startswith("transformers.models."):
            continue
        method, make = adapter
        replacement = make(module)
        if replacement is not None:
            listen(module, tape)
            setattr(module, method, replacement)
            changed.append((module, method))

    def undo() -> None:
        for module, method in changed:
            delattr(module, method)

    return undo


_Make = Callable[[Any], Callable[..., Any] | None]


def _between(scaling: Callable[[Any], float], seen: Callable[[Any, Tensor, Tensor, Any], Any] | None = None) -> _Make:
    """For modules with a method (query, key, value, mask) -> (mixed (B, H, Q, D), probabilities)."""

    def make(module: Any) -> Callable[..., Any]:
        def mix(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
            mask = attention_mask if seen is None else seen(module, query, key, attention_mask)
            out, _ = attention_forward(module, query, key, value, mask, scaling=scaling(module))
            return out.transpose(1, 2), None

        return mix

    return make


def _within_window(module: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """GPT-Neo keeps its causal mask, with the window of its local blocks, in a buffer."""
    queries, keys = query.shape[-2], key.shape[-2]
    seen: Tensor = module.bias[:, :, keys - queries : keys, :keys]
    return seen if mask is None else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _bloom(module: Any) -> Callable[..., Any] | None:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return None  # it multiplies with slices of its weights, which are not captured

    def forward(
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        bias = alibi.unflatten(0, (-1, module.num_heads)).expand(-1, -1, query.shape[2], -1)
        mask = bias if attention_mask is None else bias + attention_mask
        out, _ = attention_forward(module, query, key, value, mask, scaling=module.inv_norm_factor)
        return residual + module.dense(out.flatten(2)), None

    return forward


def _falcon(module: Any) -> Callable[..., Any]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    fused = module.config._attn_implementation == "sdpa"

    def forward(
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = _falcon_heads(module, module.query_key_value(hidden_states))
        if alibi is None and position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        mask = attention_mask
        if alibi is not None and not fused:
            # Without SDPA the module adds what the mask has of it already once more.
            mask = attention_mask + alibi.view(len(query), module.num_heads, 1, -1) * module.inv_norm_factor
        out, _ = attention_forward(module, query, key, value, mask, scaling=module.inv_norm_factor)
        return module.dense(out.flatten(2)), None

    return forward


def _falcon_heads(module: Any, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, T, D), key and value (B, K, T, D): the module's own split, but shared heads stay one."""
    if not module.new_decoder_architecture:
        query, key, value = (x.transpose(1, 2) for x in module._split_heads(mixed))
        return query, key, value
    grouped = mixed.unflatten(-1, (module.num_kv_heads, -1, module.head_dim))
    query, key, value = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]
    return query.flatten(2, 3).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


_ADAPTERS: dict[str, tuple[str, _Make]] = {
    "GPTJAttention": ("_attn", _between(lambda m: 1 / m.scale_attn)),
    "CodeGenAttention": ("_attn", _between(lambda m: 1 / m.scale_attn)),
    "GPTNeoXJapaneseAttention": ("_attn", _between(lambda m: 1 / m.norm_factor)),
    "GPTNeoSelfAttention": ("_attn", _between(lambda m: 1.0, _within_window)),
    "BloomAttention": ("forward", _bloom),
    "FalconAttention": ("forward", _falcon),
}
"""By name of the module: the method that is replaced, and what makes the replacement (None where it cannot)."""
