"""What `check_guider` finds in hooks: done right they pass, broken in one way each they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparke.errors import ArgumentError
from sparke.guidance import GuiderChain
from sparke.protocols import Evaluation, Run, State, Step
from sparke.testing import check_guider
from sparke.testing._held import network


class Nothing:
    """A guider that does not guide."""

    def begin(self, run: Run) -> None:
        pass

    def __call__(self, state: State) -> Tensor:
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None:
        pass


class Everything(Nothing):
    """Every hook, each doing something that is allowed."""

    exclusive = frozenset({"noise"})
    yields = frozenset({"guidance_scale"})
    idle: frozenset[str] = frozenset()
    seeds: tuple[int, ...] = ()
    rows = 0

    def begin(self, run: Run) -> None:
        self.seeds = run.seeds

    def drawn(self, x: Tensor, sigma: float) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seeds, sigma)))
        return torch.randn(x.shape, generator=generator).to(x)

    def on_noise(self, x: Tensor) -> Tensor:
        return x.flip(0) + self.drawn(x, 0.0)

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        return guidance_scale * step.sigma

    def on_condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        noisy = prompt_embeds + self.drawn(prompt_embeds, step.sigma)
        return noisy if mask is None else torch.where(mask[..., None], noisy, prompt_embeds)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.rows = evaluation.branches.count("uncond") * evaluation.batch

    @contextmanager
    def on_model(self, model: nn.Module) -> Iterator[None]:
        handles = [block.register_forward_hook(self.pushed) for block in model.children()]
        handles += [block.register_forward_pre_hook(lambda *_: None) for block in model.modules()]
        model.mode = "weak"  # type: ignore[assignment]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del model.mode

    def on_encoder(self, encoder: nn.Module) -> Any:
        return self.on_model(encoder)

    def pushed(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return 2 * output if isinstance(output, Tensor) else output


def test_hooks_that_do_it_right_pass() -> None:
    check_guider(Everything())
    check_guider(Everything(), cond_width=None)
    check_guider(GuiderChain([Everything(), Nothing()]))


def test_ones_own_network_is_held_as_well() -> None:
    net, called = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), []

    def forward(model: nn.Module) -> Any:
        called.append(model)
        return {"sample": model(torch.ones(2, 3)), "other": None}

    check_guider(Everything(), model=net, forward=forward)
    assert called
    assert all(model is net for model in called)
    with pytest.raises(AssertionError, match="together"):
        check_guider(Everything(), model=net)


def test_a_network_may_be_refused_but_not_ones_own() -> None:
    class Refuses(Nothing):
        def on_model(self, model: nn.Module) -> Any:
            raise ArgumentError("unknown blocks")

    class RefusesLate(Nothing):
        @contextmanager
        def on_model(self, model: nn.Module) -> Iterator[None]:
            raise ArgumentError("unknown blocks")
            yield

    for guider in (Refuses(), RefusesLate()):
        check_guider(guider)
        with pytest.raises(AssertionError, match=r"must take the network given.*unknown blocks"):
            check_guider(guider, model=network(), forward=lambda net: net(torch.ones(1, 2, 8)))


def test_padding_may_be_changed_where_that_is_meant() -> None:
    class Pads(Everything):
        def on_condition(
            self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None
        ) -> Tensor:
            return super().on_condition(prompt_embeds, step)

    check_guider(Pads(), padding=True)
    with pytest.raises(AssertionError, match="padding"):
        check_guider(Pads())


# Broken in one way.


def with_hook(name: str, hook: Any) -> Any:
    """Everything, one of its hooks in place of its own."""
    return type("Broken", (Everything,), {name: hook})()


def counted(self: Any) -> int:
    self.count = getattr(self, "count", 0) + 1
    return int(self.count)


VALUES: list[tuple[str, Any, str]] = [
    ("on_noise", lambda self, x: x[:1], "on_noise.*must have shape"),
    ("on_noise", lambda self, x: x.double(), "on_noise.*must keep torch.float32"),
    ("on_noise", lambda self, x: x.float(), "on_noise.*must keep torch.bfloat16"),
    ("on_noise", lambda self, x: x / 0, "on_noise.*finite"),
    ("on_noise", lambda self, x: x.mul_(2), "on_noise.*in place"),
    ("on_noise", lambda self, x: None, "on_noise.*must return a tensor"),
    ("on_noise", lambda self, x: x * counted(self), "on_noise.*the same noise"),
    ("on_noise", lambda self, x: x.clone().requires_grad_(), "on_noise.*detached"),
    ("on_noise", lambda self: None, "on_noise.*as hosts call it"),
    ("on_guidance_scale", lambda self, step, scale: None, "on_guidance_scale.*finite number"),
    ("on_guidance_scale", lambda self, step, scale: float("inf"), "on_guidance_scale.*finite"),
    ("on_guidance_scale", lambda self, step, scale: counted(self), "on_guidance_scale.*the same"),
    ("on_guidance_scale", lambda self, step: 1.0, "on_guidance_scale.*as hosts call it"),
    ("on_condition", lambda self, y, step: y, "on_condition.*as hosts call it"),
    ("on_condition", lambda self, y, step, mask=None: y[:, :1], "on_condition.*shape"),
    ("on_condition", lambda self, y, step, mask=None: y.double(), "on_condition.*must keep"),
    ("on_condition", lambda self, y, step, mask=None: y.zero_(), "on_condition.*in place"),
    ("on_condition", lambda self, y, step, mask=None: 0 * y, "on_condition.*padding"),
    (
        "on_condition",
        lambda self, y, step, mask=None: y / step.sigma_next if mask is None else y,
        "on_condition.*finite",
    ),
    (
        "on_condition",
        lambda self, y, step, mask=None: y if mask is None else (mask.fill_(True), y)[1],
        "on_condition.*changed the mask",
    ),
    (
        "on_condition",
        lambda self, y, step, mask=None: y + counted(self) if mask is None else y,
        "on_condition.*whatever came between",
    ),
    (
        "on_evaluation",
        lambda self, evaluation: evaluation.branches.index("cond"),
        r"on_evaluation.*any branches.*'uncond'",
    ),
    ("on_evaluation", lambda self, evaluation: evaluation.branches[0], "on_evaluation.*any"),
    ("exclusive", property(lambda self: ["noise"]), "exclusive must be a frozenset"),
    ("yields", frozenset({"cfg"}), "yields.*guidance_scale.*got"),
    ("idle", "noise", "idle must be a frozenset"),
]


@pytest.mark.parametrize(("name", "hook", "why"), VALUES)
def test_a_broken_hook_fails(name: str, hook: Any, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check_guider(with_hook(name, hook))


def test_what_is_left_of_a_run_fails() -> None:
    class CountsRuns(Everything):
        def begin(self, run: Run) -> None:
            self.seeds = (counted(self),)

    with pytest.raises(AssertionError, match=r"on_condition.*next run with the same seeds"):
        check_guider(CountsRuns())


def test_moving_torchs_generator_fails() -> None:
    def drawn(self: Any, x: Tensor, sigma: float) -> Tensor:
        torch.manual_seed(hash((self.seeds, sigma)) % 2**32)
        return torch.randn(x.shape).to(x)

    broken = with_hook("drawn", drawn)
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(AssertionError, match="generators of its own"),
    ):
        check_guider(broken)


def test_needing_a_run_before_it_began_fails() -> None:
    class Late(Nothing):
        shape: torch.Size

        def begin(self, run: Run) -> None:
            self.shape = run.shape

        def __call__(self, state: State) -> Tensor:
            return torch.zeros(self.shape, dtype=state.denoised.dtype)

    with pytest.raises(AssertionError, match=r"before begin\(\).*shape"):
        check_guider(Late())
    late = Late()
    late.shape = torch.Size((3, 4, 4, 4))
    check_guider(late)


def test_needing_seeds_is_to_be_said_before_the_first_step() -> None:
    class Seeded(Nothing):
        seed = 0

        def begin(self, run: Run) -> None:
            if not run.seeds:
                raise ArgumentError("this host tells no seeds")

    class Breaks(Nothing):
        def begin(self, run: Run) -> None:
            self.seed = run.seeds[0]

    check_guider(Seeded())
    with pytest.raises(AssertionError, match=r"without seeds.*IndexError"):
        check_guider(Breaks())


# Networks.


def hook(module: nn.Module, scale: float = 1.0) -> Any:
    return module.register_forward_hook(lambda m, args, out: scale * out)


def forgets(self: Any, model: nn.Module) -> Iterator[None]:
    hook(model)
    yield


def forgets_when_it_fails(self: Any, model: nn.Module) -> Iterator[None]:
    handle = hook(model)
    yield
    handle.remove()


def forgets_when_interrupted(self: Any, model: nn.Module) -> Iterator[None]:
    handle = hook(model)
    try:
        yield
    except Exception:
        handle.remove()
        raise
    else:
        handle.remove()


def swallows(self: Any, model: nn.Module) -> Iterator[None]:
    with suppress(RuntimeError):
        yield


def swallows_interrupts(self: Any, model: nn.Module) -> Iterator[None]:
    with suppress(KeyboardInterrupt):
        yield


def replaces_errors(self: Any, model: nn.Module) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ValueError from error


def leaves_forward(self: Any, model: nn.Module) -> Iterator[None]:
    own = model.forward
    model.forward = lambda *args: own(*args)
    yield


def leaves_a_pre_hook_deep_inside(self: Any, model: nn.Module) -> Iterator[None]:
    (*_, last) = model.modules()
    last.register_forward_pre_hook(lambda *_: None)
    yield


def leaves_a_hook_everywhere(self: Any, model: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    self.handles = [*getattr(self, "handles", ()), handle]
    yield


def leaves_a_weight(self: Any, model: nn.Module) -> Iterator[None]:
    yield
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def leaves_another_class(self: Any, model: nn.Module) -> Iterator[None]:
    model.__class__ = type("Other", (type(model),), {})
    yield


def leaves_another_module(self: Any, model: nn.Module) -> Iterator[None]:
    name = next(iter(model._modules))
    model._modules[name] = nn.ModuleList(model._modules[name])  # type: ignore[arg-type]
    yield


def leaves_an_attribute(self: Any, model: nn.Module) -> Iterator[None]:
    model.tau = 0.5  # type: ignore[assignment]
    yield


def leaves_it_training(self: Any, model: nn.Module) -> Iterator[None]:
    model.train()
    yield


def leaves_attention_replaced(self: Any, model: nn.Module) -> Iterator[None]:
    own = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda *a, **k: own(*a, **k)
    yield


def works_once(self: Any, model: nn.Module) -> Iterator[None]:
    handle = hook(model)
    try:
        yield
    finally:
        if counted(self) < 4:
            handle.remove()


def forgets_when_begun_inside(self: Any, model: nn.Module) -> Iterator[None]:
    run = self.seeds
    handle = hook(model)
    try:
        yield
    finally:
        if self.seeds is run:
            handle.remove()


def breaks_shapes(self: Any, model: nn.Module) -> Iterator[None]:
    handle = model.register_forward_hook(lambda m, args, out: out[:, :1])
    try:
        yield
    finally:
        handle.remove()


def breaks_numbers(self: Any, model: nn.Module) -> Iterator[None]:
    handle = hook(model, float("nan"))
    try:
        yield
    finally:
        handle.remove()


def refuses_too_late(self: Any, model: nn.Module) -> Iterator[None]:
    hook(model)
    raise ArgumentError("unknown blocks")
    yield


class BeginsAnew(Everything):
    def begin(self, run: Run) -> None:
        self.seeds = tuple(run.seeds[:1]) + run.seeds[1:]


HELD: list[tuple[Callable[..., Iterator[None]], str]] = [
    (forgets, "after a run.*hook"),
    (forgets_when_it_fails, "RuntimeError in a block.*hook"),
    (forgets_when_interrupted, "KeyboardInterrupt in a block.*hook"),
    (swallows, "must let RuntimeError through, None came"),
    (swallows_interrupts, "must let KeyboardInterrupt through"),
    (replaces_errors, "must let RuntimeError through, ValueError"),
    (leaves_forward, "forward"),
    (leaves_a_pre_hook_deep_inside, r"transformer_blocks\.1\.ff\.2 _forward_pre_hooks"),
    (leaves_a_hook_everywhere, "_global_forward_hooks"),
    (leaves_a_weight, "changed the weight"),
    (leaves_another_class, "class is another"),
    (leaves_another_module, "transformer_blocks"),
    (leaves_an_attribute, "tau"),
    (leaves_it_training, "training"),
    (leaves_attention_replaced, "scaled_dot_product_attention"),
    (works_once, "after a second run"),
    (breaks_shapes, "keep its shapes"),
    (breaks_numbers, "must be finite"),
    (refuses_too_late, "refusing the network.*hook"),
]


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    attention, handles = nn.functional.scaled_dot_product_attention, nn.modules.module
    before = dict(handles._global_forward_hooks)
    yield
    nn.functional.scaled_dot_product_attention = attention
    handles._global_forward_hooks.clear()
    handles._global_forward_hooks.update(before)


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize("name", ["on_model", "on_encoder"])
@pytest.mark.parametrize(("held", "why"), HELD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_network_left_otherwise_fails(
    name: str, held: Callable[..., Iterator[None]], why: str
) -> None:
    with pytest.raises(AssertionError, match=rf"(?s){name}.*{why}"):
        check_guider(with_hook(name, contextmanager(held)))


def test_a_network_held_before_the_run_is_known_must_be_let_go_of_too() -> None:
    guider = type(
        "Broken", (BeginsAnew,), {"on_model": contextmanager(forgets_when_begun_inside)}
    )()
    with pytest.raises(AssertionError, match=r"entered before begin\(\).*hook"):
        check_guider(guider)


def test_hook_registries_of_diffusers_that_hold_nothing_are_no_hooks() -> None:
    hooks = pytest.importorskip("diffusers.hooks")

    class Registered(Nothing):
        leaves = False

        @contextmanager
        def on_model(self, model: nn.Module) -> Iterator[None]:
            registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
            registry.register_hook(hooks.ModelHook(), "ours")
            try:
                yield
            finally:
                if not self.leaves:
                    registry.remove_hook("ours")

    check_guider(Registered())
    guider = Registered()
    guider.leaves = True
    with pytest.raises(AssertionError, match=r"_diffusers_hook|forward"):
        check_guider(guider)
