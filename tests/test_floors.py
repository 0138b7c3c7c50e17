"""Imports point down only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dptrain"

FLOORS = [
    {
        "errors",
        "random",
        "tree",
        "layout",
        "gradients",
        "rounding",
        "packing",
        "arithmetic",
        "phases",
        "limits",
        "heap",
        "cores",
        "board",
        "processes",
        "supervision",
        "presence",
        "rsh",
        "afar",
        "sockets",
        "appended",
    }
    | {"mkl", "v1"},
    {"job", "data", "nn", "optim"},
    {"state", "checkpoint", "journal", "rundir", "membership", "rule", "fingerprint", "straggler", "wire"}
    | {"scalars", "arrivals"},
    {"exchange"},
    {"worker", "watch", "chronicle", "assemble", "beginning", "parts", "trace", "meeting", "recovery", "watchdog"}
    | {"corruption"},
    {
        "companion",
        "training",
        "origin",
        "result",
        "plan",
        "scaling",
        "moving",
        "launch",
        "ranks",
        "api",
        "launcher",
        "scratch",
    }
    | {
        "supervise",
        "serve",
        "joined",
        "crew",
        "wanted",
        "hosts",
        "lending",
        "export",
        "onnx_graph",
        "comparison",
        "replay",
    },
    {"service"},
    {"cli"},
]
PACKAGES = {"job", "data", "nn", "optim"}
"""Of one floor, and each of its own: all they may share is what a job says."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = ["dptrain", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in modules()}


def imported(source: str) -> Iterator[str]:
    """Everything that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES else str(node.module)


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if part(module) in names)


def wrong(module: str, source: str) -> list[str]:
    """The imports of a module that don't point down."""
    found = []
    for other in imported(source):
        if other.split(".")[0] != "dptrain" or not part(other) or part(other) == part(module):
            continue
        above = floor(other) > floor(module)
        beside = part(module) in PACKAGES and part(other) in PACKAGES and other != "dptrain.job.spec"
        if above or beside:
            found.append(f"{module} imports {other}")
    return found


def test_every_module_has_a_floor() -> None:
    parts = {part(name) for name in NAMES} - {"", "__main__"}
    assert parts == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


def test_imports_point_down() -> None:
    inner = [path for path in modules() if path.relative_to(PACKAGE).as_posix() not in ("__init__.py", "__main__.py")]
    assert [line for path in inner for line in wrong(dotted(path), path.read_text())] == []


def test_an_import_that_points_up_would_be_seen() -> None:
    assert wrong("dptrain.state", "from dptrain.exchange.solo import Solo")
    assert wrong("dptrain.nn.chain", "def f():\n    from dptrain.data import dataset")
    assert wrong("dptrain.optim.schedule", "import dptrain.job.load")
    assert not wrong("dptrain.optim.schedule", "from dptrain.job import spec\nfrom dptrain import errors")


def test_each_library_has_its_place() -> None:
    allowed = {
        "mpi4py": {"dptrain.exchange.mpi"},
        "pydantic": {"dptrain.job.load"},
        "typer": {"dptrain.cli.access", "dptrain.cli.app", "dptrain.cli.nodes", "dptrain.cli.service"},
        "cryptography": {"dptrain.wire.certificates"},
        "pickle": set(),
    }
    wire = ("dptrain.v1", "dptrain.wire", "dptrain.exchange.parameter_server", "dptrain.service")
    for path in modules():
        for other in imported(path.read_text()):
            if other.split(".")[0] in allowed and dotted(path) not in allowed[other.split(".")[0]]:
                pytest.fail(f"{dotted(path)} imports {other}")
            if other.split(".")[0] in ("grpc", "google") and not dotted(path).startswith(wire):
                pytest.fail(f"{dotted(path)} imports {other}")
        assert "allow_pickle=True" not in path.read_text()


@pytest.mark.parametrize(
    ("module", "free_of"),
    [
        ("dptrain", {"numpy", "pydantic", "typer", "rich", "mpi4py", "safetensors", "grpc", "google"}),
        ("dptrain.ranks", {"numpy", "pydantic", "typer", "rich", "mpi4py", "safetensors", "grpc", "google"}),
        ("dptrain.cli.main", {"numpy", "pydantic", "typer", "rich", "mpi4py", "safetensors", "grpc", "google"}),
        ("dptrain.supervise", {"numpy", "pydantic", "typer", "rich", "mpi4py", "safetensors", "grpc", "google"}),
        ("dptrain.training", {"pydantic", "typer", "rich", "mpi4py", "pyarrow", "grpc", "google"}),
    ],
)
def test_importing_is_cheap(module: str, free_of: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "dptrain" in done.stdout.split()
    assert not free_of & set(done.stdout.split())
