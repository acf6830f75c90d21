"""Documents that share a row are to each other as if they stood in rows of their own."""

import itertools

import pytest
import torch

from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.noise import Noise
from megaswitch.layers.vocab import token_losses
from megaswitch.model.switch_transformer import Activations
from megaswitch.train.objectives import MicroBatch
from tests.unit.model.router_checks import tiny_model

# Tokens of each document, by row: (encoder, decoder).
ROWS = [[(5, 3), (2, 4), (4, 1)], [(3, 2), (7, 5)], [(9, 6)]]
LENGTHS = (13, 9)  # the last row is padded most
SHAPES = {
    "relu-tied": {"activation": "relu", "tie_embeddings": True},
    "geglu-untied": {"activation": "gated-gelu", "tie_embeddings": False},
}
MODES = {
    "dense": {"num_experts": 0},
    "dropless": {"capacity_mode": "dropless"},
    "generous": {"capacity_mode": "group", "group_size": 13, "eval_capacity_factor": 3.0},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def documents(seed=0):
    """(encoder, decoder input, targets) of each document, by row."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(1, 19, (length,), generator=generator)

    return [[(draw(e), draw(d), draw(d)) for e, d in row] for row in ROWS]


def pack(rows):
    """The documents of each row one behind another: three [B, L] tensors and two of segments."""
    encoder = torch.zeros(len(rows), LENGTHS[0], dtype=torch.int64)
    decoder, targets = (torch.zeros(len(rows), LENGTHS[1], dtype=torch.int64) for _ in range(2))
    encoder_segments, decoder_segments = encoder.int(), decoder.int()
    for row, pieces in enumerate(rows):
        e = d = 0
        for number, (source, shifted, target) in enumerate(pieces, 1):
            encoder[row, e : e + len(source)] = source
            encoder_segments[row, e : e + len(source)] = number
            decoder[row, d : d + len(target)] = shifted
            targets[row, d : d + len(target)] = target
            decoder_segments[row, d : d + len(target)] = number
            e, d = e + len(source), d + len(target)
    return encoder, decoder, targets, encoder_segments, decoder_segments


def run_packed(model, rows):
    encoder, decoder, targets, encoder_segments, decoder_segments = pack(rows)
    output = model(
        encoder, decoder, encoder_segments=encoder_segments, decoder_segments=decoder_segments
    )
    return output, token_losses(output.logits, targets, decoder_segments > 0).cross_entropy


def run_apart(model, rows):
    losses = []
    for source, shifted, target in itertools.chain(*rows):
        logits = model(source[None], shifted[None]).logits
        everything = torch.ones(1, len(target), dtype=torch.bool)
        losses.append(token_losses(logits, target[None], everything).cross_entropy)
    return torch.stack(losses)


@shapes
@pytest.mark.parametrize("mode", MODES)
def test_a_packed_row_has_the_loss_and_gradients_of_its_documents_apart(shape, mode):
    model = tiny_model(**shape, moe=MODES[mode])
    rows = documents()
    output, packed = run_packed(model, rows)
    apart = run_apart(model, rows).sum()
    real = pack(rows)[3] > 0
    for name, routing in output.routing.items():
        mask = real if name.startswith("encoder") else pack(rows)[4] > 0
        assert torch.equal(routing.kept, mask), "this test drops no token, and routes no padding"
    torch.testing.assert_close(packed, apart, rtol=1e-12, atol=0)
    weights = list(model.parameters())
    ours = torch.autograd.grad(packed, weights, allow_unused=True)
    theirs = torch.autograd.grad(apart, weights, allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            error = (one - other).abs().max() / other.abs().max().clamp(min=1e-300)
            assert error < 1e-12, f"{name} is off by {error:.1e} of its largest gradient"


def test_without_segments_neighbours_in_a_row_see_each_other():
    model = tiny_model(moe=MODES["dense"])
    rows = documents()
    encoder, decoder, targets, *segments = pack(rows)
    blind = model(encoder, decoder, encoder_mask=segments[0] > 0, decoder_mask=segments[1] > 0)
    loss = token_losses(blind.logits, targets, segments[1] > 0).cross_entropy
    assert (loss - run_apart(model, rows).sum()).abs() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_document_reaches_another(checkpointing):
    model = tiny_model(moe=MODES["dense"])
    model.set_activation_checkpointing(checkpointing)
    rows = documents()
    _, _, targets, encoder_segments, decoder_segments = pack(rows)
    for number in (1, 2, 3):
        counted = decoder_segments == number
        others = {"encoder": encoder_segments != number, "decoder": decoder_segments != number}
        seen = []
        for noise in (None, 1.0, 1e100):  # what the other documents and the padding hold
            encoder, decoder, *_ = pack(rows)
            inputs = {"encoder": model.embedding(encoder), "decoder": model.embedding(decoder)}
            inputs = {k: x.detach() for k, x in inputs.items()}
            if noise is not None:
                for stack, place in others.items():
                    inputs[stack][place] = noise * torch.randn(int(place.sum()), 8).double()
            for x in inputs.values():
                x.requires_grad_()
            model.embed = lambda *_, x=inputs: Activations(x["encoder"], x["decoder"])
            logits = model(
                encoder,
                decoder,
                encoder_segments=encoder_segments,
                decoder_segments=decoder_segments,
            ).logits
            loss = token_losses(logits, targets, counted).cross_entropy
            gradients = torch.autograd.grad(loss, list(inputs.values()))
            for gradient, place in zip(gradients, others.values(), strict=True):
                assert torch.equal(gradient[place], torch.zeros_like(gradient[place]))
                assert (gradient[~place] != 0).any()
            seen.append(
                [logits[counted], *(g[~p] for g, p in zip(gradients, others.values(), strict=True))]
            )
        for one, two, three in zip(*seen, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_document_ends_the_step_packed_or_not(value):
    """Masks are finite and attention is dense, so 0·NaN reaches the documents of the same row.

    That changes nothing: the loss is a sum over documents, which one of them makes not finite
    wherever it stands, and on such a loss training stops before it updates anything. Other rows
    are never touched.
    """
    model = tiny_model(moe=MODES["dense"])
    rows = documents()
    encoder, decoder, targets, encoder_segments, decoder_segments = pack(rows)
    inputs = {"encoder": model.embedding(encoder), "decoder": model.embedding(decoder)}
    inputs["encoder"].data[0, 1] = value  # a token of the first document of the first row
    model.embed = lambda *_: Activations(inputs["encoder"], inputs["decoder"])
    segments = {"encoder_segments": encoder_segments, "decoder_segments": decoder_segments}
    logits = model(encoder, decoder, **segments).logits
    losses = [
        token_losses(logits, targets, decoder_segments == number).cross_entropy
        for number in range(1, 4)
    ]
    assert not losses[0].isfinite(), "so would the sum be, were the others untouched"
    assert not sum(losses).isfinite()
    assert bool(logits[1:].isfinite().all())


def test_dropping_counts_the_tokens_of_all_documents_in_a_row_together():
    # A group is whole rows, whatever they hold: its slots go to the first tokens of the row.
    model = tiny_model(moe={"group_size": 13, "eval_capacity_factor": 0.5})
    rows = documents()
    output, loss = run_packed(model, rows)
    assert loss.isfinite()
    segments = {"encoder": pack(rows)[3], "decoder": pack(rows)[4]}
    dropped = 0
    for name, routing in output.routing.items():
        segment = segments[name.partition(".")[0]]
        slots = int(segment.shape[1] * 0.5 / 3)
        assert not routing.kept[segment == 0].any()
        for row, real in enumerate(segment > 0):
            for expert in range(3):
                queue = routing.kept[row][real & (routing.expert[row] == expert)]
                assert queue.tolist() == [i < slots for i in range(len(queue))]
                dropped += int((~queue).sum())
    assert dropped > 0


def test_segments_of_one_document_a_row_are_as_good_as_masks():
    model = tiny_model()
    rows = [[pieces[0]] for pieces in documents()]
    encoder, decoder, _, *segments = pack(rows)
    masks = [s > 0 for s in segments]
    plain = model(encoder, decoder, encoder_mask=masks[0], decoder_mask=masks[1])
    packed = model(encoder, decoder, encoder_segments=segments[0], decoder_segments=segments[1])
    torch.testing.assert_close(packed.logits[masks[1]], plain.logits[masks[1]], rtol=0, atol=1e-12)


def test_segments_of_one_stream_alone_are_refused():
    model = tiny_model()
    encoder, decoder, _, segments, _ = pack(documents())
    with pytest.raises(ValueError, match="give both"):
        model(encoder, decoder, encoder_segments=segments)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_packed_row_is_close_to_its_documents_apart_in_low_precision_too(precision):
    model = tiny_model(moe=MODES["dense"], double=False)
    rows = documents()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32), torch.no_grad():
        _, packed = run_packed(model, rows)
        apart = run_apart(model, rows).sum()
    torch.testing.assert_close(packed, apart, rtol=1e-5 if precision == torch.float32 else 3e-2,
                               atol=0)  # fmt: skip


def test_a_micro_batch_takes_segments_along():
    encoder, decoder, targets, *segments = pack(documents())
    batch = Seq2SeqBatch(
        encoder, decoder, targets, segments[0] > 0, segments[1] > 0, torch.arange(3), *segments
    )
    micro = MicroBatch.of(batch, torch.device("cpu"), Noise(0, 0, torch.arange(3)))
    assert torch.equal(micro.inputs.encoder_segments, segments[0])
    assert torch.equal(micro.inputs.decoder_segments, segments[1])
    assert batch.to("meta").encoder_segments.device.type == "meta"
