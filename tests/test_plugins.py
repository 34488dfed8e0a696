"""Plugins of other packages: found by real metadata, checked when loaded, named in errors.

Every package here is a dist-info folder written into a temporary one, as pip would leave it.
"""

from __future__ import annotations

import io
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from rich.console import Console

import sparke
from sparke import backends, guidance, memory
from sparke._cli import listing
from sparke._discover import BACKENDS, FAMILIES, GUIDERS, MEMORIES, SCORES, PluginError
from sparke.errors import ArgumentError, SparkeError, UnknownName, UnsupportedTarget
from sparke.memory import DiskMemory, RingMemory
from sparke.testing import check_package
from tests.samplers import run

Install = Callable[..., str]

SCORE = """
from dataclasses import dataclass
from sparke import Requires

@dataclass(frozen=True)
class Good:
    '''Counts [a] thing, see arXiv:1234.56789.'''
    width: float = 1.0
    requires: Requires = Requires()

    def __call__(self, query, bank):
        return query.x.square().sum(1)

def made(*, width=2.0):
    if width < 0:
        raise RuntimeError("width went wrong")
    return Good(width)

def nothing():
    return 3

class Short(Good):
    def __call__(self, query): ...

class Bare:
    requires = Requires()

class NoRequires:
    def __call__(self, query, bank): ...

class WrongRequires(NoRequires):
    requires = {"cond": True}

class WrongDirection(Good):
    def direction(self, query): ...

class Late(NoRequires):
    def __init__(self):
        self.requires = "prompts"

INSTANCE = Good()
NUMBER = 3
"""
MEMORY = """
from sparke.memory import RingMemory

class Good(RingMemory):
    '''Keeps things.'''

class Short(RingMemory):
    def select(self, cond): ...

class Bare:
    def __len__(self): return 0
    def commit(self, items): ...

def nothing():
    return {}

INSTANCE = RingMemory()
"""
GUIDER = """
from torch import zeros_like

class Good:
    '''Does a thing.'''
    def __init__(self, memory=None): self.memory = memory
    def begin(self, run): pass
    def __call__(self, state): return zeros_like(state.denoised)
    def finish(self, x): pass

class Short(Good):
    def begin(self): ...

class Bare:
    def begin(self, run): ...
    def finish(self, x): ...

class WrongHook(Good):
    def on_noise(self): ...

def nothing():
    return 3

INSTANCE = Good()
"""
BACKEND = """
'''Wraps strings.'''
import functools

class Guided(str):
    pass

def accepts(target):
    return isinstance(target, str)

def attach(target, guider, *, prompt_embeds=None):
    wrapped = Guided(target)
    wrapped.guider = guider
    return wrapped
"""
TEXTS = {"sparke.scores": SCORE, "sparke.memory": MEMORY, "sparke.guiders": GUIDER}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package on the path; returns the name of its module, which no other test uses."""

    def installed(
        entries: Mapping[str, Mapping[str, str]],
        text: str = "",
        *,
        dist: str = "sparke-extra",
        metadata: str | None = None,
        listed: str | None = None,
    ) -> str:
        folder = tmp_path / uuid.uuid4().hex
        module = f"extra_{folder.name}"
        info = folder / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        if metadata is None:
            metadata = f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n"
        if metadata:
            (info / "METADATA").write_text(metadata, encoding="utf-8")
        lines = []
        for group, found in entries.items():
            lines.append(f"[{group}]")
            lines += [f"{name} = {value.format(module)}" for name, value in found.items()]
        said = "\n".join(lines) + "\n" if listed is None else listed
        (info / "entry_points.txt").write_text(said, encoding="utf-8")
        (folder / f"{module}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        return module

    return installed


def shown(show: Callable[[Console], None]) -> str:
    console = Console(file=io.StringIO(), width=400)
    show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, name: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return found


# All four groups alike.


@pytest.mark.parametrize(
    ("family", "text", "entry", "made"),
    [
        (SCORES, SCORE, "{}:Good", sparke.score),
        (MEMORIES, MEMORY, "{}:Good", memory.memory),
        (GUIDERS, GUIDER, "{}:Good", guidance.guider),
        (BACKENDS, BACKEND, "{}", backends.backend),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_each_group_has_names_makes_by_name_and_lists(
    install: Install, family: Any, text: str, entry: str, made: Callable[..., Any]
) -> None:
    before = family.names()
    assert "my-thing" not in before
    module = install({family.group: {"my-thing": entry}}, text)
    assert family.names() == sorted([*before, "my-thing"])
    assert sys.modules[family.package].names() == family.names()
    thing = made("my-thing")
    assert getattr(thing, "__module__", getattr(thing, "__name__", None)) == module
    assert made(thing) is thing
    assert made("My_Thing") is not None
    shows = {
        "score": listing.show_scores,
        "memory": listing.show_memories,
        "guider": listing.show_guiders,
        "backend": listing.show_backends,
    }
    line = row(shown(shows[family.kind]), "my-thing")
    assert "sparke-extra" in line
    assert "cannot be used" not in line
    assert check_package("sparke-extra") == {family.group: ["my-thing"]}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_ours_have_names_and_can_be_loaded(family: Any) -> None:
    folder = Path(sys.modules[family.package].__path__[0])
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert family.names() == sorted(name.replace("_", "-") for name in files)
    for name in family.names():
        assert family.factory(name).__module__ if family.made else family.factory(name).__name__
    with pytest.raises(UnknownName, match=f"Did you mean '{family.names()[0]}'"):
        family.factory(family.names()[0] + "x")


def test_a_plugin_is_used_as_ours_are(install: Install) -> None:
    install(
        {
            "sparke.scores": {"thing": "{}:Good"},
            "sparke.memory": {"thing": "{}:Keep"},
            "sparke.guiders": {"push": "{}:Push"},
        },
        SCORE + MEMORY.replace("Good", "Keep") + GUIDER.replace("Good", "Push"),
    )
    sampler = sparke.wrap(sampling.sample_euler, "thing", memory="thing", width=3.0)
    assert type(sampler.memory).__name__ == "Keep"
    assert sampler.guider.score.width == 3.0
    run(sampler)
    assert len(sampler.memory) == 8
    chain = sparke.wrap(sampling.sample_euler, guider=["push", "thing"], memory="thing").guider
    assert type(chain.memory).__name__ == "Keep"


# Memory by name.


def test_a_memory_is_given_by_name(tmp_path: Path) -> None:
    assert memory.names() == ["disk", "reference", "ring", "sharded"]
    ring = memory.memory("ring", capacity=7)
    assert isinstance(ring, RingMemory)
    assert ring.capacity == 7
    assert memory.memory(ring) is ring
    assert isinstance(memory.memory("Disk", path=tmp_path / "new"), DiskMemory)
    first, second = (sparke.wrap(sampling.sample_euler, "rke", memory="ring") for _ in range(2))
    assert isinstance(first.memory, RingMemory)
    assert first.memory is not second.memory
    assert isinstance(sparke.callback("rke", memory="ring").memory, RingMemory)  # type: ignore[arg-type,unused-ignore]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("rings", UnknownName, "Did you mean 'ring'"),
        ("", UnknownName, "Known: disk"),
        ("disk", ArgumentError, r"'path'.*Make it with sparke.memory.memory\('disk', ...\)"),
        ("a/history", ArgumentError, "looks like a file.*RingMemory.load"),
        ("history.safetensors", ArgumentError, "looks like a file"),
        (Path("history"), ArgumentError, "looks like a file"),
        ({}, ArgumentError, r"no Memory: it lacks commit\(items\). It needs __len__\(\), commit"),
        (RingMemory, ArgumentError, r"is a class; make a memory of it: RingMemory\(...\)"),
    ],
)
def test_a_memory_that_cannot_be_is_an_error(given: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        sparke.wrap(sampling.sample_euler, "rke", memory=given)


def test_options_of_an_object_have_nowhere_to_go() -> None:
    with pytest.raises(ArgumentError, match=r"memory is an object already.*'capacity'"):
        memory.memory(RingMemory(), capacity=3)


# Plugins that cannot be used: each names its package, its entry point and the reason.

BROKEN = {
    "sparke.scores": {
        "{}:Missing": "failed to load: AttributeError.*Missing",
        "{}.inner:Good": "failed to load: ModuleNotFoundError",
        "no_such_module_at_all:Good": "failed to load: ModuleNotFoundError.*no_such_module_at_all",
        "two words": "failed to load: its value must be 'module' or 'module:attribute'",
        "{}": "neither a class nor a function that makes a score",
        "{}:NUMBER": "3 of type int, neither a class nor a function",
        "{}:INSTANCE": "a score already; name its class",
        "{}:Short": r"cannot be called as __call__\(query, bank\), its own is .*self, query\)",
        "{}:Bare": r"lacks __call__\(query, bank\)",
        "{}:NoRequires": "`requires` must be of type sparke.Requires, got None",
        "{}:WrongRequires": "`requires` must be of type sparke.Requires, got {'cond': True}",
        "{}:Late": "`requires` must be of type sparke.Requires, got 'prompts'",
        "{}:WrongDirection": r"cannot be called as direction\(query, bank\)",
        "{}:nothing": r"is no Score: it lacks __call__",
    },
    "sparke.memory": {
        "{}:Short": r"cannot be called as select\(\)",
        "{}:Bare": r"lacks select\(\)",
        "{}:INSTANCE": "a memory already",
        "{}:nothing": r"is no Memory: it lacks commit\(items\)",
    },
    "sparke.guiders": {
        "{}:Short": r"cannot be called as begin\(run\)",
        "{}:Bare": r"lacks __call__\(state\)",
        "{}:INSTANCE": "a guider already",
        "{}:WrongHook": r"cannot be called as on_noise\(x\)",
        "{}:nothing": r"is no Guider: it lacks begin\(run\)",
    },
}
MAKE: dict[str, Callable[..., Any]] = {
    "sparke.scores": sparke.score,
    "sparke.memory": memory.memory,
    "sparke.guiders": guidance.guider,
}


@pytest.mark.parametrize(
    ("group", "value", "said"),
    [(group, value, said) for group, all_ in BROKEN.items() for value, said in all_.items()],
)
def test_a_broken_plugin_is_told(install: Install, group: str, value: str, said: str) -> None:
    module = install({group: {"broken": value, "good": "{}:Good"}}, TEXTS[group])
    with pytest.raises(PluginError, match=said) as caught:
        MAKE[group]("broken")
    assert f"sparke-extra (broken = {value.format(module)})" in str(caught.value)
    assert "Upgrade sparke-extra" in str(caught.value)
    assert isinstance(caught.value, SparkeError)
    # Neither ours nor its neighbour suffers.
    assert MAKE[group]("good") is not None
    assert "broken" in sys.modules["sparke.scores"].names() or group != "sparke.scores"
    line = row(shown(listing.show_scores), "broken") if group == "sparke.scores" else "cannot be"
    assert "cannot be" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import warnings; warnings.warn('old', UserWarning)", "UserWarning: old"),
    ],
)
def test_a_module_that_fails_at_import(install: Install, text: str, said: str) -> None:
    install({"sparke.scores": {"broken": "{}:Good"}}, text)
    with pytest.raises(PluginError, match=said):
        sparke.score("broken")
    assert said.split(":")[0] in row(shown(listing.show_scores), "broken")
    assert sparke.score("rke") is not None
    with pytest.raises(AssertionError, match=said):
        check_package("sparke-extra")


def test_ctrl_c_while_a_plugin_loads_comes_through(install: Install) -> None:
    install({"sparke.scores": {"slow": "{}:Good"}}, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        sparke.score("slow")


def test_a_factory_that_fails_is_told_with_its_options(install: Install) -> None:
    install({"sparke.scores": {"made": "{}:made"}}, SCORE)
    assert sparke.score("made").width == 2.0  # type: ignore[attr-defined]
    with pytest.raises(
        PluginError,
        match=r"score 'made' of package sparke-extra .*made with the options .*-1.*"
        r"RuntimeError: width went wrong. If these are right: Upgrade",
    ):
        sparke.score("made", width=-1)
    with pytest.raises(ArgumentError, match=r"score='made': .*'with'.*Its options: width=2.0"):
        sparke.score("made", **{"with": 1})
    with pytest.raises(PluginError, match="width went wrong"):
        sparke.wrap(sampling.sample_euler, "made", width=-1)


# Names.


def test_two_packages_of_one_name_are_an_error_that_names_both(install: Install) -> None:
    install({"sparke.scores": {"thing": "{}:Good", "other": "{}:Good"}}, SCORE, dist="first-one")
    install({"sparke.scores": {"Thing": "{}:Good"}}, SCORE, dist="second-one")
    assert sparke.scores().count("thing") == 1
    with pytest.raises(
        PluginError,
        match=r"ambiguous.*first-one \(thing = .*second-one \(Thing = |"
        r"ambiguous.*second-one \(Thing = .*first-one \(thing = ",
    ):
        sparke.score("thing")
    assert sparke.score("other") is not None
    line = row(shown(listing.show_scores), "thing")
    assert "cannot be used" in line
    assert "first-one" in line
    assert "second-one" in line
    with pytest.raises(AssertionError, match="has the name of"):
        check_package("first-one")


def test_one_package_found_twice_is_one(install: Install) -> None:
    install({"sparke.scores": {"thing": "extra_same:Good"}}, SCORE)
    install({"sparke.scores": {"thing": "extra_same:Good"}}, SCORE)
    assert len([p for p in SCORES.plugins if p.name == "thing"]) == 1


def test_our_names_stay_ours(install: Install) -> None:
    install({"sparke.scores": {"rke": "{}:Good", "Cond_RKE": "{}:Good"}}, SCORE)
    assert type(sparke.score("rke")).__module__ == "sparke.scores.rke"
    assert type(sparke.score("cond-rke")).__module__ == "sparke.scores.cond_rke"
    text = shown(listing.show_scores)
    assert "sparke-extra" not in row(text, "rke")
    assert "Ignored: score 'rke' of package sparke-extra" in text
    assert "Ignored: score 'cond-rke' of package sparke-extra (Cond_RKE = " in text
    with pytest.raises(AssertionError, match="'rke' is sparke's own name"):
        check_package("sparke-extra")


def test_names_are_asked_for_in_small_letters_and_dashes(install: Install) -> None:
    install({"sparke.scores": {"My_Own_SCORE": "{}:Good"}}, SCORE)
    assert "my-own-score" in sparke.scores()
    for name in ("my-own-score", "My_Own_SCORE", "MY-own_score"):
        assert type(sparke.score(name)).__name__ == "Good"
    with pytest.raises(AssertionError, match="goes by the name 'my-own-score'; register it as"):
        check_package("sparke-extra")


# Metadata.


def test_a_package_without_a_name_is_unknown(install: Install) -> None:
    install({"sparke.scores": {"thing": "{}:Missing"}}, SCORE, metadata="")
    with pytest.raises(PluginError, match=r"package an unknown package|package \S+ \(thing"):
        sparke.score("thing")


@pytest.mark.parametrize("listed", ["[sparke.scores]\nno equals sign\n", "name = before:group\n"])
def test_metadata_that_cannot_be_read_fails_nobody_else(install: Install, listed: str) -> None:
    install({"sparke.scores": {"thing": "{}:Good"}}, SCORE, dist="good-one")
    install({}, dist="bad-one", listed=listed)
    assert "thing" in sparke.scores()
    assert type(sparke.score("thing")).__name__ == "Good"
    assert row(shown(listing.show_scores), "thing").count("good-one") == 1
    assert isinstance(sparke.wrap(sampling.sample_euler, "rke").memory, RingMemory)


# Backends.


def test_a_backend_of_a_plugin_wraps_what_ours_do_not(install: Install) -> None:
    install({"sparke.backends": {"texts": "{}"}}, BACKEND)
    wrapped = sparke.wrap("a host", "rke")
    assert wrapped == "a host"
    assert isinstance(wrapped.guider, sparke.DiversityGuider)  # type: ignore[attr-defined]
    assert sparke.wrap("a host", "rke", backend="texts") == "a host"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "failed to load: ZeroDivisionError"),
        ("def accepts(target): return True", r"lacks attach\(target, guider, prompt_embeds=\)"),
        (BACKEND.replace(", *, prompt_embeds=None", ""), "cannot be called as attach"),
        ("def accepts(): ...\ndef attach(target, guider, **options): ...", "called as accepts"),
        (BACKEND.replace("return isinstance", "return 1 / 0 and isinstance"), "failed in accepts"),
    ],
)
def test_a_broken_backend_breaks_nobody_elses(install: Install, text: str, said: str) -> None:
    install({"sparke.backends": {"broken": "{}"}}, text, dist="bad-one")
    assert run(sparke.wrap(sampling.sample_euler, "rke")).shape == (8, 2)
    with pytest.raises(UnsupportedTarget, match="no backend accepts it.*Passed over: .*" + said):
        sparke.wrap(3, "rke")
    with pytest.raises(UnsupportedTarget, match=r"package bad-one \(broken = .*Upgrade bad-one"):
        sparke.wrap("a host", "rke")
    assert "broken" in backends.names()
    assert shown(listing.show_backends).count("cannot be used") == ("failed in" not in said)
    install({"sparke.backends": {"texts": "{}"}}, BACKEND, dist="good-one")
    assert sparke.wrap("a host", "rke") == "a host"


def test_plugins_are_not_loaded_for_what_ours_accept(install: Install) -> None:
    greedy = BACKEND.replace("isinstance(target, str)", "True")
    module = install({"sparke.backends": {"greedy": "{}"}}, greedy)
    sampler: Any = sparke.wrap(sampling.sample_euler, "rke")
    assert module not in sys.modules
    assert run(sampler).shape == (8, 2)
    chosen: Any = sparke.wrap(3.5, "rke")
    assert module in sys.modules
    assert type(chosen).__module__ == module


def test_two_backends_that_accept_are_chosen_between(install: Install) -> None:
    install({"sparke.backends": {"one": "{}"}}, BACKEND, dist="first-one")
    second = install({"sparke.backends": {"two": "{}"}}, BACKEND, dist="second-one")
    with pytest.raises(UnsupportedTarget, match=r"several backends.*\['one', 'two'\].*backend="):
        sparke.wrap("a host", "rke")
    assert type(sparke.wrap("a host", "rke", backend="two")).__module__ == second


def test_a_backend_that_is_no_module(install: Install) -> None:
    text = (
        BACKEND + "\nclass Kind:\n    def accepts(self, t): ...\n    def attach(self, t, g): ...\n"
    )
    install({"sparke.backends": {"kind": "{}:Kind"}}, text)
    with pytest.raises(PluginError, match="cannot be called as accepts"):
        backends.backend("kind")


class Strings:
    """A backend that nobody installed."""

    def accepts(self, target: object) -> bool:
        return isinstance(target, str)

    def attach(self, target: Any, guider: sparke.Guider, **options: Any) -> Any:
        return target, guider, options


def test_a_backend_is_given_as_an_object() -> None:
    wrapped: Any = sparke.wrap("a host", "rke", backend=Strings())
    assert wrapped[0] == "a host"
    assert wrapped[2] == {"prompt_embeds": None}
    encoded: Any = sparke.wrap("a host", "rke", backend=Strings(), prompt_encoder=torch.tensor)
    assert encoded[2]["prompt_encoder"] is torch.tensor
    by_name = sparke.wrap(sampling.sample_euler, "rke", backend="k_diffusion")
    assert run(by_name).shape == (8, 2)
    for given, error, said in (
        ("diffusers", UnsupportedTarget, "'sample_euler' cannot be wrapped by backend='diffusers'"),
        ("k-difusion", UnknownName, "Did you mean 'k-diffusion'"),
        (3, ArgumentError, r"no Backend: it lacks accepts\(target\)"),
        (Strings, ArgumentError, r"is a class; make a backend of it: Strings\(...\)"),
    ):
        with pytest.raises(error, match=said):
            sparke.wrap(sampling.sample_euler, "rke", backend=given)  # type: ignore[arg-type]


# A package as a whole.


def test_a_package_that_registers_nothing(install: Install) -> None:
    install({"other.group": {"thing": "{}:Good"}}, SCORE, dist="nothing-here")
    with pytest.raises(AssertionError, match=r"nothing-here registers nothing.*sparke.backends"):
        check_package("nothing-here")
    with pytest.raises(AssertionError, match="no package 'not-there' is installed"):
        check_package("not-there")
