"""Conformance of backends: what reaches the guider, what reaches the samples, what is left."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sparke._discover import BACKENDS
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.protocols import Backend
from sparke.testing._common import expect
from sparke.testing._host_runs import HostRuns
from sparke.testing._onlookers import HOOKED
from sparke.testing._told import Watched

STRANGERS: tuple[object, ...] = (None, 3, "text", object(), object, len, lambda: None, [1], {})


def check_backend(
    backend: Backend,
    target: Any,
    call: Callable[[Any], Tensor],
    *,
    watch: Sequence[object] = (),
    refuses: Sequence[object] = (),
    hooks: Collection[str] = (),
) -> None:
    """Raise unless `backend` behaves as a [Backend][sparke.protocols.Backend].

    `accepts` takes the target and nothing strange. The wrapped target is of the target's own kind.
    A guider that displaces nothing, and one of strength 0, leave samples and torch's generator bit
    for bit as the bare target does. ``begin`` comes once and first, with the shape, device, dtype
    and prompts of the run; each state has latents of that shape and a step; ``finish`` comes once
    and last, with the finished samples, which a memory then holds once. A displacement to a known
    point leads there, to within the noise that the last step leaves. What a state offers to
    evaluate agrees with it and disturbs nothing. Errors and KeyboardInterrupt from the guider come
    through as they are, samples of a run that failed are not written, and the host is as it was. A
    generator function that is left early finishes nothing.

    Args:
        backend: the module or object to check.
        target: what it wraps.
        call: runs what it is given, the target or a wrapped one, and returns the finished samples
            (b, ...), latents where the host can return these: what ``finish`` must receive. It is
            called some thirty times, each time with torch's generator freshly seeded, and must then
            give the same samples; two or more, in few steps.
        watch: parts of the host that must be left as they were found, e.g. the model, the
            scheduler.
        refuses: things that look like the target and that this backend must not accept.
        hooks: names, without ``on_``, of the hooks that this backend promises to call. Hooks that
            change the run and are not called must be told of by a
            [GuidanceWarning][sparke.errors.GuidanceWarning] or refused.

    Raises:
        AssertionError: it does not; the message says how.
    """
    unknown = set(hooks) - set(HOOKED)
    if unknown:
        raise ArgumentError(f"hooks must be among {sorted(HOOKED)}, got {sorted(unknown)}.")
    try:
        BACKENDS.object(backend, {})
    except ArgumentError as error:
        raise AssertionError(str(error)) from None
    _check_accepts(backend, target, refuses)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", GuidanceWarning)
        host = HostRuns(backend, target, call)
        before = Watched([*watch, target])
        run = host.check_onlooker()
        before.check("a run")
        host.check_memory(run)
        host.check_prompts(run)
        host.check_displacement(run)
        host.check_evaluations()
        for name in HOOKED:
            host.check_hook(name, promised=name in hooks)
        before.check("a run with hooks")
        host.check_errors(before)
        if inspect.isgeneratorfunction(target):
            host.check_left_early(before)


def _check_accepts(backend: Backend, target: Any, refuses: Sequence[object]) -> None:
    for thing, right in ((target, True), *((other, False) for other in (*STRANGERS, *refuses))):
        try:
            said = backend.accepts(thing)
        except Exception as error:
            raise AssertionError(f"accepts({thing!r}) must answer, it raised {error!r}.") from error
        expect(said is right, f"accepts({thing!r}) must be {right}, got {said!r}")
