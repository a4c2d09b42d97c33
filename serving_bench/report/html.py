"""The HTML page: table, plot, environment and commands in one file without external resources."""

from __future__ import annotations

import base64
import shlex
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from vllm_sparsek.serving_bench.results import COLUMNS, Results


def _rows(results: Results) -> list[dict[str, Any]]:
    order = {name: i for i, name in enumerate(results.workloads)}
    rows = []
    previous = None
    for row in sorted(results.summary(), key=lambda row: order.get(row["workload"], len(order))):
        rows.append(
            {
                "workload": row["workload"],
                "arm": row["arm"],
                "failed": row["failed"],
                "first": previous is not None and row["workload"] != previous,
                "cells": [column.show(row) for column in COLUMNS],
            }
        )
        previous = row["workload"]
    return rows


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    facts = {key: environment.get(key) for key in ("device", "cpu", "platform", "python", "commit")}
    facts |= environment.get("versions", {})
    return [(name, "n/a" if value is None else str(value)) for name, value in facts.items()]


def _commands(results: Results) -> list[str]:
    """Every server's command line once, and the client's of the first repeats."""
    commands: dict[str, None] = {}
    for run in results.runs:
        if run.server_command is not None:
            commands[shlex.join(run.server_command)] = None
        if run.repeat == 0:
            commands[shlex.join(run.client_command)] = None
    return list(commands)


def _yaml(values: dict[str, Any]) -> str:
    """Show settings as YAML, less those that are left out."""
    set_ = {
        name: {key: value for key, value in item.items() if value not in (None, [], {}, "")}
        for name, item in values.items()
    }
    text: str = yaml.safe_dump(set_, sort_keys=False, width=100)
    return text.rstrip()


def render(results: Results, png: bytes) -> str:
    """Return the page. Everything from outside (names, paths, errors) is escaped."""
    source = files("vllm_sparsek.serving_bench.report").joinpath("report.html.j2")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        source.read_text(encoding="utf-8")
    )
    rows = _rows(results)
    return template.render(
        model=results.model,
        environment=results.environment,
        started_utc=results.started_utc,
        error=results.error,
        columns=COLUMNS,
        rows=rows,
        repeats=max((row["repeats"] for row in results.summary()), default=0),
        png=base64.b64encode(png).decode("ascii"),
        facts=_facts(results.environment),
        arms=_yaml(results.arms),
        workloads=_yaml(results.workloads),
        command=shlex.join(results.command),
        commands=_commands(results),
    )
