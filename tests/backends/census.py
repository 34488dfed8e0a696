"""What `sparke.wrap` finds in each pipeline of the installed diffusers, read from its source.

Nothing of diffusers is imported, so classes whose optional dependencies are missing count too.
``python -m tests.backends.census --write`` renews the figures in docs/pipelines.md.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
BEGIN, END = "<!-- census: begin -->", "<!-- census: end -->"

# Schedulers whose steps have no denoised estimate to displace.
UNREAD = {
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "HeliosDMDScheduler": "noise levels that start anew in each stage",
    "KarrasVeScheduler": "a step with other arguments",
    "PiflowScheduler": "several velocities in one prediction",
    "RFD4ProteinaScheduler": "protein coordinates",
    "RePaintScheduler": "known pixels put back within the step",
    "ScoreSdeVeScheduler": "no step, only a predictor and a corrector",
    "VQDiffusionScheduler": "discrete tokens",
}

# How the sources name the two predictions.
NEGATIVE = re.compile(r"neg|uncond|null")
PROMPT = re.compile(r"(^|_)(cond|text)(_|$)")

STEP = re.compile(r"([\w.]*scheduler\w*)(?:\[\w+\])?\.step\(")
KIND = re.compile(r"\w+Scheduler\b")
HEAD = re.compile(r"^class (\w+)(?:\(([^)]*)\))?:", re.MULTILINE)

Classes = dict[str, tuple[Path, list[str]]]
Block = ast.For | ast.While | ast.FunctionDef


@dataclass(frozen=True)
class Method:
    """A method, and the text of its body without the docstring, which may quote code."""

    node: ast.FunctionDef
    text: str


@dataclass(frozen=True)
class Row:
    """One pipeline class."""

    name: str
    deprecated: bool
    wrap: str
    """`yes`, `in a part` (another pipeline runs the same scheduler), or `no: ` and the reason."""
    callback: str
    """`used`, `in place`, `other tensors`, `passed on`, `legacy` or `none`."""
    cfg: str
    """How the unconditional prediction is made; `-` where `wrap` does not apply."""
    schedulers: tuple[str, ...]
    """Components that are schedulers, from the signature of ``__init__``."""
    kinds: tuple[str, ...]
    """The classes that the signature names for these."""
    steps: tuple[str, ...]
    """Components whose step is called during a call, those of a part left out."""

    @property
    def reached(self) -> bool:
        return not self.wrap.startswith("no")


def installed() -> str:
    """The version of the installed diffusers."""
    return importlib.metadata.version("diffusers")


@functools.cache
def rows() -> list[Row]:
    """Every pipeline class of the installed diffusers, by name."""
    classes = _classes()
    return [
        _row(classes, name)
        for name in sorted(classes)
        if name != "DiffusionPipeline" and "DiffusionPipeline" in _ancestors(classes, name)
    ]


def summary(rows: Iterable[Row]) -> str:
    """The counts, and the classes that are not reached, by reason."""
    rows = list(rows)
    current = [row for row in rows if not row.deprecated]
    deprecated = len(rows) - len(current)
    lines = [
        f"diffusers {installed()} has {len(rows)} pipeline classes, {deprecated} deprecated.",
        "",
        "| | all | not deprecated |",
        "|---|---:|---:|",
    ]

    def count(label: str, wanted: Iterable[Row]) -> None:
        found = list(wanted)
        lines.append(f"| {label} | {len(found)} | {sum(not row.deprecated for row in found)} |")

    count("classes", rows)
    count("reached by `sparke.wrap`", (row for row in rows if row.reached))
    count("a callback after each step, returned latents used", _with(rows, "used"))
    count("the same, latents changed in place only", _with(rows, "in place"))
    count("the same, without latents or passed on", _with(rows, "other tensors", "passed on"))
    count("an older callback only", _with(rows, "legacy"))
    count("no callback", _with(rows, "none"))
    missed: dict[str, list[str]] = {}
    for row in rows:
        if not row.reached:
            missed.setdefault(row.wrap.removeprefix("no: "), []).append(f"`{row.name}`")
    lines += ["", "Not reached:", ""]
    lines += [f"- {reason}: {', '.join(names)}" for reason, names in sorted(missed.items())]
    return "\n".join(lines)


def table(rows: Iterable[Row]) -> str:
    """One line of Markdown for each class."""
    lines = [
        "| Pipeline | Deprecated | `wrap` | Callback | Unconditional prediction |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row.name}` | {'yes' if row.deprecated else ''} | {row.wrap} | {row.callback} "
        f"| {row.cfg} |"
        for row in rows
    ]
    return "\n".join(lines)


def section(rows: Iterable[Row]) -> str:
    """What stands between the two comments of the page."""
    rows = list(rows)
    return f"\n\n{summary(rows)}\n\n## Class by class\n\n{table(rows)}\n\n"


def page() -> str:
    """The page with this installation's figures."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return head + BEGIN + section(rows()) + END + rest.split(END)[1]


def _with(rows: Iterable[Row], *callbacks: str) -> Iterator[Row]:
    return (row for row in rows if row.callback in callbacks)


def _classes() -> Classes:
    """File and bases of every class in diffusers' folder of pipelines."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("diffusers is not installed", name="diffusers")
    found: Classes = {}
    for path in sorted(Path(spec.submodule_search_locations[0], "pipelines").rglob("*.py")):
        for name, bases in HEAD.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, (path, re.findall(r"(\w+)\s*(?:,|$)", bases)))
    return found


def _ancestors(classes: Classes, name: str) -> list[str]:
    """The class and its bases as far as they are pipelines' own, nearest first."""
    found: list[str] = []
    todo = [name]
    while todo:
        here = todo.pop(0)
        if here in classes and here not in found:
            found.append(here)
            todo += classes[here][1]
    return found


@functools.lru_cache(maxsize=4)
def _parsed(path: Path) -> dict[str, dict[str, Method]]:
    """The classes of a file and their methods."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    return {
        node.name: {
            method.name: Method(method, "\n".join(lines[_start(method) : method.end_lineno]))
            for method in node.body
            if isinstance(method, ast.FunctionDef)
        }
        for node in ast.parse(source, str(path)).body
        if isinstance(node, ast.ClassDef)
    }


def _start(method: ast.FunctionDef) -> int:
    """The index of the first line after the docstring."""
    first = method.body[0]
    return first.end_lineno or 0 if ast.get_docstring(method) else first.lineno - 1


def _row(classes: Classes, name: str) -> Row:
    methods: dict[str, Method] = {}
    for ancestor in _ancestors(classes, name):
        if classes[ancestor][0].name == "pipeline_utils.py":
            continue  # DiffusionPipeline itself and what all pipelines may mix in
        for own, method in _parsed(classes[ancestor][0])[ancestor].items():
            methods.setdefault(own, method)
    types = {arg.arg: _text(arg.annotation) for arg in _arguments(methods["__init__"])}
    used = list(_reached(methods))
    schedulers = tuple(a for a, t in types.items() if "Scheduler" in t or a == "scheduler")
    steps, wrap = _steps(methods, used, types)
    return Row(
        name=name,
        deprecated="deprecated" in classes[name][0].parts,
        wrap=wrap,
        callback=_callback(methods, used),
        cfg=_cfg(methods, used, set(types)) if wrap == "yes" else "-",
        schedulers=schedulers,
        kinds=tuple(sorted({kind for name in schedulers for kind in KIND.findall(types[name])})),
        steps=steps,
    )


def _arguments(method: Method) -> list[ast.arg]:
    return [*method.node.args.args, *method.node.args.kwonlyargs]


def _text(node: ast.AST | None) -> str:
    return ast.unparse(node) if node else ""


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))


def _reached(methods: dict[str, Method]) -> Iterator[Method]:
    """``__call__`` and the methods of the class that it leads to."""
    seen: set[str] = set()
    todo = ["__call__"]
    while todo:
        name = todo.pop()
        if name in methods and name not in seen:
            seen.add(name)
            todo += re.findall(r"\bself\.(\w+)", methods[name].text)
            yield methods[name]


def _steps(
    methods: dict[str, Method], used: list[Method], types: dict[str, str]
) -> tuple[tuple[str, ...], str]:
    """The components whose step is called, and the column `wrap`."""
    if "__call__" not in methods:
        return (), "no: no call of its own"
    source = "\n".join(method.text for method in used)
    owners = STEP.findall(source)
    steps = tuple(dict.fromkeys(o.removeprefix("self.") for o in owners if o.startswith("self.")))
    named = [set(KIND.findall(types[step])) for step in steps]
    if steps and all(names and names <= set(UNREAD) for names in named):
        return steps, "no: " + UNREAD[min(min(names) for names in named)]
    if steps and re.search(r"\.set_timesteps\([^)]*\bstage_", source):
        return steps, "no: " + UNREAD["HeliosDMDScheduler"]
    if steps:
        return steps, "yes"
    if owners:
        return (), "no: only copies of its scheduler are used"
    if re.search(r"self\.\w+_pipe\(", source) and "scheduler" in types:
        return (), "in a part"
    if re.search(r"scheduler\.\w*step_\w+\(", source):
        return (), "no: " + UNREAD.get(types["scheduler"], "another method than step")
    return (), "no: no sampling loop"


def _callback(methods: dict[str, Method], used: list[Method]) -> str:
    if "__call__" not in methods:
        return "none"
    names = {arg.arg for arg in _arguments(methods["__call__"])}
    if "callback_on_step_end" not in names:
        return "legacy" if "callback" in names else "none"
    source = "\n".join(method.text for method in used)
    if "callback_on_step_end(" not in source:
        return "passed on"
    if "= callback_on_step_end(" not in source:
        return "in place"
    return "used" if re.search(r"\.pop\(\s*\"latents\"", source) else "other tensors"


def _blocks(methods: dict[str, Method], used: list[Method], parts: set[str]) -> list[Block]:
    """The innermost loops that both evaluate a component and step, and what they call."""
    found: list[Block] = []
    helpers: dict[str, None] = {}
    for method in used:
        if not STEP.search(method.text):
            continue
        fit: list[Block] = []
        for loop in ast.walk(method.node):
            if isinstance(loop, ast.For | ast.While) and STEP.search(_text(loop)):
                names = [_text(call.func) for call in _calls(loop)]
                called = [name[5:] for name in names if name[5:] in methods and name[:5] == "self."]
                if called or any(_component(name, parts) for name in names):
                    # The walk goes from the outside in: keep the innermost.
                    fit = [other for other in fit if not _inside(loop, other)] + [loop]
                    helpers.update(dict.fromkeys(called))
        found += fit
    return found + [methods[name].node for name in helpers]


def _inside(loop: Block, other: Block) -> bool:
    return other.lineno <= loop.lineno and (loop.end_lineno or 0) <= (other.end_lineno or 0)


def _component(name: str, parts: set[str]) -> bool:
    """Whether a component is evaluated, by its own name or as the current model."""
    return name.removeprefix("self.") in parts or name in ("current_model", "unet", "transformer")


def _cfg(methods: dict[str, Method], used: list[Method], parts: set[str]) -> str:
    """How conditional and unconditional predictions come about in the sampling loop."""
    blocks = _blocks(methods, used, parts)
    source = "\n".join(_text(block) for block in blocks)
    if "guider.prepare_inputs" in source:
        return "guider"
    if "[::2]" in source:
        return "doubled, alternating"
    splits = sorted(split for block in blocks for split in _splits(block))
    if any(count != "2" for _, count, _ in splits):
        return "three or more"
    calls = sorted(found for block in blocks for found in _evaluations(block, parts))
    separate = any(negative for _, negative in calls) and not all(negative for _, negative in calls)
    # Where both are found, the prediction was split before a further evaluation, or it was not.
    if splits and not (separate and splits[0][0] > calls[1][0]):
        first = splits[0][2]
        prompt = PROMPT.search(first) and not NEGATIVE.search(first)
        return "doubled, prompt first" if prompt else "doubled"
    if re.search(r"(\w+) \+ negative_\1", source):
        return "doubled, prompt first"
    if separate:
        return "separate" if not calls[0][1] else "separate, unconditional first"
    return "none"


def _splits(block: Block) -> Iterator[tuple[int, str, str]]:
    """Line, number of parts and name of the first part, where a prediction is split by rows."""
    for node in ast.walk(block):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        call, target = node.value, _text(node.targets[0]).strip("()")
        source = _text(call)
        if re.search(r"dim=[^0]|embeds|mask|timestep|attention", source + target):
            continue
        if found := re.search(r"\.chunk\(([^,)]+)|split\(.*(?:// |, )(\d)", source):
            yield node.lineno, found[1] or found[2], target.split(", ")[0]


def _evaluations(block: Block, parts: set[str]) -> Iterator[tuple[int, bool]]:
    """Line of each evaluation of a component, and whether it is the unconditional one."""
    for node in ast.walk(block):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for call in _calls(node.value):
                if _component(_text(call.func), parts):
                    yield call.lineno, bool(NEGATIVE.search(_text(node)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.backends.census", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew docs/pipelines.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(section(rows()).strip() + "\n")


if __name__ == "__main__":
    main()
