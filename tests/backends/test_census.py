"""The census of diffusers' pipelines: it counts all, and the page in the docs is up to date."""

import collections
import re
from pathlib import Path
from typing import Any

import pytest

from sparke.backends import _schedulers
from tests.backends import census

ARGUMENTS: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 0},
    "HeliosScheduler": {"stages": 1},  # as HeliosPipeline needs it
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log",
        "noise_mode": "tan",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
    },
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
PINS = Path(__file__).parents[2] / "constraints.txt"


@pytest.fixture(scope="module")
def rows() -> dict[str, census.Row]:
    pytest.importorskip("diffusers")
    found = census.rows()
    assert len({row.name for row in found}) == len(found)
    return {row.name: row for row in found}


def test_every_exported_pipeline_has_a_row(rows: dict[str, census.Row]) -> None:
    import diffusers

    structure = diffusers._import_structure
    exported = {name for names in structure.values() for name in names if _is_pipeline(name)}
    assert len(exported) > 200
    assert exported - set(rows) == set()


def _is_pipeline(name: str) -> bool:
    automatic = name.startswith(("AutoPipeline", "Diffusion")) or "Modular" in name
    return name.endswith("Pipeline") and not automatic


def test_the_numbers_add_up(rows: dict[str, census.Row]) -> None:
    wraps = collections.Counter(row.wrap.split(":")[0] for row in rows.values())
    assert set(wraps) == {"yes", "in a part", "no"}
    assert wraps["yes"] > 0.9 * len(rows)
    callbacks = {"used", "in place", "other tensors", "passed on", "legacy", "none"}
    assert {row.callback for row in rows.values()} == callbacks
    assert {row.cfg for row in rows.values() if row.wrap != "yes"} == {"-"}
    assert "-" not in {row.cfg for row in rows.values() if row.wrap == "yes"}
    assert any(row.deprecated for row in rows.values())

    counts = dict(
        re.findall(r"^\| ([^|]+) \| (\d+) \| \d+ \|$", census.summary(rows.values()), re.MULTILINE)
    )
    assert int(counts.pop("classes")) == len(rows)
    reached = int(counts.pop("reached by `sparke.wrap`"))
    assert reached == wraps["yes"] + wraps["in a part"] == len(rows) - wraps["no"]
    assert sum(map(int, counts.values())) == len(rows)


def test_a_class_that_steps_has_the_scheduler_as_a_component(rows: dict[str, census.Row]) -> None:
    for row in rows.values():
        assert set(row.steps) <= set(row.schedulers), row
        assert bool(row.steps) or row.wrap != "yes", row


def test_a_class_that_steps_is_reached_or_its_schedulers_cannot_be_read(
    rows: dict[str, census.Row],
) -> None:
    reasons = {f"no: {reason}" for reason in census.UNREAD.values()}
    for row in rows.values():
        assert not row.steps or row.wrap == "yes" or row.wrap in reasons, row


def test_the_unread_schedulers_are_those_that_wrap_refuses(rows: dict[str, census.Row]) -> None:
    from diffusers import schedulers

    named = {kind for row in rows.values() for kind in row.kinds if "Inverse" not in kind}
    assert set(census.UNREAD) <= named
    made = {kind: getattr(schedulers, kind)(**ARGUMENTS.get(kind, {})) for kind in named}
    refused = {kind for kind, one in made.items() if not _schedulers.supported(one)}
    assert refused == set(census.UNREAD)


@pytest.mark.parametrize(
    ("name", "wrap", "callback", "cfg"),
    [
        ("StableDiffusionPipeline", "yes", "used", "doubled"),
        ("StableDiffusionXLPipeline", "yes", "used", "doubled"),
        ("StableDiffusion3Pipeline", "yes", "used", "doubled"),
        ("StableDiffusionPAGPipeline", "yes", "used", "three or more"),
        ("StableDiffusionInstructPix2PixPipeline", "yes", "used", "three or more"),
        ("DiTPipeline", "yes", "none", "doubled, prompt first"),
        ("PixArtSigmaPipeline", "yes", "legacy", "doubled"),
        ("ZImagePipeline", "yes", "used", "doubled, prompt first"),
        ("LTX2Pipeline", "yes", "used", "doubled"),
        ("PRXPipeline", "yes", "in place", "doubled"),
        ("FluxPipeline", "yes", "used", "separate"),
        ("QwenImagePipeline", "yes", "used", "separate"),
        ("WanPipeline", "yes", "used", "separate"),
        ("CosmosTextToWorldPipeline", "yes", "used", "separate"),
        ("HunyuanImagePipeline", "yes", "used", "guider"),
        ("LatentConsistencyModelPipeline", "yes", "used", "none"),
        ("DDPMPipeline", "yes", "none", "none"),
        ("UnCLIPPipeline", "yes", "none", "doubled"),
        ("KandinskyV22CombinedPipeline", "in a part", "passed on", "-"),
        (
            "SkyReelsV2DiffusionForcingPipeline",
            "no: only copies of its scheduler are used",
            "used",
            "-",
        ),
        ("HeliosPipeline", "yes", "used", "separate"),
        (
            "HeliosPyramidPipeline",
            "no: noise levels that start anew in each stage",
            "used",
            "-",
        ),
        ("AmusedPipeline", "no: discrete tokens", "legacy", "-"),
        ("RFD4ProteinaPipeline", "no: protein coordinates", "other tensors", "-"),
        ("FluxPriorReduxPipeline", "no: no sampling loop", "none", "-"),
    ],
)
def test_classes_known_from_reading(
    rows: dict[str, census.Row], name: str, wrap: str, callback: str, cfg: str
) -> None:
    if name not in rows:
        pytest.skip(f"this diffusers has no {name}")
    row = rows[name]
    assert (row.wrap, row.callback, row.cfg) == (wrap, callback, cfg)


def test_components_known_from_reading(rows: dict[str, census.Row]) -> None:
    assert rows["FluxPipeline"].steps == rows["FluxPipeline"].schedulers == ("scheduler",)
    assert set(rows["UnCLIPPipeline"].steps) == {
        "prior_scheduler",
        "decoder_scheduler",
        "super_res_scheduler",
    }


def test_the_page_has_these_figures(rows: dict[str, census.Row]) -> None:
    pinned = re.findall(r"^diffusers==(.+)$", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    if [census.installed()] != pinned:
        pytest.skip(f"the page is of diffusers {pinned}, installed is {census.installed()}")
    written = census.PAGE.read_text(encoding="utf-8")
    assert census.table(rows.values()) in written
    assert written == census.page(), "run python -m tests.backends.census --write"
