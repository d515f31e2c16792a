"""What is refused, each for its reason: nothing is loaded in part, and nothing is left behind."""

import os
import tempfile
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.adapters.base import Site
from kvfold.adapters.peft_files import load
from kvfold.adapters.reasons import Reason
from kvfold.core.errors import NotFound, Refused

# The table below is made of it when tests are collected, which is before there are fixtures.
spec = spec_from_file_location("directories", Path(__file__).with_name("directories.py"))
assert spec is not None
assert spec.loader is not None
make = module_from_spec(spec)
spec.loader.exec_module(make)

VERA = {"vera_lambda_b": (make.HIDDEN,), "vera_lambda_d": (2,)}
SHARED = {"base_model.vera_A": (2, make.HIDDEN), "base_model.vera_B": (make.HIDDEN, 2)}
HADA = {
    f"hada_w{n}_{s}": (make.HIDDEN, 2) if s == "a" else (2, make.HIDDEN)
    for n in (1, 2)
    for s in "ab"
}
DORA = {"lora_A.weight": (2, make.HIDDEN), "lora_B.weight": (make.HIDDEN, 2)}
DORA["lora_magnitude_vector"] = (make.HIDDEN,)

REFUSED: dict[Reason, dict[str, Callable[[Any], None]]] = {
    Reason.PATH_FORBIDDEN: {
        "path-parent": make.at("../it"),
        "path-inner-parent": make.at("it/../it"),
        "path-dot": make.at("."),
        "path-empty": make.at(""),
        "path-outside": make.at("/etc"),
        "path-nul": make.at("it\0"),
        "path-link": make.at("l", lambda f: (f.parent / "l").symlink_to(f)),
        "path-file": make.at(f"it/{make.CONFIG}"),
        "config-link": make.spoilt(lambda f: make.moved(f, make.CONFIG)),
        "weights-link": make.spoilt(lambda f: make.moved(f, make.WEIGHTS)),
        "weights-pipe": make.spoilt(make.piped),
        "weights-folder": make.spoilt(make.as_folder),
    },
    Reason.PATH_NOT_FOUND: {
        "path-absent": make.at("other"),
        "weights-absent": make.spoilt(lambda f: (f / make.WEIGHTS).unlink()),
        "config-absent": make.spoilt(lambda f: (f / make.CONFIG).unlink()),
    },
    Reason.PICKLE: {
        "pickle": make.spoilt(make.pickled),
    },
    Reason.FILE_TOO_LARGE: {
        "config-too-large": make.limits(config_bytes=20),
        "weights-too-large": make.limits(file_bytes=300),
    },
    Reason.TENSOR_LIMIT: {
        "too-many-tensors": make.limits(n_tensors=7),
    },
    Reason.RANK_LIMIT: {
        "rank-too-large": make.limits(rank=1),
        "loha-rank-squared": make.both(make.method("LOHA", HADA, alpha=1), make.limits(rank=3)),
        "pissa-rank-doubled": make.both(
            make.config(init_lora_weights="pissa"), make.limits(rank=3)
        ),
    },
    Reason.BYTE_LIMIT: {
        "bytes-too-many": make.limits(nbytes=100),
    },
    Reason.CONFIG_INVALID: {
        "config-not-json": make.text(make.CONFIG, b"r: 2"),
        "config-list": make.text(make.CONFIG, b"[]"),
        "config-not-utf8": make.text(make.CONFIG, b'{"r": "\xff\xfe\xfa"}'),
        "config-repeats": make.text(make.CONFIG, b'{"r": 2, "r": 4}'),
        "config-deep": make.text(make.CONFIG, b'{"r":' + b"[" * 100_000),
        "rank-absent": make.config(r=...),
        "rank-text": make.config(r="2"),
        "rank-fraction": make.config(r=2.5),
        "rank-zero": make.config(r=0),
        "alpha-nan": make.config(lora_alpha=float("nan")),
        "alpha-infinite": make.config(lora_alpha=float("inf")),
        "alpha-huge": make.config(lora_alpha=10**400),
        "flag-text": make.config(use_rslora="yes"),
        "bias-mode": make.config(bias="some"),
        "layers-text": make.config(layers_to_transform="all"),
        "saved-text": make.config(modules_to_save="lm_head"),
        "pattern-not-object": make.config(rank_pattern=["q_proj"]),
        "pattern-value": make.config(rank_pattern={"q_proj": "2"}),
        "pattern-no-regex": make.config(rank_pattern={"q_proj(": 2}),
        "vera-bias": make.method("VERA", VERA | SHARED, bias="vera_only"),
    },
    Reason.FIELD_UNKNOWN: {
        "field-unknown": make.config(use_new_maths=True),
        "adalora-pattern": make.method(
            "ADALORA",
            {"lora_A": (2, make.HIDDEN), "lora_B": (make.HIDDEN, 2), "lora_E": (2, 1)},
            init_r=2,
            lora_alpha=1,
            alpha_pattern={"q_proj": 3},
        ),
        "field-code": make.config(auto_map={"AutoModel": "evil.Model"}),
    },
    Reason.METHOD_UNSUPPORTED: {
        "method-unknown": make.config(peft_type="NEWLORA"),
        "method-dense": make.config(peft_type="HIRA"),
        "method-prompt": make.config(peft_type="PREFIX_TUNING"),
        "method-list": make.config(peft_type=["LORA"]),
    },
    Reason.OPTION_UNSUPPORTED: {
        "alora": make.config(alora_invocation_tokens=[7, 8]),
        "arrow": make.config(arrow_config={"top_k": 2}),
        "replication": make.config(layer_replication=[[0, 1]]),
        "experts": make.config(target_parameters=["experts.up"]),
        "qalora": make.config(use_qalora=True),
        "bdlora": make.config(use_bdlora={"nblocks": 2}),
        "dora-lora-bias": make.config(use_dora=True, lora_bias=True),
        "kasa-pissa": make.config(kasa_config={"beta": 0.1}, init_lora_weights="pissa"),
        "kasa-dora": make.config(kasa_config={"beta": 0.1}, use_dora=True),
        "unilora-regex": make.method(
            "UNILORA",
            {"base_model.unilora_theta_d": (5,)},
            theta_d_length=5,
            proj_seed=1,
            target_modules=".*q_proj",
        ),
        "init-unknown": make.config(init_lora_weights="new"),
        "dora-embedding": make.both(
            make.config(use_dora=True),
            make.tensor(make.EMBEDDING, "lora_embedding_A", (2, make.VOCAB)),
        ),
        "miss-bat": make.method("MISS", {"miss_block": (4, 2, 2)}, mini_r=1, init_weights="bat"),
        "vera-embedding": make.both(
            make.method("VERA", SHARED), make.tensor(make.EMBEDDING, "vera_lambda_d", (2,))
        ),
    },
    Reason.INIT_CONVERSION_REQUIRED: {
        "init-corda": make.config(init_lora_weights="corda"),
        "init-loftq": make.config(init_lora_weights="loftq"),
        "init-lora-ga": make.config(init_lora_weights="lora_ga"),
        "init-sketch": make.config(init_lora_weights="pissa_niter_4"),
    },
    Reason.PATTERN_UNSAFE: {
        "pattern-nested": make.config(rank_pattern={"(a+)+b": 2}),
        "pattern-repeats": make.config(alpha_pattern={".*.*.*.*x": 2}),
        "pattern-optionals": make.config(alpha_pattern={".?" * 50: 2}),
        "pattern-branches": make.config(alpha_pattern={"(.|.)" * 40: 2}),
        "pattern-backreference": make.config(alpha_pattern={r"(.*)\1": 2}),
        "pattern-long": make.config(alpha_pattern={"q" * 300: 2}),
        "pattern-many": make.config(alpha_pattern={f"q{i}": 2 for i in range(5000)}),
    },
    Reason.WEIGHTS_INVALID: {
        "header-too-large": make.limits(header_bytes=20),
        "weights-empty": make.text(make.WEIGHTS, b""),
        "weights-cut": make.spoilt(lambda f: make.resaved(f, slice(0, -4))),
        "weights-trailing": make.spoilt(lambda f: make.resaved(f, more=b"1234")),
        "header-cut": make.spoilt(lambda f: make.resaved(f, slice(0, 40))),
        "header-length": make.text(make.WEIGHTS, b"\xff" * 16),
        "header-not-json": make.header("{no}"),
        "header-deep": make.header("[" * 100_000),
        "header-no-shape": make.header('{"a":{"dtype":"F32"}}'),
        "header-repeats": make.header(
            f'{{"a":{make.stored(0, 4)},"a":{make.stored(0, 4)}}}', bytes(4)
        ),
        "header-overlap": make.header(
            f'{{"a":{make.stored(0, 4)},"b":{make.stored(2, 6)}}}', bytes(6)
        ),
        "header-gap": make.header(
            f'{{"a":{make.stored(0, 4)},"b":{make.stored(8, 12)}}}', bytes(12)
        ),
        "header-shape": make.header(f'{{"a":{make.stored(0, 4, shape="[2]")}}}', bytes(4)),
        "header-negative": make.header(f'{{"a":{make.stored(0, 4, shape="[-1,-1]")}}}', bytes(4)),
        "dtype-float64": make.tensor(
            make.Q, "lora_A.weight", (2, make.HIDDEN), dtype=torch.float64
        ),
        "dtype-int32": make.tensor(make.Q, "lora_A.weight", (2, make.HIDDEN), dtype=torch.int32),
    },
    Reason.MODULE_UNKNOWN: {
        "module-unknown": make.named(f"{make.PREFIX}model.score.weight", 2, make.HIDDEN),
        "module-norm": make.named(f"{make.PREFIX}model.norm.weight", make.HIDDEN),
        "layer-unknown": make.tensor(
            Site(make.LAYERS, "q_proj"), "lora_A.weight", (2, make.HIDDEN)
        ),
    },
    Reason.MODULE_REPLACED: {
        "linear-whole": make.tensor(make.Q, "weight", (make.HIDDEN, make.HIDDEN)),
    },
    Reason.TARGET_MISMATCH: {
        "layer-left-out": make.config(target_modules=["q_proj"]),
        "layer-lost": make.both(
            make.tensor(make.Q, "lora_A.weight", None), make.tensor(make.Q, "lora_B.weight", None)
        ),
        "layers-differ": make.config(layers_to_transform=[0]),
    },
    Reason.TENSOR_MISSING: {
        "a-missing": make.tensor(make.Q, "lora_A.weight", None),
        "b-missing": make.tensor(make.Q, "lora_B.weight", None),
        "magnitude-missing": make.config(use_dora=True),
        "lora-bias-missing": make.config(lora_bias=True),
        "bias-missing": make.config(bias="lora_only"),
        "saved-missing": make.config(modules_to_save=["lm_head"]),
        "rows-missing": make.config(trainable_token_indices=[1]),
        "vera-no-projection": make.method("VERA", VERA),
        "adalora-no-values": make.method(
            "ADALORA",
            {"lora_A": (2, make.HIDDEN), "lora_B": (make.HIDDEN, 2)},
            init_r=2,
            lora_alpha=1,
        ),
    },
    Reason.TENSOR_REPEATED: {
        "tensor-repeated": make.named(f"{make.Q.path}.lora_A.weight", 2, make.HIDDEN),
    },
    Reason.TENSOR_UNUSED: {
        "magnitude-unused": make.tensor(make.Q, "lora_magnitude_vector", (make.HIDDEN,)),
        "lora-bias-unused": make.tensor(make.Q, "lora_B.bias", (make.HIDDEN,)),
        "bias-unused": make.tensor(make.Q, "base_layer.bias", (make.HIDDEN,)),
        "bias-without-base": make.both(
            make.config(bias="lora_only"),
            *(
                make.tensor(Site(i, "q_proj"), "base_layer.bias", (make.HIDDEN,))
                for i in range(make.LAYERS)
            ),
            make.tensor(make.DOWN, "base_layer.bias", (make.HIDDEN,)),
        ),
        "role-unknown": make.tensor(make.Q, "lora_C.weight", (2, 2)),
        "adapter-name-kept": make.tensor(make.Q, "lora_A.default.weight", (2, make.HIDDEN)),
        "shared-unknown": make.named("base_model.vera_A", 2, 8),
        "loha-convolution": make.method("LOHA", HADA | {"hada_t1": (2, 2, 1, 1)}, alpha=1),
    },
    Reason.SHAPE_MISMATCH: {
        "shape-in": make.tensor(make.Q, "lora_A.weight", (2, make.HIDDEN + 1)),
        "shape-out": make.tensor(make.Q, "lora_B.weight", (make.HIDDEN + 1, 2)),
        "shape-of-a-shard": make.tensor(make.Q, "lora_A.weight", (0,)),
        "head-resized": make.tensor(make.HEAD, "weight", (make.VOCAB + 1, make.HIDDEN)),
        "vera-narrow": make.method(
            "VERA", VERA | SHARED | {"base_model.vera_A": (2, make.HIDDEN - 1)}
        ),
        "lokr-sizes": make.method("LOKR", {"lokr_w1": (2, 2), "lokr_w2": (4, 3)}, alpha=1),
        "miss-columns": make.method("MISS", {"miss_block": (2, make.HIDDEN - 1)}, mini_r=1),
        "ids-too-many": make.rows([1, 2, 3]),
    },
    Reason.RANK_MISMATCH: {
        "pissa-as-wide-as-the-weight": make.both(
            make.config(init_lora_weights="pissa", r=9, target_modules=[make.Q.path]),
            lambda files: files.tensors.clear(),
            make.tensor(make.Q, "lora_A.weight", (9, make.HIDDEN)),
            make.tensor(make.Q, "lora_B.weight", (make.HIDDEN, 9)),
        ),
        "rank-of-config": make.config(r=4),
        "rank-of-pattern": make.config(rank_pattern={"q_proj": 4}),
        "rank-of-b": make.tensor(make.Q, "lora_B.weight", (make.HIDDEN, 4)),
    },
    Reason.NOT_FINITE: {
        "nan": make.value(float("nan")),
        "infinity": make.value(float("-inf")),
        "overflow": make.both(make.method("LOHA", HADA, alpha=1), make.scaled(1e30)),
        "norm-zero": make.both(
            make.config(use_dora=True, target_modules=["o_proj"]),
            lambda files: files.tensors.clear(),
            *(
                make.tensor(Site(i, "o_proj"), role, shape)
                for i in range(make.LAYERS)
                for role, shape in DORA.items()
            ),
            make.scaled(0.0),
        ),
    },
    Reason.IDS_INVALID: {
        "rows-unclaimed": make.tensor(make.EMBEDDING, make.ROWS, (1, make.HIDDEN)),
        "ids-outside": make.rows([1, make.VOCAB]),
        "ids-negative": make.rows([1, -1]),
        "ids-repeated": make.rows([1, 1]),
        "ids-bool": make.rows([True, 2]),
        "ids-text": make.rows("1, 2"),
    },
    Reason.TABLE_CONFLICT: {
        "rows-beside-table": make.both(
            make.config(trainable_token_indices=[1]),
            make.tensor(make.EMBEDDING, make.ROWS, (1, make.HIDDEN)),
            make.tensor(make.EMBEDDING, "weight", (make.VOCAB, make.HIDDEN)),
        ),
    },
    Reason.EMPTY: {
        "empty": lambda files: (files.tensors.clear(), make.config(target_modules=None)(files))[1],
    },
}


@pytest.mark.parametrize(
    ("reason", "edit"),
    [
        pytest.param(reason, edit, id=f"{reason.name.lower()}-{name}")
        for reason, cases in REFUSED.items()
        for name, edit in cases.items()
    ],
)
def test_refused_by_code_and_nothing_is_left(
    reason: Reason, edit: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = make.Files()
    edit(files)
    root, copies = tmp_path / "root", tmp_path / "copies"
    root.mkdir()
    copies.mkdir()
    files.write(root)
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    open_before = set(os.listdir("/proc/self/fd"))

    with pytest.raises((Refused, NotFound)) as caught:
        load(root, files.path, make.BASE, files.limits)

    assert caught.value.code == reason, caught.value.message
    assert isinstance(caught.value, NotFound) == (reason is Reason.PATH_NOT_FOUND)
    assert str(tmp_path) not in caught.value.message
    assert list(copies.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) <= open_before


def test_every_reason_has_a_case():
    assert REFUSED.keys() == set(Reason)
