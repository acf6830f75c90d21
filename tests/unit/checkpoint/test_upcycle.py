"""Dense to sparse and to fewer experts: what the new model computes, and that nothing is lost."""

import json
from dataclasses import replace

import pytest
import torch

import megaswitch
from megaswitch.checkpoint.manager import read_config, verify
from megaswitch.checkpoint.prune import Group, kept_alone, merged, prune
from megaswitch.checkpoint.upcycle import Recipe, compare, upcycle
from megaswitch.config import MoEConfig, load_config
from megaswitch.log import UserError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer
from tests.unit.cli.commands import printed, refusal

MOE = MoEConfig(num_experts=4, group_size=128)


def trained(folder, corpus, *more):
    options = [
        *("--model.vocab_size=192", "--model.d_model=32", "--model.d_kv=8", "--model.d_ff=64"),
        *("--model.num_heads=4", "--model.num_encoder_layers=2", "--model.num_decoder_layers=2"),
        *("--data.encoder_length=64", f"--data.train={corpus}", f"--train.run_dir={folder}"),
        *("--train.steps=5", "--train.batch_size=4", "--train.micro_batch_size=4"),
        *("--optim.learning_rate=0.05", "--optim.schedule=constant", "--optim.warmup_steps=0"),
    ]
    Trainer.build(load_config(None, [*options, *more]), Mesh.start("cpu")).fit()
    return folder


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def dense(request, tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("dense") / "run"
    return trained(folder, corpus, f"--model.activation={request.param}")


@pytest.fixture(scope="module")
def switch(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("switch") / "run"
    moe = ("--model.moe.num_experts=4", "--model.moe.group_size=128")
    return trained(folder, corpus, *moe)


def weights(path):
    return {n: p.detach() for n, p in megaswitch.load_model(path).named_parameters()}


def test_an_upcycled_model_computes_what_the_dense_one_does(dense, tmp_path):
    differences = {}
    for scale in (1e-2, 1e-3, 1e-4):
        upcycle(dense, tmp_path / f"{scale}", Recipe(MOE, router_scale=scale))
        differences[scale] = compare(dense, tmp_path / f"{scale}").difference
    assert differences[1e-3] < 1e-3
    # What is left is the router's choice of 1/E: it goes to nothing with the router's weights.
    assert differences[1e-3] == pytest.approx(differences[1e-2] / 10, rel=0.3)
    assert differences[1e-4] == pytest.approx(differences[1e-2] / 100, rel=0.3)


def test_an_undecided_router_makes_both_equal_to_round_off(dense, tmp_path):
    """With router weights of zero E·p is 1, and all that is left is fp64."""
    upcycle(dense, tmp_path / "sparse", Recipe(MOE, router_scale=1e-30))
    assert compare(dense, tmp_path / "sparse").difference < 1e-12


def test_without_the_scale_it_does_not(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", Recipe(MOE, output_scale=1.0))
    assert compare(dense, tmp_path / "sparse").difference > 1e-2


def test_experts_are_copies_routers_are_fresh_and_spread_tokens(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", Recipe(MOE, seed=3))
    before, after = weights(dense), weights(tmp_path / "sparse")
    config = read_config(tmp_path / "sparse")
    fresh = SwitchTransformer(config.model).initialize(3)
    for name, value in after.items():
        if ".experts." in name:
            old = before[name.replace(".experts.", ".")] * (4 if ".wo." in name else 1)
            assert all(torch.equal(expert, old) for expert in value), name
        elif ".router." in name:
            expected = dict(fresh.named_parameters())[name] * 1e-3
            assert torch.equal(value, expected), name
        else:
            assert torch.equal(value, before[name]), name
    model = megaswitch.load_model(tmp_path / "sparse")
    tokens = torch.randint(3, 192, (8, 64), generator=torch.Generator().manual_seed(0))
    routing = model(tokens, tokens[:, :10]).routing["encoder.1.ffn"]
    load = torch.bincount(routing.expert.flatten(), minlength=4)
    assert load.max() < 2.5 * 8 * 64 / 4
    assert (routing.gate - 0.25).abs().max() < 1e-3
    verify(tmp_path / "sparse")


def test_noise_makes_experts_differ(dense, tmp_path):
    upcycle(dense, tmp_path / "sparse", Recipe(MOE, noise=0.1))
    before, after = weights(dense), weights(tmp_path / "sparse")
    name = next(n for n in after if ".experts.wi" in n)
    old = before[name.replace(".experts.", ".")]
    shift = after[name] - old
    sizes = [x.double().square().mean().sqrt().item() for x in (shift, old)]
    assert sizes[0] == pytest.approx(0.1 * sizes[1], rel=0.05)
    assert not torch.equal(shift[0], shift[1])


def test_the_command_checks_itself(dense, tmp_path, capsys):
    words = ("convert", "upcycle", dense, tmp_path / "sparse", "--num-experts", "4", "--check")
    assert "logits differ by at most" in printed(capsys, *words)
    assert "exists already" in refusal(*words)
    bad = ("convert", "upcycle", dense, tmp_path / "bad", "--num-experts", "4", "--check")
    assert "does not compute what" in refusal(*bad, "--router-scale", "1.0")
    twice = ("convert", "upcycle", tmp_path / "sparse", tmp_path / "more", "--num-experts", "8")
    assert "has 4 experts already" in refusal(*twice)
    every = ("convert", "upcycle", dense, tmp_path / "e", "--num-experts", "8", "--every", "3")
    assert "sparse_step=3 must not exceed" in refusal(*every)
    assert not (tmp_path / "e").exists()


USAGE = [10, 40, 0, 30]


def test_the_most_used_stay_in_their_order():
    assert kept_alone(USAGE, 2) == [Group((1,), (1.0,)), Group((3,), (1.0,))]
    assert kept_alone([5, 5, 5], 2) == [Group((0,), (1.0,)), Group((1,), (1.0,))]


def test_others_join_those_whose_router_row_is_most_like_theirs():
    router = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.0, 0.5], [0.0, 3.0]])
    assert merged(USAGE, router, 2) == [Group((1, 0), (0.8, 0.2)), Group((3, 2), (1.0, 0.0))]
    assert merged([0, 0], torch.eye(2), 1) == [Group((0, 1), (0.5, 0.5))]


def usage_file(path, *layers):
    router = {
        name: {"tokens_per_expert": counts}
        for name, counts in zip(("encoder.1.ffn", "decoder.1.ffn"), layers, strict=True)
    }
    path.write_text(json.dumps({"total": {"router": router}}))
    return path


def test_pruned_experts_and_router_rows_are_the_old_ones(switch, tmp_path):
    usage = usage_file(tmp_path / "usage.json", USAGE, [1, 2, 3, 4])
    prune(switch, tmp_path / "small", usage, 2, merge=False)
    before, after = weights(switch), weights(tmp_path / "small")
    kept = {"encoder": [1, 3], "decoder": [2, 3]}
    for name, value in after.items():
        old = before[name]
        if ".experts." in name or ".router." in name:
            old = old[kept[name.split(".")[0]]]
        assert torch.equal(value, old), name
    model = read_config(switch / "checkpoints/step_00000005").model
    small = replace(model, moe=replace(model.moe, num_experts=2))
    assert read_config(tmp_path / "small").model == small


def test_experts_of_attention_are_pruned_too(corpus, tmp_path):
    moe = ("model.moe.num_experts=4", "model.moe.group_size=128", "model.moe.attention=linear",
           "model.moe.router=top-2", "train.steps=1")  # fmt: skip
    run = trained(tmp_path / "run", corpus, *(f"--{word}" for word in moe))
    layers = [f"{stack}.1.{part}" for stack in ("encoder", "decoder")
              for part in ("self_attention", "ffn")]  # fmt: skip
    router = {name: {"tokens_per_expert": USAGE} for name in layers}
    usage = tmp_path / "usage.json"
    usage.write_text(json.dumps({"total": {"router": router}}))
    prune(run, tmp_path / "small", usage, 2, merge=False)
    before, after = weights(run), weights(tmp_path / "small")
    pruned = [name for name in after if ".experts." in name or ".router." in name]
    assert len([name for name in pruned if "self_attention" in name]) >= 4
    for name in pruned:
        assert torch.equal(after[name], before[name][[1, 3]]), name
    with pytest.raises(UserError, match="asks a second expert"):
        prune(run, tmp_path / "one", usage, 1, merge=False)


def test_merged_experts_are_means_weighted_by_use(switch, tmp_path):
    usage = usage_file(tmp_path / "usage.json", [30, 0, 10, 0], [30, 10, 0, 0])
    prune(switch, tmp_path / "one", usage, 1, merge=True)
    before, after = weights(switch), weights(tmp_path / "one")
    shares = {"encoder": [0.75, 0, 0.25, 0], "decoder": [0.75, 0.25, 0, 0]}
    for name in after:
        if ".experts." in name or ".router." in name:
            weight = torch.tensor(shares[name.split(".")[0]]).double()
            expected = torch.einsum("e,e...->...", weight, before[name].double()).float()
            assert torch.allclose(after[name][0], expected, rtol=1e-6, atol=1e-9), name


def test_the_command_says_what_does_not_fit(switch, tmp_path, capsys):
    usage = usage_file(tmp_path / "usage.json", USAGE, [1, 2, 3, 4])
    start = ("convert", "prune", switch, tmp_path / "small", "--usage")
    assert "less than the 4 experts" in refusal(*start, usage, "--num-experts", "4")
    assert "does not exist" in refusal(*start, tmp_path / "none.json", "--num-experts", "2")
    other = usage_file(tmp_path / "other.json", [1, 2], [3, 4])
    assert "encoder.1.ffn: 2 experts" in refusal(*start, other, "--num-experts", "1")
    for text in ("[]", "{", '{"total": {"router": {"a": {"tokens_per_expert": [-1]}}}}'):
        (tmp_path / "bad.json").write_text(text)
        message = refusal(*start, tmp_path / "bad.json", "--num-experts", "2")
        assert "is not what megaswitch evaluate --json prints" in message
    assert "the 2 most used experts" in printed(capsys, *start, usage, "--num-experts", "2")


def test_a_full_disk_leaves_nothing_behind(switch, tmp_path, monkeypatch):
    from megaswitch.checkpoint import conversion

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_bytes", full)
    usage = usage_file(tmp_path / "usage.json", USAGE, USAGE)
    with pytest.raises(UserError, match="No space left on device"):
        prune(switch, tmp_path / "small", usage, 2, merge=False)
    assert [p.name for p in tmp_path.iterdir()] == ["usage.json"]


def test_usage_counted_by_evaluate_prunes_a_model(text_run, tmp_path, capsys):
    counted = printed(capsys, "evaluate", text_run / "run", text_run / "valid", "--json")
    (tmp_path / "usage.json").write_text(counted)
    prune(text_run / "run", tmp_path / "small", tmp_path / "usage.json", 3, merge=True)
    again = printed(capsys, "evaluate", tmp_path / "small", text_run / "valid", "--json")
    layer = json.loads(again)["total"]["router"]["encoder.1.ffn"]
    assert len(layer["tokens_per_expert"]) == 3
    assert sum(layer["tokens_per_expert"]) == layer["tokens"]
