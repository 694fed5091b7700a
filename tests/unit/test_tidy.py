"""House rules that no linter knows."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "schemas",
    "catalog",
    "ledger",
    "receipts",
    "merchants",
    "workers",
    "migrations",
    "console",
    "tests",
    "bench",
)
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LINES_MAX = 60

PURE = [
    ROOT / name
    for name in (
        "catalog/model.py",
        "catalog/decisions.py",
        "ledger/model.py",
        "ledger/books.py",
        "ledger/decisions.py",
        "ledger/chain.py",
        "merchants/decisions.py",
        "receipts/model.py",
        "receipts/tax.py",
        "workers/decide.py",
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "schemas").glob("*.py"))),
    )
]
EXACT = [path for package in ("ledger", "catalog", "receipts") for path in sorted((ROOT / package).rglob("*.py"))] + [
    ROOT / "schemas/money.py"
]

CLOCKS = re.compile(r"\b(datetime\.(now|utcnow|today)|date\.today|time\.(time|time_ns|monotonic|perf_counter))\(")
CHANCE = re.compile(r"\b(import random|from random|import secrets|from secrets|uuid4|urandom)\b")
# Spelled in pieces, so that this file does not break its own rule.
FOREIGN = re.compile(
    "|".join(
        ["/" + "work/", "/" + "tmp/work", "/" + "root/", "Clau" + "de", "Anthro" + "pic", "Chat" + "GPT", "Co" + "dex"]
    )
)


def of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=of)
def test_no_function_is_longer_than_a_page(path: Path) -> None:
    long = [f.name for f in functions(path) if (f.end_lineno or 0) - f.lineno + 1 > LINES_MAX]

    assert not long


@pytest.mark.parametrize("path", EXACT, ids=of)
def test_there_is_no_float_near_credits_and_money(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))

    floats = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, float)]
    names = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "float"]

    assert not floats + names


@pytest.mark.parametrize("path", [path for path in EXACT if path in PURE], ids=of)
def test_integers_are_never_divided_into_floats(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))

    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)]


@pytest.mark.parametrize("path", PURE, ids=of)
def test_the_pure_core_reads_no_clock_and_throws_no_dice(path: Path) -> None:
    text = path.read_text("utf-8")

    assert not CLOCKS.findall(text)
    assert not CHANCE.findall(text)


@pytest.mark.parametrize("path", SOURCES, ids=of)
def test_the_sources_speak_of_the_project_alone(path: Path) -> None:
    assert not FOREIGN.findall(path.read_text("utf-8"))


def test_every_package_is_looked_at() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}

    assert packages <= set(PACKAGES)
