"""HTML pages: table, plot, environment and commands in one file without external resources."""

from __future__ import annotations

import base64
import shlex
from importlib.resources import files
from typing import Any, Protocol

import yaml
from jinja2 import DictLoader, Environment, StrictUndefined

from vllm_sparsek.serving_bench.results import Results, columns


class About(Protocol):
    """What the results of any measurement say about themselves."""

    command: list[str]
    model: str
    started_utc: str
    environment: dict[str, Any]
    error: str | None


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
                "cells": [column.show(row) for column in columns(results)],
            }
        )
        previous = row["workload"]
    return rows


def facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what a result depends on besides the code."""
    found = {key: environment.get(key) for key in ("device", "cpu", "platform", "python", "commit")}
    found |= environment.get("versions", {})
    return [(name, "n/a" if value is None else str(value)) for name, value in found.items()]


def _commands(results: Results) -> list[str]:
    """Every server's command line once, and the client's of the first repeats."""
    commands: dict[str, None] = {}
    for run in results.runs:
        if run.server_command is not None:
            commands[shlex.join(run.server_command)] = None
        if run.repeat == 0:
            commands[shlex.join(run.client_command)] = None
    return list(commands)


def shown_as_yaml(values: dict[str, Any]) -> str:
    """Show settings as YAML, less those that are left out."""
    set_ = {
        name: {key: value for key, value in item.items() if value not in (None, [], {}, "")}
        for name, item in values.items()
    }
    text: str = yaml.safe_dump(set_, sort_keys=False, width=100)
    return text.rstrip()


def page(package: str, template: str, about: About, **values: Any) -> str:
    """Fill a template that extends `base.html.j2`. Everything from outside is escaped.

    package: where the template lies. about: what the head of every page tells.
    """
    sources = {
        name: files(where).joinpath(name).read_text(encoding="utf-8")
        for where, name in ((__package__, "base.html.j2"), (package, template))
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=DictLoader(sources)
    )
    return environment.get_template(template).render(
        model=about.model,
        environment=about.environment,
        started_utc=about.started_utc,
        error=about.error,
        facts=facts(about.environment),
        command=shlex.join(about.command),
        **values,
    )


def embedded(png: bytes) -> str:
    """A PNG as the text of a data URL."""
    return base64.b64encode(png).decode("ascii")


def render(results: Results, png: bytes) -> str:
    """Return the benchmark's page."""
    rows = _rows(results)
    return page(
        __package__,
        "report.html.j2",
        results,
        columns=columns(results),
        quality=results.quality_window,
        rows=rows,
        repeats=max((row["repeats"] for row in results.summary()), default=0),
        png=embedded(png),
        arms=shown_as_yaml(results.arms),
        workloads=shown_as_yaml(results.workloads),
        commands=_commands(results),
    )
