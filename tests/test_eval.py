"""`sparke eval`: that its numbers are right, and what the table, the report and the JSON tell."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sparke
from sparke import metrics
from sparke._cli.evaluation import nearest, verdict
from sparke._cli.evaluation.changes import _sign_test
from sparke._cli.evaluation.explain import MEASURES
from sparke.cli import main
from sparke.images import image_features
from tests.eval_pictures import Run, command, folder, picture, tree

STEMS = ("red-ball", "old-woman", "tulip")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `sparke eval` in a folder with two sets: A, of which every four are copies, and B."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "A", STEMS, 8, copies=4)
    folder(tmp_path / "B", STEMS, 8)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command(*argv)
        return code, *capsys.readouterr()

    return call


def told(path: Path = Path("out.json")) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def one_hot(names: list[str]) -> torch.Tensor:
    prompts = [re.sub(r"-\d+\.png", "", name) for name in names]
    ids = [sorted(set(prompts)).index(prompt) for prompt in prompts]
    return torch.nn.functional.one_hot(torch.tensor(ids)).double()


QUIET = ("--encoder", "pixels")


def test_the_numbers_are_those_of_the_library(run: Run, tmp_path: Path) -> None:
    folder(tmp_path / "R", STEMS, 6, first=4)
    argv = ("A", "B", "--prompts-from-names", *QUIET, "--reference", "R", "--json", "out.json")
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    rows = {name: image_features(name, "pixels") for name in "ABR"}
    s = metrics.shared_bandwidth(rows["A"], rows["B"], rows["R"])
    for found in told()["sets"]:
        x, got = rows[found["name"]], found["measures"]
        prompts = one_hot([f.name for f in sorted(Path(found["path"]).iterdir())])
        # Prompts that are never compared are those of a narrow kernel.
        narrow: Any = {"bandwidth": s, "cond_bandwidth": 0.05}
        density = metrics.prdc(x, rows["R"])
        wanted = {
            "vendi": metrics.vendi(x, bandwidth=s),
            "rke": metrics.rke(x, bandwidth=s),
            "cond_vendi": metrics.cond_vendi(x, prompts, **narrow),
            "cond_rke": metrics.cond_rke(x, prompts, **narrow),
            "in_batch_similarity": metrics.in_batch_similarity(x, prompts),
            "ken": metrics.ken(x, rows["R"], bandwidth=s),
            "relative_rke": metrics.relative_rke(x, rows["R"], bandwidth=s),
            **density._asdict(),
        }
        assert got == pytest.approx(wanted)
        assert found["n"] == 24
        for prompt, of_prompt in found["prompts"].items():
            here = x[prompts.argmax(1) == sorted(found["prompts"]).index(prompt)]
            assert of_prompt["vendi"] == pytest.approx(metrics.vendi(here, bandwidth=s))
            assert of_prompt["rke"] == pytest.approx(metrics.rke(here, bandwidth=s))
            assert of_prompt["n"] == 8
        for measure in MEASURES:
            if measure.name != "effective_modes":
                assert f"{got[measure.name] + 0.0:.{measure.digits}f}".lstrip("-") in out
    assert set(told()["sets"][0]["prompts"]) == {"red ball", "old woman", "tulip"}


def test_copies_are_found_and_cost_diversity(run: Run) -> None:
    assert (
        run("A", "B", "--prompts-from-names", *QUIET, "--json", "out.json", "--pairs", "3")[0] == 0
    )
    copied, varied = told()["sets"]
    assert copied["measures"]["cond_vendi"] < 2.01  # two pictures to a prompt, each four times
    assert varied["measures"]["cond_vendi"] > 4
    assert [pair["likeness"] for pair in copied["nearest"]] == [1, 1, 1]
    assert varied["nearest"][0]["likeness"] < 0.9
    for pair in copied["nearest"]:
        files = [Path("A", pair[name]).read_bytes() for name in ("first", "second")]
        assert files[0] == files[1]
    shown = [pair[name] for pair in copied["nearest"] for name in ("first", "second")]
    assert len(set(shown)) == 6
    (change,) = told()["changes"]
    assert [c["prompt"] for c in change["prompts"]] == sorted(
        (c["prompt"] for c in change["prompts"]),
        key=lambda p: copied["prompts"][p]["vendi"] - varied["prompts"][p]["vendi"],
    )
    assert change["words"][0].startswith(
        "3 prompts are too few to tell a trend from chance; in these pictures, B is more varied "
        "than A by Vendi, RKE and mean cosine."
    )
    before, after = (one["measures"]["cond_vendi"] for one in (copied, varied))
    assert f"{before:.2f} wholly different ones in A and {after:.2f} in B" in change["words"][0]
    assert "3 gained, 0 lost" in change["words"][1]


def test_a_loss_is_called_one(run: Run) -> None:
    assert run("B", "A", "--prompts-from-names", *QUIET, "--json", "out.json")[0] == 0
    (change,) = told()["changes"]
    assert "A is less varied than B by Vendi, RKE and mean cosine." in change["words"][0]
    assert "0 gained, 3 lost" in change["words"][1]
    assert any(words.startswith("Most lost") for words in change["words"])


@pytest.mark.parametrize(
    ("gained", "lost", "chance"), [(5, 0, 1 / 16), (8, 0, 1 / 128), (3, 2, 1.0), (7, 1, 9 / 128)]
)
def test_the_sign_test(gained: int, lost: int, chance: float) -> None:
    assert _sign_test(gained, lost) == pytest.approx(chance)
    assert _sign_test(lost, gained) == pytest.approx(chance)
    assert _sign_test(2, 2) is None


@pytest.mark.parametrize(
    ("after", "gained", "lost", "said"),
    [
        ((3, 3, 0.4), 6, 0, "b is more varied than a by Vendi, RKE and mean cosine"),
        ((1, 1, 0.6), 0, 6, "b is less varied than a by Vendi, RKE and mean cosine"),
        (
            (3, 1, 0.4),
            6,
            0,
            (
                "No clear difference between a and b: b is more varied than a by Vendi and mean "
                "cosine, less by RKE"
            ),
        ),
        ((3, 3, 0.499), 6, 0, "No clear difference between a and b: b is more varied than a by "),
        ((3, 3, 0.4), 4, 2, "No clear difference between a and b: b is more varied than a by "),
        ((3, 3, 0.4), 0, 6, "No clear difference between a and b: b is more varied than a by "),
        ((3, 3, None), 6, 0, "No clear difference between a and b: b is more varied than a by "),
        ((3, 3, 0.4), 1, 1, "Only 2 of 6 prompts changed, too few to tell a trend from chance; "),
    ],
)
def test_the_verdict_says_no_more_than_the_numbers(
    after: tuple[float | None, ...], gained: int, lost: int, said: str
) -> None:
    values = dict(zip(verdict.MARGINS, (2, 2, 0.5), strict=True))
    then = dict(zip(verdict.MARGINS, after, strict=True))
    found = verdict.directions(values, then, verdict.MARGINS)
    chance = _sign_test(gained, lost)
    assert verdict.of_prompts("a", "b", found, 6, gained, lost, chance).startswith(said)


def test_only_prompts_in_both_are_compared(run: Run, tmp_path: Path) -> None:
    for name in ("old-woman", "tulip"):
        for file in Path("B").glob(f"{name}*"):
            file.unlink()
    argv = ("A", "B", "--prompts-from-names", *QUIET, "--json", "out.json")
    assert run(*argv)[0] == 0
    found = told()
    (prompt,) = found["sets"][1]["prompts"]
    a, b = (one["prompts"][prompt]["vendi"] for one in found["sets"])
    words = found["changes"][0]["words"][0]
    assert words.startswith("1 prompt is too few")
    assert f"{a:.2f} wholly different ones in A and {b:.2f} in B" in words
    assert "over 1 prompt in both" in words
    assert a != pytest.approx(found["sets"][0]["measures"]["cond_vendi"])


def test_sets_without_prompts_are_called_untested(run: Run) -> None:
    assert run("A", "B", *QUIET, "--json", "out.json")[0] == 0
    words = told()["changes"][0]["words"]
    assert words[0].startswith("No prompts are given")
    assert "B is more varied than A by Vendi" in words[0]


def test_nearest_pairs_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCK", 7)
    x = torch.randn(40, 3)
    x[31] = x[4]
    groups = [torch.arange(0, 40, 2), torch.arange(1, 40, 2)]
    options: Any = {"kernel": "gaussian", "bandwidth": 0.7, "most": 5}
    seen: list[tuple[int, int]] = []
    found = nearest.within(x, groups, **options, tell=lambda *done: seen.append(done))
    kernel = torch.exp(-torch.cdist(x.double(), x.double()).square() / (2 * 0.7**2))
    parity = torch.arange(40) % 2
    kernel[parity[:, None] != parity] = -1  # 31 and 4 are of two prompts
    kernel.fill_diagonal_(-1)
    best = kernel.max(1).values
    torch.testing.assert_close(found.likeness.sort().values, best.sort().values)
    assert found.pairs[0].likeness == pytest.approx(float(best.max()))
    for pair in found.pairs:
        assert float(kernel[pair.first, pair.second]) == pytest.approx(pair.likeness)
    assert seen[-1] == (6, 6)
    across = nearest.across(x[:3], x, **options, tell=lambda *_: None)
    assert {(p.first, p.second, p.likeness) for p in across} == {(i, i, 1.0) for i in range(3)}


def test_prompts_from_a_file(run: Run, tmp_path: Path) -> None:
    lines = ["\ufefffile,Prompt", "A/red-ball-0001.png,über, alles"]
    lines[1] = 'A/red-ball-0001.png,"über, alles"'
    for name in "AB":
        lines += [
            f"{name}/{path.name},ball"
            for path in sorted((tmp_path / name).iterdir())
            if f"{name}/{path.name}" != "A/red-ball-0001.png"
        ]
    Path("prompts.csv").write_text("\n".join(lines), encoding="utf-8")
    code, _, err = run("A", "B", "--prompts", "prompts.csv", *QUIET, "--json", "out.json")
    assert code == 0
    assert "not of the same prompts" in err
    first, second = told()["sets"]
    assert {p: f["n"] for p, f in first["prompts"].items()} == {"ball": 23, "über, alles": 1}
    assert set(second["prompts"]) == {"ball"}
    assert first["prompts"]["über, alles"]["vendi"] == pytest.approx(1)
    assert told()["changes"][0]["only_base"] == ["über, alles"]


def test_one_file_of_prompts_for_names_in_every_set_or_one_for_each(run: Run) -> None:
    names = sorted(path.name for path in Path("A").iterdir())
    table = "file,prompt\n" + "".join(f"{name},p{i % 3}\n" for i, name in enumerate(names))
    other = "image,caption\n" + "".join(f"{name},p{i % 4}\n" for i, name in enumerate(names))
    Path("A", "prompts.csv").write_text(table)
    Path("other.csv").write_text(other)
    both = ("A", "B", *QUIET, "--no-report", "--json")
    assert run(*both, "one.json", "--prompts", "A/prompts.csv")[0] == 0
    assert [len(s["prompts"]) for s in told(Path("one.json"))["sets"]] == [3, 3]
    two = ("--prompts", "A/prompts.csv", "--prompts", "other.csv")
    assert run(*both, "two.json", *two)[0] == 0
    assert [len(s["prompts"]) for s in told(Path("two.json"))["sets"]] == [3, 4]
    # Lines about a set that is not measured now do no harm.
    Path("all.csv").write_text(
        "file,prompt\n" + "".join(f"{s}/{name},p\n" for s in "AB" for name in names)
    )
    assert run("A", *QUIET, "--no-report", "--prompts", "all.csv")[0] == 0


def test_pictures_in_folders_of_the_folder(run: Run, tmp_path: Path) -> None:
    picture(tmp_path / "C" / "x" / "1.png", 1)
    picture(tmp_path / "C" / "y" / "1.jpg", 2)
    picture(tmp_path / "C" / ".hidden" / "1.png", 3)
    Path("C", "notes.txt").write_text("no picture")
    Path("p.csv").write_text("file,prompt\nC/x/1.png,a\nC\\y\\1.jpg,a\n")
    assert run("C", "--prompts", "p.csv", *QUIET, "--json", "out.json")[0] == 0
    (found,) = told()["sets"]
    assert (found["n"], found["prompts"]["a"]["n"]) == (2, 2)


def test_a_text_encoder_says_how_alike_prompts_are(run: Run) -> None:
    Path("texts.py").write_text(
        "import torch\n"
        "def embed(texts):\n"
        "    return torch.tensor([[1.0, len(t) / 4] for t in texts])\n"
    )
    argv = ("A", *QUIET, "--no-report", "--prompts-from-names", "--json", "out.json")
    assert run(*argv, "--text-encoder", "texts.py:embed")[0] == 0
    x = image_features("A", "pixels")
    prompts = [re.sub(r"-\d+", "", p.stem).replace("-", " ") for p in sorted(Path("A").iterdir())]
    embeds = torch.tensor([[1.0, len(p) / 4] for p in prompts])
    s = metrics.shared_bandwidth(x)
    got = told()["sets"][0]["measures"]
    assert got["cond_vendi"] == pytest.approx(metrics.cond_vendi(x, embeds, bandwidth=s))
    assert got["cond_rke"] == pytest.approx(metrics.cond_rke(x, embeds, bandwidth=s))


def test_labels_give_effective_modes(run: Run) -> None:
    names = sorted(path.name for path in Path("A").iterdir())
    lines = [f"{name},{'cat' if i % 8 < 4 else 'dog'}" for i, name in enumerate(names)]
    Path("labels.csv").write_text("\n".join(["file,label", *lines]))
    argv = ("A", *QUIET, "--no-report", "--prompts-from-names", "--json", "out.json")
    code, out, _ = run(*argv, "--labels", "labels.csv")
    assert code == 0
    assert told()["sets"][0]["measures"]["effective_modes"] == pytest.approx(2)
    assert "Effective modes by label" in out


def test_files_of_features(run: Run) -> None:
    x, y = torch.randn(20, 6), 3 * torch.randn(20, 6)
    save_file({"features": x, "more": y}, "x.safetensors")
    np.save("y.npy", y.numpy().astype(np.float16))
    Path("p.csv").write_text("file,prompt\n" + "".join(f"{i},p{i % 2}\n" for i in range(20)))
    code, _, err = run("x.safetensors", "y.npy", "--prompts", "p.csv", "--json", "out.json")
    assert (code, err) == (0, "")
    first, second = told()["sets"]
    s = metrics.shared_bandwidth(x, y.half().float())
    assert first["measures"]["vendi"] == pytest.approx(metrics.vendi(x, bandwidth=s))
    assert second["measures"]["vendi"] > first["measures"]["vendi"]
    assert first["prompts"]["p1"]["n"] == 10
    report = Path("sparke-eval.html").read_text(encoding="utf-8")
    assert "<img" not in report
    assert "features from files" in report


def test_other_kernels_and_bandwidths(run: Run) -> None:
    x = image_features("A", "pixels")
    given = ("A", *QUIET, "--no-report", "--json")
    assert run(*given, "s.json", "--bandwidth", "2.5")[0] == 0
    got = told(Path("s.json"))["sets"][0]["measures"]["vendi"]
    assert got == pytest.approx(metrics.vendi(x, bandwidth=2.5))
    assert run(*given, "c.json", "--kernel", "cosine")[0] == 0
    got = told(Path("c.json"))["sets"][0]["measures"]["vendi"]
    assert got == pytest.approx(metrics.vendi(x, kernel="cosine"))
    assert run(*given, "r.json", "--random-features", "64")[0] == 0
    s = metrics.shared_bandwidth(x)
    got = told(Path("r.json"))["sets"][0]["measures"]["vendi"]
    assert got == pytest.approx(metrics.vendi(x, bandwidth=s, random_features=64))
    assert "64 random features" in told(Path("r.json"))["settings"]["eigenvalues"]


def test_sizes_that_differ_are_warned_of_and_can_be_made_equal(run: Run) -> None:
    for i in (1, 2):
        Path("B", f"tulip-000{i}.png").unlink()
    both = ("A", "B", *QUIET, "--prompts-from-names", "--json")
    assert "not of the same size" in run(*both, "a.json")[2]
    assert "not of the same size" in told(Path("a.json"))["warnings"][0]
    assert "not of the same size" in Path("sparke-eval.html").read_text(encoding="utf-8")
    code, _, err = run(*both, "b.json", "--per-prompt", "6")
    assert (code, err) == (0, "")
    assert [s["n"] for s in told(Path("b.json"))["sets"]] == [18, 18]
    assert "all prompts have fewer than 5" in run(*both, "c.json", "--per-prompt", "3")[2]


def test_what_is_left_out_is_said(run: Run) -> None:
    code, _, err = run("A")
    assert code == 0
    assert err.count("\n") == 2
    assert "compared by their pixels" in err
    assert "--prompts-from-names" in err
    # A black picture has no cosine to anything, and the rest is measured all the same.
    Image.new("RGB", (8, 8)).save("A/tulip-0009.png")
    code, out, _ = run("A", *QUIET, "--prompts-from-names", "--json", "out.json")
    assert code == 0
    (found,) = told()["sets"]
    assert found["measures"]["in_batch_similarity"] is None
    assert "cosine" in found["not_measured"]["in_batch_similarity"]
    assert "–" in out


# the report


class Page(html.parser.HTMLParser):
    """Tags, ids, attributes that fetch, and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "data", "action", "srcset"):
                self.fetched.append(value or "")
            if name == "href":
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_explains_itself_and_needs_nothing_else(run: Run) -> None:
    argv = ("A", "B", "--prompts-from-names", *QUIET, "--reference", "B", "--report", "r/e.html")
    assert run(*argv)[0] == 0
    source = Path("r", "e.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "http" not in source.replace("Content-Security-Policy", "").replace("http-equiv", "")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.fetched
    assert all(one.startswith("data:image/jpeg;base64,") for one in page.fetched)
    assert "@import" not in source
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert page.tags.count("svg") == 3
    assert "prefers-color-scheme: dark" in source
    assert "width=device-width" in source
    for measure in MEASURES:
        if measure.needs != "labels":
            assert measure.title in page.text
            assert measure.is_not[:40] in page.text
    for said in ("red ball", "What changed from", "Nearest pairs", sparke.__version__, "pixels"):
        assert said in page.text
    assert "sparke eval A B --prompts-from-names --encoder pixels --reference B" in page.text
    assert "shared by all sets" in page.text
    assert len(source) < 600_000


def test_hostile_names_and_prompts_are_text(run: Run, tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    turned = "$x^2$ \u202e{{ 7 * 7 }} </svg><img src=x onerror=alert(1)> \U0001f600 日本"
    names = ["a & b.png", "x' onerror='alert(1).png", "<b>.png", "雪.png"]
    for i, name in enumerate(names):
        picture(tmp_path / "<i>C" / name, i)
        picture(tmp_path / "D" / name, i + 10)
    rows = [
        f'"{n}","{(evil if i % 2 else turned).replace(chr(34), chr(34) * 2)}"'
        for i, n in enumerate(names)
    ]
    Path("p.csv").write_text("\n".join(["file,prompt", *rows]), encoding="utf-8")
    code, _, err = run("<i>C", "D", "--prompts", "p.csv", *QUIET, "--json", "out.json")
    assert code == 0
    assert "fewer than 5" in err
    page = Page(Path("sparke-eval.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert "b" not in page.tags
    assert all(one.startswith("data:") for one in page.fetched)
    assert evil in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "$x^2$" in page.text
    assert "\u202e" not in page.text
    assert turned in told()["sets"][0]["prompts"]


def test_many_prompts_fit(run: Run, tmp_path: Path) -> None:
    save_file({"x": torch.randn(160, 3)}, "x.safetensors")
    save_file({"x": torch.randn(160, 3)}, "y.safetensors")
    long = "a very long prompt with many words, as they are " * 20
    rows = "".join(f'{i},"{i // 4} {long}"\n' for i in range(160))
    Path("p.csv").write_text(f"file,prompt\n{rows}")
    assert run("x.safetensors", "y.safetensors", "--prompts", "p.csv")[0] == 0
    page = Page(Path("sparke-eval.html").read_text(encoding="utf-8"))
    assert "30 of 40 prompts" in page.text
    assert all(f"{i} {long.strip()}" in page.text for i in range(40))


# files


def test_nothing_is_replaced_unless_forced(run: Run, tmp_path: Path) -> None:
    few = ("A", *QUIET, "--per-prompt", "4")
    assert run(*few)[0] == 0
    assert run(*few)[1].endswith("sparke-eval-2.html\n")
    before = tree(tmp_path)
    for option in ("--report", "--json"):
        Path("mine").write_text("mine")
        code, out, err = run(*few, option, "mine")
        assert (code, out) == (1, "")
        assert "--force" in err
        assert Path("mine").read_text() == "mine"
        assert (
            run(*few, option, "mine", "--force", *(["--no-report"] * (option == "--json")))[0] == 0
        )
        assert Path("mine").read_bytes() != b"mine"
        Path("mine").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_call_that_fails_while_writing(
    stop: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)

    opened = Path.open

    def fail(self: Path, *mode: Any, **options: Any) -> Any:
        if "b.json" in self.name:
            opened(self, *mode, **options).close()
            raise stop
        return opened(self, *mode, **options)

    monkeypatch.setattr(Path, "open", fail)
    argv = ("A", *QUIET, "--prompts-from-names", "--report", "a.html", "--json", "b.json")
    code, out, err = run(*argv)
    monkeypatch.undo()
    assert code == (130 if stop is KeyboardInterrupt else 1)
    assert (out, err.count("\n")) == ("", 1)
    assert tree(tmp_path) == before


def test_ctrl_c_while_encoding(run: Run, tmp_path: Path) -> None:
    Path("enc.py").write_text("def f(x):\n    raise KeyboardInterrupt\n")
    before = tree(tmp_path)
    code, out, err = run("A", "--encoder", "enc.py:f")
    assert (code, out, err) == (130, "", "sparke: interrupted\n")
    assert tree(tmp_path) == before


def test_a_bar_moves_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    from sparke._cli.evaluation.terminal import Bars

    shown = Progress(disable=True)
    bars = Bars(shown)
    first = bars("one")
    first(1, 4)
    assert [(t.description, t.completed, t.total) for t in shown.tasks] == [("one", 1, 4)]
    second = bars("two")
    first(2, 4)
    second(3, 3)
    assert [(t.description, t.completed, t.total) for t in shown.tasks] == [("two", 3, 3)]


def test_pictures_of_sparke_generate(run: Run) -> None:
    few = ("-n", "3", "--steps", "3", "--seed", "1", "--size", "32")
    for out, scale in (("plain", "0"), ("guided", "3")):
        assert main(["generate", "old woman", "pizza", *few, "--scale", scale, "--out", out]) == 0
    argv = ("plain", "guided", "--prompts-from-names", "--encoder", "emoji", "--json", "out.json")
    code, out, _ = run(*argv)
    assert code == 0
    assert "plain -> guided" in out
    found = told()["sets"][1]
    assert {p: f["n"] for p, f in found["prompts"].items()} == {"old woman": 3, "pizza": 3}
    report = Path("sparke-eval.html").read_text(encoding="utf-8")
    assert "Gained most" in report or "Lost most" in report
