"""What a rank's frames tell, and the sentence made of many ranks' places."""

import threading
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from megaswitch.parallel.mesh import Axis, Mesh
from megaswitch.parallel.places import Place, place_now, place_of_error, rank_list, story

WAITS = Place("collective", "all_reduce over dp", 12, "backward")
HANGS = Place("code", "Loader.batch (loader.py:140)", 12, "data")


def module(name: str, code: str) -> dict[str, object]:
    """A module of that name: frames are told apart by it."""
    namespace: dict[str, object] = {"__name__": name}
    exec(compile(code, f"/somewhere/{name.rpartition('.')[2]}.py", "exec"), namespace)
    return namespace


OURS = module("megaswitch.parallel.collectives", "def _sum(x, call, axis): return call(x)")
TORCH = module(
    "torch.distributed.distributed_c10d", "def all_reduce(call, group=None): return call()"
)
LOGGER = module("torch.distributed.c10d_logger", "def wrapper(call, inner): return inner(call)")
OTHER = module("torch.nn.modules.module", "def _call_impl(call): return call()")


def seen(stack: Callable[[Callable[[], None]], None], mesh: Mesh) -> tuple[Place, Place]:
    """The places that a thread sees inside `stack`, and that an error out of it shows."""
    found: list[Place] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: found.append(place_now(mesh)))
        thread.start()
        thread.join()
        raise KeyError

    with pytest.raises(KeyError) as caught:
        stack(look)
    return found[0], place_of_error(caught.value, mesh)


MESH = Mesh(0, 2, torch.device("cpu"), None, axes={"ep": Axis("ep", 0, 2, "a group")})


def test_a_collective_is_named_with_the_axis_of_our_function():
    def stack(look):
        axis = Axis("tp", 0, 2)
        OURS["_sum"](look, lambda x: LOGGER["wrapper"](x, TORCH["all_reduce"]), axis)

    for place in seen(stack, MESH):
        assert place == Place("collective", "all_reduce over tp")


def test_a_collective_of_torch_itself_is_named_with_the_axis_of_its_group():
    for place in seen(lambda look: TORCH["all_reduce"](look, "a group"), MESH):
        assert place == Place("collective", "all_reduce over ep")
    for place in seen(lambda look: TORCH["all_reduce"](look, "another"), MESH):
        assert place == Place("collective", "all_reduce")


def test_code_is_named_by_function_file_and_line():
    for place in seen(lambda look: OURS["_sum"](look, OTHER["_call_impl"], None), MESH):
        assert place == Place("code", "_sum (collectives.py:1)")


def test_a_collective_in_a_thread_of_autograd_is_found():
    ready, done = threading.Event(), threading.Event()

    def look():
        ready.set()
        done.wait()

    thread = threading.Thread(target=TORCH["all_reduce"], args=(look,))
    thread.start()
    ready.wait()
    places = []
    watcher = threading.Thread(target=lambda: places.append(place_now(MESH)))
    watcher.start()
    watcher.join()
    done.set()
    thread.join()
    assert places == [Place("collective", "all_reduce")]


def test_a_place_travels_as_json():
    assert Place(**asdict(WAITS)) == WAITS


def test_the_story_begins_with_those_that_the_others_wait_for():
    answers = {0: WAITS, 1: WAITS, 2: HANGS, 4: WAITS, 5: Place("collective", "barrier")}
    assert story(answers, 6) == (
        "rank 3 does not answer (gone or stopped); rank 2 is in Loader.batch (loader.py:140) at "
        "step 12 (data); ranks 0-1, 4 wait in all_reduce over dp at step 12 (backward); rank 5 "
        "waits in barrier"
    )
    assert story({}, 3) == "ranks 0-2 do not answer (gone or stopped)"
    assert story({0: HANGS, 1: HANGS}, 2).startswith("ranks 0-1 are in Loader.batch")


def test_ranks_are_listed_in_runs():
    assert rank_list([3]) == "rank 3"
    assert rank_list([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
