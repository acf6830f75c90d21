"""The adapter of Transformer Engine, run against a fake with TE's signatures and habits."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megaswitch.checkpoint.manager import checkpoints
from megaswitch.config import FP8Config, load_config
from megaswitch.files import sha256
from megaswitch.layers import te_backend
from megaswitch.layers.backend import check_backend
from megaswitch.layers.fp8 import Factor
from megaswitch.layers.kernels import Rows
from megaswitch.layers.linear import GroupedLinear, Linear
from megaswitch.layers.parameter import Init
from megaswitch.layers.te_backend import TEBackend, padded_places
from megaswitch.log import ConfigError, UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.metrics import read_metrics
from megaswitch.train.trainer import Trainer
from tests import fake_te

ALONE = Mesh(0, 1, torch.device("cpu"), None)


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch):
    fake_te.install(monkeypatch)
    return fake_te


def train(options, tmp_path, name, *more, steps):
    """Losses by step of a run that is started, or goes on."""
    run_dir = tmp_path / name
    # Evaluation leaves traces in TE's history, which torch's has not.
    keys = [o for o in options if not o.startswith(("--data.valid", "--train.valid"))]
    keys += [*more, f"--train.run_dir={run_dir}", f"--train.steps={steps}"]
    keys += ["--train.micro_batch_size=8", "--train.device=cpu"]
    Trainer.build(load_config(None, keys), Mesh.start("cpu")).fit()
    metrics = read_metrics(run_dir / "metrics.jsonl")
    return {m["step"]: (m["loss"], m["grad_norm"]) for m in metrics if "loss" in m}


CASES = {
    "fp32": ["--train.precision=fp32"],
    "bf16": ["--train.precision=bf16"],
    "bf16, dropless": ["--train.precision=bf16", "--model.moe.capacity_mode=dropless"],
    "recomputed": ["--train.precision=bf16", "--train.activation_checkpointing=true"],
    "gated": ["--model.activation=gated-gelu"],
}


@pytest.mark.parametrize("case", CASES)
def test_te_trains_as_torch_does(te, run_options, tmp_path, case):
    torch_losses, te_losses = (
        train(run_options, tmp_path, b, f"--train.backend={b}", *CASES[case], steps=2)
        for b in ("torch", "te")
    )
    assert te_losses == torch_losses


@pytest.mark.parametrize(
    "more",
    [
        ["--train.precision=bf16"],
        ["--train.precision=bf16", "--train.activation_checkpointing=true"],
        ["--model.activation=gated-gelu", '--train.fp8.keep=["*.wo","decoder.layers.1.*"]'],
        ["--model.moe.capacity_mode=dropless"],
    ],
    ids=["bf16", "recomputed", "kept", "dropless"],
)
def test_a_checkpoint_in_delayed_fp8_goes_on_under_either(te, run_options, tmp_path, more):
    fp8 = ["--train.fp8.recipe=delayed", "--train.fp8.amax_history=16", *more]
    for first in ("torch", "te"):
        train(run_options, tmp_path, first, *fp8, f"--train.backend={first}", steps=2)
        runs = []
        for then in ("torch", "te"):
            shutil.copytree(tmp_path / first, tmp_path / f"{first} {then}")
            keys = [*fp8, f"--train.backend={then}"]
            runs.append(train(run_options, tmp_path, f"{first} {then}", *keys, steps=4))
        assert runs[0] == runs[1]
        assert runs[0].keys() == {1, 2, 3, 4}


def test_fp8_is_used_and_without_scales_of_before_the_run_differs(te, run_options, tmp_path):
    plain = train(run_options, tmp_path, "plain", steps=3)
    runs = {
        backend: train(
            run_options, tmp_path, backend, "--train.fp8.recipe=current",
            f"--train.backend={backend}", steps=3,
        )
        for backend in ("torch", "te")
    }  # fmt: skip
    for run in runs.values():
        assert run != plain
        assert run[1][0] == pytest.approx(plain[1][0], rel=0.05)


def test_a_checkpoint_holds_scales_as_plain_tensors_and_no_extra_state(te, run_options, tmp_path):
    fp8 = ["--train.fp8.recipe=delayed", "--train.fp8.amax_history=4"]
    train(run_options, tmp_path, "run", *fp8, "--train.backend=te", steps=2)
    (checkpoint,) = checkpoints(tmp_path / "run" / "checkpoints")
    (path,) = checkpoint.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        assert not any("extra" in name for name in names)
        dense = file.get_tensor("fp8.encoder.layers.0.ffn.wi.amax")
        stack = file.get_tensor("fp8.decoder.layers.1.ffn.experts.wo.amax")
    assert dense.shape == (1, 3, 4)
    assert stack.shape == (4, 3, 4)
    assert (dense[0, :, -2:] > 0).all()
    assert not dense[..., 0].any()
    assert 'backend = "te"' in (checkpoint / "config.toml").read_text()
    assert json.loads((checkpoint / "state.json").read_text())["state"]["step"] == 2


def test_a_run_that_starts_fp8_late_says_that_scales_start_anew(run_options, tmp_path, capsys):
    options = [*run_options, "--train.fp8.recipe=delayed"]
    train(options, tmp_path, "run", steps=1)
    (checkpoint,) = checkpoints(tmp_path / "run" / "checkpoints")
    _forget_scales(checkpoint)
    train(options, tmp_path, "run", steps=2)
    assert "start anew" in capsys.readouterr().err


def _forget_scales(checkpoint):
    """As `megaswitch reshard` does, which keeps weights and optimizer states."""
    state = json.loads((checkpoint / "state.json").read_text())
    (path,) = checkpoint.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kept = {n: t for n, t in load_file(path).items() if not n.startswith("fp8.")}
    sharding = json.loads(metadata["DCP_SHARDING_INFO"])
    metadata["DCP_SHARDING_INFO"] = json.dumps({n: sharding[n] for n in kept})
    save_file(kept, path, metadata)
    state["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_the_models_state_dict_knows_nothing_of_te(te):
    layer = Linear(32, 16, shard="column", init=Init("constant", 0.1))
    stack = GroupedLinear(2, 32, 16, shard="column", init=Init("constant", 0.1))
    nn = torch.nn.ModuleDict({"dense": layer, "stack": stack})
    backend = TEBackend(FP8Config(recipe="delayed", amax_history=4), ALONE)
    backend.attach(dict(nn.named_children()))
    for p in nn.parameters():
        torch.nn.init.normal_(p)
    with backend.forward_pass():
        y = layer(torch.randn(3, 5, 32))
        z = stack(torch.randn(7, 32), torch.tensor([2, 6], dtype=torch.int32))
    (y.sum() + z.sum()).backward()
    assert y.shape == (3, 5, 16)
    assert not z[6:].any()
    assert set(nn.state_dict()) == {"dense.weight", "stack.weight"}
    history = backend.history()
    assert history["dense"].shape == (1, 3, 4)
    assert history["stack"].shape == (2, 3, 4)
    largest = stack.weight.detach().abs().amax((1, 2))
    assert torch.equal(history["stack"][:, Factor.WEIGHT, -1], largest)
    # Nothing keeps a weight that was lent.
    for kernel in (layer.kernel, stack.kernel):
        for engine in kernel.engines.values():
            assert not list(engine.parameters())
            held = vars(engine).values()
            assert not [v for v in held if isinstance(v, torch.Tensor) and v.ndim > 1]


@pytest.mark.parametrize("ends", [[3, 3, 20, 36], [0, 0, 0, 0], [16, 32, 48, 64], [1, 2, 3, 4]])
def test_padded_places_align_every_expert(ends):
    rows = Rows(torch.tensor(ends, dtype=torch.int32), 0)
    number = ends[-1] + 2
    place, splits = padded_places(rows, number, 16)
    starts = [0, *ends[:-1]]
    assert splits == [-(-(b - a) // 16) * 16 for a, b in zip(starts, ends, strict=True)]
    expected, first = [], 0
    for a, b, size in zip(starts, ends, splits, strict=True):
        expected += [first + i for i in range(b - a)]
        first += size
    assert place.tolist() == [*expected, first, first]


def test_a_matrix_that_fp8_cannot_have_is_named(te):
    layer = Linear(40, 16, shard="column", init=Init("constant", 0.1))
    with pytest.raises(UserError, match=r"encoder\.0\.ffn\.wi is 16 × 40 on a rank.*fp8\.keep"):
        TEBackend(FP8Config(recipe="current"), ALONE).attach({"encoder.0.ffn.wi": layer})


def test_what_is_missing_is_said(te, monkeypatch):
    for device in ("cpu", "auto", "cuda"):
        with pytest.raises(UserError, match=r"='te' cannot run here: it needs a CUDA"):
            check_backend("te", FP8Config(), device)
    check_backend("torch", FP8Config(recipe="mxfp8"), "cpu")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert te_backend.missing(FP8Config(recipe="delayed"), "cuda") is None
    reason = te_backend.missing(FP8Config(recipe="mxfp8"), "cuda")
    assert "'mxfp8' is not for this chip (H200, compute capability 9.0" in reason
    for name in [n for n in sys.modules if n.startswith("transformer_engine")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install --no-build-isolation" in te_backend.missing(FP8Config(), "cuda")


def test_an_import_that_fails_in_its_own_way_is_reported(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "transformer_engine":
                raise RuntimeError("first line\ncudnn shared object not found.")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"RuntimeError: cudnn shared object not found"):
        te_backend.load()


def test_options_that_do_not_go_together_are_refused():
    for options, told in (
        (["--train.backend=te", "--parallel.pp=2", "--parallel.schedule=zero-bubble"], "at once"),
        (
            ["--train.fp8.recipe=current", "--model.moe.num_experts=4", "--train.precision=bf16",
             "--model.moe.router_precision=fp32"],
            "rounds experts",
        ),
        (["--train.fp8.recipe=current", "--train.fp8.keep=[]"], "keeps no map"),
        (["--train.fp8.margin=1"], "would be ignored"),
        (["--train.fp8.recipe=current", "--train.fp8.amax_history=8"], "would be ignored"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            load_config(None, options, world_size=2)
