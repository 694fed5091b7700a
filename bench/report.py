"""The table, `.credits/bench.json`, the charts and docs/performance.md."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import ratio
from bench.scenarios import ROOT, SCENARIOS
from bench.service import Served

FILE = ROOT / ".credits" / "bench.json"
CHART = ROOT / "docs" / "performance"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures -->", "<!-- end of the figures -->"
GROWTH_CHART = ROOT / "docs" / "performance-growth"

SERVICE, BASELINE, LIMIT = "#2a6f97", "#c1666b", "#b8b8b8"
LATE_SECONDS_MAX = 1
HEADS = (
    *("commands/s", "p50 ms", "p99 ms", "query p99 ms"),
    *("× plain", "× plain in 4 tasks", "of PostgreSQL", "CPU µs"),
)
Line = dict[str, Any]


def line(served: Served, plain: float | None, plain_parallel: float | None, limit: float | None) -> Line:
    """Return what `bench.json` has of a scenario."""
    speed = served.commands_per_second
    return {
        "commands_per_second": round(speed),
        "commands_per_second_min": round(min(served.rates)),
        "p50_ms": served.p50_ms,
        "p99_ms": served.p99_ms,
        "query_p99_ms": served.query_p99_ms,
        "at_commands_per_second": round(served.at_rate),
        "generator_late_seconds": round(served.late_seconds, 1),
        "ratio_to_baseline": ratio(speed, plain),
        "ratio_to_parallel_baseline": ratio(speed, plain_parallel),
        "ratio_to_postgres_limit": ratio(speed, limit),
        "baseline_per_second": plain and round(plain),
        "parallel_baseline_per_second": plain_parallel and round(plain_parallel),
        "postgres_limit_per_second": limit and round(limit),
        "commands": served.commands,
        "repetitions": len(served.rates),
        "cores": served.cores,
        "cpu_us_per_command": served.cpu_us,
        "worker_memory_mib": served.memory_mib,
    }


def targets(lines: dict[str, Line]) -> list[tuple[str, str, bool]]:
    """Return each target that this run can tell of: what, the figure, whether it is met."""
    told: list[tuple[str, str, bool]] = []

    def tell(what: str, name: str, key: str, least: float | None = None, most: float | None = None) -> None:
        value = lines.get(name, {}).get(key)
        if value is not None:
            met = (least is None or value >= least) and (most is None or value <= most)
            told.append((what, f"{value:,}", met))

    for name in ("many_users", "many_users_2_workers"):
        title = SCENARIOS[name].title
        tell(f"{title}: at least 10,000 commands/s", name, "commands_per_second", 10_000)
        tell(f"{title}: at least 20 times the plain worker", name, "ratio_to_baseline", 20)
        tell(f"{title}: p99 at half load at most 250 ms", name, "p99_ms", most=250)
    tell("many users: at least half of PostgreSQL's limit", "many_users", "ratio_to_postgres_limit", 0.5)
    tell("one hot user: at least 5,000 commands/s", "hot_user", "commands_per_second", 5_000)
    tell("purchases with receipts: at least 3,000/s", "purchases", "commands_per_second", 3_000)
    if "merchants_1" in lines and "merchants_100" in lines:
        share = ratio(lines["merchants_100"]["commands_per_second"], lines["merchants_1"]["commands_per_second"])
        told.append(("100 merchants: at least 60 % of one", str(share), (share or 0) >= 0.6))
    tell("a worker for 100 merchants: at most 300 MiB", "merchants_100", "worker_memory_mib", most=300)
    return told


def _cells(one: Line) -> tuple[str, ...]:
    """Return what stands under HEADS."""
    return (
        f"{one['commands_per_second']:,}",
        f"{one['p50_ms']:.0f}",
        f"{one['p99_ms']:.0f}",
        f"{one['query_p99_ms']:.0f}",
        _times(one["ratio_to_baseline"]),
        _times(one["ratio_to_parallel_baseline"]),
        "" if one["ratio_to_postgres_limit"] is None else f"{100 * one['ratio_to_postgres_limit']:.0f} %",
        str(sum(one["cpu_us_per_command"].values())),
    )


def table(lines: dict[str, Line]) -> Table:
    """Return the table of a run."""
    shown = Table(title="Commands applied, committed and answered", title_justify="left", header_style="bold")
    shown.add_column("scenario")
    for head in (*HEADS, "others' cores"):
        shown.add_column(head, justify="right")
    for name, one in lines.items():
        shown.add_row(SCENARIOS[name].title, *_cells(one), f"{one['cores'].get('others', 0):.2f}")
    return shown


def _times(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def save(document: dict[str, Any]) -> None:
    """Write `.credits/bench.json`; parts that this run did not measure stay as they were."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(known | document, indent=1) + "\n")


def show(console: Console, lines: dict[str, Line], idle: float | None) -> None:
    """Print the table and the targets."""
    console.print(table(lines))
    if idle is not None:
        console.print(_idle_text(idle), highlight=False)
    for name, one in lines.items():
        if one["generator_late_seconds"] > LATE_SECONDS_MAX:
            late = f"{SCENARIOS[name].title}: the generator was {one['generator_late_seconds']} s late"
            console.print(f"[yellow]![/] {late}, the machine was too busy for its latencies", highlight=False)
    for what, figure, met in targets(lines):
        console.print(f"[{'green' if met else 'red'}]{'✓' if met else '✗'}[/] {what}: {figure}", highlight=False)


def _idle_text(idle: float) -> str:
    return f"Faust without work: {idle:,.0f} records/s."


def chart(lines: dict[str, Line]) -> None:
    """Draw docs/performance.png and .svg: the service between the plain worker and PostgreSQL's limit."""
    plt = _pyplot()
    names = [name for name in SCENARIOS if name in lines][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(names) + 1.6), layout="constrained")
    bars = (
        ("PostgreSQL's limit", "postgres_limit_per_second", LIMIT),
        ("this service", "commands_per_second", SERVICE),
        ("plain worker, one transaction per message", "baseline_per_second", BASELINE),
    )
    for place, (label, key, colour) in enumerate(bars):
        values = [lines[name].get(key) or 0 for name in names]
        drawn = axes.barh([i + 0.27 * (1 - place) for i in range(len(names))], values, 0.25, label=label, color=colour)
        axes.bar_label(drawn, [f"{value:,}" if value else "" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), [SCENARIOS[name].title for name in names])
    axes.set_xlabel("commands applied, committed and answered a second")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    _write(plt, figure, CHART)


def growth_chart(points: list[dict[str, Any]]) -> None:
    """Draw docs/performance-growth.png and .svg: what grows with the number of entries, against the empty start."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    series = (
        ("throughput", "commands_per_second", SERVICE),
        ("throughput after a checkpoint", "after_checkpoint_per_second", LIMIT),
        ("balance p99", "balance_p99_ms", BASELINE),
        ("ledger page p99", "ledger_p99_ms", "#6a994e"),
        ("lots p99", "lots_p99_ms", "#bc8a3d"),
    )
    entries = [point["entries"] / 1e6 for point in points]
    for label, key, colour in series:
        first = points[0][key]
        axes.plot(entries, [100 * point[key] / first for point in points], marker="o", label=label, color=colour)
    axes.axhspan(85, 115, color="#eeeeee", zorder=0)
    axes.set(xlabel="million entries", ylabel="% of the empty ledger", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    _write(plt, figure, GROWTH_CHART)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    # The same figures give the same bytes.
    mpl.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot

    return pyplot


def _write(plt: Any, figure: Any, stem: Path) -> None:
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(stem.with_suffix(suffix), dpi=140, metadata=metadata)
    plt.close(figure)


def document() -> None:
    """Write the figures of `bench.json` into docs/performance.md, between its two marks."""
    known = json.loads(FILE.read_text())
    parts = [_machine_text(known["machine"])] if "machine" in known else []
    if "scenarios" in known:
        parts += [_scenarios_text(known["scenarios"], known.get("faust_without_work_per_second"))]
    if "growth" in known:
        parts += [_growth_text(known["growth"])]
    if "startup" in known:
        parts += [_startup_text(known["startup"])]
    text = DOCUMENT.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text(head + "\n\n" + "\n\n".join(parts) + "\n\n" + tail)


def _machine_text(machine: dict[str, Any]) -> str:
    postgres = machine["postgres"]
    return (
        f"Measured on {machine['cores']} cores of {machine['processor']} with {machine['memory_gib']} GiB, shared by "
        f"everything, an 8 KiB write reaching the disk in {machine['fsync_p50_ms']} ms; Python {machine['python']}, "
        f"PostgreSQL {postgres['server_version']} (fsync {postgres['fsync']}, synchronous_commit "
        f"{postgres['synchronous_commit']}, {postgres['shared_buffers']} of buffers, {postgres['max_wal_size']} "
        f"of WAL at most), Kafka {machine['kafka']}; "
        f"workers: {machine['workers']}, at most {machine['batch_max']:,} commands a batch; commit {machine['commit']}."
    )


def _scenarios_text(lines: dict[str, Line], idle: float | None) -> str:
    rows = [(SCENARIOS[name].title, *_cells(one)) for name, one in lines.items()]
    busy = max(one["cores"].get("others", 0) for one in lines.values())
    noise = f"Other programs used up to {busy:.2f} cores during the drains."
    if idle is not None:
        noise += " " + _idle_text(idle)
    told = [(what, figure, "yes" if met else "**no**") for what, figure, met in targets(lines)]
    return "\n\n".join(
        [
            "![the service between its limits](performance.svg)",
            _grid(("", *HEADS), rows),
            noise,
            _grid(("target", "", "met"), told),
        ]
    )


def _growth_text(growth: dict[str, Any]) -> str:
    keys = (
        *("commands_per_second", "after_checkpoint_per_second"),
        *("balance_p99_ms", "ledger_p99_ms", "lots_p99_ms", "worker_memory_mib"),
    )
    heads = (
        *("entries", "commands/s", "after a checkpoint"),
        *("balance p99 ms", "ledger page p99 ms", "lots p99 ms", "worker MiB"),
    )
    rows = [(f"{point['entries']:,}", *(f"{point[key]:,}" for key in keys)) for point in growth["points"]]
    lots = growth["lots"]
    debits = (
        f"Debits of a user with one lot: {lots['one_lot_commands_per_second']:,} commands/s, of one with "
        f"{lots['lots']:,} lots: {lots['many_lots_commands_per_second']:,}. "
        f"The auditor needed {growth['audit_seconds']:,} seconds for the whole ledger and found it in order."
    )
    first, last = growth["points"][0], growth["points"][-1]
    change = "At the end, in % of the empty ledger: " + ", ".join(
        f"{head} {100 * last[key] / first[key]:.0f}" for head, key in zip(heads[1:], keys, strict=True)
    )
    postgres = growth["machine"]["postgres"]
    setting = (
        f"With {postgres['shared_buffers']} of buffers and at most {postgres['max_wal_size']} of WAL; commit "
        f"{growth['machine']['commit']}."
    )
    figure = "![growth](performance-growth.svg)"
    return "\n\n".join(["### Growth", setting, figure, _grid(heads, rows), change + ".", debits])


def _startup_text(startup: dict[str, Any]) -> str:
    rows = [(name.replace("_", " "), f"{figure:,}") for name, figure in startup.items() if name != "machine"]
    return "### Start and connections\n\n" + _grid(("", ""), rows)


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
