import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dptrain.errors import JobError
from dptrain.job.load import EMBEDDED, check, complete, load_job, to_toml
from dptrain.job.spec import LAYERS, Job, plain, rebuild

FILE = """
seed = 5
[data]
source = "digits"
[model]
layers = [{ type = "linear", units = 10 }]
[optimizer]
lr = 0.25
[train]
epochs = 3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    return path


def test_each_source_is_over_the_next(path: Path) -> None:
    environ = {"DPTRAIN_OPTIMIZER__LR": "0.5", "DPTRAIN_SEED": "6", "DPTRAIN_CACHE": "/x", "OTHER": "1"}
    sets = ["optimizer.lr=0.75"]
    assert (load_job(path).optimizer.lr, load_job(path).seed) == (0.25, 5)
    assert (load_job(path, (), environ).optimizer.lr, load_job(path, (), environ).seed) == (0.5, 6)
    assert (load_job(path, sets, environ).optimizer.lr, load_job(path, sets, environ).seed) == (0.75, 6)
    assert load_job(path, sets).optimizer.momentum == 0.0
    assert load_job(path).name == "mine"
    assert load_job(path).directory == str(path.parent)


def test_overrides_are_toml_values_or_plain_text(path: Path) -> None:
    sets = ["data.shape=[8,8,1]", "train.drop_last=true", "data.source=some dir/x.npz", 'name="7"', "data.test=0"]
    job = load_job(path, sets)
    assert job.data.shape == (8, 8, 1)
    assert job.train.drop_last is True
    assert job.data.source == "some dir/x.npz"
    assert job.name == "7"
    assert job.data.test == 0.0


def test_one_length_of_training_replaces_the_other(path: Path) -> None:
    assert (load_job(path, ["train.steps=7"]).train.epochs, load_job(path, ["train.steps=7"]).train.steps) == (0, 7)
    assert load_job(path, (), {"DPTRAIN_TRAIN__STEPS": "7"}).train.epochs == 0
    both = load_job(path, ["train.epochs=2"], {"DPTRAIN_TRAIN__STEPS": "7"}).train
    assert (both.epochs, both.steps) == (2, 0)


BAD = [
    ("train.shards=0", "--set train.shards: ", "a number greater than or equal to 1", "0"),
    ("train.shards=-1", "train.shards", "a number greater than or equal to 1", "-1"),
    ("train.shards=2.5", "train.shards", "a valid integer", "2.5"),
    ("train.shards=65", "train.shards", "at most train.batch_size = 64", "65"),
    ("optimizer.lr=nan", "optimizer.lr", "a finite number", "nan"),
    ("optimizer.lr=inf", "optimizer.lr", "a finite number", "inf"),
    ("optimizer.lr=-1", "optimizer.lr", "a number greater than 0", "-1"),
    ("optimizer.lr=fast", "optimizer.lr", "a valid number", "'fast'"),
    ("optimizer.type=sdg", "optimizer.type", "'sgd', 'adam' or 'adamw'", "'sdg'"),
    ("optimizer.nesterov=1", "optimizer.nesterov", "true or false", "1"),
    ("optimizer.nesterov=true", "optimizer.nesterov", "a momentum above 0", "optimizer.momentum = 0.0"),
    ("optimizer.schedule=3", "optimizer.schedule", "a table", "3"),
    ("optimizer.schedule.gamma=1.5", "optimizer.schedule.gamma", "a number less than or equal to 1", "1.5"),
    ("train=3", "--set train: train", "a table", "3"),
    ("train.epochs=0", "train.epochs and train.steps", "exactly one of them above 0", "epochs = 0, steps = 0"),
    ("seed=-1", "seed", "a number greater than or equal to 0", "-1"),
    ("seed=9223372036854775808", "seed", "a number less than 9223372036854775808", "9223372036854775808"),
    ("data.validation=1.0", "data.validation", "a number less than 1", "1.0"),
    ("data.shape=[8,0]", "data.shape[1]", "a number greater than or equal to 1", "0"),
    ("data.classes=1979-05-27", "", "numbers, strings, booleans, lists and tables", "1979"),
    ("model.layers=3", "model.layers", "a list", "3"),
    ("model.layers=[3]", "model.layers[0].type", "one of avg_pool2d", "3, not a table"),
    ('model.layers=[{type="liner"}]', "model.layers[0].type", "one of avg_pool2d", "'liner'"),
    ('model.layers=[{type="linear"}]', "model.layers[0].units", "this key", "nothing"),
    ('model.layers=[{type="linear",units=0}]', "model.layers[0].units", "greater than or equal to 1", "0"),
    ('model.layers=[{type="conv2d",channels=1,padding="x"}]', "[0].padding", "a valid integer or 'same'", "'x'"),
    ("model.options={a=[1]}", "model.options.a", "true or false or a valid integer or", "[1]"),
    ('model.python="m.py:f"', "model", "either model.layers or model.python", "both"),
    ("model.layers=[]", "model", "either model.layers or model.python", "neither"),
    ("train.result=best;data.validation=0", "train.result = best", "a validation part", "data.validation = 0"),
    ("train.stop.patience=2;data.validation=0", "train.stop", "a validation part", "data.validation = 0"),
    ("directory=x", "directory", "a key of the job", "'directory'"),
    ("seed.x=1", "seed.x", "seed to be a table", "5"),
    ("seed", "--set seed", "key=value", "'seed'"),
]


@pytest.mark.parametrize(("sets", "where", "expected", "found"), BAD, ids=[case[0] for case in BAD])
def test_a_bad_value_is_one_sentence(path: Path, sets: str, where: str, expected: str, found: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(path, sets.split(";"))
    error = caught.value
    assert where in error.where
    assert expected in error.expected
    assert found in error.found
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("sets", "key", "suggestion"),
    [
        ("optimizer.learning=1", "optimizer.learning", "remove it"),
        ("train.epoch=1", "train.epoch", "'epochs'"),
        ("train.Epochs=1", "train.Epochs", "'epochs'"),
        ("Model=1", "Model", "'model'"),
        ("trian.epochs=1", "trian", "'train'"),
        ("optimizer.schedule.warm_up=1", "optimizer.schedule.warm_up", "'warmup_steps'"),
        ('model.layers=[{type="linear",unit=3}]', "model.layers[0].unit", "'units'"),
        ('model.layers=[{type="relu",rate=3}]', "model.layers[0].rate", "remove it"),
    ],
)
def test_an_unknown_key_is_refused_with_what_may_be_meant(path: Path, sets: str, key: str, suggestion: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(path, [sets])
    assert caught.value.where.endswith(f": {key}")
    assert caught.value.found == f"unknown key {key.rpartition('.')[2]!r}"
    assert suggestion in caught.value.cure
    allowed = caught.value.expected.removeprefix("one of the keys ").split(", ")
    assert "directory" not in allowed
    assert suggestion.strip("'") in allowed or suggestion == "remove it"


def test_the_place_is_where_the_value_came_from(path: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^environment variable DPTRAIN_TRAIN__SHARDS: train.shards: "):
        load_job(path, (), {"DPTRAIN_TRAIN__SHARDS": "0"})
    with pytest.raises(JobError, match=r"^environment variable DPTRAIN_TRIAN__SHARDS: "):
        load_job(path, (), {"DPTRAIN_TRIAN__SHARDS": "1"})
    path.write_text(FILE.replace("seed = 5", "seed = 5.5"))
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert caught.value.where == f"{path}: seed"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"seed = ", "valid TOML"), (b"\xff\xfe", "UTF-8 text"), (b"seed = 1\nseed = 2", "valid TOML")],
)
def test_a_file_that_is_no_toml_is_refused(path: Path, content: bytes, expected: str) -> None:
    path.write_bytes(content)
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert str(path) in caught.value.where
    assert caught.value.expected == expected


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="found no such file"):
        load_job(tmp_path / "none.toml")
    with pytest.raises(JobError, match="expected a readable TOML file"):
        load_job(tmp_path)


def test_the_embedded_job_is_as_if_it_were_a_file(tmp_path: Path) -> None:
    job = load_job(None)
    assert job == complete(check(EMBEDDED, "embedded"))
    (tmp_path / "digits.toml").write_text(to_toml(job))
    again = load_job(tmp_path / "digits.toml")
    assert rebuild(Job, {**plain(again), "directory": "."}) == job
    assert load_job(None, ["seed=3"]).seed == 3
    assert load_job(None).seed == 0


def test_shards_default_to_eight_or_the_batch() -> None:
    assert load_job(None).train.shards == 8
    assert load_job(None, ["train.batch_size=5"]).train.shards == 5


def test_an_object_as_the_model_needs_none_in_the_job_and_refuses_another() -> None:
    content = {"train": {"steps": 1}}
    assert complete(check(content, "x"), own_model=True).model.layers == ()
    with pytest.raises(JobError, match="no model in the job beside the object"):
        complete(check(EMBEDDED, "x"), own_model=True)


finite = st.floats(1e-6, 1e6)
text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


def layer(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """A layer of a kind with its required keys and perhaps others."""
    units = st.integers(1, 9)
    keys: dict[str, Any] = {
        "linear": {"units": units, "bias": st.booleans()},
        "conv2d": {"channels": units, "padding": st.integers(0, 2) | st.just("same")},
        "embedding": {"vocabulary": units, "units": units},
        "dropout": {"rate": st.floats(0, 0.99)},
        "batch_norm": {"momentum": st.floats(0.01, 1.0)},
    }
    return st.fixed_dictionaries({"type": st.just(kind), **keys.get(kind, {})})


jobs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, (1 << 63) - 1),
        "name": text,
        "data": st.fixed_dictionaries(
            {
                "features": st.lists(text, max_size=3),
                "shape": st.lists(st.integers(1, 9), max_size=3),
                "validation": st.floats(0.01, 0.99) | text.filter(bool),
                "scale": finite,
            }
        ),
        "model": st.fixed_dictionaries(
            {"layers": st.lists(st.sampled_from(sorted(LAYERS)).flatmap(layer), min_size=1, max_size=4)}
        )
        | st.fixed_dictionaries(
            {
                "python": st.just("a b.py:f"),
                "options": st.dictionaries(text, st.booleans() | st.integers(-(1 << 62), 1 << 62) | finite | text),
            }
        ),
        "loss": st.fixed_dictionaries({"class_weights": st.lists(finite, max_size=3)}),
        "optimizer": st.fixed_dictionaries({"lr": finite, "momentum": st.floats(0, 0.99)}),
        "train": st.fixed_dictionaries(
            {
                "batch_size": st.integers(3, 99),
                "shards": st.none() | st.integers(1, 3),
                "steps": st.integers(1, 9),
                "stop": st.fixed_dictionaries({"target": st.none() | st.floats(-9, 9)}),
            }
        ),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=jobs)
def test_a_job_survives_its_plain_data_and_its_file(content: dict[str, Any], tmp_path: Path) -> None:
    job = complete(check(content, "x"))
    assert rebuild(Job, plain(job)) == job
    assert rebuild(Job, json.loads(json.dumps(plain(job)))) == job
    path = tmp_path / "again.toml"
    path.write_text(to_toml(job))
    again = load_job(path)
    assert rebuild(Job, {**plain(again), "directory": job.directory}) == job


def test_equality_of_jobs_can_fail() -> None:
    job = load_job(None)
    changed = plain(job)
    changed["model"]["layers"][0]["units"] += 1
    assert rebuild(Job, changed) != job
    assert not math.isnan(job.optimizer.lr)
