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
from megaswitch.scale.updates import Updates, update_work
from megaswitch.train.placement import row_lengths

Key = tuple[int, bool]  # `tp`, and whether experts lie on several ranks
Profiles = Callable[[int, bool], Profile]


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
    made: dict[Key, Profile] = {}
    update: Updates = {}

    def of(tp: int, exchanges: bool) -> Profile:
        key = tp, exchanges
        if key not in made:
            update.update(update or update_work(config, hardware.device))
            made[key] = _made(config, hardware.device, update, key)
        return made[key]

    if processes > 1 and ahead:
        keys = sorted(set(ahead))
        with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
            first = pool.submit(update_work, config, hardware.device)
            found = pool.map(partial(_made, config, hardware.device, {}), keys)
            update.update(first.result())
            made = {k: replace(p, update=update) for k, p in zip(keys, found, strict=True)}
    return of


def _made(config: RunConfig, device: str, update: Updates, key: Key) -> Profile:
    return profile(config, row_lengths(config), *key, device, update)
