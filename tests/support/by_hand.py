"""What each answer of a chat is, to its stop, in the words of eleven families: written from how each writes a turn.

None of it renders a template. An answer begins behind what its header and the generation prompt have in common.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Chat = list[dict[str, Any]]


def _text(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")


def _calls(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [
        (one["name"], json.loads(one["arguments"]) if isinstance(one["arguments"], str) else one["arguments"])
        for one in functions
    ]


def _last_user(chat: Chat, without: int = -1) -> int:
    return max((i for i, message in enumerate(chat) if message["role"] == "user"), default=without)


def _answers(chat: Chat) -> list[tuple[int, dict[str, Any]]]:
    return [(i, message) for i, message in enumerate(chat) if message["role"] == "assistant"]


def _thought_and_text(message: dict[str, Any], text: str) -> tuple[str, str]:
    """As Qwen and GLM part them: the key, or else what stands between the tags."""
    if isinstance(message.get("reasoning_content"), str):
        return message["reasoning_content"], text
    _, end, after = text.rpartition("</think>")
    if not end:
        return "", text
    first = text.split("</think>", maxsplit=1)[0].rstrip("\n")
    return first.rpartition("<think>")[2].lstrip("\n"), after.lstrip("\n")


def _json_calls(message: dict[str, Any], text: str) -> str:
    made = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(given, ensure_ascii=False)}}}\n</tool_call>'
        for name, given in _calls(message)
    ]
    return "\n".join([text, *made] if text else made)


def qwen2_5(chat: Chat) -> list[str]:
    return [_json_calls(message, _text(message)) + "<|im_end|>" for _, message in _answers(chat)]


def qwen3(chat: Chat) -> list[str]:
    found = []
    for i, message in _answers(chat):
        thought, text = _thought_and_text(message, _text(message))
        front = ""
        if i > _last_user(chat, without=len(chat)) and (thought or i == len(chat) - 1):
            front, text = "<think>\n" + thought.strip("\n") + "\n</think>\n\n", text.lstrip("\n")
        found.append(front + _json_calls(message, text) + "<|im_end|>")
    return found


def qwen3_5_think(chat: Chat) -> list[str]:
    """The generation prompt opens the thought; history has none."""
    found = []
    for i, message in _answers(chat):
        thought, text = _thought_and_text(message, _text(message).strip())
        front = thought.strip() + "\n</think>\n\n" if i > _last_user(chat) else ""
        calls = []
        for name, given in _calls(message):
            values = (
                (k, v if isinstance(v, str) else json.dumps(v) if isinstance(v, dict | list) else str(v))
                for k, v in given.items()
            )
            inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
            calls.append(f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>")
        found.append(front + text + ("\n\n" if text and calls else "") + "\n".join(calls) + "<|im_end|>")
    return found


def llama3_1(chat: Chat) -> list[str]:
    found = []
    for _, message in _answers(chat):
        calls = [f'{{"name": "{name}", "parameters": {json.dumps(given)}}}' for name, given in _calls(message)]
        found.append("".join(calls or [_text(message).strip()]) + "<|eot_id|>")
    return found


def gemma3(chat: Chat) -> list[str]:
    return [_text(message).strip() + "<end_of_turn>" for _, message in _answers(chat)]


def gptoss(chat: Chat) -> list[str]:
    """Channels belong to the answer. The last has its thought, and another token for the end."""
    found = []
    for i, message in _answers(chat):
        is_last = i == len(chat) - 1
        later = any(other["role"] == "assistant" and "tool_calls" not in other for other in chat[i + 1 :])
        if calls := _calls(message):
            (name, given), *_ = calls
            thought = _text(message) or message.get("thinking") or ""
            said = f" to=functions.{name}<|channel|>commentary json<|message|>{json.dumps(given)}<|call|>"
        else:
            thought = message.get("thinking", "") if is_last else ""
            said = f"<|channel|>final<|message|>{_text(message)}{'<|return|>' if is_last else '<|end|>'}"
        has_thought = "thinking" in message and is_last if not calls else bool(thought) and not later
        front = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if has_thought else ""
        found.append(front + said)
    return found


def cohere2(chat: Chat) -> list[str]:
    return [_text(message) + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for _, message in _answers(chat)]


def deepseek_r1_distill(chat: Chat) -> list[str]:
    """Thoughts are left out everywhere."""
    return [_text(message).rpartition("</think>")[2] + "<｜end▁of▁sentence｜>" for _, message in _answers(chat)]


def glm4moe(chat: Chat) -> list[str]:
    """No turn is closed: the token that opens the user's, or a tool's, is the stop."""
    found = []
    for i, message in _answers(chat):
        thought, text = _thought_and_text(message, _text(message))
        made = f"\n<think>{thought.strip() if i > _last_user(chat) else ''}</think>"
        made += "\n" + text.strip() if text.strip() else ""
        for name, given in _calls(message):
            values = ((k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in given.items())
            inner = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values)
            made += f"\n<tool_call>{name}\n{inner}</tool_call>"
        after = chat[i + 1]["role"] if i + 1 < len(chat) else ""
        found.append(made + {"user": "<|user|>", "tool": "<|observation|>"}.get(after, ""))
    return found


def phi3(chat: Chat) -> list[str]:
    return [_text(message) + "<|end|>" for _, message in _answers(chat)]


def idefics3(chat: Chat) -> list[str]:
    """The space behind `Assistant:` is the model's own."""
    return [" " + _text(message) + "<end_of_utterance>" for _, message in _answers(chat)]


BY_HAND: dict[str, Callable[[Chat], list[str]]] = {
    made.__name__: made
    for made in (
        *(qwen2_5, qwen3, qwen3_5_think, llama3_1, gemma3, gptoss),
        *(cohere2, deepseek_r1_distill, glm4moe, phi3, idefics3),
    )
}
"""By the names of TRL's templates: the text of each answer of a chat that must respond."""
