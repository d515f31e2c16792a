"""The examination: same questions for all, bytes at the seal, and a run that goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from kvfold.demo.where import model_dir
from kvfold.eval.needle import Answer, Exam, Journal, Plan, compare, examine, main, table

SETTINGS = ("dense", "think prune_ratio=0.5 dtype=int8 page_size=16")
PLAN = Plan(
    model=str(model_dir()),
    device="cpu",
    dtype="bfloat16",
    length_tokens=512,
    settings=SETTINGS,
    memory_bytes=2**24,
)


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    exam = Exam(PLAN)
    return [*exam.ask("single", 5), *exam.ask("multikey", 5)]


def test_every_setting_answers_every_question(answers: list[Answer]):
    assert [(a.kind, a.setting) for a in answers] == [
        (kind, setting) for kind in ("single", "multikey") for setting in SETTINGS
    ]
    assert all(a.is_exact for a in answers)
    assert all(-1 < a.logprob < 0 for a in answers)
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].logprob != answers[1].logprob


def test_bytes_are_those_after_the_seal(answers: list[Answer]):
    dense, folded = answers[:2]
    per_token = 2 * 4 * 4 * 64 * 2
    assert dense.planned_bytes_per_token == per_token
    assert dense.cached_tokens == folded.cached_tokens > 512
    assert dense.cached_bytes == -(-dense.cached_tokens // 64) * 64 * per_token
    assert folded.cached_bytes < 0.6 * dense.cached_bytes


def test_a_run_goes_on_where_it_was_ended(answers: list[Answer], tmp_path: Path):
    path, head = tmp_path / "new" / "needle.partial.jsonl", {"commit": "a"}
    Journal(path, head).add(answers[:2])
    Journal(path, head).add(answers[2:])
    journal = Journal(path, head)
    assert journal.answers == answers
    # Nothing is left to be asked, so no worker starts.
    examine(replace(PLAN, model="nowhere"), [("single", 5), ("multikey", 5)], 1, journal)
    assert journal.answers == answers
    with pytest.raises(SystemExit, match="another plan or commit"):
        Journal(path, {"commit": "b"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--n 0", "--n is 0; it must be at least 1"),
        ("--length 100000", "--max-model-len 100,256 is beyond"),
        ("--memory-bytes 1", "--kv-cache-memory-bytes"),
        ("--model /nowhere", "/nowhere"),
        ("--setting thnk", "did you mean think"),
        ("--setting=think,prune_ratio", "'prune_ratio' must be name=value"),
        ("--setting=think,prune_ratio=2", "prune_ratio: 2 must be in [0, 1)"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, says: str
):
    words = [word.replace(",", " ") for word in arguments.split()]
    monkeypatch.setattr("sys.argv", ["needle", "--device", "cpu", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert says in capsys.readouterr().err


def test_settings_are_compared_document_by_document(answers: list[Answer]):
    dense, folded = answers[:2]
    folded = replace(folded, logprob=dense.logprob - 0.5)
    wrong = replace(folded, is_exact=False, tokens=(1, 2))
    told = [
        *(replace(dense, seed=seed) for seed in range(4)),
        *(replace(folded, seed=seed) for seed in (0, 1)),
        *(replace(wrong, seed=seed) for seed in (2, 3)),
        replace(dense, seed=4, is_exact=False, tokens=(3,)),
        replace(folded, seed=4),
    ]
    reference, ours = rows = compare(told, SETTINGS)
    assert reference["all"] == {"n": 5, "exact": 0.8, "loss_points": 0.0, "lost": 0, "won": 0}
    assert ours["kinds"] == {"single": ours["all"]}
    assert ours["all"] == {"n": 5, "exact": 0.6, "loss_points": 20.0, "lost": 2, "won": 1}
    assert ours["same_answers"] == 2
    assert ours["lost_nats_per_same_answer"] == pytest.approx(0.5)
    assert ours["share_of_bytes"] == pytest.approx(folded.cached_bytes / dense.cached_bytes)
    assert "| 60.0 % | 20.00 | 2 / 1 of 5 |" in table(rows)
    json.dumps(rows)
