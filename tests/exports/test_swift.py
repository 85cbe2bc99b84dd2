"""ms-swift: JSON lines of token ids with a scale for each, and the flags they need."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path

import pytest
from exported import HALF, SOFT, read, truth
from small_run import small_run

from alphatoken_curate import UsageError, export


def lines(folder: Path) -> list[dict[str, list[dict[str, dict[str, list[float]]]]]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_a_row_is_one_assistant_message_of_tokens(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=SOFT)
    export(run, trainer="ms-swift", output=tmp_path / "out")
    for row in lines(tmp_path / "out"):
        assert row.keys() == {"messages"}
        (message,) = row["messages"]
        assert message["role"] == "assistant" and message.keys() == {"role", "content"}
        content = message["content"]
        assert content.keys() == {"token_ids", "loss_scale"} and content["loss_scale"][0] == 0
        assert len(content["token_ids"]) == len(content["loss_scale"]) and min(content["loss_scale"]) >= 0


def test_pairs_are_masks_of_0_and_1(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", kind="preference", config=HALF)
    export(run, trainer="ms-swift", output=tmp_path / "out")
    assert all(row.keys() == {"messages", "rejected_messages"} for row in lines(tmp_path / "out"))
    soft = small_run(tmp_path / "soft", kind="preference", config=SOFT)
    with pytest.raises(UsageError, match="takes every other weight for 1"):
        export(soft, trainer="ms-swift", output=tmp_path / "refused")
    export(soft, trainer="ms-swift", output=tmp_path / "binary", binarize=True)
    assert read("ms-swift", tmp_path / "binary") == truth(soft, binarize=True)


@pytest.mark.parametrize(("kind", "command"), [("sft", ["swift", "sft"]), ("preference", ["swift", "rlhf"])])
def test_the_command_of_the_readme_has_the_flags(tmp_path: Path, kind: str, command: list[str]) -> None:
    place = tmp_path / "with a space"
    export(small_run(tmp_path / "run", kind=kind), trainer="ms-swift", output=place)
    found = shlex.split((place / "README.md").read_text().split("```sh\n")[1].split("```")[0].replace("\\\n", " "))
    assert found[:2] == command
    assert found[found.index("--dataset") + 1] == str(place / "train.jsonl")
    assert found[found.index("--is_binary_loss_scale") + 1] == "false"
    assert found[found.index("--external_plugins") + 1] == str(place / "swift_template.py")
    assert found[found.index("--template") + 1] == "tokens"
    assert ("--rlhf_type" in found) == (kind == "preference")


def test_the_template_adds_no_token_of_its_own(tmp_path: Path) -> None:
    export(small_run(tmp_path / "run"), trainer="ms-swift", output=tmp_path / "out")
    tree = ast.parse((tmp_path / "out" / "swift_template.py").read_text())
    (made,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "TemplateMeta")
    assert [ast.literal_eval(argument) for argument in made.args] == ["tokens"]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in made.keywords}
    assert given == {"prefix": [], "prompt": ["{{QUERY}}"], "chat_sep": None, "suffix": []}
