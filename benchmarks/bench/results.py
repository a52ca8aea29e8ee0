"""The results of a benchmark as a dict, and the files that hold them: JSON, Markdown, CSV and a picture.

A result is {"benchmark": its name, "machine": environment.describe, "rows": a list of dicts, ...}. Its report is made from
nothing else, so that report.py can make it again. Nothing here needs torch or the library.
"""

import csv
import importlib
import json
import os
from pathlib import Path

# The module that reports each benchmark: TITLE and body(results), Markdown.
REPORTS = {
    "memory": "bench.memory_report",
    "scaling": "bench.scaling",
    "own_model": "bench.own_model",
    "speed": "bench.speed.report",
    "batches": "bench.speed.batches",
    "kernels": "kernels",
    "phases": "phases",
    "largest_batch": "largest_batch",
    "gpu": "bench.gpu.report",
}


def heading(description):
    """The description of a machine in three lines or four."""
    d = description
    where = d["cpu"] if d["device"] == "cpu" else f"{d['device']} ({d['cuda']}), {d['cpu']}"
    lines = [
        f"{where}, {d['cores']} cores, {d['threads']} thread(s), {d['instruction_set']} (our kernels: {d['kernels']})",
        f"torch {d['torch']}, densenet_ext {d['densenet_ext']} ({d['commit']}), {d['system']}, {d['date']}",
        d["command"],
    ]
    return "\n".join([*lines, *([f"malloc: {d['malloc']}"] if "malloc" in d else [])])


def report_of(results):
    """The module with the report of these results."""
    return importlib.import_module(REPORTS[results["benchmark"]])


def markdown(results):
    """The whole report: title, machine, and the tables that the benchmark prints."""
    report = report_of(results)
    machine = results["machine"]
    lines = getattr(report, "heading", heading)(machine)
    title = report.TITLE.format(**{"name": "a GPU"} | machine)
    return (
        "\n\n".join(part for part in (f"# {title}", lines.replace("\n", "  \n"), report.body(results)) if part) + "\n"
    )


def publish(args, results):
    """Print the tables, and write the files that the command line asks for."""
    print(report_of(results).body(results))
    write(args, results)


def write(args, results):
    """Write the files that the command line asks for."""
    if args.json:
        write_json(args.json, results)
    if args.csv:
        write_csv(args.csv, results)
    if getattr(args, "plot", None):
        from bench import plots  # matplotlib, which measuring does without

        plots.PLOTS[results["benchmark"]](results, args.plot)


def write_json(path, results):
    """Write JSON, and Markdown beside it; each is replaced whole, so that a killed run leaves both readable."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(results, indent=1) + "\n")
    _replace(path.with_suffix(".md"), markdown(results))


def _replace(path, text):
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def write_csv(path, results):
    """Write a line for each row, without what is a dict in it; the machine's columns follow on every line, so that lines of
    several files can be put together."""
    rows = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in results["rows"]]
    columns = [*dict.fromkeys(key for row in rows for key in row), *results["machine"]]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row | results["machine"] for row in rows)
