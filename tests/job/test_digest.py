from typing import Any

import pytest

from dptrain.job.digest import JobDigest, digest_job
from dptrain.job.load import EMBEDDED, check, complete


def digests(*, decay_steps: int = 0, data: str = "d", model: str = "", start: str = "", **changes: Any) -> JobDigest:
    """The digests of the embedded job with some keys, "section__key", changed."""
    content: dict[str, Any] = {name: dict(part) if isinstance(part, dict) else part for name, part in EMBEDDED.items()}
    for path, value in changes.items():
        *sections, key = path.split("__")
        at = content
        for section in sections:
            at[section] = dict(at.get(section, {}))
            at = at[section]
        at[key] = value
        if path in ("train__steps", "train__epochs"):
            at.pop("epochs" if key == "steps" else "steps", None)
    return digest_job(complete(check(content, "x")), data=data, model=model, start=start, decay_steps=decay_steps)


PLAIN = digests()
JUDGED = {"train__stop__patience": 3}

DECISIVE: list[dict[str, Any]] = [
    {"seed": 1},
    {"model__layers": [{"type": "linear", "units": 10}]},
    {"optimizer__lr": 0.375},
    {"optimizer__schedule": {"type": "constant"}},
    {"optimizer__clip_norm": 1.0},
    {"train__batch_size": 65},
    {"train__shards": 4},
    {"train__drop_last": True},
    {"train__dtype": "float64"},
    {"train__result": "best"},
    {"train__non_finite": "skip"},
    {"loss__label_smoothing": 0.1},
    {"data__validation": 0.2},
    {"data__normalise": "standard"},
    {"arithmetic__kernels": "portable"},
    {"arithmetic__products": "mkl"},
    {"arithmetic__threads": 2},
    {"data": "e"},
    {"model": "sha256:0"},
    {"start": "sha256:0"},
]

IDLE: list[dict[str, Any]] = [
    {"name": "other"},
    {"data__source": "elsewhere.npz"},
    {"data__format": "embedded"},
    {"exchange__type": "allreduce"},
    {"exchange__coordinators": 1},
    {"exchange__deadline": 3.0},
    {"output__runs": "elsewhere"},
    {"output__checkpoint_steps": 3},
    {"data__max_bytes": 1 << 30},
    {"arithmetic__accept_other": True},
    {"train__evaluate_steps": 7},
    {"train__evaluate_rows": 7},
    {"loss__metrics": ["top_k"]},
    {"loss__top_k": 2},
    {"train__stop__metric": "accuracy"},
    {"train__stop__min_delta": 0.5},
]

STOPPING: list[dict[str, Any]] = [
    {"train__epochs": 50},
    {"train__steps": 50},
    {"train__stop__patience": 3},
    {"train__stop__target": 0.1},
]


def name(change: dict[str, Any]) -> str:
    return str(next(iter(change)))


@pytest.mark.parametrize("change", DECISIVE, ids=name)
def test_what_decides_bits_changes_both(change: dict[str, Any]) -> None:
    assert digests(**change).job != PLAIN.job
    assert digests(**change).trajectory != PLAIN.trajectory


@pytest.mark.parametrize("change", IDLE, ids=name)
def test_what_decides_nothing_changes_neither(change: dict[str, Any]) -> None:
    assert digests(**change)[:2] == PLAIN[:2]


@pytest.mark.parametrize("change", STOPPING, ids=name)
def test_the_stopping_rule_changes_the_job_and_not_its_way(change: dict[str, Any]) -> None:
    assert digests(**change).job != PLAIN.job
    assert digests(**change)[1:] == PLAIN[1:]


def test_a_schedule_over_the_whole_training_changes_the_way() -> None:
    assert digests(decay_steps=100).trajectory != digests(decay_steps=200).trajectory


@pytest.mark.parametrize(
    "change",
    [
        {"train__evaluate_steps": 7},
        {"train__evaluate_rows": 7},
        {"train__stop__metric": "accuracy"},
        {"train__stop__min_delta": 0.5},
        {"loss__metrics": ["top_k"]},
    ],
    ids=name,
)
def test_how_it_is_evaluated_counts_where_evaluations_decide(change: dict[str, Any]) -> None:
    before, after = digests(**JUDGED), digests(**JUDGED, **change)
    assert after.job != before.job
    assert after.judging != before.judging
    assert after.trajectory == before.trajectory


def test_a_split_by_file_counts_by_what_it_holds() -> None:
    one, two = digests(data__validation="a.npz"), digests(data__validation="b.npz")
    assert one == two
    assert one != digests(data__validation="a.npz", data="e")
