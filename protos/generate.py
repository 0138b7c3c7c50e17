"""``python protos/generate.py [--check]``: Python from all protos, into dptrain/v1/, as it is committed.

With ``--check`` nothing is written; the exit code is 1 where what is committed differs from what the protos give, a
file too many included. It needs the extra ``lint``, which pins the generators: another version gives other text.
"""

import filecmp
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
TARGET = PROTOS.parent / "dptrain" / "v1"
PACKAGE = Path("dptrain") / "v1"


def generate(into: Path) -> None:
    """Messages, services and their stub files for every proto of the package, below ``into``."""
    from grpc_tools import protoc

    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / PACKAGE).glob("*.proto"))
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={Path(protoc.__file__).parent / '_proto'}",
            f"--python_out={into}",
            f"--grpc_python_out={into}",
            f"--mypy_out=quiet:{into}",
            f"--mypy_grpc_out=quiet,only_sync:{into}",
            *files,
        ]
    )
    if code:
        sys.exit(code)


def generated(folder: Path) -> dict[str, Path]:
    """The generated files of a folder by name."""
    return {path.name: path for path in folder.glob("*_pb2*.py*")}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        new, old = generated(Path(folder) / PACKAGE), generated(TARGET)
        same = {name for name in new.keys() & old.keys() if filecmp.cmp(new[name], old[name], shallow=False)}
        changed = sorted((new.keys() | old.keys()) - same)
        if "--check" in sys.argv[1:]:
            if changed:
                sys.exit(f"not what the protos give: {', '.join(changed)}; run: python protos/generate.py")
            return
        for name in old.keys() - new.keys():
            old[name].unlink()
        for name in changed:
            if name in new:
                (TARGET / name).write_bytes(new[name].read_bytes())
                print(f"wrote {TARGET.relative_to(PROTOS.parent) / name}")


if __name__ == "__main__":
    main()
