"""Profiles of one model under all layouts that a search looks at."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

from megaswitch.config import RunConfig
from megaswitch.scale.hardware import Hardware
from megaswitch.scale.profile import Profile, profile
from megaswitch.scale.recorder import Work
from megaswitch.train.placement import row_lengths

Key = tuple[int, bool]  # `tp`, and whether experts lie on several ranks
Profiles = Callable[[int, bool], Profile]

# The layout whose optimizer is taken for that of all, since it hardly depends on them.
_ONE_RANK: Key = 1, False


def profiles_of(
    config: RunConfig, hardware: Hardware, ahead: Collection[Key] = (), processes: int = 1
) -> Profiles:
    """Profiles that are made when they are asked for, or `ahead`.

    Args:
        config: of the run.
        hardware: whose kernels.
        ahead: keys of those that will be asked for.
        processes: how many make them, forks of this one, which must have no threads of its own.
    """
    make = partial(_made, config, hardware.device)
    made: dict[Key, Profile] = {}

    def of(tp: int, exchanges: bool) -> Profile:
        key = tp, exchanges
        if key not in made:
            update = None if key == _ONE_RANK else of(*_ONE_RANK).update
            made[key] = make(update, key)
        return made[key]

    if processes > 1 and ahead:
        others = sorted(set(ahead) - {_ONE_RANK})
        with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
            one = pool.submit(make, None, _ONE_RANK)
            found = pool.map(partial(make, Work()), others)
            made[_ONE_RANK] = one.result()
            update = made[_ONE_RANK].update
            made |= {key: replace(p, update=update) for key, p in zip(others, found, strict=True)}
    return of


def _made(config: RunConfig, device: str, update: Work | None, key: Key) -> Profile:
    return profile(config, row_lengths(config), *key, device, update)
