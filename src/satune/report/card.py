"""A model card of a team, made of what its run measured: every number stands in the run's files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from satune.files.events import EvalEvent, UpdateEvent
from satune.report.charts import number
from satune.report.public import told, without_places
from satune.report.source import Source
from satune.report.training import outcome_of

UNKNOWN = "not known"
_UNTOLD = (
    "## Training\n\nNo run lay beside this team: what it was trained on and what came of it is not "
    "told here."
)


@dataclass(frozen=True, slots=True)
class Member:
    """One agent of a team as the card tells of it. ``folder`` holds its files, None where its model
    is served elsewhere; ``adapter`` on the weights of ``base``, else whole weights. ``base`` is a
    hub id, the name of a model that lay here, or None where nobody noted it."""

    agent: str
    seats: Sequence[str]
    folder: str | None
    base: str | None
    base_on_hub: bool
    licence: str | None
    adapter: bool
    temperature: float


def card(repo: str, members: Sequence[Member], plays: Mapping[str, Any], run: Source | None) -> str:
    """The card of the team of ``members`` in the repository ``repo``. ``plays`` are the manifest's
    ``protocol`` and ``task``; ``run`` is the run that trained it, where that is at hand."""
    sections = [
        f"# {repo.rpartition('/')[2]}",
        f"A team of {_count(sum(len(m.seats) for m in members), 'seat')} that answer together, "
        "trained with satune, one agent at a time.",
        _team(members),
        *(_trained(plays, run) if run else [_UNTOLD]),
        _use(repo, members),
        _limits(members),
    ]
    return f"---\n{_head(members)}---\n\n" + "\n\n".join(sections) + "\n"


def _head(members: Sequence[Member]) -> str:
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["satune", "multi-agent", "reinforcement-learning"],
    }
    bases = list(dict.fromkeys(m.base for m in members if m.base_on_hub))
    if bases:
        head["base_model"] = bases
    licences = {m.licence for m in members}
    (licence,) = licences if len(licences) == 1 else (None,)
    # The hub takes its own short names alone.
    if licence is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        head["license"] = licence
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _team(members: Sequence[Member]) -> str:
    rows = [
        [
            ", ".join(m.seats),
            m.folder or "not here: served elsewhere",
            m.base or UNKNOWN,
            m.licence or UNKNOWN,
            "adapter" if m.adapter else "whole weights" if m.folder else "",
            f"{m.temperature:g}",
        ]
        for m in members
    ]
    table = _table(["seats", "directory", "base", "licence", "holds", "temperature"], rows)
    text = f"## The team\n\n{table}"
    if any(m.licence is None for m in members):
        text += (
            "\n\nWhere a licence is not known the terms of the base model hold all the same: look "
            "them up before you use or pass on what was made from it."
        )
    return text


def _trained(plays: Mapping[str, Any], run: Source) -> Iterator[str]:
    yield _what(plays, run)
    yield _change(run.of(EvalEvent))
    yield _steps(run.of(UpdateEvent))
    yield _claims(run)


def _what(plays: Mapping[str, Any], run: Source) -> str:
    task, protocol = plays.get("task", {}), plays.get("protocol", {})
    facts = [("task", _named(task)), ("protocol", _named(protocol))]
    facts += [(k, run.recipe[f"{k}.name"]) for k in ("objective",) if f"{k}.name" in run.recipe]
    for key in ("stages", "episodes", "tokens"):
        count = number(run.summary.get(key))
        if count is not None:
            facts.append((_COUNTS[key], f"{count:,.0f}"))
    facts += [("seed", run.recipe["seed"])] if "seed" in run.recipe else []
    return "## What it was trained on\n\n" + _table(["", ""], [list(fact) for fact in facts])


_COUNTS = {"stages": "sweeps over the agents", "episodes": "episodes", "tokens": "sampled tokens"}


def _named(section: Mapping[str, Any]) -> str:
    options = [
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in told(section).items()
        if key != "name" and value is not None
    ]
    name = without_places(str(section.get("name", UNKNOWN)))
    return f"{name} ({', '.join(options)})" if options else name


def _change(evaluations: Sequence[EvalEvent]) -> str:
    rows = []
    for greedy in (False, True):
        own = [event for event in evaluations if event["greedy"] == greedy]
        if not own:
            continue
        first, last = own[0], own[-1]
        moved = last.get("difference") if len(own) > 1 else None
        rows.append(
            [
                "greedy" if greedy else "sampled",
                f"{first['reward']:.3f}{_between(first['interval'])}",
                f"{last['reward']:.3f}{_between(last['interval'])}" if len(own) > 1 else "",
                f"{moved[0]:+.3f}{_between(moved[1:], '+')}" if moved else "",
                f"{last['problems']:,}",
                str(last["samples"]),
            ]
        )
    if not rows:
        return "## By how much it changed\n\nNo evaluation on held-out problems was made."
    columns = ["decoding", "before", "after", "change", "problems", "samples a problem"]
    return (
        f"## By how much it changed\n\nMean reward on held-out problems, from 0 to 1.\n\n"
        f"{_table(columns, rows)}\n\nIn brackets: 95% intervals by problem; the change is paired. "
        "They speak of problems like these and of this one run, not of what training with another "
        "seed would have given. An interval of the change that holds 0 shows no change."
    )


def _steps(updates: Sequence[UpdateEvent]) -> str:
    if not updates:
        return "## Steps\n\nNo agent was updated."
    counts = Counter(outcome_of(event) for event in updates)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    rows = []
    for agent in dict.fromkeys(event["agent"] for event in updates):
        own = [event for event in updates if event["agent"] == agent and "kl" in event]
        found = [q for event in own if (q := number(event["kl"]["quantile"])) is not None]  # type: ignore[typeddict-item]
        if found:
            deltas = sorted({f"{number(event['delta']) or 'none'}" for event in own})
            rows.append([agent, f"{median(found):.4f}", f"{max(found):.4f}", ", ".join(deltas)])
    text = f"## Steps\n\n{len(updates)} steps: {told}."
    if rows:
        columns = ["agent", "median", "largest", "δ"]
        text += (
            "\n\nOf every step a quantile of the KL divergence from the agent before it, in nats "
            f"over token states, was measured against δ:\n\n{_table(columns, rows)}\n\n"
            "A quantile is no maximum: single states may lie beyond δ."
        )
    return text


def _claims(run: Source) -> str:
    tested = [event for event in run.of(UpdateEvent) if "certificate" in event]
    if not tested:
        return "## Certificates\n\nNone were made: nothing is claimed of any step."
    found = [event["certificate"]["statistical"] for event in tested]  # type: ignore[typeddict-item]
    lowers = [low for one in found if (low := number(one.get("lower"))) is not None]
    above = sum(low > 0 for low in lowers)
    text = (
        f"## Certificates\n\n{_count(len(tested), 'step')} had one: a lower bound on the change of "
        f"the team's mean reward. {above} of them {'was' if above == 1 else 'were'} above 0"
    )
    text += f"; the largest was {max(lowers):+.4f}." if lowers else "."
    spent = number((run.summary.get("certificates") or {}).get("confidence_spent"))
    if spent is not None:
        text += (
            f" Beforehand, the chance that any of the run's bounds is wrong is at most {spent:.3g}"
            ", where problems are drawn independently as the run drew them."
        )
    held = sorted({str(one.get("held_out")) for one in found if one.get("held_out")})
    if "finite" in held:
        text += " They are about the held-out rows and no others."
    statuses = Counter(
        (str(bound.get("name", "?")), str(bound.get("status", "?")))
        for event in tested
        for bound in event["certificate"].get("theory", [])  # type: ignore[typeddict-item]
    )
    if statuses:
        rows = [[name, status, str(count)] for (name, status), count in statuses.items()]
        text += (
            f"\n\nTheory beside statistics:\n\n{_table(['bound', 'status', 'steps'], rows)}\n\n"
            "A vacuous bound says nothing. A plug-in bound is made of estimates and proves nothing."
        )
    return text + (
        "\n\nA certificate speaks of mean reward on the task above. Of other problems, other "
        "prompts or other uses it says nothing."
    )


def _use(repo: str, members: Sequence[Member]) -> str:
    here = [m for m in members if m.folder]
    parts = []
    whole = next((m for m in here if not m.adapter), None)
    if whole:
        parts.append(
            "A seat by itself:\n\n```python\nfrom transformers import AutoModelForCausalLM, "
            f'AutoTokenizer\n\nmodel = AutoModelForCausalLM.from_pretrained("{repo}", '
            f'subfolder="{whole.folder}")\ntokenizer = AutoTokenizer.from_pretrained("{repo}", '
            f'subfolder="{whole.folder}")\n```'
        )
    adapter = next((m for m in here if m.adapter), None)
    if adapter:
        base = adapter.base if adapter.base_on_hub else repo
        parts.append(
            "A seat that is an adapter:\n\n```python\nfrom peft import PeftModel\nfrom "
            f"transformers import AutoModelForCausalLM\n\nbase = AutoModelForCausalLM."
            f'from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "{repo}", '
            f'subfolder="{adapter.folder}")\n```'
        )
    parts.append(
        f"The whole team:\n\n```\nhf download {repo} --local-dir team\n"
        "satune eval team --benchmark NAME\n```"
    )
    return "## Use\n\n" + "\n\n".join(parts)


def _limits(members: Sequence[Member]) -> str:
    lines = [
        "The seats were trained to speak with one another under the protocol above. One that is "
        "asked alone is not what was evaluated."
    ]
    if any(m.folder is None for m in members):
        lines.append("Seats whose model is served elsewhere are named here and not included.")
    return "## Limits\n\n" + " ".join(lines)


def _between(bounds: Sequence[float | None] | None, sign: str = "") -> str:
    low, high = bounds or (None, None)
    return "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(str(cell)) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Names come from files that anybody may have written: they are no markup here."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in "|`*<>[]\\" else c for c in plain)


def licence_in(directory: Path) -> str | None:
    """The licence that a model's directory names: in its card, else the first line of LICENSE."""
    readme = directory / "README.md"
    if readme.is_file():
        head = readme.read_text(encoding="utf-8", errors="replace").split("---\n")
        try:
            found = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
        except yaml.YAMLError:
            found = None
        if isinstance(found, dict) and isinstance(found.get("license"), str):
            return found["license"]
    for path in sorted(directory.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        first = next((" ".join(line.split()) for line in lines if line.strip()), None)
        if first is not None:
            return first[:60]
    return None
