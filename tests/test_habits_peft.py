"""Adapters of peft, put into a model before it is rewired and into a rewired one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewire
from benchmarks.outcomes import AsOriginal
from rewire.rewriting import is_rewired
from rewire.tape import watch_repeats
from tests.exactness import as_found, assert_same_bits
from tests.test_habits_timm import assert_close, assert_exact, stepping
from tests.test_habits_transformers import in_float64, inputs, loss_of, made, rewired

peft = pytest.importorskip("peft")

WHERE = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "dense"],
    "vit": ["q_proj", "v_proj", "fc1"],
}
ORDERS = ["before", "after"]


def adapted(name: str, model: nn.Module, **options: Any) -> Any:
    """With adapters that do something, the same ones each time."""
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=WHERE[name], lora_dropout=0.2, **options)
    model = peft.get_peft_model(model, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    return model.to(next(model.parameters()).dtype).train()


def both(name: str, order: str, **options: Any) -> Any:
    """Adapted and rewired, adapters put in before or after."""
    if order == "before":
        model = adapted(name, made(name))
        return rewire.make_reversible(model, inputs(name), check="raise", **options)
    return adapted(name, rewired(name, **options))


@pytest.mark.parametrize(
    ("name", "order"),
    [("llama", "before"), ("llama", "after"), ("bert", "before"), ("vit", "after")],
)
def test_gradients_of_adapters(name: str, order: str) -> None:
    rev = both(name, order)
    assert_exact(rev, loss_of(inputs(name)))
    trained = {key for key, p in rev.named_parameters() if p.grad is not None}
    assert {key for key, p in rev.named_parameters() if p.requires_grad} == trained
    assert all(".lora_" in key or "classifier" in key for key in trained)
    with watch_repeats() as seen:
        rev(**inputs(name))
    assert len(seen) >= 4


@pytest.mark.parametrize("order", ORDERS)
def test_under_the_originals_coupling(order: str) -> None:
    model = adapted("llama", made("llama"))
    rev = both("llama", order, coupling=AsOriginal())
    assert list(rev.state_dict()) == list(model.state_dict())
    rev.load_state_dict(model.state_dict())
    batch = in_float64(inputs("llama"))
    assert_close(rev.double(), model.double(), lambda m: m(**batch).logits)


def test_adapters_for_a_model_that_has_run() -> None:
    """Children of its homes are replaced; what was traced and learnt before is not used."""
    rev = rewired("bert")
    loss_of(inputs("bert"))(rev).backward()
    assert_exact(adapted("bert", rev), loss_of(inputs("bert")))


@pytest.mark.parametrize(("name", "order"), [("llama", "before"), ("bert", "after")])
def test_merging(name: str, order: str) -> None:
    """What comes out is rewired still, has the original's keys, and gives what it gave."""
    rev = both(name, order).eval()
    batch = inputs(name)
    before = rev(**batch).logits
    merged = rev.merge_and_unload()
    assert list(merged.state_dict()) == list(made(name).state_dict())
    torch.testing.assert_close(merged(**batch).logits, before, rtol=1e-4, atol=1e-5)
    other = made(name)
    other.load_state_dict(merged.state_dict())
    expected = rewired(name, other).eval()(**batch).logits
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    for parameter in merged.parameters():
        parameter.requires_grad_()
    assert_exact(merged.train(), loss_of(batch))


def test_adapters_turned_off() -> None:
    rev = both("llama", "after").eval()
    batch = inputs("llama")
    adapted_logits = rev(**batch).logits
    with rev.disable_adapter():
        plain = rev(**batch).logits
        torch.testing.assert_close(plain, rewired("llama").eval()(**batch).logits)
    assert not torch.allclose(plain, adapted_logits, atol=1e-3)
    assert torch.equal(rev(**batch).logits, adapted_logits)


def test_saved_adapters(tmp_path: Path) -> None:
    """Trained on a rewired model, loaded into a fresh one that is rewired then."""
    rev = both("llama", "after").eval()
    rev.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(made("llama"), str(tmp_path))
    again = rewire.make_reversible(back, inputs("llama")).eval()
    batch = inputs("llama")
    assert torch.equal(again(**batch).logits, rev(**batch).logits)


def test_checkpointing_changes_no_bit() -> None:
    rev = both("llama", "after")
    step = stepping(rev, loss_of(inputs("llama")))
    with as_found(rev):
        expected = step()
    rev.activation_checkpointing_enable()
    rev.enable_input_require_grads()
    assert_same_bits(step(), expected)


def test_a_wrapped_rewired_model_is_not_rewired_again() -> None:
    rev = both("llama", "after")
    assert is_rewired(rev)
    with pytest.raises(rewire.RewireError, match="rewired already"):
        rewire.make_reversible(rev, inputs("llama"))


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_merged_can_be_checked(order: str) -> None:
    merged = both("llama", order).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_()
    verdict = rewire.verify(merged, **inputs("llama"))
    assert verdict.passed, str(verdict)
