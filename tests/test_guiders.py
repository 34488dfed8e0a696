"""Guiders by name: which there are, what `wrap` and `callback` make of a name, and with what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from torch import Tensor

import sparke
from sparke import guidance
from sparke._discover import GUIDERS
from sparke.errors import ArgumentError, SparkeError, UnknownName
from sparke.guidance import DiversityGuider, GuiderChain, SharedMemory
from sparke.guidance._hooks import HOOKS
from sparke.guidance.cads import CADS
from sparke.guidance.interval import Interval
from sparke.memory import RingMemory
from sparke.protocols import Guider, Run, State
from tests.samplers import run

PLUGIN = '''
from torch import zeros_like

class Still:
    """Does [nothing], see arXiv:1234.56789."""

    def __init__(self, memory=None, *, scale=1.0, **rest):
        self.memory, self.scale, self.rest = memory, scale, rest

    def begin(self, run): pass
    def __call__(self, state): return zeros_like(state.denoised)
    def finish(self, x): pass

    def on_noise(self, x): return x

class Own(Still):
    own_memory = True

def made(score="rke", *, needed) -> Still:
    return Still()

def nothing(): return 3
'''
ENTRIES = ("still:Still", "own:Own", "made:made", "nothing:nothing", "broken:Missing", "rke:Still")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guiders of another package, one of which has a score's name."""
    info = tmp_path / "sparke_stills-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparke-stills\nVersion: 1.0\n")
    lines = (" = sparke_stills:".join(entry.split(":")) for entry in ENTRIES)
    (info / "entry_points.txt").write_text("\n".join(("[sparke.guiders]", *lines)) + "\n")
    (tmp_path / "sparke_stills.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))


def wrapped(guider: Any, *args: Any, **options: Any) -> Any:
    return sparke.wrap(sampling.sample_euler, *args, guider=guider, **options).guider


# Names.


def test_the_names_are_those_of_the_files() -> None:
    folder = Path(guidance.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert {"diversity", "cads", "interval"} <= files
    assert guidance.names() == sorted(name.replace("_", "-") for name in files)


@pytest.mark.parametrize("name", guidance.names())
def test_each_file_has_a_class_that_can_be_imported_from_the_family(name: str) -> None:
    made = GUIDERS.factory(name)
    assert isinstance(made, type)
    assert getattr(guidance, made.__name__) is made


def test_the_family_has_nothing_else() -> None:
    for name in ("Nothing", "cads_", "Cads"):
        with pytest.raises(AttributeError, match=name):
            getattr(guidance, name)


@pytest.mark.usefixtures("plugins")
def test_plugins_have_names_too() -> None:
    assert {"still", "made", "broken"} <= set(guidance.names())
    guider: Any = guidance.guider("Still", scale=3.0, other=4)
    assert (guider.scale, guider.rest) == (3.0, {"other": 4})
    with pytest.raises(SparkeError, match=r"sparke-stills.*failed to load"):
        guidance.guider("broken")
    with pytest.raises(ArgumentError, match="no Guider"):
        guidance.guider("nothing")
    with pytest.raises(ArgumentError, match="needed"):
        guidance.guider("made")


def test_a_guider_by_name_has_its_options() -> None:
    guider = guidance.guider("CADS", s=0.5, tau1=0.1)
    assert isinstance(guider, CADS)
    assert (guider.s, guider.tau1, guider.tau2) == (0.5, 0.1, CADS().tau2)
    assert guidance.guider(guider) is guider
    diversity = guidance.guider("diversity", score="rke", bandwidth=0.3)
    assert isinstance(diversity, DiversityGuider)
    assert diversity.score == sparke.score("rke", bandwidth=0.3)


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("cadz", {}, UnknownName, "Did you mean 'cads'"),
        ("cads", {"S": 1}, ArgumentError, "'S'"),
        ("cads", {"s": -1}, ArgumentError, "s must be"),
        (CADS(), {"s": 1}, ArgumentError, "object already"),
        (3, {}, ArgumentError, "no Guider"),
    ],
)
def test_what_cannot_be_made_is_an_error(
    name: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        guidance.guider(name, **options)


# `wrap` and `callback`.


def test_a_name_is_a_guiders_then_a_scores() -> None:
    assert isinstance(wrapped("cads"), CADS)
    diversity = wrapped("Cond_Vendi")
    assert isinstance(diversity, DiversityGuider)
    assert diversity.score == sparke.score("cond-vendi")


@pytest.mark.usefixtures("plugins")
def test_a_guiders_name_goes_before_a_scores() -> None:
    assert type(wrapped("rke")).__name__ == "Still"
    assert isinstance(wrapped("vendi"), DiversityGuider)


@pytest.mark.parametrize("make", [wrapped, lambda guider: sparke.callback(guider=guider)])
def test_an_unknown_name_comes_with_near_ones_of_both_kinds(make: Any) -> None:
    with pytest.raises(UnknownName, match=r"guider='cond-rk'.*'cond-rke'.*Known: .*cads.*vendi"):
        make("cond-rk")
    with pytest.raises(UnknownName, match="Did you mean 'interval'"):
        make(["cond-rke", "intervall"])


def test_names_and_objects_make_a_chain_in_their_order() -> None:
    own = DiversityGuider("rke")
    chain = wrapped(["cads", own, "vendi"])
    assert isinstance(chain, GuiderChain)
    first, second, third = chain.guiders
    assert isinstance(first, CADS)
    assert second is own
    assert isinstance(third, DiversityGuider)
    assert third.score == sparke.score("vendi")
    assert third.memory is not own.memory


def test_a_string_is_not_taken_for_a_sequence_of_names() -> None:
    assert isinstance(wrapped(("cads",)), GuiderChain)
    assert isinstance(wrapped("cads"), CADS)


def test_options_go_to_the_one_made_by_name() -> None:
    assert wrapped("cads", s=0.5).s == 0.5
    assert wrapped("vendi", scale=0.3, in_batch=False).scale == 0.3
    own = DiversityGuider("rke")
    chain = wrapped([own, "vendi"], scale=0.3, bandwidth=2.0)
    assert chain.guiders[1].scale == 0.3
    assert chain.guiders[1].score == sparke.score("vendi", bandwidth=2.0)
    assert own.scale != 0.3
    assert wrapped("diversity", "rke").score == sparke.score("rke")
    assert sparke.callback(guider="vendi", scale=0.3).guider.scale == 0.3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("guider", "options", "said"),
    [
        ("cads", {"scale": 0.3}, "'cads' takes no scale.*Its options: s, tau1"),
        ("cads", {"score": "rke"}, "takes no score"),
        ("vendi", {"score": "rke"}, "takes no score"),
        ("cads", {"memory": RingMemory()}, "takes no memory"),
        (["cads", DiversityGuider()], {"memory": RingMemory()}, "takes no memory"),
        (["cads", "vendi"], {"scale": 0.3}, r"scale could be meant for any of .*guider\('cads'"),
        (["cads", "vendi"], {"s": 0.3}, "s could be meant"),
        ([CADS(), DiversityGuider()], {"scale": 0.3}, "scale would go nowhere"),
        ("cads", {"cfg_interval": None}, "takes no cfg_interval"),
    ],
)
def test_options_that_reach_no_guider_are_an_error(
    guider: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ArgumentError, match=said):
        wrapped(guider, **options)


@pytest.mark.usefixtures("plugins")
def test_options_of_wrap_are_not_passed_on_unasked() -> None:
    # A factory with **options takes what is its own, and of wrap's only what it names.
    assert wrapped("still", scale=2.0, other=3).rest == {"other": 3}
    with pytest.raises(ArgumentError, match="takes no in_batch"):
        wrapped("still", in_batch=False)


@pytest.mark.parametrize("name", ["cvsg", "novelty"])
def test_what_is_asked_for_counts_where_wrap_has_it_as_its_default(name: str) -> None:
    rows = torch.randn(6, 320)
    given: dict[str, Any] = {"exemplars": rows} if name == "cvsg" else {"reference": rows}
    guider: Any = sparke.wrap(
        sampling.sample_euler, guider=name, score="rke", in_batch=True, scale=0.4, **given
    ).guider
    left: Any = sparke.wrap(sampling.sample_euler, guider=name, **given).guider
    assert "RKE" in repr(guider)
    assert "scale=0.4" in repr(guider)
    assert "scale=0.4" not in repr(left)
    assert ("in_batch=True" in repr(guider)) or name == "cvsg"


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.4}, {"score": "cond-rke"}, {"in_batch": True}, {"cfg_interval": "auto"}],
)
def test_options_that_reach_nobody_are_errors_also_at_their_defaults(
    options: dict[str, Any],
) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        sparke.wrap(sampling.sample_euler, guider="cads", **options)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        sparke.wrap(sampling.sample_euler, guider=sparke.DiversityGuider("rke"), **options)


@pytest.mark.parametrize("given", [sparke.DiversityGuider, [sparke.DiversityGuider, "noise"]])
def test_a_class_is_no_guider(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"is a class; make a guider of it: DiversityGuider"):
        sparke.wrap(sampling.sample_euler, guider=given)


# Memory.


def test_memory_goes_to_all_made_by_name_and_takes_each_sample_once() -> None:
    memory = RingMemory()
    sampler = sparke.wrap(sampling.sample_euler, guider=["cads", "rke", "vendi"], memory=memory)
    _, rke, vendi = sampler.guider.guiders
    assert isinstance(rke.memory, SharedMemory)
    assert rke.memory is vendi.memory
    assert sampler.memory is memory
    made = [run(sampler, seed=seed) for seed in range(2)]
    assert torch.equal(memory.features.x, torch.cat(made))
    assert len(rke.memory) == len(vendi.memory) == 16


@pytest.mark.usefixtures("plugins")
def test_who_keeps_rows_of_its_own_shares_no_memory() -> None:
    memory = RingMemory()
    own, rke = wrapped(["own", "vendi"], memory=memory).guiders
    assert own.memory is None
    assert rke.memory is memory
    assert wrapped("own", memory=memory).memory is memory


# Conflicts.


def test_conflicts_are_told_when_wrapping() -> None:
    with pytest.raises(ArgumentError, match=r"Interval\(0.28, 5.42\) and .*Interval\(0.28, 2.0\)"):
        wrapped(["interval", Interval(hi=2.0)])
    with pytest.raises(ArgumentError, match="DiversityGuider"):
        wrapped(["interval", "vendi", DiversityGuider(cfg_interval=(0, 1))])
    with pytest.raises(ArgumentError, match=r"ERG\(.*Interval\(.*classifier-free guidance"):
        wrapped([guidance.guider("erg", weak="prompt"), "cads", "interval"])
    assert len(wrapped(["interval", "vendi", "rke"]).guiders) == 3


@pytest.mark.parametrize("name", ["cads", "noise", "erg", "contextual"])
def test_a_callback_says_what_it_cannot_do(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"callback.*Hook.*sparke.wrap"):
        sparke.callback(guider=["vendi", name])


def test_a_callback_takes_the_others() -> None:
    class Resting(CADS):
        idle = frozenset({"condition"})

    given: list[Any] = ["interval", "vendi", ["interval", "vendi"], [Resting(), "vendi"]]
    for guider in given:
        assert isinstance(sparke.callback(guider=guider).guider, Guider)


def test_guiders_of_all_hooks_run_together() -> None:
    memory = RingMemory()
    names = ["noise", "cads", "interval", "cond-rke"]
    sampler = sparke.wrap(sampling.sample_euler, guider=names, memory=memory)
    made = [run(sampler, seed=seed, cond_scale=3.0) for seed in (0, 1, 1)]
    assert all(bool(torch.isfinite(x).all()) for x in made)
    assert len(memory) == 24
    # Without memory between them, the same noise gives the same samples.
    memory.clear()
    assert torch.equal(run(sampler, seed=0, cond_scale=3.0), made[0])
    assert not torch.allclose(made[0], run(sampling.sample_euler, cond_scale=3.0), atol=1e-2)


def test_a_guider_of_ones_own_needs_no_name() -> None:
    class Mine:
        def begin(self, run: Run) -> None:
            self.begun = run.shape

        def __call__(self, state: State) -> Tensor:
            return 0.5 * state.denoised

        def finish(self, x: Tensor) -> None:
            self.made = x

    mine = Mine()
    made = run(sparke.wrap(sampling.sample_euler, guider=mine))
    assert torch.equal(mine.made, made)
    assert mine.begun == made.shape
    assert not torch.allclose(made, run(sampling.sample_euler), atol=0.1)


def test_what_the_page_on_extending_says_of_guiders_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("## A guider\n")[2].partition("## A backend\n")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "block", "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    shown = [line for line in shown if line.startswith("  ") and line[2].isdigit()]
    assert [line.split("(")[0].strip() for line in shown[::2]] == ["1. CADS", "3. DiversityGuider"]
    made = run(names["sampler"])
    assert not torch.allclose(made, run(sampling.sample_euler), atol=1e-2)
    hooks = {
        line.split("|")[1].strip(" `").split("(")[0]
        for line in section.splitlines()
        if "`on_" in line and line.startswith("|")
    }
    assert hooks == {f"on_{name}" for name in HOOKS}
