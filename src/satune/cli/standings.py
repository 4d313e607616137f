"""An evaluation's report as a table."""

from __future__ import annotations

from typing import Any

from satune.cli.common import open_console
from satune.files.printing import printable


def show_report(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = open_console()
    k = report["k"]
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("")
    rows = [("team", report["team"], report["budget"]["team"])]
    for name, row in report["seats"].items():
        rows.append((f"seat {name}", row, report["budget"]["seats"][name]))
    if len(rows) == 2 and rows[1][1] == rows[0][1]:
        # The one seat of a team is the team, the best seat, and all the messages.
        del rows[0]
    elif "pooled" in report:
        rows.append(("all messages", report["pooled"], report["budget"]["pooled"]))
        rows.append(("oracle", report["oracle"], report["budget"]["oracle"]))
    columns: list[str] = list(dict.fromkeys(name for _, row, _ in rows for name in row))
    for column in (*(_HEADINGS.get(name, name) for name in columns), "answers", "read + written"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, row, budget in rows:
        table.add_row(
            label,
            *(_figure(row.get(name)) for name in columns),
            str(budget["answers"]),
            f"{_count(budget['prompt_tokens'])} + {_count(budget['completion_tokens'])}",
        )
    console.print(table)
    notes = "A seat's answer is its last message, the oracle takes the best seat's. "
    notes = notes if len(rows) > 1 else ""
    console.print(
        f"{report['benchmark']}: {report['problems']} problems, {k} conversations each "
        f"({report['protocol']['name']}). {notes}Answers are counted a problem, tokens in all.",
        highlight=False,
        soft_wrap=True,
    )
    for name, row in report.get("groups", {}).items():
        console.print(
            f"{printable(name)}: {row['avg_at_k']:.3f}, {row['problems']} problems",
            highlight=False,
            soft_wrap=True,
        )
    failed = {name: sum(kinds.values()) for name, kinds in report["failures"].items()}
    if any(failed.values()):
        kinds = [f"{n} {kind}" for of in report["failures"].values() for kind, n in of.items()]
        again = "; the same command plays those of the world again" if failed["world"] else ""
        console.print(
            f"{sum(failed.values())} conversations failed and score 0 ({', '.join(kinds)}){again}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"everything lies in {report['out']}", highlight=False, soft_wrap=True)


_HEADINGS = {"avg_at_k": "avg", "pass_at_k": "pass", "interval": "95%"}
"""How a figure is headed in the table; any other by its own name."""


def _figure(value: Any) -> str:
    match value:
        case None:
            return ""
        case int():
            return str(value)
        case [low, high]:
            return f"{low:.3f}-{high:.3f}"
        case _:
            return f"{value:.3f}"


def _count(tokens: int | None) -> str:
    if tokens is None:
        return "unknown"
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= limit:
            return f"{tokens / limit:.1f}{suffix}"
    return str(tokens)
