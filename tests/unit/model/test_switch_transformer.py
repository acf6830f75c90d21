"""The Switch layer against plain loops, and what must hold of the whole model."""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megaswitch.layers.noise import Noise
from megaswitch.model.switch_transformer import SwitchTransformer, rows_per_group
from megaswitch.parallel.shard import spec_of
from tests.unit.model.router_checks import layer, oracle, tiny_model

SHAPES = {
    "relu-tied": {"activation": "relu", "tie_embeddings": True},
    "geglu-untied": {"activation": "gated-gelu", "tie_embeddings": False},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
modes = pytest.mark.parametrize("mode", ["group", "hf", "dropless"])


def tokens(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 19, (rows, length), generator=generator)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def plain_switch_layer(ffn, x, mask, rows_per_group, training, dropout_factors):
    """The paper's layer, one token at a time."""
    logits = (x @ ffn.router.weight.T).detach().numpy()
    moe = ffn.router.config
    expert, _, kept, aux, z = oracle(logits, mask.numpy(), rows_per_group, moe, training)
    weights = dict(ffn.experts.named_parameters())
    y = torch.zeros_like(x)
    for row, place in itertools.product(range(x.shape[0]), range(x.shape[1])):
        if not kept[row, place]:
            continue
        e = expert[row, place]
        token = x[row, place]
        if "wi.weight" in weights:
            hidden = torch.relu(weights["wi.weight"][e] @ token)
        else:
            gate = F.gelu(weights["wi_0.weight"][e] @ token, approximate="tanh")
            hidden = gate * (weights["wi_1.weight"][e] @ token)
        hidden = hidden * dropout_factors[row, place]
        gate = torch.softmax(ffn.router.weight @ token, 0)[e]
        y[row, place] = gate * (weights["wo.weight"][e] @ hidden)
    return y, kept, aux, z


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("rows_per_group", [1, 2, 5])
@pytest.mark.parametrize("training", [False, True])
@modes
def test_switch_layer_equals_plain_loops(activation, rows_per_group, training, mode):
    ffn = layer(
        activation=activation, capacity_mode=mode, hf_capacity=2, expert_dropout=0.4, jitter=0.0,
        train_capacity_factor=0.8, eval_capacity_factor=1.1,
    ).train(training)  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 6, 4, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.rand(5, 6, generator=generator) < 0.8
    noise = Noise(3, 4, torch.arange(5)) if training else None
    factors = torch.ones(5, 6, 5, dtype=torch.float64)
    if training:
        keep = noise.uniform("encoder.1.ffn.experts", (5, 6, 5)) >= 0.4
        factors = keep / torch.tensor(0.6, dtype=torch.float64)

    y, routing = ffn(x, mask, rows_per_group, noise)
    expected, kept, aux, z = plain_switch_layer(ffn, x, mask, rows_per_group, training, factors)
    assert routing.kept.flatten()[:30].tolist() == kept.flatten().tolist()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 if training else 1e-10)
    close(routing.aux_loss, torch.tensor(aux, dtype=torch.float64))
    close(routing.z_loss, torch.tensor(z, dtype=torch.float64))
    weight = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    inputs = (x, *ffn.parameters())
    for actual, loop in zip(
        torch.autograd.grad((y * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, loop, rtol=0, atol=1e-5 if training else 1e-10)


# ---------------------------------------------------------------- micro-batches


@shapes
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_whole_groups_make_the_micro_batch_no_matter(shape, micro_batch):
    model = tiny_model(**shape, dropout=0.2, moe={"jitter": 0.3, "train_capacity_factor": 0.7})
    model.train()  # groups of 10 tokens: 2 rows of 5
    source, target = tokens(8, 5), tokens(8, 3, seed=1)
    mask = torch.arange(5) < torch.tensor([5, 3, 5, 5, 2, 5, 4, 5])[:, None]

    def run(rows):
        return model(source[rows], target[rows], encoder_mask=mask[rows], noise=Noise(1, 2, rows))

    whole = run(torch.arange(8))
    parts = [run(rows) for rows in torch.arange(8).split(micro_batch)]
    assert any((~layer.kept).any() for layer in whole.routing.values())
    close(torch.cat([part.logits for part in parts]), whole.logits)
    close(torch.stack([part.aux_loss for part in parts]).mean(), whole.aux_loss)
    close(torch.stack([part.z_loss for part in parts]).mean(), whole.z_loss)
    for name, routing in whole.routing.items():
        kept = torch.cat([part.routing[name].kept for part in parts])
        assert torch.equal(kept, routing.kept), name


def test_splitting_a_group_does_matter():
    model = tiny_model(moe={"eval_capacity_factor": 0.7})
    source, target = tokens(2, 5), tokens(2, 3, seed=1)
    whole = model(source, target).logits
    parts = [model(source[row], target[row]).logits for row in ([0], [1])]
    assert not torch.allclose(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("mode", "group_size", "rows"),
    [("group", 10, 2), ("group", 14, 2), ("group", 3, 1), ("dropless", 20, 4), ("hf", 20, 1)],
)
def test_rows_per_group(mode, group_size, rows):
    model = tiny_model(moe={"capacity_mode": mode, "group_size": group_size})
    assert rows_per_group(model.config, 5) == rows


# ---------------------------------------------------------------- causality and padding


@shapes
@modes
def test_decoder_is_causal(shape, mode):
    capacity = {"eval_capacity_factor": 0.6, "hf_capacity": 1, "group_size": 15}
    model = tiny_model(**shape, moe={"capacity_mode": mode, **capacity})
    source, target = tokens(3, 5), tokens(3, 6, seed=1)
    before = model(source, target)
    assert any((~layer.kept).any() for layer in before.routing.values()) == (mode != "dropless")
    for place in range(1, 6):
        changed = target.clone()
        changed[1, place:] = changed[1, place:] % 18 + 1
        after = model(source, changed)
        assert not torch.allclose(after.logits[1, place], before.logits[1, place])
        close(after.logits[0], before.logits[0])
        close(after.logits[1, :place], before.logits[1, :place])
        if mode != "group":  # in a group, row 1 stands before row 2 in the experts' queues
            close(after.logits[2], before.logits[2])


@shapes
def test_encoder_padding_changes_nothing_without_capacity(shape):
    model = tiny_model(**shape, moe={"capacity_mode": "dropless", "aux_loss_padding": "excluded"})
    source, target = tokens(3, 5), tokens(3, 4, seed=1)
    plain = model(source, target)
    for pad_id in (0, 7):
        padded = F.pad(source, (0, 3), value=pad_id)
        mask = (torch.arange(8) < 5).expand(3, 8)
        output = model(padded, target, encoder_mask=mask)
        close(output.logits, plain.logits)
        close(output.encoder_hidden[:, :5], plain.encoder_hidden)
        for name, routing in output.routing.items():
            if name.startswith("encoder"):
                assert not routing.kept[:, 5:].any()


def test_decoder_padding_behind_the_targets_changes_no_logit_in_group_mode():
    model = tiny_model(moe={"eval_capacity_factor": 1.0, "group_size": 5})
    source, target = tokens(2, 5), tokens(2, 4, seed=1)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    one = model(source, target, decoder_mask=mask).logits
    other = model(source, torch.where(mask, target, 3), decoder_mask=mask).logits
    close(one[mask], other[mask])


def test_missing_masks_mean_all_real():
    model = tiny_model()
    source, target = tokens(2, 5), tokens(2, 4, seed=1)
    full = {"encoder_mask": torch.ones(2, 5) > 0, "decoder_mask": torch.ones(2, 4) > 0}
    close(model(source, target).logits, model(source, target, **full).logits)


def test_a_row_of_nothing_but_padding_is_finite():
    model = tiny_model()
    mask = torch.tensor([[True] * 5, [False] * 5])
    output = model(tokens(2, 5), tokens(2, 4), encoder_mask=mask)
    (output.logits.sum() + output.aux_loss + output.z_loss).backward()
    assert output.logits.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


# ---------------------------------------------------------------- gradients


def loss(output):
    weight = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(9)).double()
    return (output.logits * weight).sum() + 3 * output.aux_loss + 2 * output.z_loss


def gradients(model, *arguments, **options):
    model.zero_grad()
    loss(model(*arguments, **options)).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@shapes
@modes
@pytest.mark.parametrize("which", [True, "selective"])
def test_activation_checkpointing_changes_no_gradient(shape, mode, which):
    model = tiny_model(**shape, dropout=0.3, moe={"jitter": 0.3, "capacity_mode": mode}).train()
    arguments = tokens(4, 5), tokens(4, 3, seed=1)
    options = {"noise": Noise(1, 2, torch.arange(4))}
    plain = gradients(model, *arguments, **options)
    model.set_activation_checkpointing(which)
    recomputed = gradients(model, *arguments, **options)
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name


def test_activation_checkpointing_recomputes_every_block():
    model = tiny_model()
    calls = []
    for stack in (model.encoder, model.decoder):
        for block in stack.layers.values():
            block.ffn.register_forward_pre_hook(lambda module, _: calls.append(module.site))
    for enabled, times in ((False, 1), (True, 2)):
        calls.clear()
        model.set_activation_checkpointing(enabled)
        gradients(model, tokens(2, 5), tokens(2, 3))
        assert len(calls) == 6 * times


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing_makes_again_what_is_cheap_and_no_product_with_a_weight():
    model = tiny_model(dropout=0.3).train()
    options = {"noise": Noise(1, 2, torch.arange(4))}
    calls = {}
    for which in (False, "selective", True):
        model.set_activation_checkpointing(which)
        output = loss(model(tokens(4, 5), tokens(4, 3, seed=1), **options))
        with Operations() as counted:
            output.backward()
        calls[which] = counted.calls
    for product in ("aten.mm.default", "megaswitch.grouped_product.default"):
        assert calls["selective"][product] == calls[False][product], product
        assert calls[True][product] > calls[False][product], product
    for cheap in ("aten._softmax.default", "aten.relu.default", "aten.rsqrt.default"):
        assert calls[False][cheap] == 0, cheap
        assert calls["selective"][cheap] == calls[True][cheap] > 0, cheap


@shapes
@pytest.mark.parametrize("depths", [(1, 1), (2, 4), (3, 2)])
@pytest.mark.parametrize("steps", [(1, 1), (2, 1), (0, 2), (2, 0)])
def test_every_parameter_gets_a_gradient_and_a_placement(shape, depths, steps):
    moe = {"encoder_sparse_step": steps[0], "decoder_sparse_step": steps[1], "num_experts": 2}
    model = tiny_model(**shape, num_encoder_layers=depths[0], num_decoder_layers=depths[1], moe=moe)
    assert all(hasattr(p, "shard_spec") for p in model.parameters())
    output = model(tokens(4, 5), tokens(4, 5, seed=1))
    loss(output).backward()
    used = {name: routing.expert[routing.kept] for name, routing in output.routing.items()}
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        if not spec_of(weight).is_expert:
            assert weight.grad.ne(0).any(), name
            continue
        assert "experts" in name
        assert len(weight) == 2
        for e, grad in enumerate(weight.grad):
            chosen = (used[name.partition(".experts")[0].replace("layers.", "")] == e).any()
            assert grad.ne(0).any() == chosen, name


@pytest.mark.parametrize(
    ("steps", "sparse"),
    [
        ((2, 2), ["encoder.1.ffn", "encoder.3.ffn", "decoder.1.ffn"]),
        ((1, 0), [f"encoder.{i}.ffn" for i in range(4)]),
        ((3, 1), ["encoder.2.ffn", "decoder.0.ffn", "decoder.1.ffn"]),
        ((4, 2), ["encoder.3.ffn", "decoder.1.ffn"]),
    ],
)
def test_placement_of_switch_layers(steps, sparse):
    moe = {"encoder_sparse_step": steps[0], "decoder_sparse_step": steps[1]}
    assert list(tiny_model(moe=moe)(tokens(2, 5), tokens(2, 3)).routing) == sparse


def test_a_dense_model_routes_nothing():
    output = tiny_model(moe={"num_experts": 0})(tokens(2, 5), tokens(2, 3))
    assert output.routing == {}
    assert output.aux_loss == 0
    assert output.z_loss == 0


@shapes
def test_losses_are_summed_or_averaged_over_layers(shape):
    outputs = {}
    for reduction in ("sum", "mean"):
        model = tiny_model(**shape, moe={"aux_loss_reduction": reduction})
        outputs[reduction] = model(tokens(2, 5), tokens(2, 3))
    assert len(outputs["sum"].routing) == 3
    close(outputs["sum"].aux_loss, 3 * outputs["mean"].aux_loss)
    close(outputs["sum"].z_loss, 3 * outputs["mean"].z_loss)


def routing_margin(model, *arguments):
    """The smallest lead of a chosen expert's probability over the next."""
    margins = []

    def record(module, inputs, routing):
        best = routing.probabilities.topk(2).values
        margins.append((best[..., 0] - best[..., 1]).min().item())

    hooks = [
        m.router.register_forward_hook(record) for m in model.modules() if hasattr(m, "router")
    ]
    model(*arguments)
    for hook in hooks:
        hook.remove()
    return min(margins)


@shapes
def test_gradients_equal_finite_differences(shape):
    model = tiny_model(**shape, num_encoder_layers=2, moe={"capacity_mode": "dropless"})
    arguments = tokens(2, 4), tokens(2, 3, seed=1)
    assert routing_margin(model, *arguments) > 1e-4
    exact = gradients(model, *arguments)
    generator = torch.Generator().manual_seed(0)
    step = 1e-6
    for name, weight in model.named_parameters():
        flat = weight.detach().view(-1)
        largest = exact[name].abs().flatten().argmax().item()
        for index in (largest, *torch.randint(len(flat), (2,), generator=generator).tolist()):
            values = []
            kept = flat[index].item()
            for sign in (1, -1):
                flat[index] = kept + sign * step
                with torch.no_grad():
                    values.append(loss(model(*arguments)).item())
            flat[index] = kept
            slope = (values[0] - values[1]) / (2 * step)
            analytic = exact[name].flatten()[index].item()
            assert slope == pytest.approx(analytic, rel=1e-5, abs=1e-6), (name, index)


# ---------------------------------------------------------------- assembly


def test_tied_logits_are_scaled_and_untied_are_not():
    tied, untied = tiny_model(tie_embeddings=True), tiny_model(tie_embeddings=False)
    hidden = []
    for model in (tied, untied):
        model.decoder.register_forward_hook(lambda _module, _inputs, out: hidden.append(out))
    source, target = tokens(2, 5), tokens(2, 3)
    close(tied(source, target).logits, hidden.pop() @ tied.embedding.weight.T * 8**-0.5)
    close(untied(source, target).logits, hidden.pop() @ untied.head.weight.T)


def test_the_recorded_routing_is_that_of_the_rows():
    model = tiny_model(moe={"eval_capacity_factor": 0.8})
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    output = model(tokens(3, 5), tokens(3, 4), encoder_mask=mask)  # a last group of one row
    for name, routing in output.routing.items():
        shape = (3, 5) if name.startswith("encoder") else (3, 4)
        for field in ("expert", "gate", "kept", "entropy"):
            value = getattr(routing, field)
            assert value.shape == shape, (name, field)
            assert not value.requires_grad, (name, field)
        assert (routing.gate >= 1 / 3).all()
        assert (routing.entropy <= torch.log(torch.tensor(3.0)) + 1e-9).all()
        if name.startswith("encoder"):
            assert not routing.kept[~mask].any()


def test_evaluation_ignores_noise_and_training_without_noise_takes_torchs_seed():
    model = tiny_model(dropout=0.3, moe={"jitter": 0.3})
    arguments = tokens(2, 5), tokens(2, 3)
    plain = model(*arguments).logits
    assert torch.equal(model(*arguments, noise=Noise(0, 0, torch.arange(2))).logits, plain)
    model.train()
    torch.manual_seed(0)
    first = model(*arguments).logits
    second = model(*arguments).logits
    torch.manual_seed(0)
    assert torch.equal(model(*arguments).logits, first)
    assert not torch.equal(first, second)


def test_bf16_autocast_stays_near_fp32():
    model = tiny_model(double=False, moe={"capacity_mode": "dropless"})
    arguments = tokens(2, 5), tokens(2, 3)
    plain = model(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*arguments)
    assert output.logits.dtype == torch.bfloat16
    assert output.aux_loss.dtype == torch.float32
    torch.testing.assert_close(output.logits.float(), plain.logits, rtol=0.1, atol=0.15)


def test_it_can_be_built_on_the_meta_device():
    reference = tiny_model()
    with torch.device("meta"):
        model = SwitchTransformer(reference.config)
    assert all(hasattr(p, "shard_spec") for p in model.parameters())
    for name, weight in model.named_parameters():
        assert weight.is_meta, name
        assert weight.shape == reference.get_parameter(name).shape, name
