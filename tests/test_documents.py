"""What README.md and Figures/*.md say: each command can be parsed, the quick ones run, links lead somewhere."""

import argparse
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, SMALL, do, draw, sampler

import train

PAGES = [ROOT / "README.md", *sorted((ROOT / "Figures").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^```\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAM = re.compile(r"^(\w+=\S+ )*(timeout .*?m )?(bash|\S*time -v bash|\S*python) ((train|test)\.sh|tests/\w+\.py)")


def commands(text):
    """The commands of this program in the code blocks and in single `words`, as lists of words."""
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`((?:NPROC=2 )?bash t[^`]*)`", text)
    words = (shlex.split(line.lstrip("!").removeprefix("/usr/bin/time -v "), comments=True) for line in lines
             if PROGRAM.match(line.lstrip("!")))  # fmt: skip
    for line in words:
        start = next(i for i, word in enumerate(line) if word.endswith((".sh", ".py")))
        yield line[start].replace("train.py", "train.sh"), line[start + 1 :]


FOUND = sorted({(page.name, program, *words) for page, text in TEXTS.items() for program, words in commands(text)})


def parse(program, words, monkeypatch):
    """Parses the words as the program would. Raises UserError or SystemExit where it would refuse them."""
    if program in ("train.sh", "test.sh"):
        parser = (train if program == "train.sh" else sampler).command_line()
        parser.parse_args(words)
        return

    def parse_args(parser, *_):
        monkeypatch.undo()
        parser.parse_args(words)
        raise KeyboardInterrupt

    module = importlib.import_module(Path(program).stem)
    if needed := inspect.signature(module.main).parameters:  # those of one word alone have no parser
        assert len(words) == len(needed)
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(KeyboardInterrupt):
        module.main()


assert len(FOUND) > 30


@pytest.mark.parametrize("page, program, words", [(page, program, words) for page, program, *words in FOUND])
def test_each_command_of_the_documents_can_be_parsed(page, program, words, monkeypatch):
    if program == "train.sh" and (not words or words == ["--help"]):  # the demo
        return
    letters = {"TYPE": "3", "OPTIONS": "--seed=0", "Ctrl-C": ""}
    parse(program, [letters.get(word, word) for word in words if not word.startswith(("&", "|"))], monkeypatch)


def test_the_commands_of_readme_run_and_so_does_its_python(faces, monkeypatch):
    blocks = "".join(BLOCK.findall(TEXTS[PAGES[0]]))
    for line in ("bash train.sh ImageFolder 1", "bash train.sh ImageFolder 2", "bash test.sh Net_G.param"):
        assert re.search(rf"^{line}\b", blocks, re.MULTILINE)
    Path("ImageFolder").symlink_to(faces)
    train.train(faces, 3, width=4, latent_dim=8, batch_size=8, epochs=1)  # Net_G.param
    for program, words in commands(TEXTS[PAGES[0]]):
        if program == "train.sh" and words[:1] == ["ImageFolder"]:
            out = f"run_{words[1]}{len(words)}"
            assert do(*words, *SMALL, "--epochs", 1, "--out", out, "--save_as", "x.param") == 0
        elif program == "test.sh" and words[0] == "Net_G.param":
            assert draw(*words) == (2 if "--best" in words else 0), words  # which needs the judge: test_judge.py
    assert len([*Path("drawn").iterdir()]) == 1000 and Path("walk.webp").exists() and Path("nearest.png").exists()
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXTS[PAGES[0]], re.DOTALL | re.MULTILINE)
    monkeypatch.setitem(sys.modules, "test", sampler)
    monkeypatch.setattr(train, "RECIPES", {3: train.replace(train.RECIPES[3], width=4, latent_dim=8, batch_size=8)})
    exec(block, {})
    assert Path("mine.png").exists()


def test_the_defaults_in_readme_are_those_of_the_program():
    text, parser = TEXTS[PAGES[0]], train.command_line()
    known = {action.option_strings[0]: action for action in parser._actions if action.option_strings}
    rows = re.findall(r"^`(--\w+) [^`]*` \|(.*)$", text, re.MULTILINE)
    assert len(rows) >= 6
    for option, words in rows:
        assert option in known
        for default in re.findall(r"\(default: ([^)]*)\)", words):
            assert f"(default: {default})" in known[option].help
    assert f"`--ema {train.RECIPES[3].ema}`" in text


def test_readme_says_why_there_is_no_intel_mac():
    ended, needed = re.search(r"Intel Macs:.*ended there at ([\d.]+),.*needs ([\d.]+\d)", TEXTS[PAGES[0]]).groups()
    assert ended == "2.2" and f"torch>={needed}\n" in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("script", ["train.sh", "test.sh"])
def test_help_arrives_in_a_pipe(script):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    found = subprocess.run(["bash", ROOT / script, "--help"], env=environment, capture_output=True, timeout=60)
    assert found.returncode == 0 and found.stdout.count(b"\n") > 20 and not found.stderr


def anchors(text):
    """GitHub's anchors of the headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_the_documents_are_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
