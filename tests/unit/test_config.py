"""Configuration: what is refused, with which words, and that text and config are one."""

import dataclasses

import pytest

from megaswitch.config import RunConfig, from_toml, known_keys, load_config, model_config, to_toml
from megaswitch.log import ConfigError, UserError
from megaswitch.presets import PRESETS

SWITCH = "--model.moe.num_experts=8"


def problems(*overrides, path=None, world_size=1):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return caught.value.problems


def write(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_the_defaults_are_valid():
    assert load_config(None) == RunConfig()


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.d_modle", "model.d_model"),
        ("model.num_experts", "model.moe.num_experts"),
        ("model.moe.num_expert", "model.moe.num_experts"),
        ("model.moe.capacity_factor", "model.moe.eval_capacity_factor"),
        ("optim.lr", None),
        ("optim.learning-rate", "optim.learning_rate"),
        ("train.batchsize", "train.batch_size"),
        ("zzz.qqq", None),
    ],
)
def test_unknown_keys_show_the_nearest(key, nearest):
    (problem,) = problems(f"--{key}=1")
    assert "is not a known key" in problem
    if nearest:
        assert problem == f"{key} is not a known key; did you mean {nearest}?"


def test_an_unknown_preset_shows_the_nearest():
    assert problems("--model.preset=switch-base8") == [
        "model.preset='switch-base8' is not a preset; did you mean switch-base-8?"
    ]


@pytest.mark.parametrize("value", ["3", "[1]", "{a=1}", "true"])
def test_a_preset_of_a_wrong_type_is_a_problem(value):
    (problem,) = problems(f"--model.preset={value}")
    assert problem.startswith("model.preset=")


# ---------------------------------------------------------------- everything at once


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        """
        [model]
        d_modle = 3
        d_ff = -1
        [train]
        batch_size = 7
        precision = "fp8"
        [optim]
        schedule = "cosine"
        learning_rate = 0.01
        beta1 = 0.9
        """,
    )
    found = problems("--nonsense", "--data.noise_density=2", path=path)
    for start in (
        "--nonsense is not an override",
        "model.d_modle is not a known key",
        "model.d_ff=-1 ",
        "train.precision='fp8' ",
        "data.noise_density=2 ",
        "optim.beta1=0.9 would be ignored",
        "train.batch_size=7 must be a multiple",
        "optim.warmup_steps=10000 (and decay) must fit",
    ):
        assert sum(problem.startswith(start) for problem in found) == 1, start
    assert len(found) == 8
    with pytest.raises(ConfigError, match="8 problems in the configuration:\n  - --nonsense"):
        load_config(path, ("--nonsense", "--data.noise_density=2"))


def test_a_misplaced_key_hides_no_other_problem(tmp_path):
    # `steps` at the top is part of the text `train.steps`, which the second problem speaks of.
    path = write(tmp_path, "steps = 3\n[optim]\nlearning_rate = 0.01\nschedule = 'linear'\n")
    assert len(problems(path=path)) == 2
    assert len(problems("", "--train.batch_size=7")) == 2


def test_a_wrong_section_silences_the_rules_about_it(tmp_path):
    path = write(tmp_path, "train = 3\n[optim]\nlearning_rate = 0.01\nschedule = 'linear'\n")
    (problem,) = problems(path=path)
    assert problem.startswith("train=3 is wrong")


def test_a_wrong_value_is_not_reported_twice():
    (problem,) = problems("--train.micro_batch_size=0")
    assert problem.startswith("train.micro_batch_size=0 is wrong")


# ---------------------------------------------------------------- dead keys

DEAD = [
    ("model.moe.jitter=0.1", ()),
    ("model.moe.group_size=512", ()),
    ("model.moe.aux_loss_weight=0.1", ()),
    ("model.moe.capacity_mode=dropless", ()),
    ("model.moe.expert_dropout=0.4", ()),
    ("model.moe.encoder_sparse_step=2", ()),
    ("model.moe.z_loss_weight=0.0", ()),
    ("model.moe.train_capacity_factor=1.0", (SWITCH, "--model.moe.capacity_mode=dropless")),
    ("model.moe.eval_capacity_factor=1.0", (SWITCH, "--model.moe.capacity_mode=dropless")),
    ("model.moe.min_capacity=4", (SWITCH, "--model.moe.capacity_mode=hf")),
    ("model.moe.group_size=1024", (SWITCH, "--model.moe.capacity_mode=hf")),
    ("model.moe.hf_capacity=64", (SWITCH,)),
    ("optim.beta1=0.9", ()),
    ("optim.beta2=0.9", ()),
    ("optim.epsilon=1e-8", ()),
    ("optim.factored_min_dim=128", ("--optim.name=adamw",)),
    ("optim.expert_statistics=joint", ("--optim.name=adamw",)),
    ("optim.scale_by_parameter=false", ("--optim.name=adamw",)),
    ("optim.decay_steps=10", ()),
    ("optim.min_learning_rate=0.1", ()),
    ("optim.min_learning_rate=0.1", ("--optim.schedule=constant", "--optim.learning_rate=0.2")),
    ("train.rampup_increment=8", ()),
    ("train.rampup_samples=8", ()),
]


@pytest.mark.parametrize(("text", "others"), DEAD)
def test_a_key_that_would_be_ignored_is_a_problem(text, others):
    (problem,) = problems(f"--{text}", *others)
    assert problem.startswith(text.partition("=")[0])
    assert "would be ignored because" in problem
    assert problem.endswith("remove it")


def test_a_preset_may_set_what_the_user_turns_off():
    config = load_config(
        None,
        ("--model.preset=switch-base-8", "--model.moe.capacity_mode=dropless",
         "--train.micro_batch_size=16"),
    )  # fmt: skip
    assert config.model.moe.capacity_mode == "dropless"


def test_a_dense_preset_refuses_switch_keys():
    (problem,) = problems("--model.preset=t5-small", "--model.moe.jitter=0.1")
    assert "model.moe.num_experts=0" in problem


# ---------------------------------------------------------------- overrides


def value_of(key, text):
    config = load_config(None, (f"--{key}={text}",))
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "12", 12),
        ("train.steps", "1_000", 1000),
        ("optim.learning_rate", "1e-3", 1e-3),
        ("optim.learning_rate", "2", 2.0),
        ("train.activation_checkpointing", "true", True),
        ("train.activation_checkpointing", "false", False),
        ("train.activation_checkpointing", "selective", "selective"),
        ("model.tie_embeddings", "false", False),
        ("train.run_dir", "runs/a b", "runs/a b"),
        ("train.run_dir", '"5"', "5"),
        ("train.run_dir", "a=b", "a=b"),
        ("data.train", "/data/c4", "/data/c4"),
        ("train.device", "cpu", "cpu"),
    ],
)
def test_overrides_are_typed(key, text, value):
    found = value_of(key, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.steps", "5.5"),
        ("train.steps", "5.0"),
        ("train.steps", "true"),
        ("train.steps", "'5'"),
        ("train.steps", "many"),
        ("train.steps", ""),
        ("train.steps", "[1]"),
        ("train.steps", "1979-05-27"),
        ("optim.learning_rate", "true"),
        ("optim.learning_rate", "'0.1'"),
        ("optim.learning_rate", "fast"),
        ("optim.learning_rate", "nan"),
        ("optim.learning_rate", "inf"),
        ("train.activation_checkpointing", "1"),
        ("train.activation_checkpointing", "yes"),
        ("train.activation_checkpointing", "True"),
        ("train.activation_checkpointing", "'true'"),
        ("train.run_dir", "5"),
        ("train.run_dir", "true"),
        ("train.precision", "fp16"),
        ("model.moe", "3"),
        ("train.batch_size", "-8"),
        ("model.dropout", "1.0"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_a_problem(key, text):
    (problem,) = problems(f"--{key}={text}")
    assert problem.startswith(f"{key}=")


@pytest.mark.parametrize("text", ["train.steps=3", "--steps=3", "--train.steps", "", "--", "-x=1"])
def test_malformed_overrides(text):
    assert problems(text) == [f"{text} is not an override; write --section.key=value"]


def test_an_override_through_a_value():
    (problem,) = problems("--train.steps.x=3", "--train.steps=4", "--train.steps.y=5")[-1:]
    assert problem == "train.steps.y=5: train.steps is a value, not a section"


def test_later_overrides_win_over_earlier_ones_over_the_file_over_the_preset(tmp_path):
    path = write(tmp_path, "[model]\npreset = 't5-small'\nd_ff = 100\n[train]\nsteps = 5\n")
    config = load_config(path, ("--train.steps=6", "--train.steps=7", "--model.d_kv=32"))
    assert config.train.steps == 7
    assert (config.model.d_ff, config.model.d_kv, config.model.d_model) == (100, 32, 512)


# ---------------------------------------------------------------- rules between keys


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "advice"),
    [(64, 8, 1, None), (64, 8, 8, None), (64, 8, 16, 128), (60, 8, 1, 64), (7, 8, 1, 8)],
)
def test_batch_is_a_multiple_of_the_ranks_micro_batches(batch, micro, ranks, advice):
    overrides = (f"--train.batch_size={batch}", f"--train.micro_batch_size={micro}")
    if advice is None:
        assert load_config(None, overrides, world_size=ranks).train.batch_size == batch
    else:
        (problem,) = problems(*overrides, world_size=ranks)
        assert f"{micro} × {ranks} = {micro * ranks}; use {advice}" in problem
        overrides = (f"--train.batch_size={advice}", overrides[1])
        load_config(None, overrides, world_size=ranks)


@pytest.mark.parametrize(
    ("group", "length", "micro", "fault"),
    [
        (1024, 512, 8, None),
        (1024, 512, 2, None),
        (512, 512, 3, None),
        (1000, 512, 8, "model.moe.group_size=1000 must be a multiple of data.encoder_length=512"),
        (256, 512, 8, "model.moe.group_size=256 must be a multiple of data.encoder_length=512"),
        (1024, 512, 3, "train.micro_batch_size=3 must be a multiple of the 2 rows"),
        (8192, 512, 8, "train.micro_batch_size=8 must be a multiple of the 16 rows"),
    ],
)
@pytest.mark.parametrize("mode", ["group", "dropless"])
def test_groups_hold_whole_rows_and_micro_batches_whole_groups(group, length, micro, fault, mode):
    overrides = (
        SWITCH, f"--model.moe.capacity_mode={mode}", f"--model.moe.group_size={group}",
        f"--data.encoder_length={length}", f"--train.micro_batch_size={micro}",
        "--train.batch_size=96",
    )  # fmt: skip
    if fault is None:
        load_config(None, overrides)
    else:
        (problem,) = problems(*overrides)
        assert problem.startswith(fault)


def test_groups_are_no_matter_to_hf_mode_and_dense_models():
    odd = ("--train.micro_batch_size=1", "--data.encoder_length=100")
    load_config(None, odd)
    load_config(None, (*odd, SWITCH, "--model.moe.capacity_mode=hf"))


@pytest.mark.parametrize(
    ("start", "increment", "samples", "fault"),
    [
        (16, 16, 1000, None),
        (64, 8, 1000, None),
        (16, None, 1000, "needs train.rampup_increment"),
        (16, 16, None, "needs train.rampup_increment"),
        (12, 16, 1000, "must be a multiple of 8"),
        (16, 12, 1000, "itself a multiple of 8"),
        (16, 40, 1000, "reach train.batch_size=64 in steps of"),
        (128, 16, 1000, "must not exceed train.batch_size=64"),
    ],
)
def test_ramp_up(start, increment, samples, fault):
    overrides = [f"--train.rampup_batch_size={start}"]
    overrides += [f"--train.rampup_increment={increment}"] * (increment is not None)
    overrides += [f"--train.rampup_samples={samples}"] * (samples is not None)
    if fault is None:
        assert load_config(None, overrides).train.rampup_batch_size == start
    else:
        (problem,) = problems(*overrides)
        assert problem.startswith(f"train.rampup_batch_size={start}")
        assert fault in problem


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "faults"),
    [
        ("wsd", 100, 100, []),
        ("wsd", 100, 900, []),
        ("wsd", 100, 901, ["optim.warmup_steps=100 (and decay) must fit"]),
        ("wsd", 100, None, ["optim.schedule='wsd' needs optim.decay_steps"]),
        ("cosine", 1000, None, []),
        ("cosine", 1001, None, ["optim.warmup_steps=1001 (and decay) must fit"]),
        ("linear", 1001, None, ["optim.warmup_steps=1001 (and decay) must fit"]),
        ("rsqrt", 10_000, None, []),
        ("constant", 10_000, None, []),
    ],
)
def test_warmup_and_decay_fit_in_the_run(schedule, warmup, decay, faults):
    overrides = [f"--optim.schedule={schedule}", f"--optim.warmup_steps={warmup}"]
    overrides += ["--optim.learning_rate=0.01"]
    overrides += [f"--optim.decay_steps={decay}"] * (decay is not None)
    if not faults:
        load_config(None, overrides)
        return
    found = problems(*overrides)
    assert len(found) == len(faults)
    for problem, start in zip(found, faults, strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (("--model.relative_buckets=30",), "model.relative_buckets=30 must be a multiple of 4"),
        (
            ("--model.relative_max_distance=16",),
            "model.relative_max_distance=16 must be greater than",
        ),
        (
            (SWITCH, "--model.moe.encoder_sparse_step=7"),
            "model.moe.encoder_sparse_step=7 must not exceed model.num_encoder_layers=6",
        ),
        (
            (SWITCH, "--model.moe.decoder_sparse_step=9"),
            "model.moe.decoder_sparse_step=9 must not exceed",
        ),
        (
            (SWITCH, "--model.moe.encoder_sparse_step=0", "--model.moe.decoder_sparse_step=0"),
            "model.moe.num_experts=8 but both sparse steps are 0",
        ),
        (
            ("--optim.name=adamw", "--optim.schedule=wsd", "--optim.decay_steps=10",
             "--optim.warmup_steps=0", "--optim.min_learning_rate=2.0",
             "--optim.learning_rate=0.05"),
            "optim.min_learning_rate=2.0 must not exceed optim.learning_rate=0.05",
        ),
    ],
)  # fmt: skip
def test_other_rules(overrides, start):
    (problem,) = problems(*overrides)
    assert problem.startswith(start)


# ---------------------------------------------------------------- files


def test_a_missing_file(tmp_path):
    path = tmp_path / "absent.toml"
    with pytest.raises(UserError, match=r"absent\.toml does not exist"):
        load_config(path)


@pytest.mark.parametrize("text", ["[model", "steps 3", "[a]\nb = 1\nb = 2\n"])
def test_broken_toml(tmp_path, text):
    with pytest.raises(UserError, match="is not TOML"):
        load_config(write(tmp_path, text))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["model = 3", "train = [1]", "[[train]]\nsteps = 1"])
def test_a_section_that_is_none(tmp_path, text):
    (problem,) = problems(path=write(tmp_path, text))
    assert "is wrong" in problem


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("preset", PRESETS)
def test_text_and_config_are_one_for_every_preset(preset, tmp_path):
    config = dataclasses.replace(RunConfig(), model=model_config(preset))
    assert config.model.preset == preset
    text = to_toml(config)
    assert from_toml(text) == config
    assert to_toml(from_toml(text)) == text
    # What a run folder holds can be handed to a new run.
    assert (
        load_config(write(tmp_path, text), ("--train.micro_batch_size=64",)).model == config.model
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("--optim.name=adamw", "--optim.beta1=0.8", "--optim.clip_grad_norm=1.0"),
        (
            "--optim.schedule=wsd",
            "--optim.decay_steps=9",
            "--optim.warmup_steps=0",
            "--optim.learning_rate=0.01",
        ),
        (SWITCH, "--model.moe.capacity_mode=hf", "--model.moe.hf_capacity=3"),
        (SWITCH, "--model.moe.capacity_mode=dropless"),
        (SWITCH, "--model.moe.expert_dropout=0.4", "--model.moe.jitter=0.0"),
        ("--model.preset=switch-tiny", "--model.moe.num_experts=0"),
        ("--model.preset=switch-tiny", "--model.moe.capacity_mode=hf"),
        ("--train.rampup_batch_size=8", "--train.rampup_increment=8", "--train.rampup_samples=9"),
        ("--data.train=/a/b", "--train.run_dir='with \"quotes\" and ünicode'"),
    ],
)
def test_a_resolved_config_loads_again_without_a_complaint(overrides, tmp_path):
    config = load_config(None, overrides)
    path = write(tmp_path, to_toml(config))
    again = load_config(path)
    assert to_toml(again) == to_toml(config)
    assert from_toml(to_toml(config)) == again


def test_resolved_text_shows_live_keys_only():
    text = to_toml(load_config(None, (SWITCH, "--model.moe.capacity_mode=dropless")))
    assert "num_experts = 8" in text
    assert "aux_loss_weight = 0.01" in text
    for dead in ("train_capacity_factor", "hf_capacity", "beta1", "decay_steps", "min_learning"):
        assert dead not in text


def test_from_toml_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"train\.stepz is not a known key; did you mean"):
        from_toml("[train]\nstepz = 3\n")


def test_known_keys_are_leaves():
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {"model.preset", "model.moe.num_experts", "train.steps"} <= set(keys)
    assert "model.moe" not in keys


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.steps = 3


@pytest.mark.parametrize(
    "overrides",
    [
        ["--optim.name=adamw"],  # the default is rsqrt's numerator; 1 / 100 steps
        ["--optim.schedule=constant"],
        ["--optim.schedule=cosine", "--optim.warmup_steps=10"],
        ["--optim.name=adamw", "--optim.schedule=constant", "--optim.learning_rate=0.1"],
    ],
)
def test_the_default_learning_rate_is_refused_where_it_is_absurd(overrides):
    if overrides == ["--optim.name=adamw"]:
        overrides = [*overrides, "--optim.warmup_steps=100"]
    with pytest.raises(ConfigError, match=r"optim\.learning_rate=.* is common"):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--train.valid_interval=10"],
        ["--train.valid_samples=10"],
        ["--optim.scale_by_parameter=false", "--optim.epsilon2=0.1"],
        ["--optim.expert_statistics=joint"],
    ],
)
def test_more_keys_that_would_be_ignored(overrides):
    with pytest.raises(ConfigError, match="would be ignored because"):
        load_config(None, overrides)


@pytest.mark.parametrize("override", ["--model.moe=5", "--optim.name.x=1"])
def test_sections_and_values_are_not_mixed_up(override):
    with pytest.raises(ConfigError, match="section"):
        load_config(None, ["--optim.name=adafactor", override])


# ---------------------------------------------------------------- sources of training data


TABLE = ("--data.train.en=a", "--data.train.de=b")


def test_a_table_of_sources_is_read_and_written(tmp_path):
    text = """
    [data.train]
    en = "corpora/en"
    "zh-Hant" = "corpora/zh"
    [data.valid]
    en = "corpora/en-valid"
    [data.mixture]
    exponent = 0.3
    cap = 1000
    """
    config = load_config(write(tmp_path, text), ["--data.train.de=corpora/de"])
    assert config.data.train == {"en": "corpora/en", "zh-Hant": "corpora/zh", "de": "corpora/de"}
    assert config.data.mixture.exponent == 0.3
    assert from_toml(to_toml(config)) == config
    weighted = load_config(None, [*TABLE, "--data.mixture.weights={en = 2, de = 0.5}"])
    assert from_toml(to_toml(weighted)).data.mixture.weights == {"en": 2.0, "de": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.train=a", "--data.mixture.exponent=0.3"],
         "data.mixture.exponent=0.3 would be ignored because data.train='a'; it must be a table of "
         "named sources; remove it"),
        (["--data.train.a b=x"], "has a source named 'a b'; a name must be 1 … 64 letters"),
        (["--data.train={}"], "data.train names 0 sources; it must name 1 … 1000"),
        ([*TABLE, "--data.mixture.weights={en = 1}"], "data.mixture.weights lacks 'de'; it must"),
        ([*TABLE, "--data.mixture.weights={en = 1, de = 1, fr = 1}"], "weights names 'fr'; it"),
        ([*TABLE, "--data.mixture.weights={en = 1, de = -1}"], "data.mixture.weights has de=-1.0;"),
        ([*TABLE, "--data.mixture.weights={en = 0, de = 0}"], "mixture.weights has only zeros"),
        ([*TABLE, "--data.mixture.weights={en = 1, de = 1}", "--data.mixture.cap=5"],
         "data.mixture.cap=5 would be ignored because data.mixture.weights gives the shares"),
        ([*TABLE, "--data.mixture.weights.en=x", "--data.mixture.weights.de=1"],
         "data.mixture.weights.en='x' is wrong: Input should be a valid number"),
        (["--data.train=3"], "data.train=3 is wrong: Input should be a valid"),
        (["--data.train.en=3"], "data.train.en=3 is wrong: Input should be a valid string"),
        (["--data.loader_threads=9", "--data.prefetch_batches=8"],
         "data.loader_threads=9 must not exceed data.prefetch_batches=8"),
    ],
)  # fmt: skip
def test_mistakes_in_the_sources_are_explained(options, message):
    (problem,) = problems(*options)
    assert message in problem
