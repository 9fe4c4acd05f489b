"""The README keeps to what is there: links, files to copy, commands and their flags, and figures
that the study printed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report
import study
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("experiments/*.md")),
]


def rows_under(text, head):
    """The cells of the rows of the table whose head line begins with `head`."""
    lines = iter(text[text.index(head) :].splitlines()[2:])
    found = []
    for line in lines:
        if not line.startswith("|"):
            return found
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_links_lead_somewhere():
    seen = 0
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert not [
            link for link in links if "://" not in link and not (page.parent / link).exists()
        ], page
        seen += len(links)
    assert seen > 30


@pytest.mark.parametrize(
    "row", rows_under(README, "| file | of this project |")[:-1], ids=lambda row: row[0].split()[0]
)
def test_files_can_be_copied_out(row, tmp_path):
    """Each file with what the README says it needs, in an empty folder, and no other package
    than those named.
    """
    ours = [row[0].split()[0], *re.findall(r"[\w/]+\.py", row[1])]
    needs = set(re.findall(r"\w+", row[2]))
    for name in ours:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    installed = {
        "av",
        "matplotlib",
        "numpy",
        "open_clip",
        "PIL",
        "pytest",
        "safetensors",
        "torch",
        "torchvision",
        "tqdm",
        "transformers",
    }
    # torch and torchvision bring these along
    blocked = installed - needs - ({"numpy", "PIL"} if "torch" in needs else set())
    code = f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked)}))\nimport {ours[0].removesuffix('.py').replace('/', '.')} as copied\nprint(copied.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / ours[0]), done.stderr


def commands(text):
    """The commands of ours in a page, as lists of words: in blocks, and in `code` that begins
    with python or torchrun.
    """
    blocks = (
        "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    )
    for line in [*blocks, *re.findall(r"`((?:python|torchrun) [^`]+)`", text.replace("\n", " "))]:
        for command in line.split("#")[0].split("&&"):
            if re.match(r"\s*(python|torchrun) .*(\.py|-m tgm\.)", command):
                yield shlex.split(re.sub(r"-m tgm\.(\w+)", r"tgm/\1.py", command))


def test_commands_name_scripts_and_flags_that_exist():
    seen = 0
    for words in (words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))):
        script = next(word for word in words if word.endswith(".py"))
        source = (ROOT / script).read_text() + "".join(
            (ROOT / name).read_text()
            for name in ("data/lists.py", "tgm/flags.py", "tgm/preview.py")
        )
        for flag in (
            word.split("=")[0]
            for word in words[words.index(script) :]
            if word.startswith("--") and word != "--help"
        ):
            assert f'"{flag}"' in source or f'"{flag.replace("--no-", "--")}"' in source, (
                script,
                flag,
            )
            seen += 1
    assert seen > 50


def test_the_studys_figures_are_those_of_its_runs():
    """The tables of RESULTS.md follow from runs.csv, and the differences in its text and in the README
    stand in these tables."""
    page = (ROOT / "experiments/RESULTS.md").read_text(encoding="utf-8")
    runs = study.read_runs()
    tables = report.text_of(runs, study.plan(), study.questions(), study.afterwards())
    before, rest = page.split(report.START)
    between, after = rest.split(report.END)
    assert between == f"\n{tables}"
    with_interval = r"[+-]?\d\.\d{3} ± \d\.\d{3}"
    figures = re.findall(with_interval, before + after + README)
    assert not [figure for figure in figures if figure not in tables]
    figures = re.findall(with_interval, README)
    assert len(figures) > 10


def excerpts():
    """(file, code) of each excerpt of the walkthrough: a block of Python under the file's name."""
    page = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    return re.findall(
        r"From \[([\w./]+)\]\(\.\./[\w./]+\):\n\n```python\n(.*?)```", page, re.DOTALL
    )


@pytest.mark.parametrize("name, code", excerpts())
def test_excerpts_of_the_walkthrough_stand_in_their_files(name, code):
    assert code in (ROOT / name).read_text(encoding="utf-8")


def test_pictures_of_the_walkthrough():
    page = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    assert len(excerpts()) == page.count("```python") > 8
    shown = re.findall(r"!\[[^\]]+\]\((walkthrough/\w+\.png)\)", page)
    drawn = (ROOT / "experiments/walkthrough.py").read_text(encoding="utf-8")
    assert sorted((ROOT / "docs/walkthrough").iterdir()) == sorted(
        ROOT / "docs" / path for path in shown
    )
    for path in shown:
        assert f'"{Path(path).name}"' in drawn
        assert (ROOT / "docs" / path).stat().st_size < 150_000
