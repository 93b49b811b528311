"""Every document: its code runs, its commands parse, its options and links are there."""

import ast
import importlib.util
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import torch

import groktrace
from groktrace.cli import main
from groktrace.recording.recorder import open_recorders

ROOT = Path(groktrace.__file__).parent.parent
DOCUMENTS = [ROOT / "README.md"]
DOCUMENTS += sorted(path for part in ("groktrace", "examples", "tools") for path in (ROOT / part).rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Of a cluster that is not here.
ONLY_COMPILED = {"dask_jobqueue"}
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks_of(path, language):
    """Line number and text of each block of code."""
    text = path.read_text()
    for match in FENCE.finditer(text):
        assert match[1] in ("python", "console"), f"{path}: a block of code in {match[1]!r}"
        if match[1] == language:
            yield text[: match.start()].count("\n") + 1, match[2]


def commands_of(path):
    """The commands of a document's console blocks, as lists of words."""
    for _, block in blocks_of(path, "console"):
        for line in block.splitlines():
            assert line.startswith("$ "), f"{path}: {line}"
            words = shlex.split(line[2:], comments=True)
            yield words[: words.index(">")] if ">" in words else words


def prose_of(path):
    return FENCE.sub("", path.read_text())


def imported(block):
    """Top-level packages that a block imports."""
    for node in ast.walk(ast.parse(block)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.partition(".")[0] for name in names)


def parse(command, words):
    """Have click parse a command line without running it."""
    if isinstance(command, click.Group):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        return parse(command.commands[words[0]], words[1:])
    return command.make_context(command.name, list(words))


@pytest.fixture
def names(recorded, tmp_path, monkeypatch):
    """The names that the documents take for granted, and a recorded run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, "snapshots")
    torch.manual_seed(0)
    x, xv = torch.randn(60, 4), torch.randn(20, 4)
    truth = torch.randn(4, 3)
    model = torch.nn.Linear(4, 3)
    yield {
        "__name__": "__main__",
        "groktrace": groktrace,
        "torch": torch,
        "math": math,
        "json": json,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": torch.nn.MSELoss(),
        "network": torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)),
        "AveragedModel": torch.optim.swa_utils.AveragedModel,
        **{"x": x, "y": x @ truth + 0.1 * torch.randn(60, 3), "xv": xv, "yv": xv @ truth},
    }
    for recorder in list(open_recorders):
        recorder.close()


@each_document
def test_python_runs(path, names):
    if path == ROOT / "README.md":  # records the run itself
        shutil.rmtree("snapshots")
    for line, block in blocks_of(path, "python"):
        code = compile("\n" * line + block, str(path), "exec")
        needed = set(imported(block)) - {"groktrace"}
        if needed & ONLY_COMPILED:
            continue
        if all(importlib.util.find_spec(name) for name in needed):  # extras may be missing
            exec(code, names)


@each_document
def test_commands_parse(path):
    for words in commands_of(path):
        match words:
            case ["groktrace", *rest]:
                parse(main, rest)
            case ["python", "-m", module, *rest]:
                assert importlib.util.find_spec(module), module
                folder = ROOT.joinpath(*module.split("."))
                files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
                text = "".join(file.read_text() for file in files)
                known = [word for word in rest if "/" not in word and not word.isdigit() and word != "all"]
                assert [word for word in known if word not in text] == [], module
            case ["python", script, *_]:
                assert (ROOT / script).exists(), script
            case ["pip", "install", "-e", extra]:
                assert f"\n{extra[2:-1]} = [" in (ROOT / "pyproject.toml").read_text()
            case _:
                assert words[0] == "tensorboard", words


@each_document
def test_named_commands_and_options_exist(path):
    sources = [file for part in ("groktrace", "tools", "examples") for file in (ROOT / part).rglob("*.py")]
    text = "".join(file.read_text() for file in sources)
    for code in re.findall(r"`([^`\n]+)`", prose_of(path)):
        if code.startswith("groktrace "):
            _, name, *rest = code.split()
            options = {option for parameter in main.commands[name].params for option in parameter.opts}
            assert [word for word in rest if word.startswith("-") and word not in options] == [], code
        if code.startswith("python -m "):
            assert importlib.util.find_spec(code.split()[2]), code
        if not code.startswith(("uv ", "pip ")):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
                assert f'"{option}"' in text or option in ("--help", "--logdir"), code


def anchors_of(path):
    """The headings of a document, as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        assert not anchor or anchor in anchors_of(there), target


def texts_of(tree):
    """All strings of a module, with an ellipsis for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_messages_that_are_explained_are_given():
    texts = [text for file in (ROOT / "groktrace").rglob("*.py") for text in texts_of(ast.parse(file.read_text()))]
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "groktrace" / "README.md").read_text(), flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r'"([^"]+)"', row)]
    assert len(messages) > 50
    pieces = [piece.strip() for message in messages for piece in message.replace("'…'", "…").split("…")]
    missing = [piece for piece in pieces if not any(piece in text for text in texts)]
    assert not missing, missing


def test_the_readme_shows_what_there_is():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for path in DOCUMENTS[1:]:
        assert f"({path.relative_to(ROOT)}" in text, f"README.md does not lead to {path}"


@pytest.mark.parametrize(
    ("document", "anchor"),
    [
        ("README.md", "your-own-sampler"),
        ("groktrace/README.md", "my-llc-is-negative"),
        ("groktrace/reporting/README.md", "in-pandas"),
    ],
)
def test_questions_that_strangers_ask_have_a_heading(document, anchor):
    assert anchor in anchors_of(ROOT / document)
