"""Every method that is served, against PEFT: a file it wrote, read by us, gives its outputs.

Each module of the model is asked for its whole function: a linear by the unit matrix, the embedding
by every token. Modules that an adapter leaves alone are compared as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfold.adapters.base import (
    EMBEDDING,
    HEAD,
    Adapter,
    Base,
    EmbedLowRank,
    EmbedRows,
    HeadReplace,
    LowRank,
    OutBias,
    OutScale,
    Site,
)
from kvfold.adapters.peft_files import METHODS, Limits, load
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

peft = pytest.importorskip("peft")

pytestmark = [
    # Said of every model that PEFT wraps.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning"),
    # PEFT 0.21 takes the bias of B for a factor of one dimension.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOCK = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}
BLOCK["mlp"] = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "up_proj", "down_proj"]
"""Square, wide and tall."""


def llama() -> nn.Module:
    """An own head; biases beside all of attention."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False))


def qwen2() -> nn.Module:
    """A tied head; biases beside q, k and v."""
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))


MODELS = {"llama": llama, "qwen2": qwen2}


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": SOME, **fields})


CASES: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora(target_modules=LINEAR),
    "one-linear": lambda: lora(target_modules=["v_proj"]),
    "full-path": lambda: lora(target_modules=["model.layers.1.mlp.up_proj"]),
    "regex": lambda: lora(target_modules=r".*\.[02]\..*(q|down)_proj"),
    "all-linear": lambda: lora(target_modules="all-linear"),
    "excluded": lambda: lora(target_modules=LINEAR, exclude_modules=["layers.1.mlp.up_proj"]),
    "rslora": lambda: lora(use_rslora=True),
    "patterns": lambda: lora(
        target_modules=ATTENTION,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r".*\.1\..*v_proj": 6},
        alpha_pattern={"model.layers.0.self_attn.v_proj": 32, "^model.layers.2.*": 3},
    ),
    "layers": lambda: lora(layers_to_transform=[0, 2]),
    "layer-pattern": lambda: lora(layers_to_transform=1, layers_pattern="layers"),
    "lora-bias": lambda: lora(target_modules=["q_proj", "k_proj"], lora_bias=True),
    "bias-lora-only": lambda: lora(bias="lora_only"),
    "bias-all": lambda: lora(bias="all"),
    "dora": lambda: lora(target_modules=LINEAR, use_dora=True),
    "dora-rslora-bias": lambda: lora(use_dora=True, use_rslora=True, bias="all"),
    "embedding": lambda: lora(target_modules=["embed_tokens", "k_proj"]),
    "head": lambda: lora(target_modules=["lm_head"]),
    "dora-head": lambda: lora(target_modules=["lm_head"], use_dora=True),
    "tables": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "tables-tied": lambda: lora(
        target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "saved-embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved-head": lambda: lora(modules_to_save=["lm_head"]),
    "saved-tables": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "rows": lambda: lora(trainable_token_indices=[41, 3, 96]),
    "rows-apart": lambda: lora(trainable_token_indices={"embed_tokens": [5, 2], "lm_head": [7]}),
    "trainable-tokens": lambda: peft.TrainableTokensConfig(token_indices=[41, 3, 96]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa-dora": lambda: lora(init_lora_weights="pissa", use_dora=True),
    "olora": lambda: lora(init_lora_weights="olora", use_rslora=True),
    "kasa": lambda: lora(kasa_config=peft.tuners.lora.KasaConfig()),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=5, target_r=3, total_step=10, lora_alpha=6, target_modules=SOME
    ),
    "vera": lambda: peft.VeraConfig(r=7, target_modules=SOME),
    "loha": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=SOME, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9}
    ),
    "lokr-dense": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=SOME),
    "lokr-half": lambda: peft.LoKrConfig(r=2, alpha=5, decompose_factor=2, target_modules=SOME),
    "lokr-both": lambda: peft.LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=SOME),
    "unilora": lambda: peft.UniLoraConfig(
        r=3, theta_d_length=101, proj_seed=7, target_modules=[*SOME, "lm_head"]
    ),
    "miss": lambda: peft.MissConfig(r=5, target_modules=SOME),
    "miss-mini": lambda: peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=SOME),
}


def modules(model: nn.Module) -> dict[Site, nn.Module]:
    """Every site's module, which PEFT may have wrapped."""
    decoder = model.get_submodule("model")
    found = {Site(None, EMBEDDING): decoder.embed_tokens, Site(None, HEAD): model.lm_head}
    for i, layer in enumerate(decoder.layers):
        for block, names in BLOCK.items():
            found |= {Site(i, n): layer.get_submodule(f"{block}.{n}") for n in names}
    return found


def frozen(model: nn.Module) -> Base:
    """A copy of what the adapter is for, since some methods change it as they begin."""
    held = modules(model)
    weights = {site: m.weight.detach().clone() for site, m in held.items()}
    biases = {
        site: None if getattr(m, "bias", None) is None else m.bias.detach().clone()
        for site, m in held.items()
    }
    return Base(
        fingerprint="tiny",
        shapes={site: tuple(weight.shape) for site, weight in weights.items()},
        ties_embeddings=model.config.tie_word_embeddings,
        weight=weights.__getitem__,
        bias=biases.__getitem__,
    )


def probe(site: Site, module: nn.Module, base: Base) -> Tensor:
    """Outputs for every unit vector, or for every token."""
    out, width = base.shapes[site]
    with torch.no_grad():
        found = module(torch.arange(out) if site.name == EMBEDDING else torch.eye(width))
    assert isinstance(found, Tensor)
    return found


def expected(site: Site, base: Base, adapter: Adapter | None) -> Tensor:
    """The same outputs by the formula of `kvfold.adapters.base`."""
    operators = adapter.sites.get(site, ()) if adapter else ()
    weight = base.weight(site)
    if site.name == EMBEDDING:
        y = weight.clone()
        for op in operators:
            if isinstance(op, EmbedRows):
                y[op.ids] = op.rows
            else:
                assert isinstance(op, EmbedLowRank)
                y = y + op.scale * (op.b @ op.a).T
        return y
    bias = base.bias(site)
    y = weight.T.clone()
    for op in operators:
        match op:
            case HeadReplace():
                y = op.weight.T.clone()
            case LowRank():
                added = (op.b @ op.a).T + (0.0 if op.bias is None else op.bias)
                y = y + op.scale * added
            case OutScale():
                y = y * op.scale
            case OutBias():
                bias = op.bias if bias is None else bias + op.bias
    return y if bias is None else y + bias


def trained(model: nn.Module, config: Any) -> Any:
    """A PEFT model whose every trained number was moved at random."""
    wrapped = peft.get_peft_model(model, config).eval()
    move(wrapped)
    return wrapped


def move(wrapped: Any) -> None:
    """What was begun with zeros hides mistakes."""
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


def compare(wrapped: Any, base: Base, adapter: Adapter) -> None:
    moved = 0.0
    for site, module in modules(wrapped.get_base_model()).items():
        theirs, plain = probe(site, module, base), expected(site, base, None)
        ours = expected(site, base, adapter)
        error = (theirs - ours).abs().max().item()
        assert error <= 1e-5, f"{site.path}: {error:.3g}"
        is_changed = bool((theirs - plain).abs().max() > 1e-5)
        assert is_changed == (site in adapter.sites), site.path
        moved = max(moved, (theirs - plain).abs().max().item())
    assert moved > 1e-2, "the adapter does nothing, so equality proves nothing"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_peft(model: nn.Module, case: str, tmp_path: Path):
    base = frozen(model)
    wrapped = trained(model, CASES[case]())
    wrapped.save_pretrained(tmp_path / "it")
    compare(wrapped, base, load(tmp_path, "it", base, Limits()))


def test_adalora_keeps_the_scale_of_its_initial_rank_when_pruned(model: nn.Module, tmp_path: Path):
    base = frozen(model)
    wrapped = trained(model, CASES["adalora"]())
    kept = [True, False, True, True, False]
    names = [name for name, _ in wrapped.named_parameters() if ".lora_E." in name]
    for name in names:
        with torch.no_grad():
            wrapped.get_parameter(name)[~torch.tensor(kept)] = 0.0
    pattern = {name.removeprefix("base_model.model."): kept for name in names}
    wrapped.peft_config["default"].rank_pattern = pattern
    wrapped.save_pretrained(tmp_path / "it")
    adapter = load(tmp_path, "it", base, Limits())
    assert set(adapter.ranks.values()) == {sum(kept)}
    compare(wrapped, base, adapter)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_that_peft_converted_are_plain_lora(model: nn.Module, init: str, tmp_path: Path):
    base = frozen(model)
    wrapped = peft.get_peft_model(model, lora(init_lora_weights=init)).eval()
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "begun")
    wrapped.peft_config["default"].init_lora_weights = init
    move(wrapped)
    wrapped.save_pretrained(
        tmp_path / "it", path_initial_model_for_weight_conversion=str(tmp_path / "begun")
    )
    adapter = load(tmp_path, "it", base, Limits())
    assert set(adapter.ranks.values()) == {8}
    compare(wrapped, base, adapter)


def test_every_method_has_a_case():
    assert {str(make().peft_type.value) for make in CASES.values()} == set(METHODS)
