"""Every block of every page is run by a test, read by the program's own reader, or excused here."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_layerlr.fields import settings
from dist_layerlr.files import read_config
from dist_layerlr.plan import load_config
from dist_layerlr.plan.config import PLAN_BLOCK, Config, PerLayerLR
from dist_layerlr.plan.depth import DepthSettings
from dist_layerlr.plan.steer import Changes
from dist_layerlr.plan.training_config import TRAINER_KEYS, check_training_config
from launch.trainer.steering import Orders, read_orders
from tests.support.commands import check, flags_of
from tests.support.pages import PAGES, ROOT, Block, fenced, lines, read

RUN = ("python", "bash", "diff")
"""Languages whose blocks a test takes, and runs."""
READ = ("json", "yaml", "toml")
"""Languages whose blocks are read below, all of them."""
NOT_RUN = {
    ("README.md", "bash tests/run.sh"): "what CI runs, this test among it",
    ("CONTRIBUTING.md", "make lint"): "makes an environment; what CI runs",
    ("docs/launching.md", "torchrun --nnodes 2"): "needs two machines",
    ("docs/launching.md", "deepspeed --hostfile"): "needs two machines",
    ("docs/launching.md", "accelerate launch"): "needs two machines",
    ("docs/offload.md", "wan_lora_streamed.json\n"): "needs the published Wan 14B",
}
"""(page, piece of text): why the one block with it is not run. Its commands are still parsed."""
GENERATED = ("docs/cli.md",)
"""Pages whose commands are examples of parsers; each command is run in tests/unit/cli."""
MODULE = "tests.support.pages"
EVERY = [block for page in PAGES for block in fenced(page)]


def taken() -> Iterator[tuple[str, str, str]]:
    """(page, language, piece of text) of every call of ``block`` and ``blocks`` in the tests."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        tree = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
        imports = (n for n in tree if isinstance(n, ast.ImportFrom) and n.module == MODULE)
        names = {alias.name for node in imports for alias in node.names} & {"block", "blocks"}
        for node in tree:
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names:
                words = [word.value for word in node.args if isinstance(word, ast.Constant)]
                assert len(words) == len(node.args), f"{file}:{node.lineno}: not plain words"
                page, language, *holds = words
                yield page, language, "".join(holds)


def test_every_block_is_run_read_or_excused() -> None:
    calls = set(taken())
    for block in EVERY:
        ways = {
            (page, language, holds)
            for page, language, holds in calls
            if (page, language) == (block.page, block.language) and holds in block.text
        }
        excuses = [
            w for (p, piece), w in NOT_RUN.items() if p == block.page and piece in block.text
        ]
        if block.language in RUN and block.page not in GENERATED:
            assert ways or excuses, f"{block}: no test takes this block:\n{block.text}"
        else:
            assert block.language in (*RUN, *READ, "text"), f"{block}: {block.language!r}"


def test_no_excuse_and_no_call_is_about_a_block_that_is_gone() -> None:
    texts = [(b.page, b.language, b.text) for b in EVERY]
    for page, piece in NOT_RUN:
        assert sum(p == page and piece in text for p, _, text in texts) == 1, (page, piece)
    for page, language, holds in taken():
        assert any((p, n) == (page, language) and holds in t for p, n, t in texts), (page, holds)


@pytest.mark.parametrize("block", [b for b in EVERY if b.language == "text"], ids=str)
def test_what_is_shown_as_text_is_no_code(block: Block) -> None:
    first = block.text.lstrip().splitlines()[0]
    assert not re.match(
        r"(\$|dist-layerlr|python|torchrun|deepspeed|bash|pip|import|from)\b", first
    )
    with pytest.raises(ValueError):
        json.loads(block.text)


@pytest.mark.parametrize("block", [b for b in EVERY if b.language == "bash"], ids=str)
def test_every_command_is_taken_by_the_parser_of_its_program(block: Block) -> None:
    text = re.sub(r"<<'(\w+)'(.*?)\n.*?^\1$", r"\2", block.text, flags=re.MULTILINE | re.DOTALL)
    for line in lines(text):
        if line.startswith("dist-layerlr") and "..." in line:
            continue  # shortened; its flags are asked for below
        check(line)


INLINE = re.compile(r"(?<!`)`((?:dist-layerlr|python launch/\w+\.py|torchrun) [^`]+)`(?!`)")


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_name_commands_and_flags_that_are_there(page: str) -> None:
    wrong = {line: flags_of(line) for line in INLINE.findall(" ".join(read(page).split()))}
    assert {line: flags for line, flags in wrong.items() if flags} == {}


@pytest.mark.parametrize("block", [b for b in EVERY if b.language in READ], ids=str)
def test_every_config_is_taken_by_its_reader(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The file of a smaller model that a config may name.
    Path("small.tsv").write_text("blocks.0.attn1.to_q.weight\t4x4\n")
    file = Path(f"block.{block.language}")
    file.write_text(block.text)
    config = read_config(str(file))
    if config.keys() <= settings(Changes, Orders).keys():
        read_orders(config)
        return
    if config.keys() <= settings(PerLayerLR, DepthSettings).keys():
        config = {PLAN_BLOCK: {"enabled": True, **config}}
    known = {*settings(Config), *TRAINER_KEYS, PLAN_BLOCK}
    assert config.keys() <= known, f"{block}: {sorted(config.keys() - known)}"
    check_training_config(config)
    load_config(config)


def test_the_mechanism_sees_a_new_block_and_a_wrong_flag(tmp_path: Path) -> None:
    new = Block(page="docs/start.md", line=1, language="bash", text="dist-layerlr plan M --gird x")
    with pytest.raises(AssertionError, match="--gird|--config"):
        check(new.text)
    assert flags_of("dist-layerlr plan MODEL --gird full") == ["--gird"]
    assert flags_of("dist-layerlr plna MODEL") == ["plna"]
    with pytest.raises(AssertionError, match="no parser is known"):
        check("rm -r runs")
