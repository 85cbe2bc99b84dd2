"""Chat templates of a small grammar, and chats for them."""

from __future__ import annotations

from typing import Any

from chats import answer, user
from hypothesis import strategies as st
from kinds import call, result

PARTS = {
    "header": ["<|im_start|>{r}\n", "[{r}] ", "<|im_start|>{r}<|sep|>\n\n", "{r}: ", "<|{r}|>"],
    "name": ["", "name={n} "],
    "close": ["<|im_end|>\n", "<|im_end|>", "<|im_end|><|stop|>\n", "\n", ""],
    "write": [
        "m.content",
        "m.content | trim",
        "' ' + m.content",
        "'<q>' + m.content + '</q>'",
        "m.content.strip('\\n')",
    ],
    "last": ["", "<|stop|>", "<|im_end|>"],
    "thought": ["", "always", "after the last question", "in the last answer"],
    "opened": ["", "<think>\n"],
    "calls": ["<call>{name}({arguments})</call>", "<call>{arguments} of {name}</call>\n", ""],
    "generation": ["", "marked"],
    "prompt": ["asked for", "always"],
}
"""What each part of a template may be, the most usual first."""

_THOUGHT = "{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}"
_WHERE = {
    "always": "m.reasoning_content",
    "after the last question": "m.reasoning_content and loop.index0 > ns.asked",
    "in the last answer": "m.reasoning_content and loop.last",
}


def template_of(parts: dict[str, str]) -> str:
    """Written of such parts."""

    def literal(text: str) -> str:
        return "{{ '" + text.replace("\n", "\\n") + "' }}" if text else ""

    name = (
        "{% if m.name and m.role != 'tool' %}" + literal(parts["name"]).replace("{n}", "' + m.name + '") + "{% endif %}"
    )
    header = literal(parts["header"]).replace("{r}", "' + m.role + '") + (name if parts["name"] else "")
    thought = f"{{% if {_WHERE[parts['thought']]} %}}{_THOUGHT}{{% endif %}}" if parts["thought"] else ""
    written = literal(parts["calls"]).replace("{name}", "' + c.function.name + '")
    written = written.replace("{arguments}", "' + (c.function.arguments | tojson) + '")
    calls = "{% for c in m.tool_calls or [] %}" + written + "{% endfor %}" if written else ""
    said = thought + "{{ " + parts["write"] + " }}" + calls
    last = literal(parts["last"]) or literal(parts["close"])
    closing = "{% if loop.last %}" + last + "{% else %}" + literal(parts["close"]) + "{% endif %}"
    begin, end = ("{% generation %}", "{% endgeneration %}") if parts["generation"] else ("", "")
    prompt = literal(parts["header"]).replace("{r}", "assistant") + literal(parts["opened"] if parts["thought"] else "")
    return (
        "{% set ns = namespace(asked=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}"
        + header
        + "{% if m.role == 'assistant' %}"
        + begin
        + said
        + closing
        + end
        + "{% else %}"
        "{{ m.content }}"
        + literal(parts["close"])
        + "{% endif %}{% endfor %}"
        + (prompt if parts["prompt"] == "always" else "{% if add_generation_prompt %}" + prompt + "{% endif %}")
    )


_TEXT = st.text(alphabet="ab <|>\n[]/A1", min_size=1, max_size=6).filter(str.strip)
_ANYONE, _BOB = st.sampled_from([{}, {}, {"name": "eve"}]), st.sampled_from([{}, {}, {"name": "bob"}])


@st.composite
def _turn(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A question, calls with their results, and an answer or two."""
    chat = [user(f"Q{draw(_TEXT)}Q") | draw(_ANYONE)]
    for _ in range(draw(st.integers(0, 2))):
        made = [call({"city": draw(_TEXT)}) for _ in range(draw(st.integers(1, 2)))]
        words = draw(st.sampled_from(["", "", "Zwell Z"]))
        chat += [answer(words) | {"tool_calls": made}, *(result(f"R{draw(_TEXT)}R") for _ in made)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        said = answer(f"Z{draw(_TEXT)}Z") | draw(_BOB)
        chat.append(said | draw(st.sampled_from([{}, {"reasoning_content": f"T{draw(_TEXT)}T"}])))
    return chat


@st.composite
def _chat(draw: st.DrawFn) -> list[dict[str, Any]]:
    front = draw(st.sampled_from([[], [{"role": "system", "content": "Sbe kindS"}], [answer("Zhello Z")]]))
    turns = [message for _ in range(draw(st.integers(1, 3))) for message in draw(_turn())]
    return [*front, *turns, *draw(st.sampled_from([[], [user("Qand?Q")]]))]


CHATS = _chat()
"""Chats in which the text of each kind of message stands between letters of its own."""
